"""The cross entropy of mixed labels in one pass over the logits, and its gradient in another.

Logits are (N, C, A, B), rows of C classes (rows.py). A program has tiles of ROWS rows by BLOCK_C
classes. Where a row has more classes it loops over them, with the running maximum and the running
sum of exponentials.

Two numbers per row are saved for the backward: the maximum, and the logarithm of the sum of
exponentials of differences from it. Their sum, the log-sum-exp, would lose the small number's
digits in float32: with logits of 1e4 everything below a thousandth, and a probability would be
wrong by as much.

Each program adds up a reduced loss over its rows, and one more program adds these sums: in a fixed
order and without atomics, so that two runs give the same bits. That program also writes the
denominators of a mean, by which the backward divides, so the host never waits for the device.

Cost per logit of e bytes, without a row's 24 bytes of labels and statistics:
    forward     e bytes; a maximum, a subtraction, an exponential and a sum; with label smoothing a
                multiply-add and a second sum
    backward    2 e bytes; a subtraction, a multiply-add, an exponential and a second multiply-add,
                and for each label a comparison and a selection
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
    target_of,
    wide_of,
)
from .rows import Tile, along_rows, classes_at, of_rows, read, rows_at, rows_of, vector_of, write

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _block(
    z_ptr, strides, first, start, shape, weight_ptr, highest, SMOOTHED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The statistics of a tile's rows over a block of classes.

    Returns the maximum, of the classes before too; the sum of the exponentials of differences from
    it; and, if SMOOTHED, the weighted sum of the distances from it, and the sum of the weights.
    """
    AXIS: tl.constexpr = None if ROWS == 1 and TILE.most else 1 if TILE.along == "classes" else 0
    _, exists, place = rows_at(first, shape, ROWS, 1, TILE)
    c, known = classes_at(start, shape[1], BLOCK_C, TILE)
    value = read(z_ptr, strides, first, place, c, known & exists, shape, ROWS, BLOCK_C, TILE, ACC)
    if TILE.along == "run":
        value = tl.where(known, value, float("-inf"))
    highest = tl.maximum(highest, tl.max(value, AXIS, keep_dims=True))
    base = _base(highest)
    below = _exp(value - base)
    if TILE.along == "run":
        # The compiler drops a term -0.0 from a sum.
        below = tl.where(c < TILE.most, below, -0.0)
    total = tl.sum(below, AXIS, keep_dims=True)
    spread, of_all = tl.zeros_like(total), tl.cast(0.0, ACC)
    if SMOOTHED:
        weight = _weights(weight_ptr, c, known, ACC)
        spread = tl.sum(tl.where(known, weight * (base - value), 0.0), AXIS, keep_dims=True)
        of_all = (
            tl.sum(weight)
            if weight_ptr is not None
            else tl.minimum(shape[1] - start, BLOCK_C).to(ACC)
        )
    return highest, total, spread, of_all


