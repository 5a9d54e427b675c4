"""Choosing a path: Triton's kernels or the PyTorch reference. They are the same function."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "triton")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Triton itself reads the variable when a kernel is defined, so it counts from the start of the process or not at all.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _find_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


HAS_TRITON = _find_triton()


def _check_name(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_default = _check_name(os.environ.get("REGFAST_BACKEND", "auto"))


class _Chosen(threading.local):
    """The choice of the running thread. (Not a ContextVar: Dynamo cannot read one.)"""

    def __init__(self) -> None:
        # On the instance: Dynamo's guard on a class attribute would not see the instance's appear.
        self.backend = _default


_chosen = _Chosen()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, operations take the path named: "auto" (the default), "reference" or "triton".

    "auto" takes Triton for CUDA tensors of float16, bfloat16, float32 and float64 where Triton is installed and no functorch
    transform is under way, and the reference otherwise. "triton" raises a RuntimeError that names the reason where a kernel
    cannot run; in a process started with TRITON_INTERPRET=1 it runs the kernels on CPU tensors. The environment's
    REGFAST_BACKEND sets the choice outside any block. A backward takes the path of its forward.

    Raises:
        ValueError: for any other name.
    """
    before, _chosen.backend = _chosen.backend, _check_name(name)
    try:
        yield
    finally:
        _chosen.backend = before


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot run on a tensor of this device and dtype, or None where it can."""
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"the device is {device.type}, not cuda"
    if not HAS_TRITON:
        return "triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"the dtype is {dtype}, not one of {', '.join(map(str, TRITON_DTYPES))}"
    if torch._C._are_functorch_transforms_active():
        return "a functorch transform is under way"
    return None


def use_triton(x: Tensor) -> bool:
    """Whether the operation about to run on x takes Triton's path."""
    choice = _chosen.backend
    if choice == "reference" or (choice == "auto" and x.device.type != "cuda"):
        return False
    reason = obstacle(x.device, x.dtype)
    if reason is not None and choice == "triton":
        raise RuntimeError(f"backend 'triton' cannot run: {reason}")
    return reason is None
