"""Compile a model's kernels before they are needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ._core.dispatch import use_triton
from ._core.geometry import Window
from ._core.layout import with_format
from .ops.blur_pool import blur_pool
from .ops.max_blur_pool import max_blur_pool

__all__ = ["warm_up"]

# The most columns, and the most channels, that the kernels read and write at once.
COLUMNS, CHANNELS = 8, 4
# The kernels fit their tiles to images of up to this width.
NARROW = 64


def warm_up(
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    memory_formats: Iterable[torch.memory_format] = (torch.contiguous_format, torch.channels_last),
    backward: bool = True,
    widths: Iterable[int] = (56, 28, 14),
) -> None:
    """Compile the kernels of a model's poolings and blurs.

    A kernel is compiled for a window, a dtype, a memory format, an alignment and the borders that
    outputs read beyond. It is not compiled for a size, except that the tiles of images of up to 64
    columns fit the width. The alignment of contiguous images tells whether the width is a multiple
    of 8, 4, 2 or 1, and the output's width of half as many. The alignment of channels-last images
    tells whether the channels are a multiple of 4, 2 or 1.

    This function runs each layer on small images of all these kinds, over 64 wide and of `widths`.
    The rest compiles at its first use: other narrow images; tensors that begin at an address that
    is not a multiple of 16 bytes, span 2^31 elements or more, or are sliced or expanded along the
    innermost axis.

    Where operations take the PyTorch reference, as on a CPU, it compiles and runs nothing.

    Args:
        model: the module with the layers. It does not change.
        device: the images' device. If None, the device of the model's parameters. A model without
            parameters takes the GPU, if there is one.
        dtypes: the images' dtypes. If None, the dtype of the model's parameters; and if that is
            float32, or there are none, bfloat16 as well, for autocast.
        memory_formats: the images' formats. `torch.channels_last` stands for volumes' format too.
        backward: whether to compile the backward too.
        widths: the widths of narrow images, such as those of a network's later stages.

    Raises:
        RuntimeError: if backend "triton" is chosen and cannot run on the device.

    Example:
        >>> model = regfast.antialias(torchvision.models.resnet50())
        >>> if torch.cuda.is_available():
        ...     regfast.warm_up(model.cuda(), memory_formats=[torch.channels_last])
    """
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if device is None:
        device = (
            ("cuda" if torch.cuda.is_available() else "cpu") if weight is None else weight.device
        )
    if dtypes is None:
        own = torch.float32 if weight is None else weight.dtype
        dtypes = (own, torch.bfloat16) if own == torch.float32 else (own,)
    dtypes = [
        dtype for dtype in dtypes if use_triton(torch.empty(0, device=device, dtype=dtype), dtype)
    ]
    held = (getattr(layer, "_window", None) for layer in model.modules())
    windows = {window for window in held if isinstance(window, Window)}
    wanted = {memory_format != torch.contiguous_format for memory_format in memory_formats}
    for window in windows:
        pool = max_blur_pool if window.takes_max else blur_pool
        for channels_last, shape in _shapes(window, tuple(widths)):
            for dtype in dtypes if channels_last in wanted else ():
                x = with_format(torch.zeros(shape, device=device, dtype=dtype), channels_last)
                with torch.set_grad_enabled(backward):
                    y = pool(x.requires_grad_(backward), window)
                if backward:
                    torch.autograd.grad(y, x, torch.zeros_like(y))


def _shapes(window: Window, narrow: tuple[int, ...]) -> Iterator[tuple[bool, tuple[int, ...]]]:
    """Yield small shapes for every alignment and border, and whether they are channels-last."""
    least = [
        window.reach(axis) + len(window.taps[axis]) + 4 * window.stride[axis]
        for axis in range(window.rank)
    ]
    wide = range(
        max(least[-1], NARROW) + 1, max(least[-1], NARROW) + 1 + COLUMNS * window.stride[-1]
    )
    widths = (*(width for width in narrow if width >= least[-1]), *wide)
    # On the outer axes only the remainder by the stride decides what lies beyond their ends.
    ends = [range(size, size + stride) for size, stride in zip(least[:-1], window.stride[:-1])]
    for sizes in itertools.product(*ends, widths):
        yield False, (2, 3, *sizes)
    channels = CHANNELS
    while channels:
        for sizes in itertools.product(*ends, widths):
            yield True, (2, 3 * channels, *sizes)
        channels //= 2
