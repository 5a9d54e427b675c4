"""What arithmetic is in: sums are float32 (float64 for float64), whatever autocast says."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .autograd import is_differentiated

# What sums are in.
WIDE = (torch.float32, torch.float64)


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of sums over tensors of these."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def gradient_dtype(x: Tensor, *dtypes: torch.dtype) -> torch.dtype:
    """The dtype that x is cast to first: where it is differentiated, that of sums.

    Its gradient is a sum too, which the backward of the cast rounds once.
    """
    differentiated = x.is_floating_point() and is_differentiated(x)
    return accumulator(x.dtype, *dtypes) if differentiated else x.dtype


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is enabled where x is. (Torch refuses the question for meta tensors.)"""
    device = "cpu" if x.is_cpu else x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def outside_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which operations keep the dtypes they are given."""
    return (
        torch.autocast(x.device.type, enabled=False) if is_autocast(x) else contextlib.nullcontext()
    )
