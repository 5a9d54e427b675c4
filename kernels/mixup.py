"""MixUp in one pass: read a sample and its partner, blend or paste them, normalise, write.

A sample is `numel` elements, in the order in which the output lies in memory. A program has one
block of a few samples, and computes its offsets and its channels' numbers once. The batch is the
fastest axis of the grid. So the block of a sample and that of its partner are read at about the
same time, for any permutation: each is read from device memory once, and then from the L2. Planes
that become channels-last are read as they lie, and transposed in shared memory.

The backward of an index map is its transpose: the gradient of sample j gathers from every sample
with partner j. A stable sort of the index puts these side by side, so that any index works, without
atomics.

Cost per element of e bytes in and f bytes out:
    forward     e + f bytes of device memory (2 e through the L2); 2 loads, 2 multiply-adds, and one
                more to normalise
    backward    f + e bytes; for a permutation 2 loads and 2 multiply-adds
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
    Layout,
    contiguous,
    keep,
    kinds_of,
    scalar,
    strides_of,
    wide_of,
)

# lam: a number, or a tensor, () or (batch,).
Weight = float | torch.Tensor

# Elements per program, and its warps: 16 elements per thread, which are one 128-bit load of bytes
# or two of half precision.
BLOCK, WARPS = 2048, 4
# Samples per program, divided by the bytes of an element: what all running programs read must stay
# in the L2. They are half as many where no offsets are computed, as more programs run then. And the
# fewest programs, which fill a large device.
SAMPLES, PROGRAMS = 8, 2048
# The most channels, a power of two, that are transposed in shared memory.
PLANES = 16


class Order(NamedTuple):
    """The order in which a launch takes a sample's elements, known at compile time.

    Channels are innermost (`channels_last`) or outermost. Elements are taken in runs of `run`, a
    power of two. `wraps` is the number of axes, from the innermost, on which a run may pass the
    end. If `small`, a run may pass the end of the innermost axis several times. `planes` is the
    number of planes of a block that is read with channels outermost and written with channels
    innermost, else 0.
    """

    channels_last: bool
    run: int
    wraps: int
    small: bool
    planes: int = 0


@triton.jit
def _divide(first, k, size):
    """first + k divided by `size`, for a scalar `first` and small numbers k.

    Returns the remainders, and the quotients as a scalar, first // size, and what k adds to it.
    There is no integer division of a tile. A comparison finds where first + k passes a multiple of
    `size`, and a product in float32 how many more it passes, exact because k is below BLOCK.
    """
    first_remainder = first % size
    over = k - (size - first_remainder)
    more = tl.where(over >= 0, ((over.to(tl.float32) + 0.5) * (1.0 / size)).to(tl.int32) + 1, 0)
    return first_remainder + k - more * size, first // size, more


@triton.jit
def _carry(position, size, SMALL: tl.constexpr):
    """A position on an axis wrapped into its size, and how often it wraps.

    It wraps at most once, or, if SMALL, as often as 16 elements can.
    """
    if SMALL:
        times = (position * (65536 // size + 1)) >> 16
    else:
        times = (position >= size).to(tl.int32)
    return position - times * size, times


@triton.jit
def _elements(start, sizes, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of a sample from `start` on.

    Returns their numbers, counted from `start`, and their places: channels, planes, rows, columns.
    What the elements of a run share is computed once, as (BLOCK/run, 1) and not (BLOCK/run, run).
    """
    RUN: tl.constexpr = ORDER.run
    k, within = tl.arange(0, BLOCK // RUN)[:, None] * RUN, tl.arange(0, RUN)[None, :]
    # The axes, the innermost first.
    s0, s1, s2 = (
        (sizes[0], sizes[3], sizes[2]) if ORDER.channels_last else (sizes[3], sizes[2], sizes[1])
    )
    p0, rest, more = _divide(start, k, s0)
    p1, rest, more = _divide(rest, more, s1)
    p2, rest, more = _divide(rest, more, s2)
    p3 = rest + more
    p0 += within
    if ORDER.wraps > 0:
        p0, times = _carry(p0, s0, ORDER.small)
        p1 += times
    if ORDER.wraps > 1:
        p1, times = _carry(p1, s1, False)
        p2, times = _carry(p2 + times, s2, False)
        p3 += times
    return k + within, (p0, p3, p2, p1) if ORDER.channels_last else (p3, p2, p1, p0)


@triton.jit
def _planes(start, sizes, ORDER: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of all channels from the pixel `start` on, to be transposed.

    Returns, with channels outermost, as they are read: the elements' offsets, their places and
    which exist. Then, with channels innermost, as they are written: the index of each element in
    the block that was read, its offset, and whether it exists.
    """
    PIXELS: tl.constexpr = BLOCK // ORDER.planes
    channels, size = sizes[0], sizes[1] * sizes[2] * sizes[3] // ALIGN * ALIGN
    k, place = _elements(start, sizes, ORDER, PIXELS)
    c, k = tl.arange(0, ORDER.planes)[:, None, None], k[None]
    place = (c, place[1][None], place[2][None], place[3][None])
    o = tl.arange(0, BLOCK)
    # o // channels, exact for numbers this small.
    pixel = (o * (65536 // channels + 1)) >> 16
    source, exists = (o - pixel * channels) * PIXELS + pixel, (c < channels) & (k < size - start)
    written = o < channels * tl.minimum(size - start, PIXELS)
    return (
        c.to(tl.int64) * size + start + k,
        place,
        exists,
        source,
        start.to(tl.int64) * channels + o,
        written,
    )


@triton.jit
def _offsets(start, k, place, strides, FLAT: tl.constexpr, ORDER: tl.constexpr):
    """The offsets of the elements start + k of a sample, at these places, from its first."""
    if FLAT:
        return start.to(tl.int64) + k
    else:
        # Add the innermost last: a run may share the others.
        offsets = place[1].to(tl.int64) * strides[1] + place[2].to(tl.int64) * strides[2]
        if ORDER.channels_last:
            return offsets + place[3].to(tl.int64) * strides[3] + place[0].to(tl.int64) * strides[0]
        else:
            return offsets + place[0].to(tl.int64) * strides[0] + place[3].to(tl.int64) * strides[3]


@triton.jit
def _sample(ptr, i, stride, FLAT: tl.constexpr, ALIGN: tl.constexpr):
    """A pointer to sample i.

    The launcher has checked the alignment. Rounding changes nothing and shows it to the compiler.
    """
    if FLAT:
        stride = stride // ALIGN * ALIGN
    return ptr + i.to(tl.int64) * stride


@triton.jit
def _region(box_ptr, i, box_stride, place):
    """Whether sample i is blended, and which elements lie in its box."""
    if box_ptr is None:
        return True, True
    else:
        box_ptr += i * box_stride
        y0, y1 = tl.load(box_ptr).to(tl.int32), tl.load(box_ptr + 1).to(tl.int32)
        x0, x1 = tl.load(box_ptr + 2).to(tl.int32), tl.load(box_ptr + 3).to(tl.int32)
        return y0 < 0, (place[2] >= y0) & (place[2] < y1) & (place[3] >= x0) & (place[3] < x1)


@triton.jit
def _reads(lam, blended):
    """Whether a sample's own elements are read, and whether its partner's are.

    A blend does not read what has weight 0, because zero times infinity is not zero.
    """
    return (lam != 0.0) | (blended == 0), (lam != 1.0) | (blended == 0)


@triton.jit
def _mix(own, partner, lam, region, scale, shift):
    """A sample and its partner, mixed and normalised.

    A blend is lam*own + (1 - lam)*partner; else the partner is pasted into the box. A byte
    becomes a float32 by its bits, or'ed into 2**23, because a GPU converts few integers per clock.
    """
    blended, within = region
    if own.dtype == tl.uint8 and lam.dtype == tl.float32:
        own = (own.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
        partner = (partner.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
        # Both differences are exact.
        mixed = lam * (own - partner) + (partner - 8388608.0)
        mixed = tl.where(blended, mixed, tl.where(within, partner, own) - 8388608.0)
    else:
        own, partner = own.to(lam.dtype), partner.to(lam.dtype)
        mixed = tl.where(blended, lam * own + (1.0 - lam) * partner, tl.where(within, partner, own))
    return mixed * scale if shift is None else mixed * scale + shift


@triton.jit
def _lam(ptr, lam, i, stride, ACC: tl.constexpr):
    """Sample i's lam: the number at ptr, or `lam` where ptr is None."""
    if ptr is not None:
        ptr += i * stride
    return scalar(ptr, lam, ACC)


# The integers of a kernel, before its strides. Triton does not specialise on them.
NUMBERS = [
    "batch",
    "step",
    "numel",
    "size_c",
    "size_a",
    "size_h",
    "size_w",
    "lam_stride",
    "box_stride",
]


@triton.jit(do_not_specialize=[*NUMBERS, *strides_of("x", "y", axes="ncahw")])
def _forward_kernel(
    x_ptr, index_ptr, lam_ptr, box_ptr, scale_ptr, shift_ptr, y_ptr, lam: tl.float64,
    batch, step, numel, size_c, size_a, size_h, size_w, lam_stride, box_stride,
    x_stride_n, x_stride_c, x_stride_a, x_stride_h, x_stride_w,
    y_stride_n, y_stride_c, y_stride_a, y_stride_h, y_stride_w,
    READ_FLAT: tl.constexpr, WRITE_FLAT: tl.constexpr, ALIGN: tl.constexpr, ORDER: tl.constexpr,
    IN_PLACE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK elements of every step-th sample.

    x_ptr, y_ptr: (batch, size_c, size_a, size_h, size_w)
    index_ptr: (batch,)
    lam_ptr: () or (batch,), or None where lam is a number
    box_ptr: (4,) or (batch, 4), or None
    scale_ptr, shift_ptr: (size_c,), or None

    With IN_PLACE, y is x and the index is an involution. The program of the first sample of a pair
    then computes the partner's elements too. A sample without a valid partner is filled with NaN.
    """
    block, sizes = (tl.program_id(0) // step).to(numel.dtype), (size_c, size_a, size_h, size_w)
    if ORDER.planes:
        start = block * (BLOCK // ORDER.planes)
        x_offsets, place, exists, source, y_offsets, written = _planes(
            start, sizes, ORDER, ALIGN, BLOCK
        )
    else:
        start = block * BLOCK
        k, place = _elements(start, sizes, ORDER, BLOCK)
        exists = k < numel // ALIGN * ALIGN - start
        source, written = None, exists
        x_offsets = _offsets(
            start, k, place, (x_stride_c, x_stride_a, x_stride_h, x_stride_w), READ_FLAT, ORDER
        )
        y_offsets = _offsets(
            start, k, place, (y_stride_c, y_stride_a, y_stride_h, y_stride_w), WRITE_FLAT, ORDER
        )
    UNIT: tl.constexpr = 1.0 / 255.0 if x_ptr.dtype.element_ty == tl.uint8 else 1.0
    if scale_ptr is not None:
        # Beyond a sample's end c may exceed the channels.
        c = tl.minimum(place[0], size_c - 1)
        scale, shift = tl.load(scale_ptr + c) * UNIT, tl.load(shift_ptr + c)
    else:
        scale, shift = tl.full((), UNIT, ACC), None

    i = tl.program_id(0) % step
    while i < batch:
        j = tl.load(index_ptr + i)
        known = (j >= 0) & (j < batch)
        if not (IN_PLACE and (known & (j < i))):
            lam_i = tl.where(known, _lam(lam_ptr, lam, i, lam_stride, ACC), float("nan"))
            blended, within = _region(box_ptr, i, box_stride, place)
            blended = blended | (known == 0)
            own_ptr = _sample(x_ptr, i, x_stride_n, READ_FLAT, ALIGN) + x_offsets
            partner_ptr = _sample(x_ptr, j, x_stride_n, READ_FLAT, ALIGN) + x_offsets
            reads_own, reads_partner = _reads(lam_i, blended)
            own = tl.load(own_ptr, mask=exists & reads_own, other=0)
            partner = tl.load(partner_ptr, mask=exists & known & reads_partner, other=0)
            value = _mix(own, partner, lam_i, (blended, within), scale, shift)
            if IN_PLACE and known:
                # Read all of the pair before any of it is written. The second read is from the L1.
                lam_j, region = (
                    _lam(lam_ptr, lam, j, lam_stride, ACC),
                    _region(box_ptr, j, box_stride, place),
                )
                reads_partner, reads_own = _reads(lam_j, region[0])
                own = tl.load(own_ptr, mask=exists & reads_own, other=0)
                partner = tl.load(partner_ptr, mask=exists & reads_partner, other=0)
                partners = _mix(partner, own, lam_j, region, scale, shift)
                _write(
                    _sample(y_ptr, j, y_stride_n, WRITE_FLAT, ALIGN) + y_offsets,
                    partners,
                    source,
                    written,
                )
            _write(
                _sample(y_ptr, i, y_stride_n, WRITE_FLAT, ALIGN) + y_offsets, value, source, written
            )
        i += step


@triton.jit
def _write(ptr, value, source, mask):
    """Write a block; `source`, unless None, is the index from which each element comes."""
    value = value.to(ptr.dtype.element_ty)
    if source is not None:
        value = tl.gather(tl.reshape(value, source.shape), source, 0)
    tl.store(ptr, value, mask=mask)


@triton.jit(do_not_specialize=[*NUMBERS, *strides_of("g", "dx", axes="ncahw")])
def _backward_kernel(
    g_ptr, order_ptr, lam_ptr, box_ptr, scale_ptr, dx_ptr, lam: tl.float64,
    batch, step, numel, size_c, size_a, size_h, size_w, lam_stride, box_stride,
    g_stride_n, g_stride_c, g_stride_a, g_stride_h, g_stride_w,
    dx_stride_n, dx_stride_c, dx_stride_a, dx_stride_h, dx_stride_w,
    READ_FLAT: tl.constexpr, WRITE_FLAT: tl.constexpr, ALIGN: tl.constexpr, ORDER: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK elements of one sample's gradient.

    g_ptr, dx_ptr: (batch, size_c, size_a, size_h, size_w)
    order_ptr: (2*batch + 1,), written by `_order_kernel`
    lam_ptr: () or (batch,), or None where lam is a number
    box_ptr: (4,) or (batch, 4), or None
    scale_ptr: (size_c,), or None
    """
    j = tl.program_id(0) % step
    start = (tl.program_id(0) // step).to(numel.dtype) * BLOCK
    k, place = _elements(start, (size_c, size_a, size_h, size_w), ORDER, BLOCK)
    exists = k < numel // ALIGN * ALIGN - start
    g_offsets = _offsets(
        start, k, place, (g_stride_c, g_stride_a, g_stride_h, g_stride_w), READ_FLAT, ORDER
    )
    dx_offsets = _offsets(
        start, k, place, (dx_stride_c, dx_stride_a, dx_stride_h, dx_stride_w), WRITE_FLAT, ORDER
    )

    lam_j, region = _lam(lam_ptr, lam, j, lam_stride, ACC), _region(box_ptr, j, box_stride, place)
    reads, _ = _reads(lam_j, region[0])
    gradient = tl.load(
        _sample(g_ptr, j, g_stride_n, READ_FLAT, ALIGN) + g_offsets, mask=exists & reads, other=0
    )
    total = _share(gradient.to(ACC), lam_j, region, True)
    starts_ptr = order_ptr + batch
    for s in range(tl.load(starts_ptr + j), tl.load(starts_ptr + j + 1)):
        i = tl.load(order_ptr + s)
        lam_i, region = (
            _lam(lam_ptr, lam, i, lam_stride, ACC),
            _region(box_ptr, i, box_stride, place),
        )
        _, reads = _reads(lam_i, region[0])
        gradient = tl.load(
            _sample(g_ptr, i, g_stride_n, READ_FLAT, ALIGN) + g_offsets,
            mask=exists & reads,
            other=0,
        )
        total += _share(gradient.to(ACC), lam_i, region, False)
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + tl.minimum(place[0], size_c - 1))
    tl.store(
        _sample(dx_ptr, j, dx_stride_n, WRITE_FLAT, ALIGN) + dx_offsets,
        total.to(dx_ptr.dtype.element_ty),
        mask=exists,
    )


@triton.jit
def _share(gradient, lam, region, OWN: tl.constexpr):
    """The part of a mixed sample's gradient that goes to itself (OWN) or to its partner."""
    blended, within = region
    if OWN:
        return tl.where(blended, lam * gradient, tl.where(within, 0.0, gradient))
    else:
        return tl.where(blended, (1.0 - lam) * gradient, tl.where(within, gradient, 0.0))


@triton.jit(do_not_specialize=["batch"])
def _order_kernel(index_ptr, order_ptr, batch, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program orders ROWS samples, and computes where the samples of ROWS partners begin.

    index_ptr: (batch,)
    order_ptr: (2*batch + 1,), the samples sorted by partner, then where those of each partner begin

    It counts the samples that come before each. At a training step's batch, the batch^2 comparisons
    take a GPU less time than one pass of a radix sort.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    partner = tl.load(index_ptr + i, mask=i < batch, other=0)
    before_sample = tl.zeros((ROWS, BLOCK), tl.int32)
    before_partner = tl.zeros((ROWS, BLOCK), tl.int32)
    for start in range(0, batch, BLOCK):
        k = start + tl.arange(0, BLOCK)[None, :]
        other = tl.load(index_ptr + k, mask=k < batch, other=0)
        before_sample += ((k < batch) & ((other < partner) | ((other == partner) & (k < i)))).to(
            tl.int32
        )
        before_partner += ((k < batch) & (other < i)).to(tl.int32)
    tl.store(order_ptr + tl.sum(before_sample, 1, keep_dims=True), i, mask=i < batch)
    tl.store(order_ptr + batch + i, tl.sum(before_partner, 1, keep_dims=True), mask=i <= batch)


# ROWS and BLOCK of `_order_kernel`, and the largest batch for it.
ORDER_ROWS, ORDER_BLOCK, ORDER_BATCH = 16, 256, 8192


def order_of(shape: tuple[int, ...], channels_last: bool, longest: int) -> Order:
    """The order of a memory format, with runs of at most `longest` elements.

    A run wraps no further than the next row.
    """
    _, size_c, _, size_h, size_w = shape
    # An axis may be empty.
    inner, outer = (max(size_c, 1), size_w) if channels_last else (max(size_w, 1), size_h)
    run, small = longest, inner < 16
    while run > 1 and small and (inner + run - 2) // inner > outer:
        run //= 2
    wraps = 0 if inner % run == 0 else 1 if inner * outer % run == 0 else 2
    return Order(channels_last, run, wraps, small)


def layout_of(t: torch.Tensor) -> Layout | None:
    """The layout of t, (N, ...), as N, C, A, H and W.

    An absent axis has size 1. The axes between C and H are joined into A; None where their strides
    do not allow it.
    """
    n, channels, *sizes = (*t.shape, 1)[: max(t.ndim, 2)]
    stride_n, stride_c, *strides = (*t.stride(), 0)[: max(t.ndim, 2)]
    absent = 2 - len(sizes)
    sizes, strides = [1] * absent + sizes, [0] * absent + strides
    middle, stride = 1, 0
    for size, outer in zip(reversed(sizes[:-2]), reversed(strides[:-2])):
        if size > 1 and middle > 1 and outer != middle * stride:
            return None
        if size > 1:
            middle, stride = middle * size, outer if middle == 1 else stride
    return Layout((n, channels, middle, *sizes[-2:]), (stride_n, stride_c, stride, *strides[-2:]))


def _launch(
    kernel: Any, x: torch.Tensor, y: torch.Tensor, lam: Weight, box: torch.Tensor | None,
    scale: torch.Tensor | None, misaligned: int, **constants: Any,
) -> Launch | None:  # fmt: skip
    """The launch of a kernel that writes y from x, in y's order; None if x must be copied first."""
    read, written = layout_of(x), layout_of(y)
    if read is None or written is None:
        return None
    n, channels, *sizes = written.shape
    numel = channels * math.prod(sizes)
    forward, channels_last = kernel is _forward_kernel, written.strides[1] < written.strides[4]
    flat = [layout.is_flat(channels_last) for layout in (read, written)]
    placed = box is not None or scale is not None
    if not placed and read.strides == written.strides and written.is_dense():
        # Both are runs in the same order, whichever it is.
        flat = [True, True]
    # A block is `block` elements, or with planes `block` pixels of all channels.
    planes, unit, block = 0, numel, BLOCK
    if (
        forward
        and channels_last
        and 0 < channels <= PLANES
        and read.is_flat(False)
        and flat == [False, True]
    ):
        planes, flat = 1 << (channels - 1).bit_length(), [True, True]
        unit, block = numel // channels, BLOCK // planes
    blocks = -(-unit // block)
    aligned = [
        unit,
        *(layout.strides[0] for layout, is_flat in zip((read, written), flat) if is_flat),
    ]
    # From bytes, a run is at most 16 bytes of y. Where a layout is not flat, it is at most 8
    # elements: a thread has the registers for as many offsets.
    run = min(
        16 if all(flat) else 8,
        16 // y.element_size() if x.dtype == torch.uint8 and not planes else 16,
    )
    order = Order(False, run, 0, False)
    if box is not None or (scale is not None and not planes) or not all(flat):
        order = order_of(written.shape, channels_last and not planes, run)
    samples = (
        SAMPLES // x.element_size() // (1 if placed or planes or not all(flat) else 2)
        if forward
        else 1
    )
    step = -(-n // max(min(samples, n * blocks // PROGRAMS), 1))
    lam_stride = lam.stride(0) if isinstance(lam, torch.Tensor) and lam.ndim else 0
    box_stride = 4 if box is not None and box.ndim > 1 else 0
    numbers = (
        n,
        step,
        numel,
        channels,
        *sizes,
        lam_stride,
        box_stride,
        *read.strides,
        *written.strides,
    )
    return Launch(
        kernel, step * blocks, numbers, x.device, not misaligned,
        READ_FLAT=flat[0], WRITE_FLAT=flat[1], ORDER=order._replace(planes=planes),
        ACC=wide_of(x.dtype, y.dtype),
        ALIGN=next(align for align in (16, 4, 1) if all(number % align == 0 for number in aligned)),
        BLOCK=BLOCK, num_warps=WARPS, **constants,
    )  # fmt: skip


def mixup(
    x: torch.Tensor, index: torch.Tensor, lam: Weight, box: torch.Tensor | None,
    scale: torch.Tensor | None, shift: torch.Tensor | None, dtype: torch.dtype,
    memory_format: torch.memory_format, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x, (N, ...), mixed, in a dtype and memory format, or written to `out`.

    `out` may be x if the index is an involution; otherwise they must share no memory.
    """
    index, box, scale, shift = (
        contiguous(index),
        contiguous(box),
        contiguous(scale),
        contiguous(shift),
    )
    pointer, number = (lam, 0.0) if isinstance(lam, torch.Tensor) else (None, lam)
    kinds = kinds_of(x, index, pointer, box, scale, shift, out)
    in_place = out is not None and out.data_ptr() == x.data_ptr()
    key = ("mixup", dtype, memory_format, in_place, x.shape, x.device, kinds)
    y = torch.empty_like(x, dtype=dtype, memory_format=memory_format) if out is None else out
    launch = LAUNCHES.get(key) or keep(
        key, _launch(_forward_kernel, x, y, lam, box, scale, kinds[-1], IN_PLACE=in_place)
    )
    if launch is None:
        return y.copy_(
            mixup(x.contiguous(), index, lam, box, scale, shift, dtype, torch.contiguous_format)
        )
    launch(x, index, pointer, box, scale, shift, y, number)
    return y


def mixup_backward(
    g: torch.Tensor, index: torch.Tensor, lam: Weight, box: torch.Tensor | None,
    scale: torch.Tensor | None, stride: tuple[int, ...], dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The gradient of x, in its memory format, from g, the gradient of the output.

    `stride` and `dtype` are those of x.
    """
    index, box, scale = contiguous(index), contiguous(box), contiguous(scale)
    pointer, number = (lam, 0.0) if isinstance(lam, torch.Tensor) else (None, lam)
    kinds = kinds_of(g, index, pointer, box, scale)
    key = ("mixup_backward", stride, dtype, g.shape, g.device, kinds)
    found = LAUNCHES.get(key)
    if found is None:
        like = torch.empty_like(torch.empty_strided(g.shape, stride, dtype=dtype, device="meta"))
        found = keep(
            key, (like.stride(), *_prepare_backward(g, index, like, lam, box, scale, kinds[-1]))
        )
    strides, sort, launch = found
    dx = g.new_empty_strided(g.shape, strides, dtype=dtype)
    if launch is None:
        flat = torch.empty(g.shape, device="meta").stride()
        return dx.copy_(mixup_backward(g.contiguous(), index, lam, box, scale, flat, dtype))
    if len(index) <= ORDER_BATCH:
        order = index.new_empty(2 * len(index) + 1, dtype=torch.int32)
        sort(index, order)
    else:
        order = _sorted(index)
    launch(g, order, pointer, box, scale, dx, number)
    return dx


def _prepare_backward(
    g: torch.Tensor, index: torch.Tensor, dx: torch.Tensor, lam: Weight, box: torch.Tensor | None,
    scale: torch.Tensor | None, misaligned: int,
) -> tuple[Launch, Launch | None]:  # fmt: skip
    """The launch that sorts the samples by partner, and the one that writes dx.

    The second is None if g must be copied first.
    """
    sort = Launch(
        _order_kernel, -(-(len(index) + 1) // ORDER_ROWS), (len(index),), g.device, not misaligned,
        ROWS=ORDER_ROWS, BLOCK=ORDER_BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return sort, _launch(_backward_kernel, g, dx, lam, box, scale, misaligned)


def _sorted(index: torch.Tensor) -> torch.Tensor:
    """What `_order_kernel` writes, by torch's sort, which is faster for a large batch."""
    partners, samples = index.sort(stable=True)
    starts = torch.searchsorted(
        partners, torch.arange(len(index) + 1, device=index.device, dtype=index.dtype)
    )
    return torch.cat((samples, starts)).int()
