"""A strided depthwise blur in one pass: the kernels of max-blur pooling with a window of one element.

With kernel_size 1 the maximum, its state and the second read of x are compiled away, and what is left is the blur: the
forward reads x once and writes y once, the backward reads grad_y once and writes grad_x once. (Of what is activated, the blur
is a pooling with windows of one element, whose backward reads x too: 2.25 e bytes.)

Two numbers, 2-d, b=3, s=2, G columns a lane, per input element of e bytes: 1.25 e bytes each way; forward 1 + 1/G loads and 2.25
multiply-adds, backward 0.25 + 1.5/G loads (the border's among them) and 2.25 + 2/G multiply-adds.
"""

from __future__ import annotations

import torch

from regfast.geometry import Window
from regfast.layout import empty, empty_output

from .max_blur_pool import launch_backward, launch_forward


def blur_pool(x: torch.Tensor, window: Window) -> torch.Tensor:
    """x, (N, C, *spatial), blurred and decimated, in x's dtype and memory format."""
    return launch_forward(x, x, empty_output(x, window), window, tangent=False)


def blur_pool_backward(g: torch.Tensor, shape: list[int], channels_last: bool, window: Window) -> torch.Tensor:
    """The gradient of an input of `shape` in the memory format asked for, from that of the output."""
    dx = empty(shape, g, channels_last)
    return launch_backward(g, dx, dx, window)
