"""MixUp in one pass: a sample and its partner are read, blended (or one pasted into the other), normalised and written.

A sample is `numel` elements, taken in the order in which the output lies in memory; a program has one block of a few samples, and
works out once where it lies and what its channels' numbers are. The batch is the fastest axis of the grid, so that a sample's
block and its partner's are wanted at about the same time, by whatever permutation, and device memory is asked for each once; the
second time an L2 answers. Planes whose channels become innermost are read as they lie, and exchanged in shared memory.

The backward of an index map is its transpose: the gradient of sample j gathers from every sample that took j for its partner.
They stand side by side in a stable sort of the index; so nothing need be known about the index, and there are no atomics.

Two numbers, per element of e bytes in and f bytes out:
    forward    e + f bytes of device memory (2 e through the L2); 2 loads, 2 multiply-adds, and to normalise one more
    backward   f + e bytes; for a permutation 2 loads and 2 multiply-adds
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

# A weight: a number, or a tensor, 0-d or one number per sample.
Weight = float | torch.Tensor

# Elements a program, and its warps: 16 elements a thread, which is one 128-bit load of bytes and two of half precision.
BLOCK, WARPS = 2048, 4
# Samples a program, by the bytes of an element: what all programs under way read must stay in an L2. (Half as many where there
# are no places to work out, as more are under way.) And the programs at least, enough to fill a large device.
SAMPLES, PROGRAMS = 8, 2048
# The most channels, a power of two, that are exchanged in shared memory.
PLANES = 16


class Order(NamedTuple):
    """In which order a launch takes a sample's elements, known at compile time.

    Channels innermost or outermost; `run` elements at a time, a power of two. `wraps`: on how many axes a run may pass the end,
    the innermost first; and, if `small`, that one several times, being shorter than a run. `planes`: into how many planes a block
    is cut that is read with channels outermost and written with channels innermost; else 0.
    """

    channels_last: bool
    run: int
    wraps: int
    small: bool
    planes: int = 0


@triton.jit
def _divide(first, k, size):
    """first + k by `size`, for a scalar `first` and small numbers k: the remainders, and the quotients as first // size and more.

    There is no integer division of a tile: where a multiple of `size` is passed is a comparison, and how many more are passed a
    product in float32, exact because k is below BLOCK.
    """
    first_remainder = first % size
    over = k - (size - first_remainder)
    more = tl.where(over >= 0, ((over.to(tl.float32) + 0.5) * (1.0 / size)).to(tl.int32) + 1, 0)
    return first_remainder + k - more * size, first // size, more


@triton.jit
def _carry(position, size, SMALL: tl.constexpr):
    """A position on an axis that may be past its end, and by how many times: once, or if SMALL as often as 16 elements take."""
    if SMALL:
        times = (position * (65536 // size + 1)) >> 16
    else:
        times = (position >= size).to(tl.int32)
    return position - times * size, times


@triton.jit
def _elements(start, sizes, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of a sample from `start` on: their numbers from there, and their channels, planes, rows and columns.

    What is the same for a run is computed once for it: (BLOCK/run, 1) in place of (BLOCK/run, run).
    """
    RUN: tl.constexpr = ORDER.run
    k, within = tl.arange(0, BLOCK // RUN)[:, None] * RUN, tl.arange(0, RUN)[None, :]
    # The axes in the order in which they lie, the innermost first.
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
    """BLOCK elements of all channels, from the pixel `start` on, planes outermost: their offsets, places, and which exist.

    Then, channels innermost: which of these each element is, its offset, and whether it exists.
    """
    PIXELS: tl.constexpr = BLOCK // ORDER.planes
    channels, size = sizes[0], sizes[1] * sizes[2] * sizes[3] // ALIGN * ALIGN
    k, place = _elements(start, sizes, ORDER, PIXELS)
    c, k = tl.arange(0, ORDER.planes)[:, None, None], k[None]
    place = (c, place[1][None], place[2][None], place[3][None])
    o = tl.arange(0, BLOCK)
    # A division by a small number, exact for a small one.
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
    """Where the elements start + k of a sample, which have a place, lie from its first."""
    if FLAT:
        return start.to(tl.int64) + k
    else:
        # The innermost last, for the others may be alike in a run.
        offsets = place[1].to(tl.int64) * strides[1] + place[2].to(tl.int64) * strides[2]
        if ORDER.channels_last:
            return offsets + place[3].to(tl.int64) * strides[3] + place[0].to(tl.int64) * strides[0]
        else:
            return offsets + place[0].to(tl.int64) * strides[0] + place[3].to(tl.int64) * strides[3]


@triton.jit
def _sample(ptr, i, stride, FLAT: tl.constexpr, ALIGN: tl.constexpr):
    """A pointer to sample i. The launcher has checked the alignment; rounding to it lets the compiler see it."""
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

    A blend reads nothing that has no weight: zero times an infinity is not zero.
    """
    return (lam != 0.0) | (blended == 0), (lam != 1.0) | (blended == 0)


@triton.jit
def _mix(own, partner, lam, region, scale, shift):
    """lam*own + (1 - lam)*partner; where a sample is not blended the partner within the box and itself around it. Normalised.

    Bytes are no numbers to convert, of which a GPU converts few a clock: they are the last bits of 2**23 and more.
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
    """Sample i's weight: a number, or one number of the batch or of the sample in memory."""
    if ptr is not None:
        ptr += i * stride
    return scalar(ptr, lam, ACC)


# None of a kernel's numbers is specialised on.
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
    READ_FLAT: tl.constexpr, WRITE_FLAT: tl.constexpr, ALIGN: tl.constexpr, ORDER: tl.constexpr, IN_PLACE: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Shapes: x and y (batch, size_c, size_a, size_h, size_w); index (batch,); lam_ptr () or (batch,), or None where lam is a
    number; box (4,) or (batch, 4) or None; scale and shift (size_c,) or None.

    This program processes BLOCK elements of every step-th sample, and IN_PLACE, where y is x and the index an involution, those
    of their partners too: of a pair, the first does it. A sample whose partner does not exist is filled with NaN.
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
        # (Beyond a sample there may be no channel.)
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
                # All of the pair is read before any of it is written. What is read twice is in the L1.
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
    """Writes a block, or if `source` says where from, its elements in another order."""
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
    READ_FLAT: tl.constexpr, WRITE_FLAT: tl.constexpr, ALIGN: tl.constexpr, ORDER: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Shapes: g and dx (batch, size_c, size_a, size_h, size_w); order (2*batch + 1,), see `_order_kernel`; lam_ptr () or
    (batch,), or None where lam is a number; box (4,) or (batch, 4) or None; scale (size_c,) or None.

    This program processes BLOCK elements of one sample's gradient.
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
    """A mixed sample's gradient, as much of it as goes to the sample itself (OWN) or to its partner."""
    blended, within = region
    if OWN:
        return tl.where(blended, lam * gradient, tl.where(within, 0.0, gradient))
    else:
        return tl.where(blended, (1.0 - lam) * gradient, tl.where(within, gradient, 0.0))


@triton.jit(do_not_specialize=["batch"])
def _order_kernel(index_ptr, order_ptr, batch, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Shapes: index (batch,); order (2*batch + 1,): the samples sorted by their partner, then where each partner's begin.

    This program processes ROWS samples, and as many partners. It counts the samples that come before each: a sort by B^2
    comparisons, which for the batches of a training step take a GPU less than one pass of a radix sort does.
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


# The samples and partners that a program of it processes, those it compares them with at once, and the batches it is for.
ORDER_ROWS, ORDER_BLOCK, ORDER_BATCH = 16, 256, 8192


def order_of(shape: tuple[int, ...], channels_last: bool, longest: int) -> Order:
    """The order of a format, with runs as long as they may be: at most `longest`, that wrap no further than the next row."""
    _, size_c, _, size_h, size_w = shape
    # (A sample without elements has rows of none.)
    inner, outer = (max(size_c, 1), size_w) if channels_last else (max(size_w, 1), size_h)
    run, small = longest, inner < 16
    while run > 1 and small and (inner + run - 2) // inner > outer:
        run //= 2
    wraps = 0 if inner % run == 0 else 1 if inner * outer % run == 0 else 2
    return Order(channels_last, run, wraps, small)


def layout_of(t: torch.Tensor) -> Layout | None:
    """t, (N, C, *spatial), as N, C, A, H and W: an absent axis has size 1, and those between C and H are one.

    None where their strides do not make them one.
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
    kernel: Any, x: torch.Tensor, y: torch.Tensor, lam: Weight, box: torch.Tensor | None, scale: torch.Tensor | None,
    misaligned: int, **constants: Any,
) -> Launch | None:  # fmt: skip
    """The launch of a kernel that fills y from x, in y's order; None where the axes of one have to be copied into others."""
    read, written = layout_of(x), layout_of(y)
    if read is None or written is None:
        return None
    n, channels, *sizes = written.shape
    numel = channels * math.prod(sizes)
    forward, channels_last = kernel is _forward_kernel, written.strides[1] < written.strides[4]
    flat = [layout.is_flat(channels_last) for layout in (read, written)]
    placed = box is not None or scale is not None
    if not placed and read.strides == written.strides and written.is_dense():
        # In whatever order.
        flat = [True, True]
    # Blocks begin at multiples of some elements, or of fewer pixels of all planes.
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
    # As many bytes are read at once as are written; and addresses kept as there are registers for.
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
        READ_FLAT=flat[0], WRITE_FLAT=flat[1], ORDER=order._replace(planes=planes), ACC=wide_of(x.dtype, y.dtype),
        ALIGN=next(align for align in (16, 4, 1) if all(number % align == 0 for number in aligned)),
        BLOCK=BLOCK, num_warps=WARPS, **constants,
    )  # fmt: skip


def mixup(
    x: torch.Tensor, index: torch.Tensor, lam: Weight, box: torch.Tensor | None, scale: torch.Tensor | None,
    shift: torch.Tensor | None, dtype: torch.dtype, memory_format: torch.memory_format, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x, (N, ...), blended, in a dtype and memory format, or written to `out`.

    `out` may be x, for an index that is an involution; else they share no memory.
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
    g: torch.Tensor, index: torch.Tensor, lam: Weight, box: torch.Tensor | None, scale: torch.Tensor | None,
    stride: tuple[int, ...], dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The gradient of an x of such strides and dtype, in x's memory format, from that of the output."""
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
    g: torch.Tensor, index: torch.Tensor, dx: torch.Tensor, lam: Weight, box: torch.Tensor | None, scale: torch.Tensor | None,
    misaligned: int,
) -> tuple[Launch, Launch | None]:  # fmt: skip
    """The launches that order the samples by their partner and that fill dx; no second where axes have to be copied."""
    sort = Launch(
        _order_kernel, -(-(len(index) + 1) // ORDER_ROWS), (len(index),), g.device, not misaligned,
        ROWS=ORDER_ROWS, BLOCK=ORDER_BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return sort, _launch(_backward_kernel, g, dx, lam, box, scale, misaligned)


def _sorted(index: torch.Tensor) -> torch.Tensor:
    """What `_order_kernel` gives, by torch's sort, which a large batch is worth."""
    partners, samples = index.sort(stable=True)
    starts = torch.searchsorted(
        partners, torch.arange(len(index) + 1, device=index.device, dtype=index.dtype)
    )
    return torch.cat((samples, starts)).int()
