"""rezero: a residual connection; a learnable number that starts at zero scales its branch."""

from __future__ import annotations

from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .._core.autograd import gradients, is_differentiated_again, needs_graph, unwatched_apply
from .._core.checks import as_python
from .._core.dispatch import is_its_memory, is_watched, on_device, use_triton
from .._core.layout import as_tensor
from .._core.precision import accumulator
from .._core.sharding import is_sharded, on_parts
from .._core.tensors import check_like
from ..reference.rezero import ACTIVATIONS
from ..reference.rezero import rezero as reference
from .schema import define, kernels_of

__all__ = ["ACTIVATIONS", "FORMS", "rezero"]

FORMS = ("gate", "post")
_NAMES = tuple(ACTIVATIONS)
_ONE_NUMBER = "a number or a tensor of one element"


def _forward_op(x, f, alpha, activation, form):
    _check_op(x, f, alpha)
    return kernels_of("rezero").rezero(x, f, alpha, activation, form)


def _backward_op(grad, x, f, alpha, activation, form, wants_x, wants_f, wants_alpha):
    if x is not None:
        _check_op(x, f, alpha)
    check_like("rezero_backward: grad", grad, f.shape, grad)
    wanted = wants_x and x is not None, wants_f, wants_alpha
    found = kernels_of("rezero").rezero_backward(grad, x, f, alpha, activation, form, *wanted)
    # An op returns tensors: an unwanted gradient is empty.
    return tuple(f.new_empty(0) if t is None else t for t in found)


def _check_op(x: Tensor, f: Tensor, alpha: Tensor) -> None:
    """Raise if a kernel would read beyond an operand. Direct calls of the operators need this."""
    check_like("rezero: f", f, x.shape, f)
    if alpha.numel() != 1 or f.device != x.device or alpha.device != x.device:
        found = f"f on {f.device} and alpha of shape {tuple(alpha.shape)} on {alpha.device}"
        raise ValueError(
            f"rezero: f and alpha, which has one element, must be on {x.device}, got {found}"
        )


def _fake_gradients(grad, x, f, alpha, activation, form, wants_x, wants_f, wants_alpha):
    return (
        torch.empty_like(f, dtype=x.dtype) if wants_x and x is not None else f.new_empty(0),
        torch.empty_like(f) if wants_f else f.new_empty(0),
        torch.empty_like(alpha) if wants_alpha else f.new_empty(0),
    )


define(
    "rezero(Tensor x, Tensor f, Tensor alpha, str activation, str form) -> Tensor",
    _forward_op,
    lambda x, f, *others: torch.empty_like(x, dtype=torch.promote_types(x.dtype, f.dtype)),
)
define(
    "rezero_backward(Tensor grad, Tensor? x, Tensor f, Tensor alpha, str activation, str form, "
    "bool wants_x, bool wants_f, bool wants_alpha) -> (Tensor dx, Tensor df, Tensor dalpha)",
    _backward_op,
    _fake_gradients,
)


def _forward(x, f, alpha, modes, watched):
    if watched:
        return torch.ops.regfast.rezero(x, f, alpha, *modes)
    return kernels_of("rezero").rezero(x, f, alpha, *modes)


def _backward(grad, x, f, alpha, modes, wanted, watched):
    """Return the gradients of x, f and alpha; an unwanted one is unspecified."""
    if watched or is_watched(grad) or not is_its_memory(grad):
        alpha = as_tensor(alpha, accumulator(grad.dtype), grad.device)
        return torch.ops.regfast.rezero_backward(grad, x, f, alpha, *modes, *wanted)
    return kernels_of("rezero").rezero_backward(grad, x, f, alpha, *modes, *wanted)


class _ReZero(torch.autograd.Function):
    """With form "gate" the gradient of x is that of the output, and x is not saved."""

    @staticmethod
    def forward(ctx, x, f, alpha, modes, watched):
        tensor, number = (alpha, None) if isinstance(alpha, Tensor) else (None, alpha)
        ctx.save_for_backward(None if modes[1] == "gate" else x, f, tensor)
        ctx.arguments = number, modes, x.dtype, watched
        return _forward(x, f, alpha, modes, watched)

    @staticmethod
    def backward(ctx, grad):
        (x, f, tensor), (number, modes, x_dtype, watched) = ctx.saved_tensors, ctx.arguments
        alpha = number if tensor is None else tensor
        wants_x, wants_f, wants_alpha = ctx.needs_input_grad[:3]
        wanted = wants_x and x is not None, wants_f, wants_alpha
        dx = df = dalpha = None
        if is_differentiated_again():
            alpha = as_tensor(alpha, accumulator(grad.dtype), grad.device)
            stream = grad.new_zeros((), dtype=x_dtype).expand_as(f) if x is None else x
            dx, df, dalpha = gradients(
                lambda *inputs: reference(*inputs, *modes), (stream, f, alpha), wanted, grad
            )
        elif any(wanted):
            dx, df, dalpha = _backward(grad, x, f, alpha, modes, wanted, watched)
        if x is None:
            dx = grad if grad.dtype == x_dtype else grad.to(x_dtype)
        return (
            dx if wants_x else None,
            df if wants_f else None,
            dalpha if wants_alpha else None,
            None,
            None,
        )


