"""mixup_cross_entropy: the cross entropy of blended labels, which stay indices, in one pass."""

from __future__ import annotations

from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.autograd import gradients, is_differentiated_again, needs_graph, unwatched_apply
from .._core.checks import as_python
from .._core.dispatch import is_its_memory, is_watched, may_read, on_device, use_triton
from .._core.layout import as_tensor
from .._core.precision import accumulator, is_autocast
from .._core.sharding import is_sharded, on_parts, whole
from .._core.tensors import check_lam, check_like, extremes
from ..reference.mixup_cross_entropy import mixup_cross_entropy as reference
from .schema import define, kernels_of

__all__ = ["mixup_cross_entropy"]

REDUCTIONS = ("mean", "sum", "none")
LABELS = (torch.int64, torch.int32, torch.uint8)


def _forward_op(z, a, b, lam, weight, ignore_index, reduction, label_smoothing, dtype):
    _check_op(z, a, b, lam, weight)
    arguments = ignore_index, reduction, label_smoothing, dtype
    return kernels_of("mixup_cross_entropy").mixup_cross_entropy(z, a, b, lam, weight, *arguments)


def _backward_op(grad, z, a, b, lam, weight, statistics, ignore_index, reduction, label_smoothing):
    _check_op(z, a, b, lam, weight)
    rows, wide = tuple(z.shape[:1] + z.shape[2:]), z.new_empty((), dtype=accumulator(z.dtype))
    if tuple(grad.shape) not in ((), rows) or grad.device != z.device:
        found = f"{tuple(grad.shape)} on {grad.device}"
        raise ValueError(
            f"mixup_cross_entropy_backward: grad must be () or {rows} on {z.device}, got {found}"
        )
    check_like(
        "mixup_cross_entropy_backward: statistics",
        statistics,
        _statistics_shape(a, reduction),
        wide,
    )
    return kernels_of("mixup_cross_entropy").mixup_cross_entropy_backward(
        grad, z, a, b, lam, weight, statistics, ignore_index, reduction, label_smoothing
    )


def _fake_outputs(z, a, b, lam, weight, ignore_index, reduction, label_smoothing, dtype):
    loss = z.new_empty(a.shape if reduction == "none" else (), dtype=dtype)
    return loss, z.new_empty(_statistics_shape(a, reduction), dtype=accumulator(z.dtype))


def _statistics_shape(a: Tensor, reduction: str) -> tuple[int]:
    """Return the shape: two statistics per row, and the two denominators of a mean."""
    return (2 * a.numel() + (2 if reduction == "mean" else 0),)


TERMS = "Tensor z, Tensor a, Tensor b, Tensor lam, Tensor? weight"
define(
    f"mixup_cross_entropy({TERMS}, int ignore_index, str reduction, float label_smoothing, "
    "ScalarType dtype) -> (Tensor loss, Tensor statistics)",
    _forward_op,
    _fake_outputs,
)
define(
    f"mixup_cross_entropy_backward(Tensor grad, {TERMS}, Tensor statistics, int ignore_index, "
    "str reduction, float label_smoothing) -> Tensor",
    _backward_op,
    lambda grad, z, *others: torch.empty_like(z),
)


def _forward(z, a, b, lam, weight, arguments, watched):
    if watched:
        return torch.ops.regfast.mixup_cross_entropy(z, a, b, lam, weight, *arguments)
    return kernels_of("mixup_cross_entropy").mixup_cross_entropy(z, a, b, lam, weight, *arguments)


def _backward(grad, z, a, b, lam, weight, statistics, arguments, watched):
    if watched or is_watched(grad) or not is_its_memory(grad):
        lam = as_tensor(lam, accumulator(z.dtype), z.device)
        return torch.ops.regfast.mixup_cross_entropy_backward(
            grad, z, a, b, lam, weight, statistics, *arguments
        )
    kernels = kernels_of("mixup_cross_entropy")
    return kernels.mixup_cross_entropy_backward(grad, z, a, b, lam, weight, statistics, *arguments)


