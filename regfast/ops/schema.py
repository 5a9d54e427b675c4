"""What the operations share: the library they are defined in, and a `Window` as a schema can carry it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..dispatch import INTERPRETED
from ..geometry import Window, output_shape

LIBRARY = torch.library.Library("regfast", "DEF")

WINDOW = (
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode, "
    "float[] taps, int[] blur_size, int[] lead, int[] trail, str padding_mode, str? activation"
)


def define(schema: str, implementation: Any, fake: Any) -> None:
    """Defines `regfast::<schema>` with its CUDA implementation and its fake; under Triton's interpreter, a CPU one too."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CUDA")
    if INTERPRETED:
        LIBRARY.impl(name, implementation, "CPU")
    torch.library.register_fake(f"regfast::{name}", fake, lib=LIBRARY)


def apply(function: type[Function], with_jvp: type[Function], *args: Any) -> Tensor:
    """Applies the autograd Function that suits: Dynamo cannot trace one that has a jvp, and forward mode needs one that has."""
    return (function if torch.compiler.is_compiling() else with_jvp).apply(*args)


def flatten(window: Window) -> tuple[Any, ...]:
    """`window` as the arguments of `WINDOW`."""
    kernel_size, stride, padding, dilation, ceil_mode, taps, *rest = window
    flat = [tap for axis in taps for tap in axis]
    return kernel_size, stride, padding, dilation, ceil_mode, flat, [len(axis) for axis in taps], *rest


def unflatten(kernel_size, stride, padding, dilation, ceil_mode, taps, blur_size, lead, trail, *modes) -> Window:
    """The inverse of `flatten`."""
    axes, start = [], 0
    for size in blur_size:
        axes.append(tuple(taps[start : start + size]))
        start += size
    kernel_size, stride, padding, dilation = map(tuple, (kernel_size, stride, padding, dilation))
    return Window(kernel_size, stride, padding, dilation, ceil_mode, tuple(axes), tuple(lead), tuple(trail), *modes)


def check_input(name: str, x: Any, rank: int) -> bool:
    """Checks an image before anything is computed; whether it is batched, (N, C, *spatial) rather than (C, *spatial)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: x must be a floating-point tensor, got {x.dtype}")
    if x.ndim not in (rank + 1, rank + 2):
        raise ValueError(f"{name}: x must be {rank + 1}-d or {rank + 2}-d (batched), got shape {tuple(x.shape)}")
    if any(size == 0 for size in x.shape[-rank - 1 :]):
        raise ValueError(f"{name}: only the batch may be empty, got shape {tuple(x.shape)}")
    return x.ndim == rank + 2


def check_like(name: str, t: Tensor, shape: Sequence[int], x: Tensor) -> None:
    """Refuses a gradient or a tangent that does not belong to x: a kernel would read beyond it, or misread it."""
    expected, found = (tuple(shape), x.dtype, x.device), (tuple(t.shape), t.dtype, t.device)
    if found != expected:
        raise ValueError(f"{name} must have the shape, dtype and device {expected}, got {found}")


def check_output(name: str, x: Tensor, window: Window) -> None:
    """Refuses an image too small for the window."""
    sizes = output_shape(window, x.shape)[2:]
    if any(size < 1 for size in sizes):
        raise ValueError(f"{name}: the output of {tuple(x.shape)} would be {tuple(sizes)} in space, and must be at least 1")
