"""What differentiation is under way, and the one policy for derivatives of derivatives: they are the reference's.

An operation has one autograd Function, whose backward is a kernel. Whatever differentiates again (a backward with
create_graph=True, forward mode, a transform of torch.func) goes through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _get_tracing_state
from torch.autograd import Function, forward_ad


def is_exporting() -> bool:
    """Whether a graph is made for any runtime: by torch.export, torch.jit.trace or ONNX's exporters.

    (Traced by torch 2.11, `torch.compiler.is_exporting` says yes whatever traces it.)
    """
    if torch.compiler.is_compiling():
        return torch.compiler._is_exporting_flag
    return _get_tracing_state() is not None


def is_compiled() -> bool:
    """Whether a compiler will fuse what is traced. An exported graph stays as it is, for any runtime."""
    return torch.compiler.is_compiling() and not is_exporting()


def is_differentiated(x: Tensor) -> bool:
    """Whether a derivative of what is computed from x may be asked for, in any mode of differentiation."""
    return is_exporting() or is_transformed() or (x.requires_grad and is_grad_enabled())


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or is_forward_mode()


def is_forward_mode() -> bool:
    """Whether tangents may be carried along."""
    return forward_ad._current_level >= 0


def needs_graph(*arguments: Any) -> bool:
    """Whether autograd records what is computed from the tensors among the arguments."""
    if not is_grad_enabled():
        return False
    for argument in arguments:  # noqa: SIM110 (a generator takes longer than the rest of a call's checks)
        if isinstance(argument, Tensor) and argument.requires_grad:
            return True
    return False


def is_variable(t: Tensor) -> bool:
    """Whether t itself is differentiated by, in either mode."""
    return needs_graph(t) or (is_forward_mode() and forward_ad.unpack_dual(t).tangent is not None)


def unwatched_apply(function: type[Function]) -> Any:
    """function.apply for where nothing watches: a quarter faster.

    For then no argument has escaped from a transform of torch.func, which is what Function's own apply looks for.
    """
    return super(Function, function).apply  # type: ignore[misc]


def is_differentiated_again() -> bool:
    """Whether the backward under way is itself differentiated. (A compiler traces a backward once, and that is all.)"""
    return (is_grad_enabled() or is_forward_mode()) and not torch.compiler.is_compiling()


def gradients(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of reference(*inputs) by the inputs that are wanted, differentiable themselves; None by the others."""
    if not any(wanted):
        return (None,) * len(inputs)
    with torch.enable_grad():
        # Views of them, for one input may have been computed from another, and what comes that way is not asked for here.
        inputs = [t.view_as(t) if wants else t for t, wants in zip(inputs, wanted)]
        y = reference(*inputs)
    chosen = [t for t, wants in zip(inputs, wanted) if wants]
    found = iter(torch.autograd.grad(y, chosen, grad, create_graph=True))
    return tuple(next(found) if wants else None for wants in wanted)
