"""max_blur_pool: a stride-1 maximum and a strided blur in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .._core.autograd import (
    gradients,
    is_compiled,
    is_differentiated_again,
    needs_graph,
    unwatched_apply,
)
from .._core.dispatch import is_its_memory, is_watched, use_triton
from .._core.geometry import (
    RATIO,
    Activation,
    MaxPaddingMode,
    Size,
    Window,
    as_image,
    max_blur_window,
    output_shape,
    output_size,
)
from .._core.layout import empty_output, is_channels_last, with_format
from .._core.sharding import is_sharded, on_parts
from .._core.tensors import check_image, check_like
from ..reference.max_blur_pool import all_maxima, split
from ..reference.max_blur_pool import max_blur_pool as reference
from . import blur_pool
from .schema import WINDOW, define, flatten, kernels_of, unflatten

__all__ = ["fused", "max_blur_pool", "max_blur_pool1d", "max_blur_pool2d", "max_blur_pool3d"]


def _forward_op(x: Tensor, *window: Any) -> Tensor:
    return kernels_of("max_blur_pool").max_blur_pool(x, unflatten(*window))


def _backward_op(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
    window = unflatten(*args)
    check_like("max_blur_pool_backward: grad", grad, output_shape(window, x.shape), x)
    return kernels_of("max_blur_pool").max_blur_pool_backward(grad, x, window)


define(
    f"max_blur_pool(Tensor x, {WINDOW}) -> Tensor",
    _forward_op,
    lambda x, *window: empty_output(x, unflatten(*window)),
)
define(
    f"max_blur_pool_backward(Tensor grad, Tensor x, {WINDOW}) -> Tensor",
    _backward_op,
    lambda grad, x, *window: torch.empty_like(x),
)


def _forward(x: Tensor, window: Window, watched: bool) -> Tensor:
    if watched:
        return torch.ops.regfast.max_blur_pool(x, *flatten(window))
    return kernels_of("max_blur_pool").max_blur_pool(x, window)


def _backward(grad: Tensor, x: Tensor, window: Window, watched: bool) -> Tensor:
    if watched or is_watched(grad) or not is_its_memory(grad):
        return torch.ops.regfast.max_blur_pool_backward(grad, x, *flatten(window))
    return kernels_of("max_blur_pool").max_blur_pool_backward(grad, x, window)


class _MaxBlurPool(torch.autograd.Function):
    """Saves only x: the backward finds the position of each maximum again."""

    @staticmethod
    def forward(ctx, x, window, watched):
        ctx.save_for_backward(x)
        ctx.window, ctx.watched = window, watched
        return _forward(x, window, watched)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if is_differentiated_again():
            return *gradients(lambda x: reference(x, ctx.window), (x,), (True,), grad), None, None
        return _backward(grad, x, ctx.window, ctx.watched), None, None


_apply = unwatched_apply(_MaxBlurPool)


def fused(x: Tensor, window: Window) -> Tensor:
    """Return the kernels' pooling of x, (N, C, *spatial), differentiable."""
    if not window.is_of_images:
        return _by_maxima(x, window)
    watched = is_watched(x) or not is_its_memory(x)
    if needs_graph(x):
        return (_MaxBlurPool.apply if watched else _apply)(x, window, watched)
    return _forward(x, window, watched)


def _by_maxima(x: Tensor, window: Window) -> Tensor:
    """Pool volumes, or with a dilation: compute all maxima, then blur them with a kernel.

    Without dilation, image kernels compute the maxima of a volume: within each slice, then across
    slices. With a dilation PyTorch computes them.
    """
    output_shape(window, x.shape)
    before, after, blur = split(window, x.shape[2:])
    if all(d == 1 for d in window.dilation):
        maxima = _volume_maxima(x, window, before, after)
    else:
        maxima = all_maxima(x, window, before, after, not is_compiled(), x.dtype)
    if window.activation == "relu":
        maxima = torch.relu(maxima)
    y = blur_pool.fused(maxima, blur)
    if window.ceil_mode:
        for axis, size in enumerate(x.shape[2:]):
            y = y.narrow(axis - window.rank, 0, output_size(window, axis, size))
    return with_format(y, is_channels_last(x))


