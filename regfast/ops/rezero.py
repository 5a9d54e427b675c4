"""rezero: a residual connection whose branch is scaled by a learnable number that starts at zero."""

from __future__ import annotations

from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..dispatch import on_device, use_triton
from ..reference.blur_pool import accumulator, is_forward_mode
from ..reference.rezero import ACTIVATIONS
from ..reference.rezero import rezero as reference
from ..sharding import is_sharded, on_parts
from .schema import check_like, define

__all__ = ["ACTIVATIONS", "FORMS", "rezero"]

FORMS = ("gate", "post")


def _forward(x, f, alpha, activation, form, dtype):
    from ..kernels import rezero as kernels

    _check_op(x, f, alpha)
    return kernels.rezero(x, f, alpha, activation, form, torch.empty_like(x, dtype=dtype))


def _backward(grad, x, f, alpha, activation, form, wants_x, wants_f, wants_alpha):
    from ..kernels import rezero as kernels

    if x is not None:
        _check_op(x, f, alpha)
    check_like("rezero_backward: grad", grad, f.shape, grad)
    outputs = _gradients(grad, x, f, alpha, activation, form, wants_x, wants_f, wants_alpha)
    kernels.rezero_backward(grad, x, f, alpha, activation, form, *outputs)
    return outputs


def _gradients(grad, x, f, alpha, activation, form, wants_x, wants_f, wants_alpha):
    """The uninitialised gradients of x and f, laid out as f is, and of alpha; empty where nobody wants one."""
    dx = torch.empty_like(f, dtype=x.dtype) if wants_x and x is not None else f.new_empty(0)
    df = torch.empty_like(f) if wants_f else f.new_empty(0)
    return dx, df, f.new_empty(() if wants_alpha else 0, dtype=accumulator(grad.dtype, f.dtype, alpha.dtype))


def _check_op(x: Tensor, f: Tensor, alpha: Tensor) -> None:
    """Refuses what a kernel would read beyond, if an op is called by hand."""
    check_like("rezero: f", f, x.shape, f)
    if alpha.numel() != 1 or f.device != x.device or alpha.device != x.device:
        found = f"f on {f.device} and alpha of shape {tuple(alpha.shape)} on {alpha.device}"
        raise ValueError(f"rezero: f and alpha, which has one element, must be on {x.device}, got {found}")


define(
    "rezero(Tensor x, Tensor f, Tensor alpha, str activation, str form, ScalarType dtype) -> Tensor",
    _forward,
    lambda x, f, alpha, activation, form, dtype: torch.empty_like(x, dtype=dtype),
)
define(
    "rezero_backward(Tensor grad, Tensor? x, Tensor f, Tensor alpha, str activation, str form, bool wants_x, bool wants_f, "
    "bool wants_alpha) -> (Tensor dx, Tensor df, Tensor dalpha)",
    _backward,
    _gradients,
)


# There is no kernel of the gradient's own derivative: who differentiates again, or forwards, does it through the reference. So
# the Function has no jvp, and forward mode never meets it. Of the gate's form x is not saved: its gradient *is* the output's.
class _ReZero(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, f, alpha, activation, form, dtype):
        ctx.save_for_backward(None if form == "gate" else x, f, alpha)
        ctx.arguments, ctx.x_dtype = (activation, form, dtype), x.dtype
        return torch.ops.regfast.rezero(x, f, alpha, activation, form, dtype)

    @staticmethod
    def backward(ctx, grad):
        x, f, alpha = ctx.saved_tensors
        activation, form, dtype = ctx.arguments
        wants_x, wants_f, wants_alpha = ctx.needs_input_grad[:3]
        dx = grad.to(ctx.x_dtype) if wants_x and form == "gate" else None
        again = torch.is_grad_enabled() or is_forward_mode()
        if again and not torch.compiler.is_compiling():
            with torch.enable_grad():
                stream = f.new_zeros((), dtype=ctx.x_dtype).expand_as(f) if x is None else x
                y = reference(stream, f, alpha, activation, form, dtype)
                wanted = [t for t, wants in zip((x, f, alpha), ctx.needs_input_grad) if wants and t is not None]
                found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True) if wanted else ())
            dx = next(found) if wants_x and form == "post" else dx
            return dx, next(found) if wants_f else None, next(found) if wants_alpha else None, None, None, None
        given = torch.ops.regfast.rezero_backward(grad, x, f, alpha, activation, form, wants_x, wants_f, wants_alpha)
        dx = given[0] if wants_x and form == "post" else dx
        dalpha = given[2].to(alpha.dtype).view(alpha.shape) if wants_alpha else None
        return dx, given[1] if wants_f else None, dalpha, None, None, None


