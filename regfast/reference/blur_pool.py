"""The strided depthwise blur in plain PyTorch: the specification and the path of the CPU.

Tensors are batched, (N, C, *spatial). A `Window` with a kernel_size of 1 and no padding says what
to compute.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.autograd import is_compiled, is_differentiated, is_forward_mode, is_transformed
from .._core.dispatch import is_watched
from .._core.geometry import Window, as_image, output_shape
from .._core.layout import is_channels_last, with_format
from .._core.precision import accumulator, gradient_dtype, outside_autocast
from .._core.taps import binomial


def blur_pool(x: Tensor, window: Window) -> Tensor:
    """Extend x by its border, correlate each channel with the taps, keep every `stride`-th output.

    x is (N, C, *spatial) in float16, bfloat16, float32 or float64; the result has x's dtype and
    memory format. Sums are float32 (float64 for float64) and are rounded once. An activation of the
    window is applied to x first. Source: Zhang, "Making Convolutional Networks Shift-Invariant
    Again" (2019).
    """
    output_shape(window, x.shape)
    if window.rank == 1:
        return blur_pool(x.unsqueeze(2), as_image(window, None, 0)).squeeze(2)
    if window.activation == "relu":
        x = F.relu(x)
    with outside_autocast(x):
        wide = _extend(x.to(gradient_dtype(x)), window).to(accumulator(x.dtype))
        if is_small(x) and averages(window):
            return in_format_of(x, average(wide, averages(window)).to(x.dtype))
        blur = _convolve if prefers_convolution(x) else _sum_slices
        return in_format_of(x, blur(wide, window).to(x.dtype))


def prefers_convolution(x: Tensor) -> bool:
    """Return whether a grouped convolution blurs x faster than strided slices.

    A compiler fuses slices, but only in a forward: their backward writes an image of zeros per tap.
    Devices other than the CPU may compute convolutions in TF32, which is no float32 sum. The
    tangent of a convolution is NaN wherever its input is infinite, because PyTorch adds the input
    times the weight's tangent, zero. Inductor (2.13) cannot lower a convolution of volumes with
    symbolic sizes.
    """
    fused = is_compiled() and (x.ndim == 5 or not is_differentiated(x))
    return x.device.type == "cpu" and not is_forward_mode() and not fused


# Elements of a small image: calls of operators take most of its time, a convolution's above all.
SMALL = 2**14


def is_small(x: Tensor) -> bool:
    """Return whether x is small and computed eagerly on a CPU.

    A traced graph must serve every size.
    """
    return x.is_cpu and not is_watched(x) and not is_transformed() and x.numel() <= SMALL


# Per average, the kernel_size and the stride.
Averages = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@functools.lru_cache(maxsize=256)
def averages(window: Window) -> Averages:
    """Return a blur of images by binomial taps as repeated averages of two, which are its factors.

    Other taps, and more taps than this pays for, give an empty tuple.
    """
    sizes = [len(taps) for taps in window.taps]
    if (
        window.rank != 2
        or not 1 < max(sizes) <= 5
        or any(taps != binomial(len(taps)) for taps in window.taps)
    ):
        return ()
    kernels = [tuple(2 if step < size else 1 for size in sizes) for step in range(1, max(sizes))]
    return (*((kernel, (1, 1)) for kernel in kernels[:-1]), (kernels[-1], window.stride))


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """Return y in x's memory format, which a few operations lose.

    Transforms of torch.func have no memory formats.
    """
    return y if torch._C._are_functorch_transforms_active() else with_format(y, is_channels_last(x))


def _extend(x: Tensor, window: Window) -> Tensor:
    """Return x with `lead` and `trail` more positions per axis, filled by the border mode."""
    amounts = pad_amounts(window.lead, window.trail)
    if not any(amounts):
        return x
    if window.padding_mode == "zeros":
        return F.pad(x, amounts)
    extend = _reflect if window.padding_mode == "reflect" else _replicate
    return extend(x, window.lead, window.trail)


def _replicate(x: Tensor, lead: Sequence[int], trail: Sequence[int]) -> Tensor:
    """Return x with its ends repeated.

    F.pad(mode="replicate") does not serve: Inductor assumes a wrong layout for its gradient.
    """
    for dim, before, after in zip(range(2, x.ndim), lead, trail):
        ends = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
        first, last = (end.repeat_interleave(n, dim) for end, n in zip(ends, (before, after)))
        x = torch.cat([first, x, last], dim) if before or after else x
    return x


def _reflect(x: Tensor, lead: Sequence[int], trail: Sequence[int]) -> Tensor:
    """Return x extended by reflection at its ends.

    F.pad reflects each element once. The loop extends x until every position is filled.
    """
    single = [size == 1 for size in x.shape[2:]]
    if any(single):
        # A single element can only be repeated.
        x = _replicate(
            x, *([n if alone else 0 for n, alone in zip(pads, single)] for pads in (lead, trail))
        )
        lead, trail = (
            [0 if alone else n for n, alone in zip(pads, single)] for pads in (lead, trail)
        )
    while any(lead) or any(trail):
        near, far = (
            [n if n < size else size - 1 for n, size in zip(pads, x.shape[2:])]
            for pads in (lead, trail)
        )
        x = F.pad(x, pad_amounts(near, far), mode="reflect")
        lead = [n - seen for n, seen in zip(lead, near)]
        trail = [n - seen for n, seen in zip(trail, far)]
    return x


def pad_amounts(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return F.pad's argument: pairs, the last axis first."""
    return [amount for pair in zip(reversed(before), reversed(after)) for amount in pair]


def average(x: Tensor, steps: Averages) -> Tensor:
    """Compute a blur by its `averages`."""
    for kernel, stride in steps:
        x = F.avg_pool2d(x, kernel, stride)
    return x


def _convolve(x: Tensor, window: Window) -> Tensor:
    """Compute the blur as one grouped convolution."""
    channels = _constant(x.shape[1])
    products = [math.prod(taps) for taps in itertools.product(*window.taps)]
    kernel = torch.tensor(products, dtype=x.dtype, device=x.device).view(
        1, 1, *map(len, window.taps)
    )
    convolve = F.conv2d if window.rank == 2 else F.conv3d
    return convolve(
        x, kernel.expand(channels, *kernel.shape[1:]), stride=window.stride, groups=channels
    )


def _constant(size: Any) -> int:
    """Return a size as an int.

    torch.jit.trace records it as a tensor, and ONNX convolves with constants.
    """
    if not isinstance(size, Tensor):
        return size
    with warnings.catch_warnings():
        # The warning says that the trace fixes the number of channels; a network fixes it too.
        warnings.simplefilter("ignore")
        return int(size)


def _sum_slices(x: Tensor, window: Window) -> Tensor:
    """Compute the blur as weighted sums of strided slices.

    The outermost axis is first: slices of rows are the cheapest.
    """
    for axis, (taps, stride) in enumerate(zip(window.taps, window.stride)):
        dim = axis - window.rank
        outputs = (x.shape[dim] - len(taps)) // stride + 1
        terms = [tap * _every(x, dim, j, stride, outputs) for j, tap in enumerate(taps)]
        x = functools.reduce(torch.add, terms)
    return x


def _every(x: Tensor, dim: int, start: int, stride: int, count: int) -> Tensor:
    """Return `count` elements of one axis, `stride` apart."""
    every: list[Any] = [slice(None)] * x.ndim
    every[dim] = slice(start, start + stride * (count - 1) + 1, stride)
    return x[tuple(every)]