def _volume_maxima(
    x: Tensor, window: Window, before: tuple[int, ...], after: tuple[int, ...]
) -> Tensor:
    """Return the maximum of every window that fits in volumes extended by `before` and `after`."""
    lead, trail = (tuple(n - p for n, p in zip(ends, window.padding)) for ends in (before, after))
    ones = (1,) * window.rank
    every = window._replace(
        stride=ones,
        taps=((1.0,),) * window.rank,
        lead=lead,
        trail=trail,
        ceil_mode=False,
        padding_mode="partial",
        activation=None,
    )
    slices, down = as_image(every, 1, 2), as_image(every, 0, None)
    if slices.takes_max:
        if is_channels_last(x):
            images = fused(x.transpose(1, 2).flatten(0, 1), slices)
            x = images.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        else:
            x = fused(x.flatten(1, 2), slices).unflatten(1, x.shape[1:3])
    return fused(x.flatten(3), down).unflatten(3, x.shape[3:]) if down.takes_max else x


def max_blur_pool(x: Tensor, window: Window) -> Tensor:
    """Pool x, (C, *spatial) or (N, C, *spatial); the modules call this with a checked window."""
    if has_torch_function_unary(x):
        return handle_torch_function(max_blur_pool, (x,), x, window)
    if not check_image("max_blur_pool", x, len(window.kernel_size)):
        return max_blur_pool(x.unsqueeze(0), window).squeeze(0)
    if type(x) is not Tensor and is_sharded(x):
        return on_parts(lambda x: max_blur_pool(x, window), x, dims=(0, 1), keeps=2)
    if use_triton(x, x.dtype):
        return fused(x, window)
    return reference(x, window)


def max_blur_pool1d(
    x: Tensor,
    kernel_size: Size = 2,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    return_indices: bool = False,
    ceil_mode: bool = False,
    *,
    ratio: float | Sequence[float] = RATIO,
    blur_size: Size | None = None,
    filter: Any = "binomial",
    padding_mode: MaxPaddingMode = "partial",
    activation: Activation | None = None,
) -> Tensor:
    """Max-pool a signal, (N, C, L) or (C, L), with anti-aliasing.

    The arguments are those of `regfast.MaxPool1dAA`.
    """
    blur = ratio, blur_size, filter, padding_mode, activation
    window = max_blur_window(
        1, kernel_size, stride, padding, dilation, return_indices, ceil_mode, *blur
    )
    return max_blur_pool(x, window)


def max_blur_pool2d(
    x: Tensor,
    kernel_size: Size = 2,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    return_indices: bool = False,
    ceil_mode: bool = False,
    *,
    ratio: float | Sequence[float] = RATIO,
    blur_size: Size | None = None,
    filter: Any = "binomial",
    padding_mode: MaxPaddingMode = "partial",
    activation: Activation | None = None,
) -> Tensor:
    """Max-pool an image, (N, C, H, W) or (C, H, W), with anti-aliasing.

    The arguments are those of `regfast.MaxPool2dAA`.
    """
    blur = ratio, blur_size, filter, padding_mode, activation
    window = max_blur_window(
        2, kernel_size, stride, padding, dilation, return_indices, ceil_mode, *blur
    )
    return max_blur_pool(x, window)


def max_blur_pool3d(
    x: Tensor,
    kernel_size: Size = 2,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    return_indices: bool = False,
    ceil_mode: bool = False,
    *,
    ratio: float | Sequence[float] = RATIO,
    blur_size: Size | None = None,
    filter: Any = "binomial",
    padding_mode: MaxPaddingMode = "partial",
    activation: Activation | None = None,
) -> Tensor:
    """Max-pool a volume, (N, C, D, H, W) or (C, D, H, W), with anti-aliasing.

    The arguments are those of `regfast.MaxPool3dAA`.
    """
    blur = ratio, blur_size, filter, padding_mode, activation
    window = max_blur_window(
        3, kernel_size, stride, padding, dilation, return_indices, ceil_mode, *blur
    )
    return max_blur_pool(x, window)
