"""Rows of classes: how a tile of them is numbered, found, read and written.

Tensors are (N, C, A, B), with a row of C classes at each position (N, A, B), and rows are numbered
in the order of the positions. A tile is ROWS rows by BLOCK_C classes. A kernel is compiled for one
layout, which also sets the order of a tile's axes:
    "classes"  The classes of a row lie side by side. A warp reads along them, in vectors.
    "rows"     Rows lie side by side, as in contiguous maps. A warp reads along them, and a thread
               has all the tile's classes of its rows.
    "run"      A tile is one run, as in channels-last maps of 21 classes, an odd number that aligns
               no row. It is read in vectors from end to end, and transposed in shared memory, so
               that a thread has a row.
Axes of the rows that are one run in every tensor are joined, to save divisions when a row's place
is computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """How a launch reads and writes, known at compile time.

    The rows have `axes` axes after joining. Vectors lie along "classes", "rows" or a "run"
    (`along`) and have `align` elements; `align` divides all sizes, strides and addresses. Where a
    block holds all classes of a row, the first `least` classes exist, and none after the first
    `most`; else `most` is 0.
    """

    axes: int
    along: str
    align: int
    least: int
    most: int


@triton.jit
def rows_at(first, shape, ROWS: tl.constexpr, TURNS: tl.constexpr, TILE: tl.constexpr):
    """The rows of TURNS tiles: their numbers, which exist, and their places along N, A and B.

    The rows are a line, (1, ROWS), or, along "classes", a column for each tile, (ROWS, TURNS).
    """
    rows, _, size_a, size_b = shape
    ALIGN: tl.constexpr = TILE.align if TILE.along == "rows" else 1
    # The launcher has checked the alignment. Rounding changes nothing and shows it to the compiler.
    size_b, rows = size_b // ALIGN * ALIGN, rows // ALIGN * ALIGN
    r = tl.arange(0, ROWS)
    r = first + (
        r[:, None] + ROWS * tl.arange(0, TURNS)[None, :] if TILE.along == "classes" else r[None, :]
    )
    # A tile of one row always exists.
    exists = r >= first if ROWS * TURNS == 1 else r < rows
    if TILE.axes == 1:
        return r, exists, (0, 0, r)
    elif TILE.axes == 2:
        return r, exists, (0, r // size_b, r % size_b)
    else:
        return r, exists, (r // size_b // size_a, r // size_b % size_a, r % size_b)


@triton.jit
def of_rows(ptr, place, strides, ALIGN: tl.constexpr, TILE: tl.constexpr):
    """Pointers to one number per row, or to a row's first class.

    Strides are rounded to ALIGN, which divides them.
    """
    stride_b = 1 if TILE.along == "rows" and ALIGN > 1 else strides[2] // ALIGN * ALIGN
    offset = place[2].to(tl.int64) * stride_b
    if TILE.axes > 1:
        offset += place[1].to(tl.int64) * (strides[1] // ALIGN * ALIGN)
    if TILE.axes > 2:
        offset += place[0].to(tl.int64) * (strides[0] // ALIGN * ALIGN)
    return ptr + offset


@triton.jit
def classes_at(start, classes, BLOCK_C: tl.constexpr, TILE: tl.constexpr):
    """The classes of a block, and which exist: a line along "classes", else a column."""
    c = start + tl.arange(0, BLOCK_C)
    c = c[None, :] if TILE.along == "classes" else c[:, None]
    known = c < (classes // TILE.align * TILE.align if TILE.along == "classes" else classes)
    if TILE.most:
        # The first `least` need no comparison at run time.
        known = (c < TILE.least) | (c < TILE.most) & known
    return c, known


@triton.jit
def _places(ptr, strides, place, c, TILE: tl.constexpr):
    """Pointers to the logits of a tile."""
    stride_c = strides[3]
    if TILE.align > 1:
        stride_c = strides[3] // TILE.align * TILE.align if TILE.along == "rows" else 1
    return of_rows(ptr, place, strides, TILE.align, TILE) + c.to(tl.int64) * stride_c


@triton.jit
def _run(first, shape, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr):
    """The offsets of a run's elements, a vector per line, and which vectors exist.

    A vector beyond the run has the offsets of the first.
    """
    vector, i = (
        tl.arange(0, ROWS * BLOCK_C // TILE.align)[:, None],
        tl.arange(0, TILE.align)[None, :],
    )
    exists = vector < tl.minimum(shape[0] - first, ROWS).to(tl.int32) * shape[1] // TILE.align
    return TILE.align * tl.where(exists, vector, 0) + i, exists


@triton.jit
def read(
    ptr, strides, first, place, c, mask, shape, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The logits of a tile; where the mask is false -inf, or in a "run" undefined."""
    if TILE.along == "run":
        k, _ = _run(first, shape, ROWS, BLOCK_C, TILE)
        run = tl.load(ptr + tl.cast(first, tl.int64) * shape[1] + k)
        i = tl.arange(0, ROWS * BLOCK_C)
        value = tl.gather(tl.reshape(run, (ROWS * BLOCK_C,)), i % ROWS * shape[1] + i // ROWS, 0)
        return tl.reshape(value, (BLOCK_C, ROWS)).to(ACC)
    else:
        return tl.load(_places(ptr, strides, place, c, TILE), mask=mask, other=float("-inf")).to(
            ACC
        )


@triton.jit
def write(
    ptr, strides, first, place, c, mask, shape, value, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write a tile of logits to where `read` finds it."""
    if TILE.along == "run":
        k, exists = _run(first, shape, ROWS, BLOCK_C, TILE)
        # k // classes, exact for numbers this small.
        row = k * ((1 << 22) / shape[1] + 1).to(tl.int32) >> 22
        place = tl.reshape(k + row * (BLOCK_C - shape[1]), (ROWS * BLOCK_C,))
        value = tl.where(c < TILE.most, value, 0.0).to(ptr.dtype.element_ty)
        run = tl.gather(tl.reshape(tl.trans(value), (ROWS * BLOCK_C,)), place, 0)
        tl.store(
            ptr + tl.cast(first, tl.int64) * shape[1] + k, tl.reshape(run, k.shape), mask=exists
        )
    else:
        tl.store(_places(ptr, strides, place, c, TILE), value.to(ptr.dtype.element_ty), mask=mask)


class Rows(NamedTuple):
    """The rows of a launch's tensors, without data: sizes along N, A and B, and tensors' strides.

    Axes that are one run in every tensor are joined into the last ones; those before have size 1.
    """

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def axes(self) -> int:
        return max((3 - axis for axis, size in enumerate(self.sizes) if size > 1), default=1)

    def is_run(self, i: int, length: int) -> bool:
        """Whether the rows of tensor i, each of this length, lie one after the other."""
        for size, stride in zip(reversed(self.sizes), reversed(self.strides[i])):
            if size > 1 and stride != length:
                return False
            length *= size
        return True


def rows_of(sizes: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> Rows | None:
    """Join the axes of the rows where all the strides allow it; None if over three remain."""
    joined: list[list[int]] = []
    for axis, size in enumerate(sizes):
        if size == 1:
            continue
        along = [stride[axis] for stride in strides]
        if joined and all(outer == size * inner for outer, inner in zip(joined[-1][1:], along)):
            joined[-1] = [joined[-1][0] * size, *along]
        else:
            joined.append([size, *along])
    if len(joined) > 3:
        return None
    joined = [[1, *(0 for _ in strides)]] * (3 - len(joined)) + joined
    return Rows(tuple(axis[0] for axis in joined), tuple(zip(*(axis[1:] for axis in joined))))


def along_rows(t: Any, z: torch.Tensor) -> tuple[int, ...]:
    """The strides of t along the rows of z, (N, C, ...).

    t is a number, or a tensor with one number in all, per sample or per row.
    """
    given = t.stride() if isinstance(t, torch.Tensor) else ()
    return (*given, *(0,) * (z.ndim - 1 - len(given)))


def vector_of(rows: Rows, strides_c: list[int], classes: int, along: str, most: int) -> int:
    """The widest vector, up to `most`, that the logits' sizes and strides allow.

    No vector reaches beyond its run.
    """
    along_n, along_a, along_b = zip(*rows.strides[::2])
    run, inner, outer = (
        (rows.sizes[2], along_b, strides_c) if along == "rows" else (classes, strides_c, along_b)
    )
    dense, divided = all(stride == 1 for stride in inner), (run, *outer, *along_n, *along_a)
    align = most
    while align > 1 and not (dense and all(number % align == 0 for number in divided)):
        align //= 2
    return align
