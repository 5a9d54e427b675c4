"""The memory formats of tensors and of outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import Window, output_shape

CHANNELS_LAST = {1: torch.channels_last, 2: torch.channels_last, 3: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of x, (N, C, *spatial), are innermost in memory.

    The rule is nn.MaxPool2d's for the format of its output. It reads strides: a slice keeps the
    format of its source, and ambiguous shapes count as contiguous. A 1-d signal counts as an image
    of one row.
    """
    # The quickest test first.
    if x.is_contiguous() or x.stride(1) == 0:
        return False
    least = 0
    for dim in (1, *range(x.ndim - 1, 1, -1), 0):
        size, stride = x.shape[dim], x.stride(dim)
        if size == 0 or stride < least or (dim == 0 and least == x.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def with_format(y: Tensor, channels_last: bool) -> Tensor:
    """Return y in the given format; copy only if the format differs."""
    if y.ndim == 3:
        return with_format(y.unsqueeze(2), channels_last).squeeze(2)
    return y.contiguous(
        memory_format=CHANNELS_LAST[y.ndim - 2] if channels_last else torch.contiguous_format
    )


def as_laid_out(y: Tensor, x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return y with the layout of `torch.empty_like(x, memory_format=...)`.

    y has x's shape, and is copied only if its layout differs. Transforms of torch.func have no
    layouts: y then stays as it is.
    """
    if torch._C._are_functorch_transforms_active():
        return y
    like = torch.empty_like(x, device="meta", memory_format=memory_format)
    if y.stride() == like.stride():
        return y
    return torch.empty_strided(like.shape, like.stride(), dtype=y.dtype, device=y.device).copy_(y)


def empty_output(x: Tensor, window: Window) -> Tensor:
    """Return an uninitialised output of `window` over x, with x's dtype, device and format."""
    return empty(output_shape(window, x.shape), x, is_channels_last(x))


def empty(shape: list[int], like: Tensor, channels_last: bool) -> Tensor:
    """Return an uninitialised tensor with `like`'s dtype and device in the given format."""
    if len(shape) == 3:
        return empty([*shape[:2], 1, shape[2]], like, channels_last).squeeze(2)
    memory_format = CHANNELS_LAST[len(shape) - 2] if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def as_tensor(number: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number as a 0-d tensor on a device, and a tensor unchanged."""
    if isinstance(number, Tensor):
        return number
    if torch.compiler.is_compiling():
        # With torch.full the compiler makes a graph for each number.
        return torch.zeros((), dtype=dtype, device=device) + number
    return torch.full((), number, dtype=dtype, device=device)