class _MixupCrossEntropy(torch.autograd.Function):
    """Saves the logits and, for their gradient, each row's statistics and a mean's denominators."""

    @staticmethod
    def forward(ctx, z, a, b, lam, weight, arguments, watched):
        loss, statistics = _forward(z, a, b, lam, weight, arguments, watched)
        tensor, number = (lam, None) if isinstance(lam, Tensor) else (None, lam)
        ctx.save_for_backward(z, a, b, tensor, weight, statistics)
        ctx.number, ctx.arguments, ctx.watched = number, arguments, watched
        return loss

    @staticmethod
    def backward(ctx, grad):
        z, a, b, tensor, weight, statistics = ctx.saved_tensors
        lam = ctx.number if tensor is None else tensor
        if is_differentiated_again():
            terms = a, b, as_tensor(lam, accumulator(z.dtype), z.device), weight, *ctx.arguments
            (dz,) = gradients(lambda z: reference(z, *terms), (z,), (True,), grad)
        else:
            dz = _backward(grad, z, a, b, lam, weight, statistics, ctx.arguments[:-1], ctx.watched)
        return dz, *(None,) * 6


_apply = unwatched_apply(_MixupCrossEntropy)


def mixup_cross_entropy(
    input: Tensor,
    target: Tensor | tuple[Tensor, Tensor, float | Tensor],
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return lam*cross_entropy(input, a) + (1 - lam)*cross_entropy(input, b).

    The target is (a, b, lam), as from `regfast.MixUp`. The forward reads the logits once, and so
    does the backward. Differentiable any number of times. The host never waits for the device: the
    values of CUDA tensors are checked only under `regfast.debug`. Without it a label that is no
    class makes the loss NaN.

    Args:
        input: logits, (N, C), (N, C, d1, ...) or (C,), floating, in any memory format.
        target: (a, b, lam): integer labels a and b, of shape (N,), (N, d1, ...) or (), and lam, the
            weight of a, in [0, 1]: a number, a 0-d or an (N,) tensor. Labels may be class
            probabilities, floating and of the shape of input. A plain Tensor of either kind gives
            F.cross_entropy.
        weight: the classes' weights, (C,), or None.
        ignore_index: rows with this label contribute nothing.
        reduction: "mean", "sum" or "none". "mean" divides each term by its own denominator, the sum
            of the weights of its labels that are not ignored. This holds for an (N,) lam too, which
            weights the rows within the sums.
        label_smoothing: the share, in [0, 1], of a target that is spread evenly over the classes.

    Returns:
        The loss, 0-d, or with "none" of the shape of a. It has input's dtype, or is float32 under
        autocast, as torch's cross_entropy.

    Raises:
        ValueError, TypeError: for an invalid argument; the message names it and what is allowed.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018); the book chapter's
    MixupLoss.

    Example:
        >>> input, a, b = torch.randn(64, 10), torch.randint(10, (64,)), torch.randint(10, (64,))
        >>> regfast.functional.mixup_cross_entropy(input, (a, b, 0.7)).shape
        torch.Size([])
    """
    _check_logits(input)
    ignore_index, label_smoothing = as_python(ignore_index), as_python(label_smoothing)
    _check_options(input, weight, ignore_index, reduction, label_smoothing)
    if isinstance(target, Tensor):
        return F.cross_entropy(
            input, target, weight, None, ignore_index, None, reduction, label_smoothing
        )
    a, b, lam = _terms(target)
    probabilities = a.is_floating_point() and b.is_floating_point()
    if probabilities:
        _check_shapes(input, a, b, input.shape)
    else:
        _check_labels(input, a, b)
    if input.ndim == 1:
        lifted = (a.unsqueeze(0), b.unsqueeze(0), lam)
        loss = mixup_cross_entropy(
            input.unsqueeze(0), lifted, weight, ignore_index, reduction, label_smoothing
        )
        return loss.squeeze(0) if reduction == "none" else loss
    lam = check_lam(lam, input)
    watched = is_watched(input, a, b, lam, weight) or not is_its_memory(input)
    if watched and is_sharded(input, a, b, lam):
        # A mean needs all rows.
        terms, weight = (whole(a), whole(b), whole(lam)), whole(weight)
        function = partial(
            mixup_cross_entropy, target=terms, weight=weight, ignore_index=ignore_index,
            reduction=reduction, label_smoothing=label_smoothing,
        )  # fmt: skip
        return on_parts(function, input, dims=(), keeps=0)
    if isinstance(lam, Tensor):
        lam = on_device(lam, input.device, accumulator(input.dtype))
    elif not isinstance(lam, (float, torch.SymFloat)):
        lam = float(lam)
    fused = not probabilities and use_triton(input, input.dtype, lam=lam, weight=weight)
    if not fused or watched:
        lam = as_tensor(lam, accumulator(input.dtype), input.device)
    if probabilities:
        share = lam.view(-1, *(1,) * (input.ndim - 1))
        # The cross entropy is linear in the probabilities.
        blended = (share * a + (1 - share) * b).to(input.dtype)
        return F.cross_entropy(
            input, blended, weight, None, ignore_index, None, reduction, label_smoothing
        )
    ignores = _check_range(input, a, b, ignore_index)
    if not fused:
        ignore = ignore_index if ignores else None
        return reference(
            input, a, b, lam, weight, ignore, reduction, label_smoothing, _loss_dtype(input)
        )
    arguments = ignore_index, reduction, label_smoothing, _loss_dtype(input)
    if needs_graph(input):
        return (_MixupCrossEntropy.apply if watched else _apply)(
            input, a, b, lam, weight, arguments, watched
        )
    return _forward(input, a, b, lam, weight, arguments, watched)[0]


def _loss_dtype(input: Tensor) -> torch.dtype:
    """Return the loss's dtype: input's, but under autocast float32 for half precision.

    This is the rule of torch's cross entropy.
    """
    wide = accumulator(input.dtype)
    return wide if wide != input.dtype and is_autocast(input) else input.dtype


def _check_logits(input: Any) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"mixup_cross_entropy: input must be a Tensor, got {type(input).__name__}")
    if not input.is_floating_point():
        raise TypeError(f"mixup_cross_entropy: input must be floating-point, got {input.dtype}")
    ndim = input.ndim
    if ndim == 0:
        raise ValueError(
            "mixup_cross_entropy: input must be (C,), (N, C) or (N, C, d1, ...), got a 0-d tensor"
        )
    if input.size(1 if ndim > 1 else 0) == 0:
        found = f"shape {tuple(input.shape)}"
        raise ValueError(f"mixup_cross_entropy: input must have at least one class, got {found}")


def _check_options(
    input: Tensor, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any
) -> None:
    _check_weight(input, weight)
    # The usual type is the quickest to test.
    if type(ignore_index) is not int and (
        isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt))
    ):
        raise TypeError(
            f"mixup_cross_entropy: ignore_index must be an integer, got {ignore_index!r}"
        )
    check_reduction(reduction)
    check_smoothing(label_smoothing)


def check_reduction(reduction: Any) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}"
        )


def check_smoothing(label_smoothing: Any) -> None:
    if type(label_smoothing) is not float and (
        isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (Real, torch.SymFloat))
    ):
        raise TypeError(f"label_smoothing must be a number, got {label_smoothing!r}")
    if not 0 <= float(label_smoothing) <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def _check_weight(input: Tensor, weight: Any) -> None:
    """Raise unless `weight` is None or has one entry per class."""
    if weight is None:
        return
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(
            f"mixup_cross_entropy: weight must be a floating-point Tensor or None, got {found}"
        )
    classes = input.shape[min(input.ndim - 1, 1)]
    if weight.shape != (classes,):
        raise ValueError(
            f"mixup_cross_entropy: weight must have shape {(classes,)}, got {tuple(weight.shape)}"
        )
    if weight.device != input.device:
        expected = f"{input.device}, the device of input"
        raise ValueError(f"mixup_cross_entropy: weight must be on {expected}, got {weight.device}")


def _terms(target: Any) -> tuple[Tensor, Tensor, Any]:
    """Return the three entries of a target (a, b, lam)."""
    allowed = "a Tensor or a tuple (a, b, lam)"
    if not isinstance(target, (tuple, list)):
        found = type(target).__name__
        raise TypeError(f"mixup_cross_entropy: target must be {allowed}, got {found}")
    if len(target) != 3:
        found = f"{len(target)} entries"
        raise ValueError(f"mixup_cross_entropy: target must be {allowed}, got {found}")
    a, b, lam = target
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        name, labels = ("b", b) if isinstance(a, Tensor) else ("a", a)
        raise TypeError(
            f"mixup_cross_entropy: the labels {name} must be a Tensor, got {type(labels).__name__}"
        )
    return a, b, lam


def _check_labels(input: Tensor, a: Tensor, b: Tensor) -> None:
    """Raise unless a and b hold one class index per row."""
    for name, labels in (("a", a), ("b", b)):
        if labels.dtype not in LABELS:
            allowed = f"{', '.join(map(str, LABELS))}, or both floating-point (probabilities)"
            raise TypeError(
                f"mixup_cross_entropy: the labels {name} must be {allowed}, got {labels.dtype}"
            )
    shape: tuple[int, ...] = input.shape
    _check_shapes(
        input, a, b, shape[:1] if len(shape) == 2 else (shape[:1] + shape[2:])[: len(shape) - 1]
    )


def _check_shapes(input: Tensor, a: Tensor, b: Tensor, shape: tuple[int, ...]) -> None:
    device = input.device
    for name, labels in (("a", a), ("b", b)):
        which = f"mixup_cross_entropy: the labels {name}"
        if labels.shape != shape:
            found = f"{tuple(labels.shape)} for input of shape {tuple(input.shape)}"
            found += _hint(labels, input)
            raise ValueError(f"{which} must have shape {tuple(shape)}, got {found}")
        if labels.device != device:
            expected = f"{device}, the device of input"
            raise ValueError(f"{which} must be on {expected}, got {labels.device}")


def _hint(labels: Tensor, input: Tensor) -> str:
    if labels.is_floating_point():
        return " (floating-point labels are probabilities; class indices are integers)"
    if labels.shape == input.shape:
        return " (one-hot labels must be floating-point)"
    return ""


def _check_op(z: Tensor, a: Tensor, b: Tensor, lam: Tensor, weight: Tensor | None) -> None:
    """Raise if the kernels would misread an operand. Direct calls of the operators need this."""
    _check_labels(z, a, b)
    _check_weight(z, weight)
    if tuple(lam.shape) not in ((), (z.shape[0],)) or lam.device != z.device:
        found = f"{tuple(lam.shape)} on {lam.device}"
        raise ValueError(
            f"mixup_cross_entropy: lam must be () or {(z.shape[0],)} on {z.device}, got {found}"
        )


def _check_range(input: Tensor, a: Tensor, b: Tensor, ignore_index: int) -> bool:
    """Raise for a label that is no class, if labels may be read; return whether to ignore any."""
    classes, ignores = input.shape[1], False
    for name, labels in (("a", a), ("b", b)):
        if not may_read(labels):
            return True
        if not labels.numel():
            continue
        low, high = extremes(labels)
        if low < 0 or high >= classes:
            wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
            if wrong.numel():
                allowed = f"in [0, {classes}) or ignore_index={ignore_index}"
                found = wrong[0].item()
                raise ValueError(
                    f"mixup_cross_entropy: the labels {name} must be {allowed}, got {found}"
                )
        ignores = ignores or low <= ignore_index <= high
    return ignores
