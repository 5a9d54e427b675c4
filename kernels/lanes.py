"""Lanes: how the pooling kernels map a batch of images to threads, and read and write it.

A lane is a group of successive columns of an image, in `vector` successive channels. It streams
down the rows. A tile has one lane per thread of a program. Lanes are numbered along the innermost
axis first, so that neighbours lie side by side in memory. No size wastes threads. Kernels are
compiled for the alignment, not for sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import join, split
from .windows import element

# The integers of a kernel, before its strides. Triton does not specialise on them.
NUMBERS = ["lanes", "channels", "groups", "height", "width", "out_height", "out_width", "rows"]


class Access(NamedTuple):
    """How a launch reads and writes, known at compile time.

    `vector` is the number of channels of a lane: 1 unless channels are innermost. `dense` says
    whether columns are contiguous; then `columns` of an input and `out_columns` of an output are
    read at once. `whole` says that every lane has all its columns and outputs. `small` says that no
    image spans 2^31 elements, so that offsets in it take 32 bits. `packed` says that 16-bit numbers
    are taken two per instruction (tiles.py).
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
    """This program's block of lanes and its first row.

    Successive programs go down an image, so that they share rows in a cache.
    """
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
    """Each lane's image, first channel and first output, and whether it exists: (LANES, 1) each.

    A lane has OUTPUTS outputs. Lanes beyond the last compute what the last does and write nothing.
    With ACCESS.whole the last lane of a row ends where the row does. The columns that it shares
    with the lane before are written twice, with the same values.
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
    """A tensor with STRIDE columns per output, as lanes read or write it.

    Returns pointers to each lane's first own column in row 0, (LANES, VECTOR), and the strides of
    rows and columns.
    """
    n, c, own, _ = lane
    stride_n, stride_c, stride_h, stride_w = strides
    # The launcher has checked the alignment. Rounding changes nothing and shows it to the compiler.
    ALIGN: tl.constexpr = ACCESS.vector if ACCESS.channels_last else COLUMNS
    stride_n, stride_h = stride_n // ALIGN * ALIGN, stride_h // ALIGN * ALIGN
    column = own * STRIDE
    if ACCESS.channels_last:
        # A vector's channels are contiguous.
        stride_c = 1 if ACCESS.vector > 1 else stride_c
        stride_w = stride_w // ALIGN * ALIGN
    elif ACCESS.dense:
        # A width of 1 may have any stride.
        column = column // ALIGN * ALIGN
        stride_c, stride_w = stride_c // ALIGN * ALIGN, 1
    start = ptr + n * stride_n + c * stride_c + column.to(tl.int64) * stride_w
    return start + tl.arange(0, ACCESS.vector)[None, :], stride_h, stride_w


@triton.jit
def place(index, stride, ACCESS: tl.constexpr):
    """The offset of the index-th row or column of an image from its first."""
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
    """The offsets of a lane's columns FIRST, FIRST + 1, ... from `column`, its first own one.

    A column beyond the image has the offset of the element that stands for it.
    """
    places = ()
    for i in tl.static_range(FIRST, FIRST + COUNT):
        if ACCESS.whole and i >= 0 and i < W.group:
            places = places + (place(i, stride_w, ACCESS),)
        else:
            places = places + (place(element(column + i, width, W) - column, stride_w, ACCESS),)
    return places


@triton.jit
def load_columns(
    image, row, places, FIRST: tl.constexpr, room, OWN: tl.constexpr, ACCESS: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """A row's columns FIRST, FIRST + 1, ..., counted from a lane's first own one: a tile each.

    A lane has `room` own columns in the image. Those beyond are -inf where they are read as
    vectors; all other columns exist.
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
    """A row of the output's gradient at the readers of a lane's windows: a tile each.

    The row has `before` outputs before a lane's first own one, and `room` from that on. The
    gradient is 0 at outputs that do not exist.
    """
    FIRST: tl.constexpr = W.first
    READERS: tl.constexpr = W.readers
    # A lane's own outputs are read as vectors if all of them read its windows.
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
    """Write COUNT of a lane's columns, which are contiguous."""
    i = FIRST + tl.arange(0, COUNT)[None, None, :]
    inside = exists[:, :, None]
    if not ACCESS.whole:
        inside = inside & (i < room[:, :, None])
    tile = join(columns[FIRST : FIRST + COUNT], COUNT)
    tl.store(row[:, :, None] + i, tile.to(row.dtype.element_ty), mask=inside)


@triton.jit
def store_columns(image, row, columns, exists, room, ACCESS: tl.constexpr):
    """Write a lane's own columns of a row; the image has `room` of them."""
    OWN: tl.constexpr = len(columns)
    ptr, stride_h, stride_w = image
    to: tl.constexpr = ptr.dtype.element_ty
    down = place(row, stride_h, ACCESS)
    if ACCESS.dense and OWN < 32:
        # In runs of powers of two. Threads exchange the elements of a run that is no aligned
        # vector, so that a warp writes whole sectors of the cache at once.
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
