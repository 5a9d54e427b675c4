"""Max-blur pooling in plain PyTorch: the specification, and the path of the CPU.

The maximum at every position, then the strided blur of those maxima. Two composites of ordinary operations compute the
maxima: `F.max_pool` for eager training, shifted slices for everything else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Window, map_limits, output_size
from .blur_pool import as_image, blur_pool, outside_autocast, pad_amounts, prefers_library_calls

def max_blur_pool(x: Tensor, window: Window) -> Tensor:
    """Anti-aliased max pooling of x, (N, C, *spatial), to nn.MaxPool2d's output size.

    float16, bfloat16, float32 or float64 in and out, in x's memory format. The maximum is exact, sums are float32
    (float64 for float64) and are rounded once. Of equal maxima the first in row-major order takes the gradient,
    and a NaN wins, as in PyTorch. Source: Zhang, "Making Convolutional Networks Shift-Invariant Again" (2019), with
    windows that the image's border cuts, instead of padding, by default.
    """
    if window.rank == 1:
        return max_blur_pool(x.unsqueeze(2), as_image(window)).squeeze(2)
    before, after, blur = _split(window, x.shape[2:])
    with outside_autocast(x):
        maxima = _maxima(x, window, before, after)
        if all(s == 1 and taps == (1.0,) for s, taps in zip(window.stride, window.taps)):
            y = maxima
        else:
            y = blur_pool(maxima, blur)
    if window.ceil_mode:
        for axis, size in enumerate(x.shape[2:]):
            y = y.narrow(axis - window.rank, 0, output_size(window, axis, size))
    return y


def _split(window: Window, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], Window]:
    """How far beyond each end of x the maxima reach, and the blur of these maxima.

    What the blur reads depends on `size % stride`. Here it may read up to `stride - 1` positions more than it needs, so that
    paddings are constants, which export asks for: in floor mode these do not make another output.
    """
    before, after, lead, trail = [], [], [], []
    for axis, size in enumerate(sizes):
        last_hole, p = window.reach(axis) - 1, window.padding[axis]
        more = window.trail[axis] + (window.stride[axis] - 1 if window.ceil_mode else 0)
        if window.padding_mode == "partial":
            before.append(min(p + window.lead[axis], last_hole))
            after.append(min(p + more, last_hole))
            lead.append(p + window.lead[axis] - before[-1])
            trail.append(p + more - after[-1])
        else:
            before.append(p)
            # The inner map has one position at least, even where no window fits.
            after.append(map_limits(window, axis, size)[1] - size + last_hole + 1 - p)
            lead.append(window.lead[axis])
            trail.append(more)
    ones, mode = (1,) * window.rank, "replicate" if window.padding_mode == "partial" else window.padding_mode
    blur = Window(ones, window.stride, (0,) * window.rank, ones, False, window.taps, tuple(lead), tuple(trail), mode)
    return tuple(before), tuple(after), blur


def _maxima(x: Tensor, window: Window, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    """The maximum of every window that fits in x extended by `before` and `after` positions that never win."""
    if not window.takes_max:
        return x
    max_pool = F.max_pool2d if window.rank == 2 else F.max_pool3d
    differentiated = _is_differentiated(x)
    undilated = all(d == 1 for d in window.dilation)
    if prefers_library_calls(x):
        if differentiated and before == after and all(2 * p <= k for p, k in zip(before, window.kernel_size)):
            return max_pool(x, window.kernel_size, 1, before, window.dilation)
        if undilated:
            # Each window holds the element that its positions outside would repeat: they change no maximum.
            x = _pad(x, before, after, mode="replicate")
            before = (0,) * window.rank
            if differentiated:
                return max_pool(x, window.kernel_size, 1)
            return _slide(x, window, before, differentiated)
    return _slide(_pad(x, before, after, value=float("-inf")), window, before, differentiated)


def _is_differentiated(x: Tensor) -> bool:
    """Whether someone may ask for a derivative of what is computed from x, in any mode of differentiation."""
    if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active():
        return True
    return (x.requires_grad and torch.is_grad_enabled()) or torch.autograd.forward_ad._current_level >= 0


def _pad(x: Tensor, before: tuple[int, ...], after: tuple[int, ...], **border: Any) -> Tensor:
    amounts = pad_amounts(before, after)
    return F.pad(x, amounts, **border) if any(amounts) else x


def _slide(x: Tensor, window: Window, before: tuple[int, ...], differentiated: bool) -> Tensor:
    """The maxima of all windows in x, of which the first `before` positions of each axis are padding.

    Axis by axis, the innermost first, which finds the first maximum in row-major order.
    """
    for axis in reversed(range(window.rank)):
        dim, step = axis - window.rank, window.dilation[axis]
        windows = x.shape[dim] - window.reach(axis) + 1
        best = x.narrow(dim, 0, windows)
        for offset in range(step, window.reach(axis), step):
            value = x.narrow(dim, offset, windows)
            if not differentiated:
                best = torch.maximum(best, value)
                continue
            # Unlike torch.maximum, whose gradient is shared among equals; `value != value` is a NaN.
            wins = (value > best) | (value != value)
            padded = before[axis] + step - offset
            if padded > 0:
                # All earlier samples of these windows were padding, to which no gradient may go.
                first = torch.arange(windows, device=x.device) < padded
                wins = wins | first.view(-1, *(1,) * (window.rank - 1 - axis))
            best = torch.where(wins, value, best)
        x = best
    return x
