"""max_blur_pool: a stride-1 maximum and a strided blur in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..dispatch import use_triton
from ..geometry import RATIO, Activation, MaxPaddingMode, Size, Window, max_blur_window, output_shape
from ..layout import empty_output
from ..reference.max_blur_pool import max_blur_pool as reference
from ..sharding import is_sharded, on_parts
from .schema import WINDOW, apply, check_input, check_like, check_output, define, flatten, unflatten

__all__ = ["fused", "max_blur_pool", "max_blur_pool1d", "max_blur_pool2d", "max_blur_pool3d"]


def _forward(x: Tensor, *window: Any) -> Tensor:
    from ..kernels import max_blur_pool as kernels

    return kernels.max_blur_pool(x, unflatten(*window))


def _backward(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
    from ..kernels import max_blur_pool as kernels

    window = unflatten(*args)
    check_like("max_blur_pool_backward: grad", grad, output_shape(window, x.shape), x)
    return kernels.max_blur_pool_backward(grad, x, window)


def _tangent(t: Tensor, x: Tensor, *window: Any) -> Tensor:
    from ..kernels import max_blur_pool as kernels

    check_like("max_blur_pool_tangent: t", t, x.shape, x)
    return kernels.max_blur_pool_tangent(t, x, unflatten(*window))


define(f"max_blur_pool(Tensor x, {WINDOW}) -> Tensor", _forward, lambda x, *window: empty_output(x, unflatten(*window)))
define(
    f"max_blur_pool_backward(Tensor grad, Tensor x, {WINDOW}) -> Tensor",
    _backward,
    lambda grad, x, *window: torch.empty_like(x),
)
define(
    f"max_blur_pool_tangent(Tensor t, Tensor x, {WINDOW}) -> Tensor",
    _tangent,
    lambda t, x, *window: empty_output(x, unflatten(*window)),
)


# With a(q) the place of the maximum M(q), y is linear in x[a(q)]. So three maps are all there is: P(x), its tangent T(t, x)
# and T's adjoint B(g, x), linear in t and g; and each one's derivative is one of the other two.
class _Pool(torch.autograd.Function):
    """P(x). Saves x alone: where each maximum came from is found again."""

    @staticmethod
    def forward(ctx, x, window):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        ctx.window = window
        return torch.ops.regfast.max_blur_pool(x, *flatten(window))

    @staticmethod
    def backward(ctx, grad):
        return apply(_Adjoint, _AdjointWithJvp, grad, *ctx.saved_tensors, ctx.window), None


class _Adjoint(torch.autograd.Function):
    """B(g, x)."""

    @staticmethod
    def forward(ctx, grad, x, window):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        ctx.window = window
        return torch.ops.regfast.max_blur_pool_backward(grad, x, *flatten(window))

    @staticmethod
    def backward(ctx, t):
        return apply(_Tangent, _TangentWithJvp, t, *ctx.saved_tensors, ctx.window), None, None


class _Tangent(torch.autograd.Function):
    """T(t, x)."""

    @staticmethod
    def forward(ctx, t, x, window):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        ctx.window = window
        return torch.ops.regfast.max_blur_pool_tangent(t, x, *flatten(window))

    @staticmethod
    def backward(ctx, grad):
        return apply(_Adjoint, _AdjointWithJvp, grad, *ctx.saved_tensors, ctx.window), None, None


class _PoolWithJvp(_Pool):
    @staticmethod
    def jvp(ctx, t, _window):
        return _TangentWithJvp.apply(t, *ctx.saved_tensors, ctx.window)


class _AdjointWithJvp(_Adjoint):
    @staticmethod
    def jvp(ctx, t, _x, _window):
        return _AdjointWithJvp.apply(t, *ctx.saved_tensors, ctx.window)


class _TangentWithJvp(_Tangent):
    @staticmethod
    def jvp(ctx, t, _x, _window):
        return _TangentWithJvp.apply(t, *ctx.saved_tensors, ctx.window)


def fused(x: Tensor, window: Window) -> Tensor:
    """The kernels' pooling of x, (N, C, *spatial), differentiable."""
    return apply(_Pool, _PoolWithJvp, x, window)


def max_blur_pool(x: Tensor, window: Window) -> Tensor:
    """Pools x, (C, *spatial) or (N, C, *spatial), with arguments already checked: what the modules call."""
    if has_torch_function_unary(x):
        return handle_torch_function(max_blur_pool, (x,), x, window)
    name = f"max_blur_pool{window.rank}d"
    if not check_input(name, x, window.rank):
        return max_blur_pool(x.unsqueeze(0), window).squeeze(0)
    check_output(name, x, window)
    if is_sharded(x):
        return on_parts(lambda x: max_blur_pool(x, window), x, dims=(0, 1), keeps=2)
    return fused(x, window) if use_triton(x) else reference(x, window)


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
