"""A strided depthwise blur in one pass: the kernels of max-blur pooling with a kernel_size of 1.

With a kernel of 1 the maximum, its state and the second read of x are compiled away, and a blur is
left. The forward reads x once and writes y once; the backward reads the output's gradient once and
writes the input's once. A volume takes two passes over images: first its slices, then down the
slices, where each slice is one row. The numbers between the two passes are float32 (float64 for
float64 inputs), so the result is rounded once.

Cost in 2-d, with 3 taps, stride 2 and G columns per lane, per input element of e bytes:
    forward     1.25 e bytes; 1 + 1/G loads, 2.25 multiply-adds
    backward    1.25 e bytes; 0.25 + 1.5/G loads, 2.25 + 2/G multiply-adds
"""

from __future__ import annotations

import math
from typing import Any

import torch

from regfast._core.geometry import Window, as_image, output_shape
from regfast._core.layout import empty, is_channels_last, with_format

from .cuts import prepare
from .launch import LAUNCHES, Launch, Layout, keep, kinds_of, on_meta
from .max_blur_pool import _forward_kernel, max_blur_pool
from .max_blur_pool_backward import _backward_kernel, prepare_backward


def blur_pool(x: torch.Tensor, window: Window) -> torch.Tensor:
    """The blur of x, (N, C, *spatial), in x's dtype and memory format."""
    if window.rank < 3:
        return max_blur_pool(x, window)
    channels_last = is_channels_last(x)
    x = with_format(x, channels_last)
    kinds = kinds_of(x)
    key = ("blur_pool", window, x.shape, x.device, kinds)
    shapes, of_slices, down_slices = LAUNCHES.get(key) or keep(
        key, _prepare_volumes(x, window, kinds[-1])
    )
    between, y = _empty_volumes(x, *shapes, channels_last)
    of_slices(x, between)
    down_slices(between, y)
    return y


def blur_pool_backward(
    g: torch.Tensor, shape: torch.Size, stride: tuple[int, ...], window: Window
) -> torch.Tensor:
    """The gradient of a blur's input of this shape and stride, in its memory format.

    g is the gradient of the output.
    """
    # By the input: a small output's memory format may be ambiguous.
    channels_last = window.rank == 3 and is_channels_last(
        torch.empty_strided(shape, stride, device="meta")
    )
    g = with_format(g, channels_last) if window.rank == 3 else g
    kinds = kinds_of(g)
    key = ("blur_pool_backward", window, shape, stride, g.device, kinds)
    prepared = LAUNCHES.get(key) or keep(
        key, _prepare_backward(g, shape, stride, window, kinds[-1])
    )
    if window.rank < 3:
        strides, launch = prepared
        dx = g.new_empty_strided(shape, strides)
        launch(g, dx, dx)
        return dx
    shapes, down_slices, of_slices = prepared
    between, dx = _empty_volumes(g, *shapes, channels_last)
    down_slices(g, between, between)
    of_slices(between, dx, dx)
    return dx


def _prepare_backward(
    g: torch.Tensor, shape: torch.Size, stride: tuple[int, ...], window: Window, misaligned: int
) -> tuple[Any, ...]:
    """The strides of the input's gradient and the launch that writes it.

    For volumes: the shapes of what the two passes write, and their launches.
    """
    channels_last = is_channels_last(torch.empty_strided(shape, stride, device="meta"))
    like = empty(list(shape), on_meta(g), channels_last)
    if window.rank < 3:
        return like.stride(), prepare_backward(g, like, like, window, misaligned)
    planes, slices = _passes(window)
    between = (*shape[:3], *g.shape[3:])
    layouts = (_slices(between, channels_last),) * 2, _slices(g.shape, channels_last)
    down_slices = prepare(_backward_kernel, "blur backward", slices, *layouts, _wide(g), misaligned)
    layouts = (_planes(shape, channels_last),) * 2, _planes(between, channels_last)
    of_slices = prepare(_backward_kernel, "blur backward", planes, *layouts, _wide(g), 0)
    return (torch.Size(between), shape), down_slices, of_slices


def _prepare_volumes(
    x: torch.Tensor, window: Window, misaligned: int
) -> tuple[tuple[Any, ...], Launch, Launch]:
    """The shapes of what the two passes write, and their launches."""
    channels_last, shape = is_channels_last(x), torch.Size(output_shape(window, x.shape))
    planes, slices = _passes(window)
    between = torch.Size((*x.shape[:3], *shape[3:]))
    layouts = (_planes(x.shape, channels_last),), _planes(between, channels_last)
    of_slices = prepare(_forward_kernel, "blur", planes, *layouts, _wide(x), misaligned)
    layouts = (_slices(between, channels_last),), _slices(shape, channels_last)
    down_slices = prepare(_forward_kernel, "blur", slices, *layouts, _wide(x), 0)
    return (between, shape), of_slices, down_slices


def _passes(window: Window) -> tuple[Window, Window]:
    """The windows of a volume's two passes: over its slices, with the activation, and down them."""
    return as_image(window, 1, 2), as_image(window, 0, None)._replace(activation=None)


def _wide(t: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the dtype that the numbers between two passes from t have."""
    return t.new_empty(0, dtype=torch.promote_types(t.dtype, torch.float32))


def _empty_volumes(
    t: torch.Tensor, between: torch.Size, last: torch.Size, channels_last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty tensors for what two passes from t write, in a memory format."""
    return empty(list(between), _wide(t), channels_last), empty(list(last), t, channels_last)


def _planes(shape: tuple[int, ...], channels_last: bool) -> Layout:
    """Dense volumes as images: each slice is an image."""
    n, c, d, h, w = shape
    if channels_last:
        return Layout((n * d, c, 1, h, w), (h * w * c, 1, 0, w * c, c))
    return Layout((n, c * d, 1, h, w), (c * d * h * w, h * w, 0, w, 1))


def _slices(shape: tuple[int, ...], channels_last: bool) -> Layout:
    """Dense volumes as images: each slice is a row."""
    n, c, d, *plane = shape
    columns = math.prod(plane)
    if channels_last:
        return Layout((n, c, 1, d, columns), (d * columns * c, 1, 0, columns * c, c))
    return Layout((n, c, 1, d, columns), (c * d * columns, d * columns, 0, columns, 1))
