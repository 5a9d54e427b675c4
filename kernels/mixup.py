"""MixUp in one pass: a sample and its partner are read, blended (or one pasted into the other), normalised and written.

A sample is `numel` elements, taken in the order in which the output lies in memory; a program has one block of one sample. The
batch is the fastest axis of the grid, so that a sample's block and its partner's are wanted at about the same time, by whatever
permutation, and device memory is asked for each once; the second time an L2 answers.

The backward of an index map is its transpose: the gradient of sample j gathers from every sample that took j for its partner.
They stand side by side in a stable sort of the index; so nothing need be known about the index, and there are no atomics.

Two numbers, per element of e bytes in and f bytes out:
    forward    e + f bytes of device memory (2 e through the L2); 2 loads, 2 multiply-adds, and to normalise one more, with 2
               loads of a channel's numbers, which the elements of a run share where channels are not innermost
    backward   f + e bytes; for a permutation 2 loads and 2 multiply-adds
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .lanes import contiguous, device_guard

# Elements a program, and its warps: 16 elements a thread, which is one 128-bit load of bytes and two of half precision.
BLOCK, WARPS = 2048, 4


class Order(NamedTuple):
    """In which order a launch takes a sample's elements, known at compile time.

    Channels innermost or outermost; `run` elements at a time, a power of two. `wraps`: on how many axes a run may pass the end,
    the innermost first; and, if `small`, that one several times, being shorter than a run.
    """

    channels_last: bool
    run: int
    wraps: int
    small: bool


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
    if ORDER.channels_last:
        sizes = (sizes[0], sizes[3], sizes[2], sizes[1])
    else:
        sizes = (sizes[3], sizes[2], sizes[1], sizes[0])
    p0, rest, more = _divide(start, k, sizes[0])
    p1, rest, more = _divide(rest, more, sizes[1])
    p2, rest, more = _divide(rest, more, sizes[2])
    p3 = rest + more
    p0 += within
    if ORDER.wraps > 0:
        p0, times = _carry(p0, sizes[0], ORDER.small)
        p1 += times
    if ORDER.wraps > 1:
        p1, times = _carry(p1, sizes[1], False)
        p2, times = _carry(p2 + times, sizes[2], False)
        p3 += times
    if ORDER.channels_last:
        return k + within, (p0, p3, p2, p1)
    else:
        return k + within, (p3, p2, p1, p0)


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
def _mix(own, partner, lam, region, unit):
    """lam*own + (1 - lam)*partner; where a sample is not blended the partner within the box and itself around it. By `unit`."""
    blended, within = region
    mixed = (lam * unit) * own + ((1.0 - lam) * unit) * partner
    return tl.where(blended, mixed, tl.where(within, partner, own) * unit)


@triton.jit
def _scale(value, scale_ptr, shift_ptr, c, channels):
    """scale*value + shift, by the channels c, which beyond the sample may be none."""
    c = tl.minimum(c, channels - 1)
    if scale_ptr is not None:
        value *= tl.load(scale_ptr + c)
    if shift_ptr is not None:
        value += tl.load(shift_ptr + c)
    return value


def numbers_of(*tensors: str) -> list[str]:
    """The names of a kernel's numbers, on none of which it is specialised: sizes and the tensors' strides."""
    return [
        "batch", "numel", "size_c", "size_a", "size_h", "size_w", "lam_stride", "box_stride",
        *(f"{tensor}_stride_{axis}" for tensor in tensors for axis in "ncahw"),
    ]  # fmt: skip


@triton.jit(do_not_specialize=numbers_of("x", "y"))
def _forward_kernel(
    x_ptr, index_ptr, lam_ptr, box_ptr, scale_ptr, shift_ptr, y_ptr,
    batch, numel, size_c, size_a, size_h, size_w, lam_stride, box_stride,
    x_stride_n, x_stride_c, x_stride_a, x_stride_h, x_stride_w,
    y_stride_n, y_stride_c, y_stride_a, y_stride_h, y_stride_w,
    READ_FLAT: tl.constexpr, WRITE_FLAT: tl.constexpr, ALIGN: tl.constexpr, ORDER: tl.constexpr, IN_PLACE: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Shapes: x and y (batch, size_c, size_a, size_h, size_w); index (batch,); lam () or (batch,); box (4,) or (batch, 4) or
    None; scale and shift (size_c,) or None.

    This program processes BLOCK elements of one sample, and IN_PLACE, where y is x and the index an involution, those of its
    partner too: of a pair, the first does it. A sample whose partner does not exist is filled with NaN.
    """
    i = tl.program_id(0) % batch
    block = tl.program_id(0) // batch
    j = tl.load(index_ptr + i)
    known = (j >= 0) & (j < batch)
    if IN_PLACE and (known & (j < i)):
        return
    start = block.to(numel.dtype) * BLOCK
    k, place = _elements(start, (size_c, size_a, size_h, size_w), ORDER, BLOCK)
    exists = k < numel // ALIGN * ALIGN - start
    x_offsets = _offsets(start, k, place, (x_stride_c, x_stride_a, x_stride_h, x_stride_w), READ_FLAT, ORDER)
    y_offsets = _offsets(start, k, place, (y_stride_c, y_stride_a, y_stride_h, y_stride_w), WRITE_FLAT, ORDER)
    own = tl.load(_sample(x_ptr, i, x_stride_n, READ_FLAT, ALIGN) + x_offsets, mask=exists).to(ACC)
    partner = tl.load(_sample(x_ptr, j, x_stride_n, READ_FLAT, ALIGN) + x_offsets, mask=exists & known).to(ACC)

    UNIT: tl.constexpr = 1.0 / 255.0 if x_ptr.dtype.element_ty == tl.uint8 else 1.0
    unit = tl.where(known, tl.full((), UNIT, ACC), float("nan"))
    to = y_ptr.dtype.element_ty
    value = _mix(own, partner, tl.load(lam_ptr + i * lam_stride).to(ACC), _region(box_ptr, i, box_stride, place), unit)
    value = _scale(value, scale_ptr, shift_ptr, place[0], size_c)
    tl.store(_sample(y_ptr, i, y_stride_n, WRITE_FLAT, ALIGN) + y_offsets, value.to(to), mask=exists)
    if IN_PLACE and known:
        value = _mix(partner, own, tl.load(lam_ptr + j * lam_stride).to(ACC), _region(box_ptr, j, box_stride, place), unit)
        value = _scale(value, scale_ptr, shift_ptr, place[0], size_c)
        tl.store(_sample(y_ptr, j, y_stride_n, WRITE_FLAT, ALIGN) + y_offsets, value.to(to), mask=exists)


