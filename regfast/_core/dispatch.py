"""Choosing a path: Triton's kernels or the PyTorch reference. They are the same function."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _has_storage,
    _len_torch_dispatch_stack,
)
from torch.compiler import is_compiling
from torch.nn import Parameter

from .autograd import is_exporting, is_forward_mode, needs_graph

F = TypeVar("F", bound=Callable[..., Any])

BACKENDS = ("auto", "reference", "triton")
TRITON_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))

# Triton itself reads the variable when a kernel is defined, so it counts from the start of the process or not at all.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _find_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


HAS_TRITON = _find_triton()


def _check_name(what: str, name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_default = _check_name("REGFAST_BACKEND", os.environ.get("REGFAST_BACKEND", "auto"))


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

    "auto" takes Triton for CUDA tensors of float16, bfloat16, float32 and float64 where Triton is
    installed and no functorch transform is under way, and the reference otherwise; a graph of
    torch.export, torch.jit.trace or ONNX is the reference's, of PyTorch's operators alone. "triton"
    raises a RuntimeError that names the reason where a kernel cannot run; in a process started with
    TRITON_INTERPRET=1 it runs the kernels on CPU tensors. The environment's REGFAST_BACKEND sets the
    choice outside any block. A backward takes the path of its forward; forward mode, and a backward
    that is differentiated itself, are the reference's whatever is named.

    Raises:
        ValueError: for any other name.
    """
    before, _chosen.backend = _chosen.backend, _check_name("backend", name)
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
    lies_here = t.is_cpu or (_chosen.debug and not t.is_meta)
    return lies_here and not is_watched(t) and not _are_functorch_transforms_active()


def is_watched(*arguments: Any) -> bool:
    """Whether an operation must be one that PyTorch can see: for a compiler, an exporter, a tracer, a mode or a subclass.

    Where nothing watches, an operation calls its kernel itself, which spares the host most of a call's time.
    """
    # (In this order: a compiler reads no further than the first.)
    if is_compiling() or _len_torch_dispatch_stack() or _get_tracing_state() is not None:
        return True
    for argument in arguments:  # noqa: SIM110 (a generator takes longer than the rest of a call's checks)
        if type(argument) not in _PLAIN:
            return True
    return False


_PLAIN = frozenset((Tensor, Parameter, float, int, type(None)))


def is_its_memory(t: Tensor) -> bool:
    """Whether t is what lies in memory of its own.

    Within a vmap, or escaped from a transform of torch.func, a tensor has none; and the imaginary part of a conjugate has
    the other sign.
    """
    return _has_storage(t) and not t.is_neg()


def obstacle(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why Triton cannot run on tensors of this device and these dtypes, or None where it can."""
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"the device is {device.type}, not cuda"
    if not HAS_TRITON:
        return "triton is not installed"
    for dtype in dtypes:
        if dtype not in TRITON_DTYPES:
            return f"the dtype is {dtype}, not one of {', '.join(sorted(map(str, TRITON_DTYPES)))}"
    if _are_functorch_transforms_active():
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


def on_device(t: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """t on a device, sent without waiting for it; but the host waits for what it is to read itself.

    What is sent, if anything is, has been cast to `dtype`: not every device has float64.
    """
    if dtype is not None and t.device != device:
        t = t.to(dtype)
    return t if t.device == device else t.to(device, non_blocking=device.type != "cpu")


def check_recordable() -> None:
    """Refuses the kernels in a graph that records PyTorch's operators alone.

    An operator's fake asks too: what Dynamo traces is told that no ONNX export is under way.
    """
    if is_exporting() and (not is_compiling() or torch.onnx.is_in_onnx_export()):
        reason = "torch.jit.trace and ONNX record PyTorch's operators alone; take backend 'auto'"
        raise RuntimeError(f"backend 'triton' cannot run: {reason}")


def use_triton(
    x: Tensor, *dtypes: torch.dtype, elementwise: bool = False, **constants: Any
) -> bool:
    """Whether the operation about to run on x takes Triton's path.

    `dtypes` are the floating ones that it reads and writes. An elementwise operation is left to the compiler within
    torch.compile, which fuses the reference into its neighbours. `constants` are the arguments by which the kernels do not
    differentiate: where they are differentiated, and in forward mode, it is the reference's.
    """
    choice = _chosen.backend
    if choice == "reference" or is_forward_mode():
        return False
    if choice == "auto" and (not x.is_cuda or is_exporting() or (elementwise and is_compiling())):
        return False
    able = (
        (x.is_cuda or (INTERPRETED and x.is_cpu))
        and HAS_TRITON
        and not _are_functorch_transforms_active()
    )
    reason = None if able and TRITON_DTYPES.issuperset(dtypes) else obstacle(x.device, *dtypes)
    if constants and needs_graph(*constants.values()):
        reason = (
            f"{next(name for name, t in constants.items() if needs_graph(t))} is differentiated"
        )
    if choice == "triton":
        check_recordable()
        if reason is not None:
            raise RuntimeError(f"backend 'triton' cannot run: {reason}")
    return reason is None
