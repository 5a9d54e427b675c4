"""Max-blur pooling in plain PyTorch: the specification and the path of the CPU.

It computes the maximum at every position, then the strided blur of those maxima. Each step is a
library call or a composite of shifted slices: `prefers_max_pool` and `prefers_convolution` choose.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.autograd import is_compiled, is_differentiated, is_transformed
from .._core.dispatch import is_watched
from .._core.geometry import Window, as_image, map_limits, output_shape, output_size
from .._core.layout import is_channels_last, with_format
from .._core.precision import WIDE, gradient_dtype, outside_autocast
from .blur_pool import SMALL, averages, blur_pool, in_format_of, pad_amounts
from .small import Small


def max_blur_pool(x: Tensor, window: Window) -> Tensor:
    """Max-pool x, (N, C, *spatial), with anti-aliasing, to nn.MaxPool2d's output size.

    x is float16, bfloat16, float32 or float64; the result has x's dtype and memory format. The
    maximum is exact. Sums are float32 (float64 for float64) and are rounded once. As in PyTorch,
    the first of equal maxima in row-major order takes the gradient, and a NaN wins. The window's
    activation is applied to the maxima. Source: Zhang, "Making Convolutional Networks
    Shift-Invariant Again" (2019); by default the image's border cuts the windows, instead of
    padding.
    """
    if window.rank == 1:
        output_shape(window, x.shape)
        return max_blur_pool(x.unsqueeze(2), as_image(window, None, 0)).squeeze(2)
    if x.ndim != 4 or not x.is_cpu or is_watched(x) or is_transformed():
        output_shape(window, x.shape)
        return _in_its_format(x, window)
    prepared = _prepare_small(window, x.shape) if x.numel() <= SMALL and x.dtype in WIDE else None
    if prepared is not None:
        with outside_autocast(x):
            return prepared.pool(x)
    output_shape(window, x.shape)
    return _in_parts(x, window)


@functools.lru_cache(maxsize=1024)
def _prepare_small(window: Window, shape: torch.Size) -> Small | None:
    """Return how to pool small images of a shape, or None if `Small` cannot."""
    output_shape(window, shape)
    before, after, blur = split(window, shape[2:])
    undilated = all(d == 1 for d in window.dilation)
    if window.ceil_mode or not undilated or any(blur.lead) or any(blur.trail) or not averages(blur):
        return None
    return Small.of(window, before, after)


# Elements of a part: its maxima, their positions and their gradients stay in a core's cache and in
# reused memory.
_PART = 2**21


def _in_parts(x: Tensor, window: Window) -> Tensor:
    """Run `_in_its_format` on some images at a time, for eager calls.

    With enough channels to fill a vector, PyTorch's max pooling takes channels_last images: it is
    vectorised only over innermost channels, and that gains more than the copies cost.
    """
    parts, innermost = [], x.shape[1] >= 8 and prefers_max_pool(x)
    for part in x.split(max(_PART // x.shape[1:].numel(), 1)) if x.numel() > _PART else (x,):
        if innermost:
            part = part.contiguous(memory_format=torch.channels_last)
        parts.append(_in_its_format(part, window))
    return with_format(torch.cat(parts) if len(parts) > 1 else parts[0], is_channels_last(x))


def _in_its_format(x: Tensor, window: Window) -> Tensor:
    """Compute `max_blur_pool` of images and volumes in their own memory format."""
    before, after, blur = split(window, x.shape[2:])
    with outside_autocast(x):
        maxima = all_maxima(x, window, before, after, prefers_max_pool(x), gradient_dtype(x))
        if window.activation == "relu":
            # In place: nothing else reads maxima that were computed here.
            maxima = F.relu(maxima, inplace=maxima is not x)
        # The result must not share x's memory.
        y = maxima.clone() if maxima is x and blur.is_identity else maxima
        y = (y if blur.is_identity else blur_pool(y, blur)).to(x.dtype)
    if window.ceil_mode:
        for axis, size in enumerate(x.shape[2:]):
            y = y.narrow(axis - window.rank, 0, output_size(window, axis, size))
    # Padding and slices lose x's format on some devices.
    return in_format_of(x, y)


def split(
    window: Window, sizes: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], Window]:
    """Return how far the maxima reach beyond each end of x, and the blur of these maxima.

    The positions that the blur needs depend on `size % stride`. Export needs constant paddings: the
    blur may therefore read up to `stride - 1` positions more. In floor mode these add no output.
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
            # Keep at least one maximum, even if no window fits.
            after.append(map_limits(window, axis, size)[1] - size + last_hole + 1 - p)
            lead.append(window.lead[axis])
            trail.append(more)
    ones, mode = (
        (1,) * window.rank,
        "replicate" if window.padding_mode == "partial" else window.padding_mode,
    )
    blur = Window(
        ones,
        window.stride,
        (0,) * window.rank,
        ones,
        False,
        window.taps,
        tuple(lead),
        tuple(trail),
        mode,
    )
    return tuple(before), tuple(after), blur


