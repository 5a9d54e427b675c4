"""Shared by the operations: their library, a `Window` in a schema, and the kernels' modules."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from .._core.dispatch import INTERPRETED, check_recordable
from .._core.geometry import Window

LIBRARY = torch.library.Library("regfast", "DEF")

WINDOW = (
    "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode, "
    "float[] taps, int[] blur_size, int[] lead, int[] trail, str padding_mode, str? activation"
)


def define(schema: str, implementation: Any, fake: Any) -> None:
    """Define `regfast::<schema>` and its fake, for CUDA and under the interpreter for the CPU."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CUDA")
    if INTERPRETED:
        LIBRARY.impl(name, implementation, "CPU")

    def recordable(*arguments: Any) -> Any:
        check_recordable()
        return fake(*arguments)

    torch.library.register_fake(f"regfast::{name}", recordable, lib=LIBRARY)


@functools.cache
def kernels_of(operation: str) -> Any:
    """Import an operation's kernels when the first one runs: regfast works without Triton."""
    return importlib.import_module(f"regfast.kernels.{operation}")


def flatten(window: Window) -> tuple[Any, ...]:
    """Return `window` as the arguments of `WINDOW`."""
    kernel_size, stride, padding, dilation, ceil_mode, taps, *rest = window
    flat = [tap for axis in taps for tap in axis]
    return (
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode,
        flat,
        [len(axis) for axis in taps],
        *rest,
    )


def unflatten(
    kernel_size, stride, padding, dilation, ceil_mode, taps, blur_size, lead, trail, *modes
) -> Window:
    """Return the `Window` of these arguments: the inverse of `flatten`."""
    axes, start = [], 0
    for size in blur_size:
        axes.append(tuple(taps[start : start + size]))
        start += size
    kernel_size, stride, padding, dilation = map(tuple, (kernel_size, stride, padding, dilation))
    return Window(
        kernel_size,
        stride,
        padding,
        dilation,
        ceil_mode,
        tuple(axes),
        tuple(lead),
        tuple(trail),
        *modes,
    )
