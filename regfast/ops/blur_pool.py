"""blur_pool: a strided depthwise blur."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..dispatch import use_triton
from ..geometry import Activation, BlurPaddingMode, Size, Window, blur_window, output_shape
from ..layout import empty, empty_output, is_channels_last
from ..reference.blur_pool import blur_pool as reference
from ..sharding import is_sharded, on_parts
from . import max_blur_pool
from .schema import WINDOW, apply, check_input, check_like, check_output, define, flatten, unflatten

__all__ = ["blur_pool", "blur_pool1d", "blur_pool2d", "blur_pool3d"]


def _forward(x: Tensor, *window: Any) -> Tensor:
    from ..kernels import blur_pool as kernels

    return kernels.blur_pool(x, unflatten(*window))


def _backward(grad: Tensor, size: list[int], channels_last: bool, *args: Any) -> Tensor:
    from ..kernels import blur_pool as kernels

    window = unflatten(*args)
    if window.activation is not None:
        raise ValueError(f"blur_pool_backward: activation must be None, got {window.activation!r}; max_blur_pool_backward's may")
    check_like("blur_pool_backward: grad", grad, output_shape(window, size), grad)
    return kernels.blur_pool_backward(grad, size, channels_last, window)


define(f"blur_pool(Tensor x, {WINDOW}) -> Tensor", _forward, lambda x, *window: empty_output(x, unflatten(*window)))
define(
    f"blur_pool_backward(Tensor grad, SymInt[] size, bool channels_last, {WINDOW}) -> Tensor",
    _backward,
    lambda grad, size, channels_last, *window: empty(size, grad, channels_last),
)


# The blur is linear, so it is its own tangent, and nothing is saved: its derivative needs x's shape and format alone.
class _Blur(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, window):
        ctx.size, ctx.channels_last, ctx.window = x.shape, is_channels_last(x), window
        return torch.ops.regfast.blur_pool(x, *flatten(window))

    @staticmethod
    def backward(ctx, grad):
        return apply(_Adjoint, _AdjointWithJvp, grad, ctx.size, ctx.channels_last, ctx.window), None


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, size, channels_last, window):
        ctx.size, ctx.channels_last, ctx.window = size, channels_last, window
        return torch.ops.regfast.blur_pool_backward(grad, size, channels_last, *flatten(window))

    @staticmethod
    def backward(ctx, t):
        return apply(_Blur, _BlurWithJvp, t, ctx.window), None, None, None


class _BlurWithJvp(_Blur):
    @staticmethod
    def jvp(ctx, t, _window):
        return _BlurWithJvp.apply(t, ctx.window)


class _AdjointWithJvp(_Adjoint):
    @staticmethod
    def jvp(ctx, t, _size, _channels_last, _window):
        return _AdjointWithJvp.apply(t, ctx.size, ctx.channels_last, ctx.window)


def blur_pool(x: Tensor, window: Window) -> Tensor:
    """Blurs x, (C, *spatial) or (N, C, *spatial), with arguments already checked: what the modules call."""
    if has_torch_function_unary(x):
        return handle_torch_function(blur_pool, (x,), x, window)
    name = f"blur_pool{window.rank}d"
    if not check_input(name, x, window.rank):
        return blur_pool(x.unsqueeze(0), window).squeeze(0)
    check_output(name, x, window)
    if is_sharded(x):
        return on_parts(lambda x: blur_pool(x, window), x, dims=(0, 1), keeps=2)
    if not use_triton(x):
        return reference(x, window)
    # Activated, the blur is no longer linear: it is the pooling of windows of one element, whose backward reads x.
    return apply(_Blur, _BlurWithJvp, x, window) if window.activation is None else max_blur_pool.fused(x, window)


def blur_pool1d(
    x: Tensor,
    kernel_size: Size = 3,
    stride: Size = 2,
    padding: str | Size = "same",
    *,
    filter: Any = "binomial",
    padding_mode: BlurPaddingMode = "reflect",
    activation: Activation | None = None,
) -> Tensor:
    """A strided blur of a signal, (N, C, L) or (C, L). The arguments are those of `regfast.BlurPool1d`."""
    return blur_pool(x, blur_window(1, kernel_size, stride, padding, filter, padding_mode, activation))


def blur_pool2d(
    x: Tensor,
    kernel_size: Size = 3,
    stride: Size = 2,
    padding: str | Size = "same",
    *,
    filter: Any = "binomial",
    padding_mode: BlurPaddingMode = "reflect",
    activation: Activation | None = None,
) -> Tensor:
    """A strided blur of an image, (N, C, H, W) or (C, H, W). The arguments are those of `regfast.BlurPool2d`."""
    return blur_pool(x, blur_window(2, kernel_size, stride, padding, filter, padding_mode, activation))


def blur_pool3d(
    x: Tensor,
    kernel_size: Size = 3,
    stride: Size = 2,
    padding: str | Size = "same",
    *,
    filter: Any = "binomial",
    padding_mode: BlurPaddingMode = "reflect",
    activation: Activation | None = None,
) -> Tensor:
    """A strided blur of a volume, (N, C, D, H, W) or (C, D, H, W). The arguments are those of `regfast.BlurPool3d`."""
    return blur_pool(x, blur_window(3, kernel_size, stride, padding, filter, padding_mode, activation))
