"""The dtype of arithmetic: sums are float32 (float64 for float64), also under autocast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .autograd import is_differentiated

# The dtypes of sums.
WIDE = (torch.float32, torch.float64)


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over tensors of these dtypes."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def gradient_dtype(x: Tensor, *dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype to cast x to first: that of sums if x is differentiated, else its own.

    The gradient is a sum too, and the backward of the cast rounds it once.
    """
    differentiated = x.is_floating_point() and is_differentiated(x)
    return accumulator(x.dtype, *dtypes) if differentiated else x.dtype


def is_autocast(x: Tensor) -> bool:
    """Return whether autocast is enabled on x's device.

    PyTorch refuses the query for meta tensors.
    """
    device = "cpu" if x.is_cpu else x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def outside_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast on x's device."""
    if is_autocast(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
