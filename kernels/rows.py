"""Rows of classes that lie in memory in any way: how they are numbered, found, read and written, a tile of them at a time.

Tensors are (N, C, A, B), with a row of C classes at each of the positions (N, A, B); rows are numbered in that order. A tile is
of ROWS rows by BLOCK_C classes. How they lie is compiled for, and with it the order of a tile's axes:
    "classes"  of a row lie side by side, and a warp reads along them, in vectors
    "rows"     lie side by side, as in contiguous maps: a thread has all that a tile has of its rows, and a warp reads along them
    "run"      a tile is one run, as in channels-last maps of 21 classes, an odd number that aligns no row: it is read in vectors
               from its beginning to its end, and turned, in shared memory, so that a thread has a row
Axes of the rows that are one run for every tensor are one, so that a row's place takes a division only where it must.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """How a launch reads and writes, known at compile time.

    `axes` of the rows are left when those that are one run are one. Vectors lie `along` "classes", "rows" or a "run", and have
    `align` elements, of which every size, stride and address is a multiple. Where a block has all classes of a row, the first
    `least` exist, and none after the first `most`, which is else 0.
    """

    axes: int
    along: str
    align: int
    least: int
    most: int


@triton.jit
def rows_at(first, shape, ROWS: tl.constexpr, TURNS: tl.constexpr, TILE: tl.constexpr):
    """The rows of TURNS tiles: their numbers, which exist, and their places along N, A and B; a line, or a column of each tile
    where a warp goes along the classes."""
    rows, _, size_a, size_b = shape
    ALIGN: tl.constexpr = TILE.align if TILE.along == "rows" else 1
    # The launcher has checked the alignment. Rounding to it changes nothing, and lets the compiler see it.
    size_b, rows = size_b // ALIGN * ALIGN, rows // ALIGN * ALIGN
    r = tl.arange(0, ROWS)
    r = first + (
        r[:, None] + ROWS * tl.arange(0, TURNS)[None, :] if TILE.along == "classes" else r[None, :]
    )
    # A tile of one row is there for it.
    exists = r >= first if ROWS * TURNS == 1 else r < rows
    if TILE.axes == 1:
        return r, exists, (0, 0, r)
    elif TILE.axes == 2:
        return r, exists, (0, r // size_b, r % size_b)
    else:
        return r, exists, (r // size_b // size_a, r // size_b % size_a, r % size_b)


@triton.jit
def of_rows(ptr, place, strides, ALIGN: tl.constexpr, TILE: tl.constexpr):
    """Pointers to one number a row, or to its first class; strides that `align` divides are rounded to ALIGN."""
    stride_b = 1 if TILE.along == "rows" and ALIGN > 1 else strides[2] // ALIGN * ALIGN
    offset = place[2].to(tl.int64) * stride_b
    if TILE.axes > 1:
        offset += place[1].to(tl.int64) * (strides[1] // ALIGN * ALIGN)
    if TILE.axes > 2:
        offset += place[0].to(tl.int64) * (strides[0] // ALIGN * ALIGN)
    return ptr + offset


@triton.jit
def classes_at(start, classes, BLOCK_C: tl.constexpr, TILE: tl.constexpr):
    """The classes of a block, and which exist: a column, or a line where a warp goes along them."""
    c = start + tl.arange(0, BLOCK_C)
    c = c[None, :] if TILE.along == "classes" else c[:, None]
    known = c < (classes // TILE.align * TILE.align if TILE.along == "classes" else classes)
    if TILE.most:
        # Most need no comparison.
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
    """Where a run's elements are, a vector a line, and which vectors exist; of one that does not they are the first's."""
    vector, i = (
        tl.arange(0, ROWS * BLOCK_C // TILE.align)[:, None],
        tl.arange(0, TILE.align)[None, :],
    )
    exists = vector < tl.minimum(shape[0] - first, ROWS).to(tl.int32) * shape[1] // TILE.align
    return TILE.align * tl.where(exists, vector, 0) + i, exists


@triton.jit
def read(
    ptr, strides, first, place, c, mask, shape, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The logits of a tile, -inf where the mask says there is none; those of a run are undefined there."""
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
    ptr, strides, first, place, c, mask, shape, value, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Writes a tile of logits as `read` reads it."""
    if TILE.along == "run":
        k, exists = _run(first, shape, ROWS, BLOCK_C, TILE)
        # k // classes, of numbers so small.
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
    """The rows of a launch's tensors without their data: sizes of N, A and B, and each tensor's strides along them.

    Axes that are one run for every tensor are one, the last; those before it have size 1.
    """

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def axes(self) -> int:
        return max((3 - axis for axis, size in enumerate(self.sizes) if size > 1), default=1)

    def is_run(self, i: int, length: int) -> bool:
        """Whether the rows of a tensor, each of that length, lie one after the other."""
        for size, stride in zip(reversed(self.sizes), reversed(self.strides[i])):
            if size > 1 and stride != length:
                return False
            length *= size
        return True


def rows_of(sizes: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> Rows | None:
    """Joins the axes of the rows as far as all the tensors' strides allow; None where more than three are left."""
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
    """The strides along the rows of z, (N, C, ...), of what has one number in all, a sample or a row."""
    given = t.stride() if isinstance(t, torch.Tensor) else ()
    return (*given, *(0,) * (z.ndim - 1 - len(given)))


def vector_of(rows: Rows, strides_c: list[int], classes: int, along: str, most: int) -> int:
    """The width of the vectors that sizes and strides of the logits allow, up to `most`: none may reach beyond its run."""
    along_n, along_a, along_b = zip(*rows.strides[::2])
    run, inner, outer = (
        (rows.sizes[2], along_b, strides_c) if along == "rows" else (classes, strides_c, along_b)
    )
    dense, divided = all(stride == 1 for stride in inner), (run, *outer, *along_n, *along_a)
    align = most
    while align > 1 and not (dense and all(number % align == 0 for number in divided)):
        align //= 2
    return align
