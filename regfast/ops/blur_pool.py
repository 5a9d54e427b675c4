"""blur_pool: a strided depthwise blur."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .._core.autograd import gradients, is_differentiated_again, needs_graph, unwatched_apply
from .._core.dispatch import is_its_memory, is_watched, use_triton
from .._core.geometry import Activation, BlurPaddingMode, Size, Window, blur_window, output_shape
from .._core.layout import empty, empty_output, is_channels_last
from .._core.sharding import is_sharded, on_parts
from .._core.tensors import check_image, check_like
from ..reference.blur_pool import blur_pool as reference
from . import max_blur_pool
from .schema import WINDOW, define, flatten, kernels_of, unflatten

__all__ = ["blur_pool", "blur_pool1d", "blur_pool2d", "blur_pool3d"]


def _forward_op(x: Tensor, *window: Any) -> Tensor:
    return kernels_of("blur_pool").blur_pool(x, unflatten(*window))


def _backward_op(grad: Tensor, size: list[int], stride: list[int], *args: Any) -> Tensor:
    window = unflatten(*args)
    if window.activation is not None:
        found = f"{window.activation!r}; call max_blur_pool_backward"
        raise ValueError(f"blur_pool_backward: activation must be None, got {found}")
    check_like("blur_pool_backward: grad", grad, output_shape(window, size), grad)
    return kernels_of("blur_pool").blur_pool_backward(grad, torch.Size(size), tuple(stride), window)


def _fake_gradient(grad: Tensor, size: list[Any], stride: list[Any], *window: Any) -> Tensor:
    return empty(
        size, grad, is_channels_last(torch.empty_strided(size, stride, device=grad.device))
    )


define(
    f"blur_pool(Tensor x, {WINDOW}) -> Tensor",
    _forward_op,
    lambda x, *window: empty_output(x, unflatten(*window)),
)
define(
    f"blur_pool_backward(Tensor grad, SymInt[] x_size, SymInt[] x_stride, {WINDOW}) -> Tensor",
    _backward_op,
    _fake_gradient,
)


def _forward(x: Tensor, window: Window, watched: bool) -> Tensor:
    if watched:
        return torch.ops.regfast.blur_pool(x, *flatten(window))
    return kernels_of("blur_pool").blur_pool(x, window)


def _backward(grad: Tensor, size: torch.Size, stride: tuple[int, ...], window: Window) -> Tensor:
    if is_watched(grad) or not is_its_memory(grad):
        return torch.ops.regfast.blur_pool_backward(grad, size, stride, *flatten(window))
    return kernels_of("blur_pool").blur_pool_backward(grad, size, stride, window)


class _BlurPool(torch.autograd.Function):
    """Saves no tensor: the blur is linear, and its gradient needs only x's shape and strides."""

    @staticmethod
    def forward(ctx, x, window, watched):
        ctx.arguments = x.shape, x.stride(), window
        return _forward(x, window, watched)

    @staticmethod
    def backward(ctx, grad):
        size, stride, window = ctx.arguments
        if is_differentiated_again():
            # The blur is linear: every image of this shape has the same gradient.
            zeros = grad.new_zeros(()).expand(size).requires_grad_()
            return *gradients(lambda x: reference(x, window), (zeros,), (True,), grad), None, None
        return _backward(grad, size, stride, window), None, None


_apply = unwatched_apply(_BlurPool)


def fused(x: Tensor, window: Window) -> Tensor:
    """Return the kernels' blur of x, (N, C, *spatial), differentiable."""
    if window.activation is not None and window.rank == 3:
        return fused(torch.relu(x), window._replace(activation=None))
    if window.activation is not None:
        # With an activation the blur is not linear. It is the pooling of windows of one element,
        # and its backward reads x.
        return max_blur_pool.fused(x, window)
    watched = is_watched(x) or not is_its_memory(x)
    if needs_graph(x):
        return (_BlurPool.apply if watched else _apply)(x, window, watched)
    return _forward(x, window, watched)


def blur_pool(x: Tensor, window: Window) -> Tensor:
    """Blur x, (C, *spatial) or (N, C, *spatial); the modules call this with a checked window."""
    if has_torch_function_unary(x):
        return handle_torch_function(blur_pool, (x,), x, window)
    if not check_image("blur_pool", x, len(window.kernel_size)):
        return blur_pool(x.unsqueeze(0), window).squeeze(0)
    if type(x) is not Tensor and is_sharded(x):
        return on_parts(lambda x: blur_pool(x, window), x, dims=(0, 1), keeps=2)
    if use_triton(x, x.dtype):
        return fused(x, window)
    return reference(x, window)


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
    """Blur and subsample a signal, (N, C, L) or (C, L).

    The arguments are those of `regfast.BlurPool1d`.
    """
    return blur_pool(
        x, blur_window(1, kernel_size, stride, padding, filter, padding_mode, activation)
    )


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
    """Blur and subsample an image, (N, C, H, W) or (C, H, W).

    The arguments are those of `regfast.BlurPool2d`.
    """
    return blur_pool(
        x, blur_window(2, kernel_size, stride, padding, filter, padding_mode, activation)
    )


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
    """Blur and subsample a volume, (N, C, D, H, W) or (C, D, H, W).

    The arguments are those of `regfast.BlurPool3d`.
    """
    return blur_pool(
        x, blur_window(3, kernel_size, stride, padding, filter, padding_mode, activation)
    )