def rezero(x: Tensor, f: Tensor, alpha: float | Tensor, activation: str = "relu", form: str = "gate") -> Tensor:
    """A residual connection with a gate: x + alpha*act(f), or with form "post" act(x + alpha*f).

    One read of x and f and one write; backward, of the output's gradient and f, and one write. Differentiable in x, f and alpha,
    any number of times; the gradient of alpha is summed in float32, in the same order every time. At alpha = 0 and finite f the
    gate's form gives x itself.

    Args:
        x: the residual stream, of any shape; float16, bfloat16, float32 or float64.
        f: the branch, of x's shape; of a dtype of its own, as under autocast.
        alpha: the gate, a number or a tensor of one element.
        activation: "identity", "relu", "leaky_relu" (slope 0.01), "gelu" (exact) or "silu".
        form: "gate", the book chapter's; or "post", the author's.

    Returns:
        A tensor of x's shape and memory format, in the wider of the dtypes of x and f.

    Raises:
        ValueError, TypeError: for an argument that is not allowed; the message names it and what is.

    Source: Bachlechner et al., "ReZero is All You Need" (2020); the book chapter's ResidualBlock.

    Example:
        >>> x, f, alpha = torch.randn(8, 64, 56, 56), torch.randn(8, 64, 56, 56), torch.zeros(1)
        >>> torch.equal(regfast.functional.rezero(x, f, alpha), x)
        True
    """
    if has_torch_function((x, f, alpha)):
        return handle_torch_function(rezero, (x, f, alpha), x, f, alpha, activation, form)
    _check(x, f, alpha)
    check_activation(activation)
    check_form(form)
    wide, dtype = accumulator(x.dtype, f.dtype), torch.promote_types(x.dtype, f.dtype)
    alpha = on_device(alpha, x.device) if isinstance(alpha, Tensor) else torch.full((), alpha, dtype=wide, device=x.device)
    if is_sharded(x, f, alpha):
        function = partial(rezero, activation=activation, form=form)
        return on_parts(function, x, f, dims=range(x.ndim), keeps=x.ndim, partial=[alpha])
    dtypes = x.dtype, f.dtype, alpha.dtype
    if is_forward_mode() or not use_triton(x, dtypes=dtypes, elementwise=True):
        return reference(x, f, alpha, activation, form, dtype)
    return _ReZero.apply(x, f, alpha, activation, form, dtype)


def _check(x: Any, f: Any, alpha: Any) -> None:
    for name, t in (("x", x), ("f", f)):
        if not isinstance(t, Tensor):
            raise TypeError(f"rezero: {name} must be a Tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"rezero: {name} must be floating-point, got {t.dtype}")
    if x.shape != f.shape:
        raise ValueError(f"rezero: x and f must be of one shape, got {tuple(x.shape)} and {tuple(f.shape)}")
    if x.device != f.device:
        raise ValueError(f"rezero: x and f must be on one device, got {x.device} and {f.device}")
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise TypeError(f"rezero: alpha must be floating-point, got {alpha.dtype}")
        if alpha.numel() != 1:
            raise ValueError(f"rezero: alpha must be a number or a tensor of one element, got shape {tuple(alpha.shape)}")
    elif isinstance(alpha, bool) or not isinstance(alpha, (Real, torch.SymFloat)):
        raise TypeError(f"rezero: alpha must be a number or a tensor of one element, got {type(alpha).__name__}")


def check_activation(activation: Any) -> None:
    # Not in the dictionary itself, which would have to hash whatever it is.
    if activation not in tuple(ACTIVATIONS):
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")


def check_form(form: Any) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
