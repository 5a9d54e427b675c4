"""Lanes: how the pooling kernels lay a batch of images over a GPU's threads, and read and write it.

An image is (N, C, A, B, W); an axis that it has not got has extent 1. A lane is `group` successive columns of W, of `vector`
successive channels of one image; a tile is as many lanes as a program has threads. Lanes are numbered along the innermost
axis first, so that neighbours lie side by side in memory whatever the sizes: no size wastes threads, or is compiled for.

What is compiled for is the alignment. A lane's `vector` channels (innermost channels) or `group` columns (innermost columns)
are read and written at once where sizes, strides and addresses are all multiples of them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Access(NamedTuple):
    """How a launch reads and writes, known at compile time: channels a lane, and whether a lane's own columns are one vector."""

    channels_last: bool
    vector: int
    whole: bool


@triton.jit
def lane_of(lanes, channels, groups, block, LANES: tl.constexpr, ACCESS: tl.constexpr):
    """The image, first channel and group of every lane of a tile, and whether it exists: (LANES, 1) each."""
    lane = block.to(lanes.dtype) * LANES + tl.arange(0, LANES)[:, None]
    if ACCESS.channels_last:
        vectors = channels // ACCESS.vector
        c, rest = lane % vectors * ACCESS.vector, lane // vectors
        g, n = rest % groups, rest // groups
    else:
        g, rest = lane % groups, lane // groups
        c, n = rest % channels, rest // channels
    return n.to(tl.int64), c.to(tl.int64), g.to(tl.int32), lane < lanes


@triton.jit
def image_of(ptr, lane, OWN: tl.constexpr, sizes, strides, ACCESS: tl.constexpr):
    """A tensor as its lanes see it: pointers to their own first columns of row (0, 0), their groups, which lanes exist, and the
    sizes and strides of A, B and W."""
    n, c, g, exists = lane
    VECTOR: tl.constexpr = ACCESS.vector
    # The launcher has checked the alignment. Rounding to it changes nothing, and lets the compiler see it.
    ALIGN: tl.constexpr = OWN if ACCESS.whole else VECTOR
    stride_n, stride_a, stride_b = strides[0] // ALIGN * ALIGN, strides[2] // ALIGN * ALIGN, strides[3] // ALIGN * ALIGN
    stride_c, stride_w = strides[1], strides[4]
    column = g.to(tl.int64) * OWN
    if ACCESS.whole:
        # A width of one may come with any stride.
        stride_w = 1
        start = ptr + n * stride_n + c * (stride_c // ALIGN * ALIGN) + column
    elif VECTOR > 1:
        stride_w = stride_w // ALIGN * ALIGN
        start = ptr + n * stride_n + c + column * stride_w
    else:
        start = ptr + n * stride_n + c * stride_c + column * stride_w
    return start + tl.arange(0, VECTOR)[None, :], g, exists, sizes, (stride_a, stride_b, stride_w)


@triton.jit
def _row(image, a, b):
    """Pointers to row (a, b) of an image, and the lanes for which it exists."""
    ptr, _, exists, sizes, strides = image
    inside = (a >= 0) & (a < sizes[0]) & (b >= 0) & (b < sizes[1])
    return ptr + (tl.cast(a, tl.int64) * strides[0] + tl.cast(b, tl.int64) * strides[1]), exists & inside


@triton.jit
def load_column(image, a, b, w, OWN: tl.constexpr, other: tl.constexpr, ACCESS: tl.constexpr, ACC: tl.constexpr):
    """Column w, a scalar or one of each lane's, of row (a, b); beyond the image, `other`."""
    row, inside = _row(image, a, b)
    inside = inside & (w >= 0) & (w < image[3][2])
    offset = (w - image[1] * OWN).to(tl.int64) * image[4][2]
    return tl.load(row + offset, mask=inside, other=other).to(ACC)


@triton.jit
def load_columns(
    image, a, b, FIRST: tl.constexpr, COUNT: tl.constexpr, OWN: tl.constexpr, other: tl.constexpr,
    ACCESS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Columns FIRST, FIRST + 1, ... of each lane, counted from its own first: COUNT tiles; beyond the image, `other`."""
    row, inside = _row(image, a, b)
    g, size, stride = image[1], image[3][2], image[4][2]
    # OWN is a power of two and divides the width: of an aligned vector of as many columns, or of two, all exist or none.
    VECTORS: tl.constexpr = ACCESS.whole and OWN > 1
    # Two columns beside them are read at once in half precision. (Wider ones Triton would send through shared memory.)
    PAIRS: tl.constexpr = VECTORS and row.dtype.element_ty.primitive_bitwidth == 16
    if VECTORS:
        own = _load_vector(row, inside & (g * OWN < size), 0, OWN, other, ACC)
    columns = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        w = g * OWN + i
        exists = inside & (w >= 0) & (w < size)
        if VECTORS and i >= 0 and i < OWN:
            columns = columns + (own[i],)
        elif PAIRS and i % 2 == 0 and i + 1 < FIRST + COUNT:
            columns = columns + _load_vector(row, exists, i, 2, other, ACC)
        elif PAIRS and i % 2 == 1 and i > FIRST:
            # It came with the one before.
            columns = columns
        elif VECTORS:
            columns = columns + (tl.load(row + i, mask=exists, other=other).to(ACC),)
        else:
            columns = columns + (tl.load(row + tl.cast(i, tl.int64) * stride, mask=exists, other=other).to(ACC),)
    return columns


@triton.jit
def _load_vector(row, exists, first: tl.constexpr, COUNT: tl.constexpr, other: tl.constexpr, ACC: tl.constexpr):
    """Successive columns from a lane's column `first` on, read at once: COUNT tiles."""
    ptr = (row + first)[:, :, None] + tl.arange(0, COUNT)[None, None, :]
    return _split(tl.load(ptr, mask=exists[:, :, None], other=other).to(ACC), COUNT)


@triton.jit
def store_columns(image, a, b, columns, OWN: tl.constexpr, keep, ACCESS: tl.constexpr):
    """Writes a lane's own OWN columns of row (a, b) where they exist and `keep`."""
    row, inside = _row(image, a, b)
    g, size, stride = image[1], image[3][2], image[4][2]
    to = row.dtype.element_ty
    if ACCESS.whole and OWN > 1:
        ptr = row[:, :, None] + tl.arange(0, OWN)[None, None, :]
        tl.store(ptr, _join(columns, OWN).to(to), mask=(inside & keep & (g * OWN < size))[:, :, None])
    else:
        for i in tl.static_range(OWN):
            ptr = row + tl.cast(i, tl.int64) * stride
            tl.store(ptr, columns[i].to(to), mask=inside & keep & (g * OWN + i < size))


@triton.jit
def _split(tile, COUNT: tl.constexpr):
    """The COUNT slices of a tile along its last axis. (tl.split halves; what a thread holds stays where it is.)"""
    if COUNT == 2:
        return tl.split(tile)
    else:
        even, odd = tl.split(tile.reshape(tile.shape[0], tile.shape[1], COUNT // 2, 2))
        evens, odds = _split(even, COUNT // 2), _split(odd, COUNT // 2)
        slices = ()
        for i in tl.static_range(COUNT // 2):
            slices = slices + (evens[i], odds[i])
        return slices


@triton.jit
def _join(slices, COUNT: tl.constexpr):
    """The inverse of `_split`."""
    if COUNT == 2:
        return tl.join(slices[0], slices[1])
    else:
        joined = tl.join(_join(slices[0::2], COUNT // 2), _join(slices[1::2], COUNT // 2))
        return joined.reshape(joined.shape[0], joined.shape[1], COUNT)
