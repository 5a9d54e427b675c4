"""Choose a path: the Triton kernels or the PyTorch reference. Both compute the same function."""

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

# Triton reads the variable when it defines a kernel, so only its value at process start counts.
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
    """The choices of the running thread. Not a ContextVar: Dynamo cannot read one."""

    def __init__(self) -> None:
        # On the instance: a Dynamo guard on a class attribute would miss a later instance's.
        self.backend = _default
        self.debug = os.environ.get("REGFAST_DEBUG") == "1"


_chosen = _Chosen()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the operations of the block on a path: "auto" (the default), "reference" or "triton".

    "auto" takes Triton for CUDA tensors of float16, bfloat16, float32 and float64 if Triton is
    installed and no functorch transform is active, and the reference otherwise. Graphs of
    torch.export, torch.jit.trace and ONNX take the reference: they hold only PyTorch's operators.

    "triton" raises a RuntimeError with the reason if a kernel cannot run. In a process started with
    TRITON_INTERPRET=1 it runs the kernels on CPU tensors.

    The environment variable REGFAST_BACKEND sets the path outside all blocks. A backward takes the
    path of its forward. Forward mode, and a backward that is itself differentiated, always take the
    reference.

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
    """Check the values of CUDA tensors in the block, as those of CPU tensors always are.

    Each check synchronises the device. An index out of range, a lam outside [0, 1] or a label that
    is no class raises a ValueError. Without the checks no kernel reads beyond a tensor, but a wrong
    value gives a wrong result without an error. The environment variable REGFAST_DEBUG=1 enables
    the checks outside all blocks.
    """
    before, _chosen.debug = _chosen.debug, enabled
    try:
        yield
    finally:
        _chosen.debug = before


def may_read(t: Tensor) -> bool:
    """Return whether the host may read the values of t: eagerly, on the CPU or under `debug`."""
    readable = t.is_cpu or (_chosen.debug and not t.is_meta)
    return readable and not is_watched(t) and not _are_functorch_transforms_active()


def is_watched(*arguments: Any) -> bool:
    """Return whether PyTorch must see the operation as an operator.

    A compiler, an exporter, a tracer, a mode or a tensor subclass needs the operator. Otherwise an
    operation calls its kernel directly, which saves most of a call's time on the host.
    """
    # A compiler stops at the first test.
    if is_compiling() or _len_torch_dispatch_stack() or _get_tracing_state() is not None:
        return True
    for argument in arguments:  # noqa: SIM110 (any() takes longer than all other checks)
        if type(argument) not in _PLAIN:
            return True
    return False


_PLAIN = frozenset((Tensor, Parameter, float, int, type(None)))


def is_its_memory(t: Tensor) -> bool:
    """Return whether t's storage holds its values.

    A tensor within a vmap, or one that escaped from a transform of torch.func, has no storage. The
    imaginary part of a conjugate is stored with the other sign.
    """
    return _has_storage(t) and not t.is_neg()


def obstacle(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Return why Triton cannot run on this device and these dtypes, or None if it can."""
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
    """Apply `torch.compiler.disable` without importing the compiler: the import takes a second."""

    def decorate(function: F) -> F:
        disabled: list[Any] = []

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            if not disabled:
                disabled.append(torch.compiler.disable(function, reason=reason))
            return disabled[0](*args, **kwargs)

        # Dynamo reads these: its error for a graph that must not break then gives the reason.
        call.__dict__.update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
        return cast(F, call)

    return decorate


def on_device(t: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return t on `device`, without waiting for a transfer to an accelerator.

    A transfer to the host does wait. Before a transfer t is cast to `dtype`: not every device has
    float64.
    """
    if dtype is not None and t.device != device:
        t = t.to(dtype)
    return t if t.device == device else t.to(device, non_blocking=device.type != "cpu")


def check_recordable() -> None:
    """Raise a RuntimeError for kernels in a graph that records only PyTorch's operators.

    The fake of an operator calls this too: code that Dynamo traces cannot see an ONNX export.
    """
    if is_exporting() and (not is_compiling() or torch.onnx.is_in_onnx_export()):
        reason = "torch.jit.trace and ONNX record PyTorch's operators alone; take backend 'auto'"
        raise RuntimeError(f"backend 'triton' cannot run: {reason}")


def use_triton(
    x: Tensor, *dtypes: torch.dtype, elementwise: bool = False, **constants: Any
) -> bool:
    """Return whether the operation about to run on x takes Triton's path.

    `dtypes` are the floating dtypes that it reads and writes. Within torch.compile an elementwise
    operation takes the reference, which the compiler fuses with its neighbours. The kernels do not
    differentiate by `constants`: if one of them is differentiated, and in forward mode, the
    reference runs.

    Raises:
        RuntimeError: under backend "triton", with the reason, if a kernel cannot run.
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
