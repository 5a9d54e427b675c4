"""Queries of autograd's state, and one policy for higher derivatives: the reference computes them.

An operation has one autograd Function, and its backward is a kernel. Higher derivatives (a backward
with create_graph=True, forward mode, a transform of torch.func) differentiate the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _get_tracing_state
from torch.autograd import Function, forward_ad


def is_exporting() -> bool:
    """Return whether torch.export, torch.jit.trace or an ONNX exporter records the graph.

    In code that torch 2.11 traces, `torch.compiler.is_exporting` is always True.
    """
    if torch.compiler.is_compiling():
        return torch.compiler._is_exporting_flag
    return _get_tracing_state() is not None


def is_compiled() -> bool:
    """Return whether a compiler fuses the traced operators. An exported graph stays unfused."""
    return torch.compiler.is_compiling() and not is_exporting()


def is_differentiated(x: Tensor) -> bool:
    """Return whether any mode of differentiation may differentiate what is computed from x."""
    return is_exporting() or is_transformed() or (x.requires_grad and is_grad_enabled())


def is_transformed() -> bool:
    """Return whether torch.func or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or is_forward_mode()


def is_forward_mode() -> bool:
    """Return whether forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


def needs_graph(*arguments: Any) -> bool:
    """Return whether autograd records an operation on these arguments."""
    if not is_grad_enabled():
        return False
    for argument in arguments:  # noqa: SIM110 (any() takes longer than all other checks)
        if isinstance(argument, Tensor) and argument.requires_grad:
            return True
    return False


def is_variable(t: Tensor) -> bool:
    """Return whether t itself requires a gradient or carries a tangent."""
    return needs_graph(t) or (is_forward_mode() and forward_ad.unpack_dual(t).tangent is not None)


def unwatched_apply(function: type[Function]) -> Any:
    """Return function.apply without its search for tensors of torch.func: a quarter faster.

    The search is for tensors that escaped from a transform. Use this only where `is_watched` is
    False and tensors own their memory (`is_its_memory`): then there are none.
    """
    return super(Function, function).apply  # type: ignore[misc]


def is_differentiated_again() -> bool:
    """Return whether the running backward is itself differentiated.

    A compiler traces a backward only once: within one the answer is False.
    """
    return (is_grad_enabled() or is_forward_mode()) and not torch.compiler.is_compiling()


def gradients(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Return differentiable gradients of reference(*inputs): None for unwanted inputs."""
    if not any(wanted):
        return (None,) * len(inputs)
    with torch.enable_grad():
        # Views: one input may be computed from another, and that path must not add to the gradient.
        inputs = [t.view_as(t) if wants else t for t, wants in zip(inputs, wanted)]
        y = reference(*inputs)
    chosen = [t for t, wants in zip(inputs, wanted) if wants]
    found = iter(torch.autograd.grad(y, chosen, grad, create_graph=True))
    return tuple(next(found) if wants else None for wants in wanted)