@triton.jit
def _statistics(
    z_ptr, strides, first, shape, weight_ptr, SMOOTHED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The statistics of `_block` over all classes."""
    highest = tl.full((ROWS, 1) if TILE.along == "classes" else (1, ROWS), float("-inf"), ACC)
    if TILE.most:
        return _block(
            z_ptr, strides, first, 0, shape, weight_ptr, highest, SMOOTHED, ROWS, BLOCK_C, TILE, ACC
        )
    else:
        total, spread, of_all = tl.zeros_like(highest), tl.zeros_like(highest), tl.cast(0.0, ACC)
        for start in range(0, shape[1], BLOCK_C):
            block = _block(
                z_ptr,
                strides,
                first,
                start,
                shape,
                weight_ptr,
                highest,
                SMOOTHED,
                ROWS,
                BLOCK_C,
                TILE,
                ACC,
            )
            base, before = _base(block[0]), _base(highest)
            total = total * _exp(highest - base) + block[1]
            if SMOOTHED:
                spread += of_all * (base - before) + block[2]
                of_all += block[3]
            highest = block[0]
        return highest, total, spread, of_all


@triton.jit
def _base(highest):
    # The difference of two infinities is NaN: where all logits are -inf, subtract 0.
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def _exp(x):
    # tl.exp takes three more instructions, for subnormal results.
    return tl.exp2(x * LOG2_E)


@triton.jit
def _weights(weight_ptr, c, known, ACC: tl.constexpr):
    """The weights of the classes c, 0 where not `known`."""
    if weight_ptr is None:
        return known.to(ACC)
    else:
        return tl.load(weight_ptr + c, mask=known, other=0.0).to(ACC)


@triton.jit
def _labels(ptr, r, exists, classes, ignore_index, weight_ptr, ACC: tl.constexpr):
    """The rows' labels, which are valid classes, which count, and their weights.

    A label that is neither a class nor ignored weighs NaN.
    """
    label = tl.load(ptr + r, mask=exists, other=0).to(tl.int64)
    counts = exists & (label != ignore_index)
    known = counts & (label.to(tl.uint64) < classes.to(tl.uint64))
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
    """One number per row where ptr is not None, else the number."""
    if ptr is None:
        return scalar(None, number, ACC)
    else:
        return tl.load(of_rows(ptr, place, strides, 1, TILE), mask=exists, other=0.0).to(ACC)


# Integers of the kernels on which Triton does not specialise.
NUMBERS = ["rows", "classes", "size_a", "size_b", "ignore_index", "z_stride_c", "dz_stride_c"]


@triton.jit(do_not_specialize=[*NUMBERS, "turns", *strides_of("z", "lam", axes="nab")])
def _forward_kernel(
    z_ptr, a_ptr, b_ptr, lam_ptr, weight_ptr, statistics_ptr, loss_ptr, sums_ptr, lam: tl.float64,
    rows, classes, size_a, size_b, ignore_index,
    z_stride_n, z_stride_a, z_stride_b, z_stride_c, lam_stride_n, lam_stride_a, lam_stride_b, turns,
    SMOOTHING: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    TILE: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """A program computes groups of `turns` <= TURNS tiles of ROWS rows, every programs-th group.

    z_ptr: (N, classes, size_a, size_b)
    a_ptr, b_ptr: (N, size_a, size_b), contiguous
    lam_ptr: (N, size_a, size_b) by its strides, or None where lam is a number
    weight_ptr: (classes,), or None
    statistics_ptr: (2*rows + 2,) for a mean, else (2*rows,)
    loss_ptr: (rows,), or None for a reduced loss
    sums_ptr: (programs, 4) for a reduced loss, else None

    The tiles of a group are read one after the other; what is computed once per row is then
    computed for all of them at once. The four sums of a program are the losses of a and of b,
    weighted by lam and 1 - lam, and the weights of a and of b.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    shape, strides = (
        (rows, classes, size_a, size_b),
        (z_stride_n, z_stride_a, z_stride_b, z_stride_c),
    )
    sum_a = tl.zeros((ROWS, TURNS) if TILE.along == "classes" else (1, ROWS), ACC)
    sum_b, weight_a, weight_b = tl.zeros_like(sum_a), tl.zeros_like(sum_a), tl.zeros_like(sum_a)
    for group in range(program, tl.cdiv(rows, ROWS * turns).to(tl.int32), programs):
        first = tl.cast(group, rows.dtype) * (ROWS * turns)
        last = tl.minimum(rows, first + ROWS * turns)
        if TURNS == 1:
            highest, total, spread, of_all = _statistics(
                z_ptr, strides, first, shape, weight_ptr, SMOOTHING > 0, ROWS, BLOCK_C, TILE, ACC
            )
        else:
            highest, total, spread = (
                tl.zeros_like(sum_a),
                tl.zeros_like(sum_a),
                tl.zeros_like(sum_a),
            )
            of_all = tl.cast(0.0, ACC)
            for turn in range(tl.cdiv(last - first, ROWS).to(tl.int32)):
                tile = _statistics(
                    z_ptr,
                    strides,
                    first + turn * ROWS,
                    shape,
                    weight_ptr,
                    SMOOTHING > 0,
                    ROWS,
                    BLOCK_C,
                    TILE,
                    ACC,
                )
                now = tl.arange(0, TURNS)[None, :] == turn
                highest, total = tl.where(now, tile[0], highest), tl.where(now, tile[1], total)
                spread, of_all = tl.where(now, tile[2], spread), tile[3]
        log_sum = tl.log(total)
        r, exists, place = rows_at(first, (last, classes, size_a, size_b), ROWS, TURNS, TILE)
        tl.store(statistics_ptr + r, highest, mask=exists)
        tl.store(statistics_ptr + rows + r, log_sum, mask=exists)

        z = of_rows(z_ptr, place, strides, 1, TILE)
        share = _per_row(
            lam_ptr, lam, place, (lam_stride_n, lam_stride_a, lam_stride_b), exists, TILE, ACC
        )
        statistics = highest, log_sum, spread + of_all * log_sum
        a = _labels(a_ptr, r, exists, classes, ignore_index, weight_ptr, ACC)
        loss_a = share * _losses(z, a, z_stride_c, statistics, classes, SMOOTHING, ACC)
        b = _labels(b_ptr, r, exists, classes, ignore_index, weight_ptr, ACC)
        loss_b = (1.0 - share) * _losses(z, b, z_stride_c, statistics, classes, SMOOTHING, ACC)
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
def _finish_kernel(
    sums_ptr, loss_ptr, statistics_ptr, programs, rows, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """One program adds all programs' sums.

    sums_ptr: (programs, 4), with programs <= BLOCK
    loss_ptr: ()
    statistics_ptr: (2*rows + 2,) for a mean, the last two its denominators
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
    MEAN: tl.constexpr, SMOOTHING: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A program computes one tile of ROWS rows of dz, block after block of BLOCK_C classes.

    g_ptr: (N, size_a, size_b) by its strides
    z_ptr, dz_ptr: (N, classes, size_a, size_b)
    a_ptr, b_ptr: (N, size_a, size_b), contiguous
    lam_ptr: (N, size_a, size_b) by its strides, or None where lam is a number
    weight_ptr: (classes,), or None
    statistics_ptr: (2*rows + 2,) for a mean, the last two its denominators; else (2*rows,)
    """
    shape, first = (rows, classes, size_a, size_b), tl.cast(tl.program_id(0), rows.dtype) * ROWS
    strides = (z_stride_n, z_stride_a, z_stride_b, z_stride_c)
    dz_strides = (dz_stride_n, dz_stride_a, dz_stride_b, dz_stride_c)
    r, exists, place = rows_at(first, shape, ROWS, 1, TILE)
    # The successive classes of a thread.
    SPAN: tl.constexpr = TILE.align if TILE.along == "classes" else BLOCK_C
    highest = tl.load(statistics_ptr + r, mask=exists, other=0.0)
    log_sum = tl.load(statistics_ptr + rows + r, mask=exists, other=0.0) * LOG2_E

    g = _per_row(g_ptr, None, place, (g_stride_n, g_stride_a, g_stride_b), exists, TILE, ACC)
    share = _per_row(
        lam_ptr, lam, place, (lam_stride_n, lam_stride_a, lam_stride_b), exists, TILE, ACC
    )
    g_a, g_b = g * share, g * (1.0 - share)
    if MEAN:
        denominators_ptr = statistics_ptr + 2 * rows
        g_a, g_b = g_a / tl.load(denominators_ptr), g_b / tl.load(denominators_ptr + 1)
    label_a, share_a, g_a = _gradients(
        _labels(a_ptr, r, exists, classes, ignore_index, weight_ptr, ACC), g_a, SMOOTHING
    )
    label_b, share_b, g_b = _gradients(
        _labels(b_ptr, r, exists, classes, ignore_index, weight_ptr, ACC), g_b, SMOOTHING
    )
    total = share_a + share_b
    if SMOOTHING > 0:
        every = (g_a + g_b) * (SMOOTHING / classes.to(ACC))
        total += every * _weight_sum(weight_ptr, classes, BLOCK_C, TILE, ACC)

    # Where both labels are one class, b's share takes both.
    share_b += tl.where(label_a == label_b, share_a, 0.0)
    for start in range(0, 1 if TILE.most else classes, BLOCK_C):
        c, known = classes_at(start, classes, BLOCK_C, TILE)
        value = read(
            z_ptr, strides, first, place, c, known & exists, shape, ROWS, BLOCK_C, TILE, ACC
        )
        # c == label, in a form that costs no addition and no register per class.
        i = (c - start) % SPAN
        taken = tl.where(
            i == label_b - (c - i), share_b, tl.where(i == label_a - (c - i), share_a, 0.0)
        )
        gradient = total * tl.exp2((value - highest) * LOG2_E - log_sum) - taken
        if SMOOTHING > 0:
            gradient -= every * _weights(weight_ptr, c, known, ACC)
        write(
            dz_ptr,
            dz_strides,
            first,
            place,
            c,
            known & exists,
            shape,
            gradient,
            ROWS,
            BLOCK_C,
            TILE,
        )


@triton.jit
def _weight_sum(weight_ptr, classes, BLOCK_C: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr):
    """The sum of the classes' weights. Each program computes it, to save a launch."""
    if weight_ptr is None:
        return classes.to(ACC)
    else:
        total = tl.cast(0.0, ACC)
        for start in range(0, classes, BLOCK_C):
            c, known = classes_at(start, classes, BLOCK_C, TILE)
            total += tl.sum(_weights(weight_ptr, c, known, ACC))
        return total


@triton.jit
def _gradients(labels, g, SMOOTHING: tl.constexpr):
    """A term's labels, their shares of the rows' gradients, and g where the label counts.

    A label that is not a class becomes -1.
    """
    label, known, counts, weight = labels
    g = tl.where(counts, g, 0.0)
    share = tl.where(counts, g * (1 - SMOOTHING) * weight, 0.0)
    return tl.where(known, label, -1).to(tl.int32), share, g


class Cut(NamedTuple):
    """How a launch is cut: rows and classes per tile, the most tiles per group, warps per program.

    `turns` tiles' rows are finished at once.
    """

    rows: int
    block: int
    turns: int
    num_warps: int


# The most programs of a forward. One program adds their sums.
PROGRAMS = 4096


def cut_for(classes: int, along: str, align: int, warp_size: int) -> Cut:
    """The pinned cut for a number of classes, by its power of two: few sizes compile anew."""
    width = 1 << (classes - 1).bit_length()
    if along == "classes":
        # One row per warp, or a few. All threads of a row would repeat what is computed once per
        # row, so the rows of several tiles are finished at once, a row per thread.
        block = min(width, 4096)
        return Cut(
            max(1024 // block, 1), block, 32 if 1024 <= width <= 4096 else 1, max(block // 1024, 1)
        )
    if along == "run":
        # One row per thread.
        return Cut(128, width, 1, 128 // warp_size)
    # A thread has the rows of a vector, and few classes at once: registers remain for enough warps
    # to hide latency, in every Triton version.
    if width <= 64:
        return Cut(64 * align, min(width, 4), 1, 2)
    return Cut(32 * align, 32, 1, 4) if width <= 256 else Cut(32, 64, 1, 8)


def _prepare(
    kernel: Any, logits: tuple[torch.Tensor, ...], others: tuple[Any, ...], ignore_index: int,
    smoothing: float, aligned: bool, **constants: Any,
) -> Launch | None:  # fmt: skip
    """The launch of a kernel; None where the rows have too many axes.

    `logits` are (N, C, ...), z first. `others` are the tensors with one number per row.
    """
    z = logits[0]
    (n, classes, *positions), itemsize = z.shape, z.element_size()
    pairs = zip(
        ((t.stride(0), *t.stride()[2:]) for t in logits), (along_rows(t, z) for t in others)
    )
    rows = rows_of((n, *positions), tuple(stride for pair in pairs for stride in pair))
    if rows is None:
        return None
    strides_c = [t.stride(1) for t in logits]
    inner = rows.strides[0][2]
    along = "rows" if strides_c[0] != 1 and (inner == 1 or 0 < inner < strides_c[0]) else "classes"
    # By the logits' addresses alone: only logits are read in vectors.
    widest = max(
        min(
            alignment_of(kinds_of(*logits)[-1]) // itemsize,
            4 if along == "rows" else 16 // itemsize,
        ),
        1,
    )
    align = vector_of(rows, strides_c, classes, along, widest)
    if along == "classes" and align < 4 and classes <= 64:
        # Along classes a thread would have one or two elements of a row, and as much work per row
        # as a thread that has them all.
        runs = all(
            rows.is_run(2 * i, classes) and stride == 1 for i, stride in enumerate(strides_c)
        )
        # 64 numbers of 64 bits would fill all registers of a thread.
        if runs and classes * itemsize <= 256:
            along, align = "run", math.gcd(widest, math.prod(rows.sizes) * classes)
        else:
            along, align = "rows", 1
    cut = cut_for(classes, along, align, target_of(z.device).warp_size)
    tiles = -(-math.prod(rows.sizes) // cut.rows)
    numbers = [math.prod(rows.sizes), classes, *rows.sizes[1:], ignore_index]
    for i, stride in enumerate(rows.strides):
        numbers += stride if i % 2 else (*stride, strides_c[i // 2])
    # Rows of up to three quarters of a block compile apart from longer ones.
    three = cut.block // 4 * 3
    bounds = (
        (0, 0)
        if classes > cut.block
        else (cut.block // 2, three)
        if classes <= three
        else (three, cut.block)
    )
    tile = Tile(rows.axes, along, align, *bounds)
    if kernel is _forward_kernel:
        turns = max(min(-(-tiles // PROGRAMS), cut.turns), 1)
        tiles, constants = min(-(-tiles // turns), PROGRAMS), dict(constants, TURNS=cut.turns)
        numbers.append(turns)
    return Launch(
        kernel, tiles, tuple(numbers), z.device, aligned,
        SMOOTHING=smoothing, ACC=wide_of(z.dtype), ROWS=cut.rows, BLOCK_C=cut.block, TILE=tile,
        num_warps=cut.num_warps, **constants,
    )  # fmt: skip


def mixup_cross_entropy(
    z: torch.Tensor, a: torch.Tensor, b: torch.Tensor, lam: float | torch.Tensor,
    weight: torch.Tensor | None, ignore_index: int, reduction: str, smoothing: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The loss, (N, ...) or (), and the statistics from which the backward computes its gradient.

    z: (N, C, ...)
    a, b: (N, ...)
    lam: a number, () or (N,)
    weight: (C,), or None

    The statistics are two numbers per row and, for a mean, its two denominators.
    """
    a, b, weight = contiguous(a), contiguous(b), contiguous(weight)
    pointer, number = (lam, 0.0) if isinstance(lam, torch.Tensor) else (None, lam)
    kinds = kinds_of(z, a, b, pointer, weight)
    # The logits' own misalignment, needed only where not all addresses are aligned.
    address = kinds[-1] and z.data_ptr() & 15
    key = (
        "mixup_cross_entropy",
        ignore_index,
        reduction,
        smoothing,
        dtype,
        z.shape,
        z.device,
        address,
        kinds,
    )
    wide, launch, finish = LAUNCHES.get(key) or keep(
        key, _prepare_forward(z, lam, ignore_index, reduction, smoothing, not kinds[-1])
    )
    if launch is None:
        return mixup_cross_entropy(
            z.contiguous(), a, b, lam, weight, ignore_index, reduction, smoothing, dtype
        )
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
    """The dtype of the sums, and the launches that write statistics and reduce the loss."""
    wide, rows = (
        torch.float64 if z.dtype == torch.float64 else torch.float32,
        z.numel() // z.shape[1],
    )
    launch = _prepare(_forward_kernel, (z,), (lam,), ignore_index, smoothing, aligned)
    if launch is None:
        return wide, None, None
    mean = reduction == "mean"
    finish = Launch(
        _finish_kernel,
        1,
        (launch.grid[0], rows),
        z.device,
        True,
        MEAN=mean,
        BLOCK=PROGRAMS,
        num_warps=8,
    )
    return wide, launch, finish


def mixup_cross_entropy_backward(
    g: torch.Tensor, z: torch.Tensor, a: torch.Tensor, b: torch.Tensor, lam: float | torch.Tensor,
    weight: torch.Tensor | None, statistics: torch.Tensor, ignore_index: int, reduction: str,
    smoothing: float,
) -> torch.Tensor:  # fmt: skip
    """The gradient of z, laid out as z is, from g, the gradient of the loss.

    `statistics` are those that the forward returned.
    """
    a, b, weight, statistics = (
        contiguous(a),
        contiguous(b),
        contiguous(weight),
        contiguous(statistics),
    )
    pointer, number = (lam, 0.0) if isinstance(lam, torch.Tensor) else (None, lam)
    kinds = kinds_of(g, z, a, b, pointer, weight, statistics)
    address = kinds[-1] and z.data_ptr() & 15
    key = (
        "mixup_cross_entropy_backward",
        ignore_index,
        reduction,
        smoothing,
        z.shape,
        z.device,
        address,
        kinds,
    )
    dz = torch.empty_like(z)
    launch = LAUNCHES.get(key)
    if launch is None:
        arguments = (z, dz), (lam, g), ignore_index, smoothing, not kinds[-1]
        launch = keep(key, _prepare(_backward_kernel, *arguments, MEAN=reduction == "mean"))
    if launch is None:
        terms = a, b, lam, weight, statistics, ignore_index, reduction, smoothing
        return dz.copy_(mixup_cross_entropy_backward(g.contiguous(), z.contiguous(), *terms))
    launch(g, z, a, b, pointer, weight, statistics, dz, number)
    return dz