@triton.jit(do_not_specialize=numbers_of("g", "dx"))
def _backward_kernel(
    g_ptr, samples_ptr, starts_ptr, lam_ptr, box_ptr, scale_ptr, dx_ptr,
    batch, numel, size_c, size_a, size_h, size_w, lam_stride, box_stride,
    g_stride_n, g_stride_c, g_stride_a, g_stride_h, g_stride_w,
    dx_stride_n, dx_stride_c, dx_stride_a, dx_stride_h, dx_stride_w,
    READ_FLAT: tl.constexpr, WRITE_FLAT: tl.constexpr, ALIGN: tl.constexpr, ORDER: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Shapes: g and dx (batch, size_c, size_a, size_h, size_w); samples (batch,), sorted by their partner; starts (batch + 1,),
    where each partner's begin in it; lam () or (batch,); box (4,) or (batch, 4) or None; scale (size_c,) or None.

    This program processes BLOCK elements of one sample's gradient.
    """
    j = tl.program_id(0) % batch
    block = tl.program_id(0) // batch
    start = block.to(numel.dtype) * BLOCK
    k, place = _elements(start, (size_c, size_a, size_h, size_w), ORDER, BLOCK)
    exists = k < numel // ALIGN * ALIGN - start
    g_offsets = _offsets(start, k, place, (g_stride_c, g_stride_a, g_stride_h, g_stride_w), READ_FLAT, ORDER)
    dx_offsets = _offsets(start, k, place, (dx_stride_c, dx_stride_a, dx_stride_h, dx_stride_w), WRITE_FLAT, ORDER)

    gradient = tl.load(_sample(g_ptr, j, g_stride_n, READ_FLAT, ALIGN) + g_offsets, mask=exists).to(ACC)
    total = _share(gradient, tl.load(lam_ptr + j * lam_stride).to(ACC), _region(box_ptr, j, box_stride, place), True)
    for s in range(tl.load(starts_ptr + j), tl.load(starts_ptr + j + 1)):
        i = tl.load(samples_ptr + s)
        gradient = tl.load(_sample(g_ptr, i, g_stride_n, READ_FLAT, ALIGN) + g_offsets, mask=exists).to(ACC)
        total += _share(gradient, tl.load(lam_ptr + i * lam_stride).to(ACC), _region(box_ptr, i, box_stride, place), False)
    total = _scale(total, scale_ptr, None, place[0], size_c)
    tl.store(_sample(dx_ptr, j, dx_stride_n, WRITE_FLAT, ALIGN) + dx_offsets, total.to(dx_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _share(gradient, lam, region, OWN: tl.constexpr):
    """A mixed sample's gradient, as much of it as goes to the sample itself (OWN) or to its partner."""
    blended, within = region
    if OWN:
        return tl.where(blended, lam * gradient, tl.where(within, 0.0, gradient))
    else:
        return tl.where(blended, (1.0 - lam) * gradient, tl.where(within, gradient, 0.0))


class Layout(NamedTuple):
    """A batch as a launch sees it, without its data: sizes and strides of N, C, A, H and W."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def is_flat(self, channels_last: bool) -> bool:
        """Whether a sample's elements, in the order of the format, are a run in memory."""
        expected = 1
        for axis in (1, 4, 3, 2) if channels_last else (4, 3, 2, 1):
            if self.shape[axis] > 1 and self.strides[axis] != expected:
                return False
            expected *= self.shape[axis]
        return True

    def is_dense(self) -> bool:
        """Whether a sample's elements, in some order, are a run in memory."""
        expected = 1
        for stride, size in sorted(zip(self.strides[1:], self.shape[1:])):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True


def as_batch(t: torch.Tensor) -> torch.Tensor:
    """t as (N, C, A, H, W): an axis that it has not got has size 1, those between C and H are one (which may take a copy)."""
    n, *sizes = t.shape
    channels, *spatial = sizes or [1]
    height = spatial[-2] if len(spatial) > 1 else 1
    width = spatial[-1] if spatial else 1
    return t.reshape(n, channels, math.prod(spatial[:-2]), height, width)


class Plan(NamedTuple):
    """All of a launch but its tensors: the grid, the kernel's numbers in their order, and its constants."""

    grid: tuple[int]
    numbers: tuple[int, ...]
    options: dict[str, Any]


def order_of(shape: tuple[int, ...], channels_last: bool, flat: bool) -> Order:
    """The order of a format, with runs as long as they may be: as many elements as wrap no further than the next row.

    At most 16 of them; 8 where they are not `flat`, as the addresses of longer ones would be more than there are registers for.
    """
    _, size_c, _, size_h, size_w = shape
    inner, outer = (size_c, size_w) if channels_last else (size_w, size_h)
    run, small = 16 if flat else 8, inner < 16
    while run > 1 and small and (inner + run - 2) // inner > outer:
        run //= 2
    wraps = 0 if inner % run == 0 else 1 if inner * outer % run == 0 else 2
    return Order(channels_last, run, wraps, small)


# In training the same few layouts come again and again.
@functools.lru_cache(maxsize=1024)
def plan(read: Layout, written: Layout, lam_stride: int, box_stride: int, positions: bool, double: bool) -> Plan:
    """The launch for a layout that is read and one that is written, in the order of the latter.

    `positions`: whether an element's channel, row or column is asked for.
    """
    n, *sizes = written.shape
    numel = math.prod(sizes)
    channels_last = written.strides[1] < written.strides[4]
    flat = [layout.is_flat(channels_last) for layout in (read, written)]
    if not positions and read.strides == written.strides and written.is_dense():
        # In whatever order.
        flat = [True, True]
    needed = positions or not all(flat)
    aligned = [numel, *(layout.strides[0] for layout, is_flat in zip((read, written), flat) if is_flat)]
    return Plan(
        grid=(n * -(-numel // BLOCK),),
        numbers=(n, numel, *sizes, lam_stride, box_stride, *read.strides, *written.strides),
        options=dict(
            READ_FLAT=flat[0],
            WRITE_FLAT=flat[1],
            ALIGN=next(align for align in (16, 4, 1) if all(number % align == 0 for number in aligned)),
            ORDER=order_of(written.shape, channels_last, all(flat)) if needed else Order(False, 16, 0, False),
            ACC=tl.float64 if double else tl.float32,
            BLOCK=BLOCK,
            num_warps=WARPS,
        ),
    )


def plan_of(
    read: torch.Tensor, written: torch.Tensor, lam: torch.Tensor, box: torch.Tensor | None, channels: torch.Tensor | None
) -> Plan:
    """The launch for these batches, (N, C, A, H, W)."""
    return plan(
        Layout(tuple(read.shape), read.stride()),
        Layout(tuple(written.shape), written.stride()),
        lam.stride(0) if lam.ndim else 0,
        4 if box is not None and box.ndim > 1 else 0,
        box is not None or channels is not None,
        torch.float64 in (read.dtype, written.dtype),
    )


def mixup(
    x: torch.Tensor, index: torch.Tensor, lam: torch.Tensor, box: torch.Tensor | None, scale: torch.Tensor | None,
    shift: torch.Tensor | None, y: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Fills y, of x's shape, with x blended. y may be x, for an index that is an involution; else they share no memory."""
    if y.numel() == 0:
        return y
    batch, filled = as_batch(x), as_batch(y)
    index, box, scale, shift = contiguous(index, box, scale, shift)
    launch = plan_of(batch, filled, lam, box, scale)
    in_place = y.data_ptr() == x.data_ptr()
    with device_guard(x):
        _forward_kernel[launch.grid](
            batch, index, lam, box, scale, shift, filled, *launch.numbers, **launch.options, IN_PLACE=in_place
        )
    return y if filled.data_ptr() == y.data_ptr() else y.copy_(filled.view(y.shape))


def mixup_backward(
    g: torch.Tensor, samples: torch.Tensor, starts: torch.Tensor, lam: torch.Tensor, box: torch.Tensor | None,
    scale: torch.Tensor | None, dx: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Fills dx with the gradient of an input of its layout, from that of the output."""
    if dx.numel() == 0:
        return dx
    gradient, filled = as_batch(g), as_batch(dx)
    samples, starts, box, scale = contiguous(samples, starts, box, scale)
    launch = plan_of(gradient, filled, lam, box, scale)
    with device_guard(dx):
        _backward_kernel[launch.grid](gradient, samples, starts, lam, box, scale, filled, *launch.numbers, **launch.options)
    return dx if filled.data_ptr() == dx.data_ptr() else dx.copy_(filled.view(dx.shape))