_apply = unwatched_apply(_ReZero)


def rezero(
    x: Tensor, f: Tensor, alpha: float | Tensor, activation: str = "relu", form: str = "gate"
) -> Tensor:
    """Return a residual with a gate, x + alpha*act(f), or with form "post" act(x + alpha*f).

    The forward reads x and f once and writes once. With form "gate" the backward reads the output's
    gradient and f once and writes once. Differentiable in x, f and alpha, any number of times; the
    gradient of alpha is summed in float32, always in the same order. At alpha = 0 and finite f form
    "gate" gives x itself.

    Args:
        x: the residual stream, of any shape; float16, bfloat16, float32 or float64.
        f: the branch, of x's shape. Its dtype may differ, as under autocast.
        alpha: the gate, a number or a tensor of one element.
        activation: "identity", "relu", "leaky_relu" (slope 0.01), "gelu" (exact) or "silu".
        form: "gate", the book chapter's; or "post", the paper's.

    Returns:
        A tensor of x's shape and memory format, in the wider of the dtypes of x and f.

    Raises:
        ValueError, TypeError: for an invalid argument; the message names it and what is allowed.

    Source: Bachlechner et al., "ReZero is All You Need" (2020); the book chapter's ResidualBlock.

    Example:
        >>> x, f, alpha = torch.randn(8, 64, 56, 56), torch.randn(8, 64, 56, 56), torch.zeros(1)
        >>> torch.equal(regfast.functional.rezero(x, f, alpha), x)
        True
    """
    if has_torch_function_variadic(x, f, alpha):
        return handle_torch_function(rezero, (x, f, alpha), x, f, alpha, activation, form)
    alpha = as_python(alpha)
    dtypes = _check(x, f, alpha)
    check_activation(activation)
    check_form(form)
    if isinstance(alpha, Tensor):
        alpha = on_device(alpha, x.device)
    elif not isinstance(alpha, (float, torch.SymFloat)):
        alpha = float(alpha)
    watched = is_watched(x, f, alpha) or not (is_its_memory(x) and is_its_memory(f))
    if watched and is_sharded(x, f, alpha):
        alpha = as_tensor(alpha, accumulator(*dtypes), x.device)
        function = partial(rezero, activation=activation, form=form)
        return on_parts(function, x, f, dims=range(x.ndim), keeps=x.ndim, partial=[alpha])
    fused = use_triton(x, *dtypes, elementwise=True)
    if not fused or watched:
        alpha = as_tensor(alpha, accumulator(*dtypes), x.device)
    if not fused:
        return reference(x, f, alpha, activation, form)  # type: ignore[arg-type]
    modes = activation, form
    if needs_graph(f, x, alpha):
        return (_ReZero.apply if watched else _apply)(x, f, alpha, modes, watched)
    return _forward(x, f, alpha, modes, watched)


def _check(x: Any, f: Any, alpha: Any) -> tuple[torch.dtype, ...]:
    """Raise unless x, f and alpha go together; return their dtypes."""
    if not isinstance(x, Tensor) or not isinstance(f, Tensor):
        name, t = ("f", f) if isinstance(x, Tensor) else ("x", x)
        raise TypeError(f"rezero: {name} must be a Tensor, got {type(t).__name__}")
    dtypes: tuple[torch.dtype, ...] = x.dtype, f.dtype
    if not dtypes[0].is_floating_point or not dtypes[1].is_floating_point:
        name, dtype = ("f", dtypes[1]) if dtypes[0].is_floating_point else ("x", dtypes[0])
        raise TypeError(f"rezero: {name} must be floating-point, got {dtype}")
    if x.shape != f.shape:
        raise ValueError(
            f"rezero: x and f must be of one shape, got {tuple(x.shape)} and {tuple(f.shape)}"
        )
    if x.device != f.device:
        raise ValueError(f"rezero: x and f must be on one device, got {x.device} and {f.device}")
    if isinstance(alpha, Tensor):
        dtypes = *dtypes, alpha.dtype
        if not dtypes[2].is_floating_point:
            raise TypeError(f"rezero: alpha must be floating-point, got {dtypes[2]}")
        if alpha.numel() != 1:
            found = f"shape {tuple(alpha.shape)}"
            raise ValueError(f"rezero: alpha must be {_ONE_NUMBER}, got {found}")
    elif isinstance(alpha, bool) or not isinstance(alpha, (Real, torch.SymFloat)):
        raise TypeError(f"rezero: alpha must be {_ONE_NUMBER}, got {type(alpha).__name__}")
    return dtypes


def check_activation(activation: Any) -> None:
    # Not in the dictionary: it would have to hash a value of any type.
    if activation not in _NAMES:
        raise ValueError(
            f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}"
        )


def check_form(form: Any) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
