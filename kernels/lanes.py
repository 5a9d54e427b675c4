"""Lanes: how the pooling kernels lay a batch of images over a GPU's threads, and read and write it.

A lane is a group of successive columns of an image, of `vector` successive channels, and streams down its rows; a tile is as
many lanes as a program has threads. Lanes are numbered along the innermost axis first, so that neighbours lie side by side in
memory whatever the sizes: no size wastes threads, or is compiled for. What is compiled for is the alignment.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import join, split
from .windows import element

# The numbers of a kernel, on none of which it is specialised; strides follow.
NUMBERS = ["lanes", "channels", "groups", "height", "width", "out_height", "out_width", "rows"]


class Access(NamedTuple):
    """How a launch reads and writes, at compile time.

    `vector` counts the channels of a lane, more than one only where they are innermost. `dense` says whether columns are one
    after the other in memory, `columns` and `out_columns` how many of an input and of an output are read at once then. `whole`
    says that every lane has all its columns and outputs; `small`, that no image spans 2^31 elements, so that places in it are
    counted in 32 bits; `packed`, that 16-bit numbers are taken two at a time (tiles.py).
    """

    channels_last: bool
    vector: int
    dense: bool
    columns: int
    out_columns: int
    whole: bool
    small: bool
    packed: bool


@triton.jit
def program_of(rows, rows_a_program):
    """This program's block of lanes and first row. Programs that follow each other down an image share rows in a cache."""
    chunks = tl.cdiv(rows, rows_a_program)
    return tl.program_id(0) // chunks, tl.program_id(0) % chunks * rows_a_program


@triton.jit
def lane_of(
    lanes,
    channels,
    groups,
    outputs,
    block,
    OUTPUTS: tl.constexpr,
    LANES: tl.constexpr,
    ACCESS: tl.constexpr,
):
    """Image, first channel and first of OUTPUTS outputs of every lane of a tile, and whether it exists: (LANES, 1) each.

    Lanes beyond the last do as that one does, and write nothing. If all of every lane is to be in the image, the last lane of
    a row ends where the row does, and what it shares with the lane before it is written twice, and alike.
    """
    lane = block.to(lanes.dtype) * LANES + tl.arange(0, LANES)[:, None]
    exists = lane < lanes
    lane = tl.minimum(lane, lanes - 1)
    if ACCESS.channels_last:
        vectors = channels // ACCESS.vector
        c, rest = lane % vectors * ACCESS.vector, lane // vectors
        g, n = rest % groups, rest // groups
    else:
        g, rest = lane % groups, lane // groups
        c, n = rest % channels, rest // channels
    own = g.to(tl.int32) * OUTPUTS
    if ACCESS.whole:
        own = tl.minimum(own, outputs - OUTPUTS)
    return n.to(tl.int64), c.to(tl.int64), own, exists


@triton.jit
def image_of(ptr, lane, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, strides, ACCESS: tl.constexpr):
    """A tensor as its lanes see it, STRIDE columns an output: pointers to their own in row 0; strides of rows and columns."""
    n, c, own, _ = lane
    stride_n, stride_c, stride_h, stride_w = strides
    # The launcher has checked the alignment. Rounding to it changes nothing, and lets the compiler see it.
    ALIGN: tl.constexpr = ACCESS.vector if ACCESS.channels_last else COLUMNS
    stride_n, stride_h = stride_n // ALIGN * ALIGN, stride_h // ALIGN * ALIGN
    column = own * STRIDE
    if ACCESS.channels_last:
        # Channels are one after the other where they are taken more than one at a time.
        stride_c = 1 if ACCESS.vector > 1 else stride_c
        stride_w = stride_w // ALIGN * ALIGN
    elif ACCESS.dense:
        # A width of one may come with any stride.
        column = column // ALIGN * ALIGN
        stride_c, stride_w = stride_c // ALIGN * ALIGN, 1
    start = ptr + n * stride_n + c * stride_c + column.to(tl.int64) * stride_w
    return start + tl.arange(0, ACCESS.vector)[None, :], stride_h, stride_w


@triton.jit
def place(index, stride, ACCESS: tl.constexpr):
    """Where the index-th row or column of an image is, from its first one."""
    if ACCESS.small:
        return index * stride
    else:
        return tl.cast(index, tl.int64) * stride


@triton.jit
def places_of(
    column,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    width,
    stride_w,
    W: tl.constexpr,
    ACCESS: tl.constexpr,
):
    """Where the elements that stand for a lane's columns FIRST, ... are, from its own first one, `column`."""
    places = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        if ACCESS.whole and i >= 0 and i < W.group:
            places = places + (place(i, stride_w, ACCESS),)
        else:
            places = places + (place(element(column + i, width, W) - column, stride_w, ACCESS),)
    return places


