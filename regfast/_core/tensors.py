"""Checks of tensors. Each raises an error that names the value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .checks import as_python
from .dispatch import may_read


def check_image(operation: str, x: Any, rank: int) -> bool:
    """Raise unless x is an image; return whether it is batched, (N, C, *spatial)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{operation}{rank}d: x must be a Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{operation}{rank}d: x must be a floating-point tensor, got {x.dtype}")
    ndim = x.ndim
    if ndim - rank not in (1, 2):
        allowed = f"{rank + 1}-d or {rank + 2}-d (batched)"
        raise ValueError(f"{operation}{rank}d: x must be {allowed}, got shape {tuple(x.shape)}")
    # A compiler may not know whether a batch is empty.
    if (torch.compiler.is_compiling() or not x.numel()) and 0 in x.shape[-rank - 1 :]:
        raise ValueError(
            f"{operation}{rank}d: only the batch may be empty, got shape {tuple(x.shape)}"
        )
    return ndim == rank + 2


def check_batch(x: Any) -> None:
    """Raise unless x is a batch of floating-point or uint8 numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"mixup: x must be a Tensor, got {type(x).__name__}")
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise TypeError(f"mixup: x must be floating-point or uint8, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("mixup: x must be a batch, (B, ...), got a 0-d tensor")


def check_like(name: str, t: Tensor, shape: Sequence[int], x: Tensor) -> None:
    """Raise unless t has this shape and x's dtype and device: a kernel would misread it."""
    expected, found = (tuple(shape), x.dtype, x.device), (tuple(t.shape), t.dtype, t.device)
    if found != expected:
        raise ValueError(f"{name} must have the shape, dtype and device {expected}, got {found}")


def extremes(t: Tensor) -> tuple[float, float]:
    """Return the least and the greatest element of a tensor that may be read."""
    if t.ndim == 0:
        return t.item(), t.item()
    low, high = t.detach().aminmax()
    return low.item(), high.item()


def check_lam(lam: Any, x: Any) -> Any:
    """Return lam checked: one weight, or one per sample of x.

    NumPy's numbers become Python's, and its arrays tensors.
    """
    given, lam = lam, as_python(lam)
    if isinstance(lam, list) and lam is not given:
        lam = torch.tensor(lam, dtype=torch.float64, device="cpu")
    if isinstance(lam, Tensor):
        if not lam.is_floating_point():
            raise TypeError(f"lam must be floating-point, got {lam.dtype}")
        if lam.ndim and lam.shape != x.shape[:1]:
            allowed = f"a number, 0-d or of shape {tuple(x.shape[:1])}"
            raise ValueError(f"lam must be {allowed}, got {tuple(lam.shape)}")
        if not may_read(lam) or not lam.numel():
            return lam
        low, high = extremes(lam)
        # If one element is NaN, so are both.
        if not (low >= 0 and high <= 1):
            lam = lam.detach().flatten()
            wrong = lam[~((lam >= 0) & (lam <= 1))]
            raise ValueError(f"lam must be in [0, 1], got {wrong[0].item()}")
    elif isinstance(lam, bool) or not isinstance(lam, (Real, torch.SymFloat)):
        raise TypeError(f"lam must be a number or a Tensor, got {type(lam).__name__}")
    elif not torch.compiler.is_compiling() and not 0 <= float(lam) <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    return lam
