"""The cross entropy of blended labels in one pass over the logits, and its gradient in another.

Logits are (N, C, A, B), with a row of C classes at each of the positions (N, A, B); rows are numbered in that order. A program
has tiles of ROWS rows by BLOCK_C classes, and goes along the classes with the maximum and the sum of exponentials so far. Which
of the two lie side by side in memory is compiled for, and with it the order of a tile's axes, so that a warp's reads are runs.
Axes of the rows that are one run for every tensor are one, so that a row's place takes a division only where it must.

Two numbers a row are kept for the backward: the maximum, and the logarithm of the sum of exponentials of differences from it. In
float32 their sum, the log-sum-exp, would lose of the small number what the large one leaves no digits for: with logits of 1e4
everything below a thousandth, and a probability is then wrong by as much.

A reduced loss is added up by each program, and then over programs by one more of its own: in an order that does not change, and
without atomics, so that two runs give the same bits. That one also has the denominators of a mean, which the backward divides by:
nobody waits for the device.

Two numbers, per logit of e bytes, and a row's 24 bytes of labels and statistics apart:
    forward    e bytes; a maximum, a subtraction, an exponential and a sum; with label smoothing a multiply-add and another sum
    backward   2 e bytes; a subtraction, a multiply-add, an exponential, a product, and for each label a comparison, a selection
               and a subtraction
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch import (
    LAUNCHES,
    Launch,
    alignment_of,
    contiguous,
    keep,
    kinds_of,
    scalar,
    strides_of,
    wide_of,
)

LOG2_E = tl.constexpr(math.log2(math.e))


class Tile(NamedTuple):
    """How a launch reads and writes, known at compile time.

    `axes` of the rows are left when those that are one run are one. A warp goes along the rows where `by_rows`, and else along
    the classes, in vectors of `align`, of which every size, stride and address is a multiple.
    """

    axes: int
    by_rows: bool
    align: int


@triton.jit
def _rows(tile, rows, sizes, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The rows of a tile: their numbers, which exist, and their places along N, A and B; a column, or a line where by_rows."""
    r = tl.cast(tile, rows.dtype) * ROWS + tl.arange(0, ROWS)
    ALIGN: tl.constexpr = TILE.align if TILE.by_rows else 1
    # The launcher has checked the alignment. Rounding to it changes nothing, and lets the compiler see it.
    size_a, size_b, rows = sizes[0], sizes[1] // ALIGN * ALIGN, rows // ALIGN * ALIGN
    r = r[None, :] if TILE.by_rows else r[:, None]
    if TILE.axes == 1:
        place = (0, 0, r)
    elif TILE.axes == 2:
        place = (0, r // size_b, r % size_b)
    else:
        place = (r // size_b // size_a, r // size_b % size_a, r % size_b)
    return r, r < rows, place


@triton.jit
def _of_rows(ptr, place, strides, ALIGN: tl.constexpr, TILE: tl.constexpr):
    """Pointers to one number a row, or to its first class; strides that `align` divides are rounded to ALIGN."""
    stride_b = strides[2] // ALIGN * ALIGN
    if TILE.by_rows and ALIGN > 1:
        stride_b = 1
    offset = place[2].to(tl.int64) * stride_b
    if TILE.axes > 1:
        offset += place[1].to(tl.int64) * (strides[1] // ALIGN * ALIGN)
    if TILE.axes > 2:
        offset += place[0].to(tl.int64) * (strides[0] // ALIGN * ALIGN)
    return ptr + offset


@triton.jit
def _class_stride(stride, TILE: tl.constexpr):
    if TILE.align == 1:
        return stride
    elif TILE.by_rows:
        return stride // TILE.align * TILE.align
    else:
        return 1


@triton.jit
def _classes(start, classes, BLOCK_C: tl.constexpr, TILE: tl.constexpr):
    """The classes of a block, and which exist: a line, or a column where by_rows."""
    c = start + tl.arange(0, BLOCK_C)
    c = c[:, None] if TILE.by_rows else c[None, :]
    if not TILE.by_rows:
        classes = classes // TILE.align * TILE.align
    return c, c < classes


@triton.jit
def _statistics(
    z, exists, classes, stride_c, weight_ptr, SMOOTHED: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Of rows that begin at z: the maximum, the log of the sum of exponentials below it and, if SMOOTHED, the weighted sum of
    every class's loss."""
    AXIS: tl.constexpr = 0 if TILE.by_rows else 1
    highest = tl.full(exists.shape, float("-inf"), ACC)
    base, total, spread = tl.zeros_like(highest), tl.zeros_like(highest), tl.zeros_like(highest)
    before = tl.cast(0.0, ACC)
    for start in range(0, classes, BLOCK_C):
        c, known = _classes(start, classes, BLOCK_C, TILE)
        value = tl.load(z + c.to(tl.int64) * stride_c, mask=known & exists, other=float("-inf")).to(ACC)
        new = tl.maximum(highest, tl.max(value, AXIS, keep_dims=True))
        # A difference of two infinities is NaN: as long as all are -inf, they are counted from 0.
        new_base = tl.where(new == float("-inf"), 0.0, new)
        total = total * _exp(highest - new_base) + tl.sum(_exp(value - new_base), AXIS, keep_dims=True)
        if SMOOTHED:
            weight = _weights(weight_ptr, c, known, ACC)
            below = tl.where(known, weight * (new_base - value), 0.0)
            spread += before * (new_base - base) + tl.sum(below, AXIS, keep_dims=True)
            if weight_ptr is None:
                before = tl.minimum(start + BLOCK_C, classes).to(ACC)
            else:
                before += tl.sum(weight)
        highest, base = new, new_base
    log_sum = tl.log(total)
    return highest, log_sum, spread + before * log_sum


@triton.jit
def _exp(x):
    # (Triton's own exp takes three instructions more, for results that are subnormal.)
    return tl.exp2(x * LOG2_E)


@triton.jit
def _weights(weight_ptr, c, known, ACC: tl.constexpr):
    """The weights of the classes c, where they are known."""
    if weight_ptr is None:
        return known.to(ACC)
    else:
        return tl.load(weight_ptr + c, mask=known, other=0.0).to(ACC)


@triton.jit
def _labels(ptr, r, exists, classes, ignore_index, weight_ptr, ACC: tl.constexpr):
    """The rows' labels, which are classes, which of them count, and their weights. One that is no class weighs NaN."""
    label = tl.load(ptr + r, mask=exists, other=0).to(tl.int64)
    counts = exists & (label != ignore_index)
    known = counts & (label >= 0) & (label < classes)
    if weight_ptr is None:
        weight = tl.where(known, 1.0, float("nan")).to(ACC)
    else:
        weight = tl.load(weight_ptr + label, mask=known, other=float("nan")).to(ACC)
    return label, known, counts, tl.where(counts, weight, 0.0)


@triton.jit
def _losses(z, labels, stride_c, statistics, classes, SMOOTHING: tl.constexpr, ACC: tl.constexpr):
    """The rows' losses for one of the two labels."""
    label, known, counts, weight = labels
    highest, log_sum, of_all = statistics
    score = tl.load(z + label * stride_c, mask=known, other=float("nan")).to(ACC)
    loss = weight * ((highest - score) + log_sum)
    if SMOOTHING > 0:
        loss = (1 - SMOOTHING) * loss + SMOOTHING / classes.to(ACC) * of_all
    return tl.where(counts, loss, 0.0)


@triton.jit
def _per_row(ptr, number, place, strides, exists, TILE: tl.constexpr, ACC: tl.constexpr):
    """One number per row where ptr is a tensor, else the number."""
    if ptr is None:
        return scalar(None, number, ACC)
    else:
        return tl.load(_of_rows(ptr, place, strides, 1, TILE), mask=exists, other=0.0).to(ACC)


# None of a kernel's numbers is specialised on.
NUMBERS = ["rows", "classes", "size_a", "size_b", "ignore_index", "z_stride_c", "dz_stride_c"]


@triton.jit(do_not_specialize=[*NUMBERS, *strides_of("z", "lam", axes="nab")])
def _forward_kernel(
    z_ptr, a_ptr, b_ptr, lam_ptr, weight_ptr, statistics_ptr, loss_ptr, sums_ptr, lam: tl.float64,
    rows, classes, size_a, size_b, ignore_index,
    z_stride_n, z_stride_a, z_stride_b, z_stride_c, lam_stride_n, lam_stride_a, lam_stride_b,
    SMOOTHING: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Shapes: z (N, classes, size_a, size_b); a, b and lam_ptr (N, size_a, size_b), a and b contiguous, lam_ptr None where lam
    is a number; weight (classes,) or None; statistics (2*rows + 2,), or (2*rows,) unless there is a mean; loss (rows,), or None
    where sums, (programs, 4), are asked for.

    This program processes tiles of ROWS rows, as many programs apart as there are. Its four sums are of the losses of a and of b,
    weighted by lam and 1 - lam, and of the weights of a and of b.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    stride_c = _class_stride(z_stride_c, TILE)
    sum_a = tl.zeros((1, ROWS) if TILE.by_rows else (ROWS, 1), ACC)
    sum_b, weight_a, weight_b = tl.zeros_like(sum_a), tl.zeros_like(sum_a), tl.zeros_like(sum_a)
    for tile in range(program, tl.cdiv(rows, ROWS).to(tl.int32), programs):
        r, exists, place = _rows(tile, rows, (size_a, size_b), ROWS, TILE)
        z = _of_rows(z_ptr, place, (z_stride_n, z_stride_a, z_stride_b), TILE.align, TILE)
        statistics = _statistics(z, exists, classes, stride_c, weight_ptr, SMOOTHING > 0, BLOCK_C, TILE, ACC)
        tl.store(statistics_ptr + r, statistics[0], mask=exists)
        tl.store(statistics_ptr + rows + r, statistics[1], mask=exists)

        share = _per_row(lam_ptr, lam, place, (lam_stride_n, lam_stride_a, lam_stride_b), exists, TILE, ACC)
        a = _labels(a_ptr, r, exists, classes, ignore_index, weight_ptr, ACC)
        b = _labels(b_ptr, r, exists, classes, ignore_index, weight_ptr, ACC)
        loss_a = share * _losses(z, a, stride_c, statistics, classes, SMOOTHING, ACC)
        loss_b = (1.0 - share) * _losses(z, b, stride_c, statistics, classes, SMOOTHING, ACC)
        if sums_ptr is None:
            tl.store(loss_ptr + r, (loss_a + loss_b).to(loss_ptr.dtype.element_ty), mask=exists)
        else:
            sum_a += loss_a
            sum_b += loss_b
            weight_a += a[3]
            weight_b += b[3]
    if sums_ptr is not None:
        sums = sums_ptr + program * 4
        tl.store(sums, tl.sum(sum_a))
        tl.store(sums + 1, tl.sum(sum_b))
        tl.store(sums + 2, tl.sum(weight_a))
        tl.store(sums + 3, tl.sum(weight_b))


@triton.jit(do_not_specialize=["programs", "rows"])
def _finish_kernel(sums_ptr, loss_ptr, statistics_ptr, programs, rows, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Shapes: sums (programs, 4), programs <= BLOCK; loss (); statistics (2*rows + 2,), whose last two are the denominators.

    This program processes everything.
    """
    i = tl.arange(0, BLOCK)
    loss_a = tl.sum(tl.load(sums_ptr + i * 4, mask=i < programs, other=0.0))
    loss_b = tl.sum(tl.load(sums_ptr + i * 4 + 1, mask=i < programs, other=0.0))
    if MEAN:
        weight_a = tl.sum(tl.load(sums_ptr + i * 4 + 2, mask=i < programs, other=0.0))
        weight_b = tl.sum(tl.load(sums_ptr + i * 4 + 3, mask=i < programs, other=0.0))
        denominators_ptr = statistics_ptr + 2 * rows
        tl.store(denominators_ptr, weight_a)
        tl.store(denominators_ptr + 1, weight_b)
        loss_a, loss_b = loss_a / weight_a, loss_b / weight_b
    tl.store(loss_ptr, (loss_a + loss_b).to(loss_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=[*NUMBERS, *strides_of("z", "dz", "lam", "g", axes="nab")])
def _backward_kernel(
    g_ptr, z_ptr, a_ptr, b_ptr, lam_ptr, weight_ptr, statistics_ptr, dz_ptr, lam: tl.float64,
    rows, classes, size_a, size_b, ignore_index,
    z_stride_n, z_stride_a, z_stride_b, z_stride_c, lam_stride_n, lam_stride_a, lam_stride_b,
    dz_stride_n, dz_stride_a, dz_stride_b, dz_stride_c, g_stride_n, g_stride_a, g_stride_b,
    MEAN: tl.constexpr, SMOOTHING: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Shapes: z and dz (N, classes, size_a, size_b); g, a, b and lam_ptr (N, size_a, size_b), a and b contiguous, lam_ptr None
    where lam is a number; weight (classes,) or None; statistics (2*rows + 2,), whose last two are the denominators of a mean.

    This program processes one tile of ROWS rows, a block of BLOCK_C classes after the other.
    """
    r, exists, place = _rows(tl.program_id(0), rows, (size_a, size_b), ROWS, TILE)
    z = _of_rows(z_ptr, place, (z_stride_n, z_stride_a, z_stride_b), TILE.align, TILE)
    dz = _of_rows(dz_ptr, place, (dz_stride_n, dz_stride_a, dz_stride_b), TILE.align, TILE)
    stride_c, dz_stride_c = _class_stride(z_stride_c, TILE), _class_stride(dz_stride_c, TILE)
    highest = tl.load(statistics_ptr + r, mask=exists, other=0.0)
    log_sum = tl.load(statistics_ptr + rows + r, mask=exists, other=0.0)

    g = _per_row(g_ptr, None, place, (g_stride_n, g_stride_a, g_stride_b), exists, TILE, ACC)
    share = _per_row(lam_ptr, lam, place, (lam_stride_n, lam_stride_a, lam_stride_b), exists, TILE, ACC)
    g_a, g_b = g * share, g * (1.0 - share)
    if MEAN:
        denominators_ptr = statistics_ptr + 2 * rows
        g_a, g_b = g_a / tl.load(denominators_ptr), g_b / tl.load(denominators_ptr + 1)
    label_a, share_a, g_a = _gradients(_labels(a_ptr, r, exists, classes, ignore_index, weight_ptr, ACC), g_a, SMOOTHING)
    label_b, share_b, g_b = _gradients(_labels(b_ptr, r, exists, classes, ignore_index, weight_ptr, ACC), g_b, SMOOTHING)
    total = share_a + share_b
    if SMOOTHING > 0:
        every = (g_a + g_b) * (SMOOTHING / classes.to(ACC))
        total += every * _weight_sum(weight_ptr, classes, BLOCK_C, TILE, ACC)

    for start in range(0, classes, BLOCK_C):
        c, known = _classes(start, classes, BLOCK_C, TILE)
        value = tl.load(z + c.to(tl.int64) * stride_c, mask=known & exists, other=float("-inf")).to(ACC)
        gradient = total * _exp((value - highest) - log_sum)
        gradient -= tl.where(c == label_a, share_a, 0.0)
        gradient -= tl.where(c == label_b, share_b, 0.0)
        if SMOOTHING > 0:
            gradient -= every * _weights(weight_ptr, c, known, ACC)
        tl.store(dz + c.to(tl.int64) * dz_stride_c, gradient.to(dz_ptr.dtype.element_ty), mask=known & exists)


@triton.jit
def _weight_sum(weight_ptr, classes, BLOCK_C: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr):
    """The sum of the classes' weights. (Each program adds them up anew, rather than wait for another launch.)"""
    if weight_ptr is None:
        return classes.to(ACC)
    else:
        total = tl.cast(0.0, ACC)
        for start in range(0, classes, BLOCK_C):
            c, known = _classes(start, classes, BLOCK_C, TILE)
            total += tl.sum(_weights(weight_ptr, c, known, ACC))
        return total


@triton.jit
def _gradients(labels, g, SMOOTHING: tl.constexpr):
    """A term's labels, what each takes of its row's gradient, and the gradient g where the label counts."""
    label, known, counts, weight = labels
    g = tl.where(counts, g, 0.0)
    share = tl.where(counts, g * (1 - SMOOTHING) * weight, 0.0)
    return tl.where(known, label, -1).to(tl.int32), share, g


class Cut(NamedTuple):
    """How a launch is cut: rows and classes a tile, and a program's warps."""

    rows: int
    block: int
    num_warps: int


# The programs of a reduced loss at most, whose sums one program adds.
PROGRAMS = 4096


def cut_for(classes: int, by_rows: bool) -> Cut:
    """The pinned cut for as many classes: by their power of two alone, so that no size compiles anew."""
    width = 1 << (classes - 1).bit_length()
    if not by_rows:
        block = min(width, 4096)
        # One row a warp: what is done once a row is done by all the threads that share it.
        return Cut(max(1024 // block, 1), block, max(block // 1024, 1))
    if width <= 64:
        # A thread has all of a row's classes.
        return Cut(256, min(width, 8), 2)
    return Cut(128, 32, 4) if width <= 256 else Cut(32, 64, 8)


class Rows(NamedTuple):
    """The rows of a launch's tensors without their data: sizes of N, A and B, and each tensor's strides along them.

    Axes that are one run for every tensor are one, the last; those before it have size 1.
    """

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def axes(self) -> int:
        return max((3 - axis for axis, size in enumerate(self.sizes) if size > 1), default=1)


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


def _along(t: Any, z: torch.Tensor) -> tuple[int, ...]:
    """The strides along the rows of z, (N, C, ...), of what has one number in all, a sample or a row."""
    given = t.stride() if isinstance(t, torch.Tensor) else ()
    return (*given, *(0,) * (z.ndim - 1 - len(given)))


def _prepare(
    kernel: Any, logits: tuple[torch.Tensor, ...], others: tuple[Any, ...], ignore_index: int, smoothing: float, most: int,
    aligned: bool, **constants: Any,
) -> Launch | None:  # fmt: skip
    """The launch, of `most` programs at most, on logits (N, C, ...), z the first, and what there is of each row.

    None where the axes of the rows are too many.
    """
    z = logits[0]
    (n, classes, *positions), itemsize = z.shape, z.element_size()
    pairs = zip(((t.stride(0), *t.stride()[2:]) for t in logits), (_along(t, z) for t in others))
    rows = rows_of((n, *positions), tuple(stride for pair in pairs for stride in pair))
    if rows is None:
        return None
    strides_c = [t.stride(1) for t in logits]
    inner = rows.strides[0][2]
    by_rows = strides_c[0] != 1 and (inner == 1 or 0 < inner < strides_c[0])
    # By the logits' addresses alone: it is they that are read in vectors.
    widest = min(alignment_of(kinds_of(*logits)[-1]) // itemsize, 4 if by_rows else 16 // itemsize)
    align = _align(rows, strides_c, classes, by_rows, max(widest, 1))
    if not by_rows and align < 4 and classes <= 64:
        # A thread would have one or two elements of a row, and as much to do for it as one that has them all.
        by_rows, align = True, 1
    cut = cut_for(classes, by_rows)
    numbers = [math.prod(rows.sizes), classes, *rows.sizes[1:], ignore_index]
    for i, stride in enumerate(rows.strides):
        numbers += stride if i % 2 else (*stride, strides_c[i // 2])
    return Launch(
        kernel, min(-(-numbers[0] // cut.rows), most), tuple(numbers), z.device, aligned,
        SMOOTHING=smoothing, ACC=wide_of(z.dtype), ROWS=cut.rows, BLOCK_C=cut.block, TILE=Tile(rows.axes, by_rows, align),
        num_warps=cut.num_warps, **constants,
    )  # fmt: skip


def _align(rows: Rows, strides_c: list[int], classes: int, by_rows: bool, most: int) -> int:
    """The width of the vectors that sizes and strides of the logits allow, up to `most`: none may reach beyond its run."""
    along_n, along_a, along_b = zip(*rows.strides[::2])
    run, inner, outer = (rows.sizes[2], along_b, strides_c) if by_rows else (classes, strides_c, along_b)
    dense, divided = all(stride == 1 for stride in inner), (run, *outer, *along_n, *along_a)
    align = most
    while align > 1 and not (dense and all(number % align == 0 for number in divided)):
        align //= 2
    return align


def mixup_cross_entropy(
    z: torch.Tensor, a: torch.Tensor, b: torch.Tensor, lam: float | torch.Tensor, weight: torch.Tensor | None,
    ignore_index: int, reduction: str, smoothing: float, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The loss, (N, ...) or (), and what its gradient is made of: the rows' two statistics, and the denominators of a mean.

    z is (N, C, ...), a and b (N, ...), lam a number, () or (N,), weight (C,) or None.
    """
    a, b, weight = contiguous(a), contiguous(b), contiguous(weight)
    pointer, number = (lam, 0.0) if isinstance(lam, torch.Tensor) else (None, lam)
    kinds = kinds_of(z, a, b, pointer, weight)
    # Of the logits' own address, only where not all are aligned.
    address = kinds[-1] and z.data_ptr() & 15
    key = ("mixup_cross_entropy", ignore_index, reduction, smoothing, dtype, z.shape, z.device, address, kinds)
    wide, launch, finish = LAUNCHES.get(key) or keep(
        key, _prepare_forward(z, lam, ignore_index, reduction, smoothing, not kinds[-1])
    )
    if launch is None:
        return mixup_cross_entropy(z.contiguous(), a, b, lam, weight, ignore_index, reduction, smoothing, dtype)
    statistics = z.new_empty(2 * a.numel() + (2 if reduction == "mean" else 0), dtype=wide)
    if reduction == "none":
        loss = z.new_empty(a.shape, dtype=dtype)
        launch(z, a, b, pointer, weight, statistics, loss, None, number)
    else:
        loss, sums = z.new_empty((), dtype=dtype), z.new_empty((launch.grid[0], 4), dtype=wide)
        launch(z, a, b, pointer, weight, statistics, None, sums, number)
        finish(sums, loss, statistics)
    return loss, statistics


def _prepare_forward(
    z: torch.Tensor, lam: Any, ignore_index: int, reduction: str, smoothing: float, aligned: bool
) -> tuple[torch.dtype, Launch | None, Launch | None]:  # fmt: skip
    """What sums are in, and the launches that fill statistics and that finish a reduced loss."""
    wide, rows = torch.float64 if z.dtype == torch.float64 else torch.float32, z.numel() // z.shape[1]
    most = max(rows, 1) if reduction == "none" else PROGRAMS
    launch = _prepare(_forward_kernel, (z,), (lam,), ignore_index, smoothing, most, aligned)
    if launch is None:
        return wide, None, None
    mean = reduction == "mean"
    finish = Launch(_finish_kernel, 1, (launch.grid[0], rows), z.device, True, MEAN=mean, BLOCK=PROGRAMS, num_warps=8)
    return wide, launch, finish


def mixup_cross_entropy_backward(
    g: torch.Tensor, z: torch.Tensor, a: torch.Tensor, b: torch.Tensor, lam: float | torch.Tensor, weight: torch.Tensor | None,
    statistics: torch.Tensor, ignore_index: int, reduction: str, smoothing: float,
) -> torch.Tensor:  # fmt: skip
    """The gradient of z, laid out as z is, from g, that of the loss, and from the statistics that the forward gave."""
    a, b, weight, statistics = contiguous(a), contiguous(b), contiguous(weight), contiguous(statistics)
    pointer, number = (lam, 0.0) if isinstance(lam, torch.Tensor) else (None, lam)
    kinds = kinds_of(g, z, a, b, pointer, weight, statistics)
    address = kinds[-1] and z.data_ptr() & 15
    key = ("mixup_cross_entropy_backward", ignore_index, reduction, smoothing, z.shape, z.device, address, kinds)
    dz = torch.empty_like(z)
    launch = LAUNCHES.get(key)
    if launch is None:
        arguments = (z, dz), (lam, g), ignore_index, smoothing, max(a.numel(), 1), not kinds[-1]
        launch = keep(key, _prepare(_backward_kernel, *arguments, MEAN=reduction == "mean"))
    if launch is None:
        terms = a, b, lam, weight, statistics, ignore_index, reduction, smoothing
        return dz.copy_(mixup_cross_entropy_backward(g.contiguous(), z.contiguous(), *terms))
    launch(g, z, a, b, pointer, weight, statistics, dz, number)
    return dz