def all_maxima(
    x: Tensor,
    window: Window,
    before: tuple[int, ...],
    after: tuple[int, ...],
    by_library: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return the maximum of every window in x extended by `before` and `after` positions.

    The added positions never win. With `by_library`, PyTorch's max pooling computes the maxima if
    it has such windows. The result is in `dtype`, and so is the sum of its gradient.
    """
    if not window.takes_max:
        return x
    undilated = all(d == 1 for d in window.dilation)
    if (
        undilated
        and not by_library
        and is_compiled()
        and is_differentiated(x)
        and not is_transformed()
    ):
        return _CompiledMaxima.apply(x, window, before, after, dtype)
    x = x.to(dtype)
    if by_library:
        max_pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[window.rank - 1]
        # PyTorch's max pooling points outside the image if a dilated window holds only padding.
        holds_something = undilated or not any(before)
        if (
            holds_something
            and before == after
            and all(2 * p <= k for p, k in zip(before, window.kernel_size))
        ):
            return max_pool(x, window.kernel_size, 1, before, window.dilation)
        if undilated:
            return max_pool(_repeat_ends(x, before, after), window.kernel_size, 1)
    if not is_differentiated(x):
        # Repeating the ends is faster than a constant in eager F.pad, and slower compiled.
        pad = _repeat_ends if undilated and not is_compiled() else _pad_lowest
        return _slide(pad(x, before, after), window)
    return _slide(_pad_lowest(x, before, after), window, before)


def prefers_max_pool(x: Tensor) -> bool:
    """Return whether PyTorch's max pooling of x is faster than shifted slices.

    A compiler fuses slices. Eager slices win where no arg-max is needed: max pooling always finds
    it.
    """
    return x.is_cpu and not is_compiled() and is_differentiated(x)


def _repeat_ends(x: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    """Return x with its ends repeated, which changes no maximum.

    An undilated window that holds an added position also holds the end that it repeats.
    """
    amounts = pad_amounts(before, after)
    return F.pad(x, amounts, mode="replicate") if any(amounts) else x


def _pad_lowest(x: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    amounts = pad_amounts(before, after)
    return F.pad(x, amounts, value=float("-inf")) if any(amounts) else x


def _slide(x: Tensor, window: Window, before: tuple[int, ...] | None = None) -> Tensor:
    """Return the maxima of all windows in x; differentiable if `before` is given.

    `before` is the number of padding positions before the image, per axis. The innermost axis is
    first, which finds the first maximum in row-major order.
    """
    for axis in reversed(range(window.rank)):
        samples = _samples(x, window, axis)
        best = samples[0]
        for i, value in enumerate(samples[1:], start=1):
            if before is None:
                best = torch.maximum(best, value)
            else:
                # An equal value replaces padding too: padding must not take a gradient.
                padding_until = before[axis] - (i - 1) * window.dilation[axis]
                best = torch.where(
                    _wins(value, best) | (_positions(x, window, axis) < padding_until), value, best
                )
        x = best
    return x


def _samples(x: Tensor, window: Window, axis: int) -> list[Tensor]:
    """Return what the windows along one axis hold: the first samples, the second, and so on."""
    dim, step = axis - window.rank, window.dilation[axis]
    windows = x.shape[dim] - window.reach(axis) + 1
    return [x.narrow(dim, i * step, windows) for i in range(window.kernel_size[axis])]


def _positions(x: Tensor, window: Window, axis: int) -> Tensor:
    """Return the numbers of the windows along one axis."""
    windows = x.shape[axis - window.rank] - window.reach(axis) + 1
    return torch.arange(windows, device=x.device).view(-1, *(1,) * (window.rank - 1 - axis))


def _wins(value: Tensor, best: Tensor) -> Tensor:
    """Return where `value` replaces `best`, by PyTorch's rule.

    torch.maximum would share its gradient among equals. Compilers vectorise `!=`, but not isnan.
    """
    return (value > best) | (value != value)


class _CompiledMaxima(torch.autograd.Function):
    """`all_maxima` of undilated windows, with a backward that a compiler fuses.

    Each element gathers from its windows. Autograd's backward of slices would write one image per
    slice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        window: Window,
        before: tuple[int, ...],
        after: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.window, ctx.before, ctx.after = window, before, after
        return _slide(_pad_lowest(x, before, after), window).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        # Take every window that touches the image: each element is then in equally many.
        before, after = (
            [k - 1 - p for k, p in zip(ctx.window.kernel_size, pads)]
            for pads in (ctx.before, ctx.after)
        )
        amounts = pad_amounts(before, after)
        grad = F.pad(grad, amounts) if any(amounts) else grad
        return _gather(x, grad, ctx.window, ctx.window.rank - 1).to(x.dtype), None, None, None, None


def _gather(x: Tensor, grad: Tensor, window: Window, axis: int) -> Tensor:
    """Return the gradient of x, given that of the maxima along `axis` and all axes before it."""
    if axis < 0:
        return grad
    dim, size, last = axis - window.rank, x.shape[axis - window.rank], window.kernel_size[axis] - 1
    reach = tuple(last if a == axis else 0 for a in range(window.rank))
    # Clamped reads: a compiler shares them among samples, but repeats a masked read at each use.
    x = _repeat_ends(x, reach, reach)
    position = _positions(x, window, axis)
    best, *values = _samples(x, window, axis)
    wins = []
    for i, value in enumerate(values, start=1):
        # A sample wins over padding before the image, and padding behind the image never wins.
        wins.append((_wins(value, best) | (position <= last - i)) & (position < size + last - i))
        best = torch.where(wins[-1], value, best)
    grad = _gather(best, grad, window, axis - 1)
    shares = []
    for win in reversed(wins):
        shares.append(torch.where(win, grad, 0))
        grad = torch.where(win, 0, grad)
    # An element is sample j of the window that starts j positions before it: the last sample,
    # which `shares` has first, is that of the earliest window.
    return functools.reduce(
        torch.add, [share.narrow(dim, i, size) for i, share in enumerate([*shares, grad])]
    )
