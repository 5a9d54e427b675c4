"""MixUp in one pass: a sample and its partner are read, blended (or one pasted into the other), normalised and written.

A sample is a run of `numel` elements, taken in the order in which its input lies in memory. A program has one block of one
sample. The batch is the fastest axis of the grid, so that a sample's block and its partner's are wanted at about the same
time, by whatever permutation, and device memory is asked for each once; the second time an L2 answers.

The backward of an index map is its transpose: the gradient of sample j gathers from every sample that took j for its partner.
They stand side by side in a stable sort of the index; so nothing need be known about the index, and there are no atomics.

Two numbers, per element of e bytes in and f bytes out:
    forward    e + f bytes of device memory (2 e through the L2); 2 loads, 2 multiply-adds, and to normalise 2 loads of a
               channel's numbers, which a block shares, a subtraction and a division
    backward   f + e bytes; for a permutation 2 loads and 2 multiply-adds
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .lanes import device_guard

# Elements a program, and its warps: 16 elements a thread, which is one 128-bit load of bytes and two of half precision.
BLOCK, WARPS = 2048, 4


@triton.jit
def _divide(first, k, size):
    """first + k by `size`, for a scalar `first` and small numbers k: the remainders, and the quotients as (first // size, more).

    There is no integer division of a tile: where a multiple of `size` is passed is a comparison, and how many more are passed a
    product in float32, exact because k is below BLOCK.
    """
    first_remainder = first % size
    over = k - (size - first_remainder)
    more = tl.where(over >= 0, ((over.to(tl.float32) + 0.5) * (1.0 / size)).to(tl.int32) + 1, 0)
    return first_remainder + k - more * size, first // size, more


@triton.jit
def _coordinates(start, k, sizes, CHANNELS_LAST: tl.constexpr):
    """The channel, plane, row and column of the elements start + k of a sample."""
    size_c, size_a, size_h, size_w = sizes
    if CHANNELS_LAST:
        c, start, k = _divide(start, k, size_c)
    w, start, k = _divide(start, k, size_w)
    h, start, k = _divide(start, k, size_h)
    a, start, k = _divide(start, k, size_a)
    if not CHANNELS_LAST:
        c = start + k
    return c, a, h, w


@triton.jit
def _offsets(start, k, place, strides, FLAT: tl.constexpr):
    """Where the elements start + k of a sample lie, counted from its first."""
    if FLAT:
        return start.to(tl.int64) + k
    else:
        offsets = place[0].to(tl.int64) * strides[0]
        for axis in tl.static_range(1, 4):
            offsets += place[axis].to(tl.int64) * strides[axis]
        return offsets


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
        edges = box_ptr + i * box_stride
        y0, y1, x0, x1 = tl.load(edges), tl.load(edges + 1), tl.load(edges + 2), tl.load(edges + 3)
        return y0 < 0, (place[2] >= y0) & (place[2] < y1) & (place[3] >= x0) & (place[3] < x1)


@triton.jit
def _mix(own, partner, lam, region):
    """lam*own + (1 - lam)*partner, or where a sample is not blended the partner within the box and itself around it."""
    blended, within = region
    mixed = lam * own + (1.0 - lam) * partner
    return tl.where(blended, mixed, tl.where(within, partner, own))


@triton.jit
def _normalise(value, mean_ptr, std_ptr, c, mask, BYTES: tl.constexpr):
    """(value - mean)/std of the channels c, of bytes value/255."""
    if BYTES:
        value = value * (1.0 / 255.0)
    if mean_ptr is not None:
        value -= tl.load(mean_ptr + c, mask=mask, other=0.0)
    if std_ptr is not None:
        value /= tl.load(std_ptr + c, mask=mask, other=1.0)
    return value


def numbers_of(*tensors: str) -> list[str]:
    """The names of a kernel's numbers, on none of which it is specialised: sizes and the tensors' strides."""
    return [
        "batch", "numel", "size_c", "size_a", "size_h", "size_w", "lam_stride", "box_stride",
        *(f"{tensor}_stride_{axis}" for tensor in tensors for axis in "ncahw"),
    ]  # fmt: skip


@triton.jit(do_not_specialize=numbers_of("x", "y"))
def _forward_kernel(
    x_ptr, index_ptr, lam_ptr, box_ptr, mean_ptr, std_ptr, y_ptr,
    batch, numel, size_c, size_a, size_h, size_w, lam_stride, box_stride,
    x_stride_n, x_stride_c, x_stride_a, x_stride_h, x_stride_w,
    y_stride_n, y_stride_c, y_stride_a, y_stride_h, y_stride_w,
    X_FLAT: tl.constexpr, Y_FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, IN_PLACE: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Shapes: x and y (batch, size_c, size_a, size_h, size_w); index (batch,); lam () or (batch,); box (4,) or (batch, 4) or
    None; mean and std (size_c,) or None.

    This program processes BLOCK elements of one sample, and IN_PLACE, where y is x and the index an involution, those of its
    partner too: of a pair, the first does it.
    """
    i = tl.program_id(0) % batch
    block = tl.program_id(0) // batch
    j = tl.load(index_ptr + i)
    if IN_PLACE and j < i:
        return
    start = block.to(numel.dtype) * BLOCK
    k = tl.arange(0, BLOCK)
    place = _coordinates(start, k, (size_c, size_a, size_h, size_w), CHANNELS_LAST)
    exists = k < numel // ALIGN * ALIGN - start
    region = _region(box_ptr, i, box_stride, place)
    x_offsets = _offsets(start, k, place, (x_stride_c, x_stride_a, x_stride_h, x_stride_w), X_FLAT)
    y_offsets = _offsets(start, k, place, (y_stride_c, y_stride_a, y_stride_h, y_stride_w), Y_FLAT)
    own = tl.load(_sample(x_ptr, i, x_stride_n, X_FLAT, ALIGN) + x_offsets, mask=exists).to(ACC)
    partner = tl.load(_sample(x_ptr, j, x_stride_n, X_FLAT, ALIGN) + x_offsets, mask=exists).to(ACC)

    BYTES: tl.constexpr = x_ptr.dtype.element_ty == tl.uint8
    to = y_ptr.dtype.element_ty
    value = _mix(own, partner, tl.load(lam_ptr + i * lam_stride).to(ACC), region)
    value = _normalise(value, mean_ptr, std_ptr, place[0], exists, BYTES)
    tl.store(_sample(y_ptr, i, y_stride_n, Y_FLAT, ALIGN) + y_offsets, value.to(to), mask=exists)
    if IN_PLACE:
        region = _region(box_ptr, j, box_stride, place)
        value = _mix(partner, own, tl.load(lam_ptr + j * lam_stride).to(ACC), region)
        value = _normalise(value, mean_ptr, std_ptr, place[0], exists, BYTES)
        tl.store(_sample(y_ptr, j, y_stride_n, Y_FLAT, ALIGN) + y_offsets, value.to(to), mask=exists)


@triton.jit(do_not_specialize=numbers_of("dx", "g"))
def _backward_kernel(
    g_ptr, order_ptr, starts_ptr, lam_ptr, box_ptr, std_ptr, dx_ptr,
    batch, numel, size_c, size_a, size_h, size_w, lam_stride, box_stride,
    dx_stride_n, dx_stride_c, dx_stride_a, dx_stride_h, dx_stride_w,
    g_stride_n, g_stride_c, g_stride_a, g_stride_h, g_stride_w,
    X_FLAT: tl.constexpr, Y_FLAT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Shapes: g and dx (batch, size_c, size_a, size_h, size_w); order (batch,), the samples sorted by their partner; starts
    (batch + 1,), where each partner's begin in it; lam () or (batch,); box (4,) or (batch, 4) or None; std (size_c,) or None.

    This program processes BLOCK elements of one sample's gradient.
    """
    j = tl.program_id(0) % batch
    block = tl.program_id(0) // batch
    start = block.to(numel.dtype) * BLOCK
    k = tl.arange(0, BLOCK)
    place = _coordinates(start, k, (size_c, size_a, size_h, size_w), CHANNELS_LAST)
    exists = k < numel // ALIGN * ALIGN - start
    g_offsets = _offsets(start, k, place, (g_stride_c, g_stride_a, g_stride_h, g_stride_w), Y_FLAT)
    dx_offsets = _offsets(start, k, place, (dx_stride_c, dx_stride_a, dx_stride_h, dx_stride_w), X_FLAT)

    gradient = tl.load(_sample(g_ptr, j, g_stride_n, Y_FLAT, ALIGN) + g_offsets, mask=exists).to(ACC)
    total = _share(gradient, tl.load(lam_ptr + j * lam_stride).to(ACC), _region(box_ptr, j, box_stride, place), True)
    for s in range(tl.load(starts_ptr + j), tl.load(starts_ptr + j + 1)):
        i = tl.load(order_ptr + s)
        gradient = tl.load(_sample(g_ptr, i, g_stride_n, Y_FLAT, ALIGN) + g_offsets, mask=exists).to(ACC)
        total += _share(gradient, tl.load(lam_ptr + i * lam_stride).to(ACC), _region(box_ptr, i, box_stride, place), False)
    if std_ptr is not None:
        total = total / tl.load(std_ptr + place[0], mask=exists, other=1.0)
    tl.store(_sample(dx_ptr, j, dx_stride_n, X_FLAT, ALIGN) + dx_offsets, total.to(dx_ptr.dtype.element_ty), mask=exists)


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


# In training the same few layouts come again and again.
@functools.lru_cache(maxsize=1024)
def plan(x: Layout, y: Layout, lam_stride: int, box_stride: int, positions: bool, double: bool) -> Plan:
    """The launch of an input's layout and an output's. `positions`: whether an element's channel, row or column is asked for."""
    n, *sizes = x.shape
    numel = math.prod(sizes)
    channels_last = x.strides[1] < x.strides[4]
    x_flat, y_flat = x.is_flat(channels_last), y.is_flat(channels_last)
    if not positions and x.strides == y.strides and x.is_dense():
        # In whatever order.
        x_flat = y_flat = True
    aligned = [numel, *(layout.strides[0] for layout, flat in ((x, x_flat), (y, y_flat)) if flat)]
    align = next(align for align in (16, 4, 1) if all(number % align == 0 for number in aligned))
    return Plan(
        grid=(n * -(-numel // BLOCK),),
        numbers=(n, numel, *sizes, lam_stride, box_stride, *x.strides, *y.strides),
        options=dict(
            X_FLAT=x_flat, Y_FLAT=y_flat, CHANNELS_LAST=channels_last, ALIGN=align, ACC=tl.float64 if double else tl.float32,
            BLOCK=BLOCK, num_warps=WARPS,
        ),
    )  # fmt: skip


def plan_of(x: torch.Tensor, y: torch.Tensor, lam: torch.Tensor, box: torch.Tensor | None, channels: torch.Tensor | None) -> Plan:
    """The launch for these batches, (N, C, A, H, W)."""
    return plan(
        Layout(tuple(x.shape), x.stride()),
        Layout(tuple(y.shape), y.stride()),
        lam.stride(0) if lam.ndim else 0,
        4 if box is not None and box.ndim > 1 else 0,
        box is not None or channels is not None,
        torch.float64 in (x.dtype, y.dtype),
    )


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Small tensors as the kernels read them."""
    return [t if t is None else t.contiguous() for t in tensors]


def mixup(
    x: torch.Tensor, index: torch.Tensor, lam: torch.Tensor, box: torch.Tensor | None, mean: torch.Tensor | None,
    std: torch.Tensor | None, y: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Fills y, of x's shape, with x blended. y may be x, for an index that is an involution; else they share no memory."""
    if y.numel() == 0:
        return y
    batch, filled = as_batch(x), as_batch(y)
    index, box, mean, std = contiguous(index, box, mean, std)
    launch = plan_of(batch, filled, lam, box, std)
    in_place = y.data_ptr() == x.data_ptr()
    with device_guard(x):
        _forward_kernel[launch.grid](
            batch, index, lam, box, mean, std, filled, *launch.numbers, **launch.options, IN_PLACE=in_place
        )
    return y if filled.data_ptr() == y.data_ptr() else y.copy_(filled.view(y.shape))


def mixup_backward(
    g: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, lam: torch.Tensor, box: torch.Tensor | None,
    std: torch.Tensor | None, dx: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Fills dx with the gradient of an input of its layout, from that of the output."""
    if dx.numel() == 0:
        return dx
    gradient, filled = as_batch(g), as_batch(dx)
    order, starts, box, std = contiguous(order, starts, box, std)
    launch = plan_of(filled, gradient, lam, box, std)
    with device_guard(dx):
        _backward_kernel[launch.grid](gradient, order, starts, lam, box, std, filled, *launch.numbers, **launch.options)
    return dx if filled.data_ptr() == dx.data_ptr() else dx.copy_(filled.view(dx.shape))
