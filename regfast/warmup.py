"""Compiling a model's kernels before they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ._core.geometry import Window
from ._core.layout import with_format
from .ops.blur_pool import blur_pool
from .ops.max_blur_pool import max_blur_pool

__all__ = ["warm_up"]

# What the kernels read and write at once, at most: so many outputs' columns, or so many channels.
OUTPUTS, CHANNELS = 4, 4


def warm_up(
    model: nn.Module,
    *,
    device: torch.device | str = "cuda",
    dtypes: Iterable[torch.dtype] = (torch.float32,),
    memory_formats: Iterable[torch.memory_format] = (torch.contiguous_format, torch.channels_last),
    backward: bool = True,
) -> None:
    """Compiles every kernel that the model's pooling layers and blurs will want, for images of whatever size.

    A kernel is compiled for a window, a dtype, a memory format and an alignment, and never for a size. The alignments are, of
    contiguous images, whether the width is a multiple of 4, 2 or 1 times the stride, and the output's width of 4, 2 or 1; of
    channels-last ones, whether the channels are a multiple of 4, 2 or 1. This runs each layer on small images of all of
    them. What it leaves out compiles when it is met: tensors that begin at an address which is no multiple of 16 bytes, whose
    strides are 2^31 elements or more, or that are sliced or expanded along the innermost axis. On a CPU nothing is compiled.

    Args:
        model: the layers are found among its modules; nothing in it changes.
        device, dtypes, memory_formats: of the images to come. `torch.channels_last` stands for volumes' format too.
        backward: compile the backward too.
    """
    held = (getattr(layer, "_window", None) for layer in model.modules())
    windows = {window for window in held if isinstance(window, Window)}
    wanted = {memory_format != torch.contiguous_format for memory_format in memory_formats}
    for window in windows:
        pool = max_blur_pool if window.takes_max else blur_pool
        for channels_last, shape in _shapes(window):
            for dtype in dtypes if channels_last in wanted else ():
                x = with_format(torch.zeros(shape, device=device, dtype=dtype), channels_last)
                with torch.set_grad_enabled(backward):
                    y = pool(x.requires_grad_(backward), window)
                if backward:
                    torch.autograd.grad(y, x, torch.zeros_like(y))


def _shapes(window: Window) -> Iterator[tuple[bool, tuple[int, ...]]]:
    """Small images of every alignment, and whether they are channels-last."""
    sizes = [window.reach(axis) + len(window.taps[axis]) + 4 * window.stride[axis] for axis in range(window.rank)]
    period = OUTPUTS * window.stride[-1]
    for width in range(sizes[-1], sizes[-1] + period):
        yield False, (2, 3, *sizes[:-1], width)
    channels = CHANNELS
    while channels:
        yield True, (2, 3 * channels, *sizes)
        channels //= 2
