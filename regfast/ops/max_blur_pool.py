"""max_blur_pool: a stride-1 maximum and a strided blur in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .._core.autograd import gradients, is_differentiated_again, needs_graph, unwatched_apply
from .._core.dispatch import is_its_memory, is_watched, use_triton
from .._core.geometry import (
    RATIO,
    Activation,
    MaxPaddingMode,
    Size,
    Window,
    max_blur_window,
    output_shape,
)
from .._core.layout import empty_output
from .._core.sharding import is_sharded, on_parts
from .._core.tensors import check_image, check_like
from ..reference.max_blur_pool import max_blur_pool as reference
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
    """Saves x alone: where each maximum came from is found again."""

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
    """The kernels' pooling of x, (N, C, *spatial), differentiable."""
    watched = is_watched(x) or not is_its_memory(x)
    if needs_graph(x):
        return (_MaxBlurPool.apply if watched else _apply)(x, window, watched)
    return _forward(x, window, watched)


def max_blur_pool(x: Tensor, window: Window) -> Tensor:
    """Pools x, (C, *spatial) or (N, C, *spatial), with arguments already checked: what the modules call."""
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
    """Anti-aliased max pooling of a signal, (N, C, L) or (C, L). The arguments are those of `regfast.MaxPool1dAA`."""
    blur = ratio, blur_size, filter, padding_mode, activation
    window = max_blur_window(1, kernel_size, stride, padding, dilation, return_indices, ceil_mode, *blur)
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
    """Anti-aliased max pooling of an image, (N, C, H, W) or (C, H, W). The arguments are those of `regfast.MaxPool2dAA`."""
    blur = ratio, blur_size, filter, padding_mode, activation
    window = max_blur_window(2, kernel_size, stride, padding, dilation, return_indices, ceil_mode, *blur)
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
    """Anti-aliased max pooling of a volume, (N, C, D, H, W) or (C, D, H, W). The arguments are those of `regfast.MaxPool3dAA`."""
    blur = ratio, blur_size, filter, padding_mode, activation
    window = max_blur_window(3, kernel_size, stride, padding, dilation, return_indices, ceil_mode, *blur)
    return max_blur_pool(x, window)
