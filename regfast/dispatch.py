"""Choosing a path: Triton's kernels or the PyTorch reference. They are the same function."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

F = TypeVar("F", bound=Callable[..., Any])

NO_CONSTANTS: Mapping[str, Any] = MappingProxyType({})
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
    """The choices of the running thread. (Not a ContextVar: Dynamo cannot read one.)"""

    def __init__(self) -> None:
        # On the instance: Dynamo's guard on a class attribute would not see the instance's appear.
        self.backend = _default
        self.debug = os.environ.get("REGFAST_DEBUG") == "1"


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


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Within the block, the values of CUDA tensors are checked as those on the host are, at the price of a synchronisation each.

    An index out of range, a lam outside [0, 1] or a label that is no class raises a ValueError; without the switch, which the
    environment's REGFAST_DEBUG=1 sets from outside, nothing is read beyond a tensor, but nothing says why a result is wrong.
    """
    before, _chosen.debug = _chosen.debug, enabled
    try:
        yield
    finally:
        _chosen.debug = before


def may_read(t: Tensor) -> bool:
    """Whether the values of t may be looked at: eagerly, and where they lie on the host or debugging is on."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or type(t) not in (Tensor, Parameter):
        return False
    return t.device.type == "cpu" or (_chosen.debug and t.device.type != "meta")


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


def outside_graphs(reason: str) -> Callable[[F], F]:
    """`torch.compiler.disable`, without importing the compiler where nobody else has: it takes a second."""

    def decorate(function: F) -> F:
        disabled: list[Any] = []

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            if not disabled:
                disabled.append(torch.compiler.disable(function, reason=reason))
            return disabled[0](*args, **kwargs)

        # What Dynamo looks for, so that a graph that must not break says why it would.
        call.__dict__.update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
        return cast(F, call)

    return decorate


def on_device(t: Tensor, device: torch.device) -> Tensor:
    """t on a device, sent without waiting for it to arrive; but the host waits for what it is to read itself."""
    return t.to(device, non_blocking=device.type != "cpu")


def is_variable(t: Tensor) -> bool:
    """Whether somebody differentiates by t, in either mode."""
    return (t.requires_grad and torch.is_grad_enabled()) or torch.autograd.forward_ad.unpack_dual(t).tangent is not None


def use_triton(
    x: Tensor,
    *,
    dtypes: Sequence[torch.dtype] = (),
    elementwise: bool = False,
    constants: Mapping[str, Any] = NO_CONSTANTS,
) -> bool:
    """Whether the operation about to run on x takes Triton's path.

    `dtypes` are the floating ones that it reads and writes, x's own if not said. An elementwise operation is left to the compiler
    within torch.compile, which fuses the reference into its neighbours. `constants` are the arguments by which the kernels do
    not differentiate: where somebody does, it is through the reference.
    """
    choice, fused = _chosen.backend, elementwise and torch.compiler.is_compiling()
    if choice == "reference" or (choice == "auto" and (x.device.type != "cuda" or fused)):
        return False
    reason = next(filter(None, (obstacle(x.device, dtype) for dtype in dtypes or (x.dtype,))), None)
    for name, t in constants.items():
        if isinstance(t, Tensor) and is_variable(t):
            reason = f"{name} is differentiated"
    if reason is not None and choice == "triton":
        raise RuntimeError(f"backend 'triton' cannot run: {reason}")
    return reason is None