@triton.jit
def load_columns(
    image, row, places, FIRST: tl.constexpr, room, OWN: tl.constexpr, ACCESS: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """Columns FIRST, FIRST + 1, ... of a row of each lane, counted from its own first: a tile each.

    All exist, but for own ones of a lane's beyond the image's, of which there are `room`; these are -inf if read as vectors.
    """
    VECTOR: tl.constexpr = ACCESS.columns
    COUNT: tl.constexpr = len(places)
    ptr, stride_h, _ = image
    down = place(row, stride_h, ACCESS)
    columns = ()
    for i in tl.static_range(COUNT):
        if VECTOR == 1 or FIRST + i < 0 or FIRST + i >= OWN:
            columns = columns + (tl.load(ptr + down + places[i]).to(TYPE),)
        elif (FIRST + i) % VECTOR == 0:
            vector = (ptr + down + (FIRST + i))[:, :, None] + tl.arange(0, VECTOR)[None, None, :]
            if ACCESS.whole:
                tile = tl.load(vector)
            else:
                tile = tl.load(vector, mask=(room > FIRST + i)[:, :, None], other=float("-inf"))
            columns = columns + split(tile.to(TYPE), VECTOR)
    return columns


@triton.jit
def load_outputs(
    image, row, exists, before, room, W: tl.constexpr, ACCESS: tl.constexpr, ACC: tl.constexpr
):
    """A row of an output's gradient at the readers of a lane's windows, a tile each; zeros where there is no such output.

    Of a lane's own first one there are `before` outputs before it, and `room` from it on.
    """
    FIRST: tl.constexpr = W.first
    READERS: tl.constexpr = W.readers
    # A lane's own outputs are vectors if its windows are read by all of them.
    VECTOR: tl.constexpr = (
        ACCESS.out_columns if W.first <= 0 and W.first + W.readers >= W.outputs else 1
    )
    ptr, stride_h, stride_w = image
    down = place(row, stride_h, ACCESS)
    columns = ()
    for i in tl.static_range(FIRST, FIRST + READERS):
        inside = exists
        if i < 0:
            inside = inside & (before >= -i)
        if i >= W.outputs or not ACCESS.whole:
            inside = inside & (room > i)
        if VECTOR == 1 or i < 0 or i >= W.outputs:
            columns = columns + (
                tl.load(ptr + down + place(i, stride_w, ACCESS), mask=inside, other=0.0).to(ACC),
            )
        elif i % VECTOR == 0:
            vector = (ptr + down + i)[:, :, None] + tl.arange(0, VECTOR)[None, None, :]
            columns = columns + split(
                tl.load(vector, mask=inside[:, :, None], other=0.0).to(ACC), VECTOR
            )
    return columns


@triton.jit
def _store_run(
    row, columns, FIRST: tl.constexpr, COUNT: tl.constexpr, exists, room, ACCESS: tl.constexpr
):
    """Writes COUNT of a lane's columns, which are one after the other in memory."""
    i = FIRST + tl.arange(0, COUNT)[None, None, :]
    inside = exists[:, :, None]
    if not ACCESS.whole:
        inside = inside & (i < room[:, :, None])
    tile = join(columns[FIRST : FIRST + COUNT], COUNT)
    tl.store(row[:, :, None] + i, tile.to(row.dtype.element_ty), mask=inside)


@triton.jit
def store_columns(image, row, columns, exists, room, ACCESS: tl.constexpr):
    """Writes a lane's own columns of a row, of which the image has `room`."""
    OWN: tl.constexpr = len(columns)
    ptr, stride_h, stride_w = image
    to: tl.constexpr = ptr.dtype.element_ty
    down = place(row, stride_h, ACCESS)
    if ACCESS.dense and OWN < 32:
        # In runs of powers of two. A run that is no aligned vector the threads exchange, so that they write together what is
        # together, and not each its own piece of every sector of the cache.
        for log in tl.static_range(4, -1, -1):
            if OWN & (1 << log):
                _store_run(
                    ptr + down,
                    columns,
                    OWN >> (log + 1) << (log + 1),
                    1 << log,
                    exists,
                    room,
                    ACCESS,
                )
    else:
        for i in tl.static_range(OWN):
            inside = exists
            if not ACCESS.whole:
                inside = inside & (room > i)
            tl.store(ptr + down + place(i, stride_w, ACCESS), columns[i].to(to), mask=inside)
