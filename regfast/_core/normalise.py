"""Normalisation, (v - mean)/std, in the form that a blend applies: scale*v + shift."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .checks import as_python
from .dispatch import is_watched, may_read, on_device
from .precision import accumulator
from .tensors import extremes


def result_dtype(
    x_dtype: torch.dtype, dtype: torch.dtype | None, mean: Any, std: Any
) -> torch.dtype:
    """Return a blend's dtype: `dtype` if given, else x's, and float32 for normalised uint8."""
    if (mean is None) != (std is None):
        found = f"mean={mean!r} and std={std!r}"
        raise ValueError(f"mixup: mean and std must be given together, got {found}")
    if dtype is None:
        if x_dtype != torch.uint8:
            return x_dtype
        if mean is None:
            raise ValueError(
                "mixup: x of torch.uint8 needs mean and std, or a floating dtype for x/255"
            )
        return torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"mixup: dtype must be floating-point, got {dtype!r}")
    return dtype


class Affine:
    """The scale and shift of a mean and std, numbers or one per channel.

    Each device receives them once, in the dtype that the kernel reads.
    """

    def __init__(self, mean: Any, std: Any) -> None:
        mean, std = (_numbers(name, value) for name, value in (("mean", mean), ("std", std)))
        # If one of them is a plain number, it goes to the other's device.
        like = std if mean.device.type == "cpu" else mean
        mean, std = (on_device(numbers, like.device, like.dtype) for numbers in (mean, std))
        if mean.ndim and std.ndim and 1 not in (len(mean), len(std)) and len(mean) != len(std):
            found = f"{len(mean)} and {len(std)}"
            raise ValueError(
                f"mixup: mean and std must have the same number of channels, got {found}"
            )
        if may_read(std) and not (std > 0).all():
            raise ValueError(f"mixup: std must be positive, got {std.tolist()}")
        self.scale, self.shift = 1 / std, -mean / std
        self._highest = extremes(mean)[1] if may_read(mean) else 0.0
        self._sent: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor, Tensor]] = {}

    def of(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return scale and shift, (C,) on x's device, for a blend of x to `dtype`.

        The channels are dimension 1. The dtype is that of the blend's sums.
        """
        if x.ndim < 2:
            found = f"x of shape {tuple(x.shape)}"
            raise ValueError(f"mixup: mean and std belong to channels, dimension 1, got {found}")
        channels, wide = x.shape[1], accumulator(x.dtype, dtype)
        for numbers in (self.scale, self.shift):
            if numbers.ndim and numbers.shape[0] not in (1, channels):
                found = f"one per channel of x, got {numbers.shape[0]}"
                raise ValueError(f"mixup: mean and std must be numbers or {channels}, {found}")
        if x.dtype == torch.uint8 and self._highest > 1:
            found = f"of x/255, at most 1, for bytes; got a mean of {self._highest:g}"
            raise ValueError(f"mixup: mean and std must be {found}")
        if is_watched(x):
            # A constant that a tracer made must not outlive the trace.
            return self._send(x.device, wide, channels)
        key = x.device, wide, channels
        if key not in self._sent:
            # Training could not use tensors of inference mode.
            with torch.inference_mode(False):
                self._sent[key] = self._send(*key)
        return self._sent[key]

    def _send(
        self, device: torch.device, dtype: torch.dtype, channels: int
    ) -> tuple[Tensor, Tensor]:
        # Cast before the transfer: not every device has float64.
        scale, shift = (
            numbers.to(dtype).expand(channels).contiguous() for numbers in (self.scale, self.shift)
        )
        return on_device(scale, device), on_device(shift, device)


def _numbers(name: str, value: Any) -> Tensor:
    """Return a number, or one per channel, as a constant tensor.

    On the host it is float64; on a device float64 stays, and any other dtype becomes float32.
    """
    value = as_python(value)
    if isinstance(value, (bool, str)) or not isinstance(value, (Real, Sequence, Tensor)):
        raise TypeError(
            f"mixup: {name} must be a number, a sequence of numbers or a Tensor, got {value!r}"
        )
    if isinstance(value, Tensor):
        t = value.detach().to(torch.float64 if value.is_cpu else accumulator(value.dtype))
    else:
        t = torch.tensor(value, dtype=torch.float64, device="cpu")
    if t.ndim > 1 or t.numel() == 0:
        raise ValueError(
            f"mixup: {name} must be a number or one per channel, got shape {tuple(t.shape)}"
        )
    return t
