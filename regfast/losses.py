"""Losses for mixed labels.

A mixed target is a tuple (y_i, y_j, lam), such as a `MixedTarget`. Any other target is a plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._core.checks import Traceable, as_python
from ._core.dispatch import on_device
from ._core.precision import accumulator
from ._core.tensors import check_lam
from .ops.mixup_cross_entropy import check_reduction, check_smoothing, mixup_cross_entropy

__all__ = [
    "MixupBCEWithLogitsLoss",
    "MixupCrossEntropyLoss",
    "MixupLoss",
    "mixup_accuracy",
    "mixup_criterion",
]


class MixupLoss(Traceable):
    """The book's loss: lam*loss(input, y_i) + (1 - lam)*loss(input, y_j).

    For a plain target it is base_loss(input, target). For cross entropy, `MixupCrossEntropyLoss`
    gives the same value and reads the logits once.

    Args:
        base_loss: any loss of (input, target); nn.CrossEntropyLoss() by default. For a (B,) lam it
            must return one loss per sample (reduction="none"), so that each lam can weigh its own.

    Raises:
        ValueError: if a tuple does not have three elements, a lam is outside [0, 1], or a (B,) lam
            meets a reduced loss.
        TypeError: if base_loss cannot be called, or lam is not a number.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018); the book chapter's
    MixupLoss.

    Example:
        >>> x, target = regfast.MixUp(0.2)(torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))
        >>> loss = regfast.MixupLoss(nn.CrossEntropyLoss(label_smoothing=0.1))
        >>> loss(torch.randn(8, 10), target).shape
        torch.Size([])
    """

    def __init__(self, base_loss: Callable[[Any, Any], Any] | None = None) -> None:
        super().__init__()
        if base_loss is not None and (isinstance(base_loss, type) or not callable(base_loss)):
            raise TypeError(
                f"base_loss must be a loss, such as nn.CrossEntropyLoss(), got {base_loss!r}"
            )
        self.base_loss = nn.CrossEntropyLoss() if base_loss is None else base_loss

    def forward(self, input: Any, target: Any) -> Any:
        mixed = _as_mixed(target)
        return (
            self.base_loss(input, target)
            if mixed is None
            else mixup_criterion(self.base_loss, input, *mixed)
        )


def mixup_criterion(
    criterion: Callable[[Any, Any], Any], pred: Any, y_a: Any, y_b: Any, lam: float | Tensor
) -> Any:
    """The blog's loss: lam*criterion(pred, y_a) + (1 - lam)*criterion(pred, y_b).

    Raises:
        ValueError: if a lam is outside [0, 1], or a (B,) lam meets a criterion that does not return
            one loss per sample.
    """
    return _weigh("loss", criterion(pred, y_a), criterion(pred, y_b), lam)


def mixup_accuracy(
    metric: Callable[[Any, Any], Any], preds: Any, y_a: Any, y_b: Any, lam: float | Tensor
) -> Any:
    """The blog's accuracy: lam*metric(preds, y_a) + (1 - lam)*metric(preds, y_b).

    Raises:
        ValueError: if a lam is outside [0, 1], or a (B,) lam meets a metric that does not return
            one value per sample.
    """
    return _weigh("metric", metric(preds, y_a), metric(preds, y_b), lam)


class MixupCrossEntropyLoss(Traceable, nn.CrossEntropyLoss):
    """nn.CrossEntropyLoss for mixed labels: lam*CE(input, a) + (1 - lam)*CE(input, b).

    It reads the logits once. For a plain target it is nn.CrossEntropyLoss, value for value.

    Args:
        weight, ignore_index, reduction, label_smoothing: as in nn.CrossEntropyLoss.

    Shape: input (N, C) or (N, C, d1, ...). The target is a tuple (a, b, lam) or the labels alone.
    Labels are class indices, (N,) or (N, d1, ...), or floating-point class probabilities of input's
    shape. lam is a number, or a tensor of shape () or (N,).

    Raises:
        ValueError, TypeError: if an argument or input is not allowed. The message names it and what
            is allowed.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018).

    Example:
        >>> a, b = torch.randint(10, (2, 8))
        >>> loss = regfast.MixupCrossEntropyLoss(label_smoothing=0.1)
        >>> loss(torch.randn(8, 10), (a, b, 0.7)).shape
        torch.Size([])
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        ignore_index, label_smoothing = as_python(ignore_index), as_python(label_smoothing)
        _check_weight(weight, "; label_smoothing goes by keyword")
        check_reduction(reduction)
        check_smoothing(label_smoothing)
        super().__init__(
            weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )

    def forward(self, input: Tensor, target: Any) -> Tensor:
        mixed = _as_mixed(target)
        target = target if mixed is None else mixed
        return mixup_cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing
        )


class MixupBCEWithLogitsLoss(Traceable, nn.BCEWithLogitsLoss):
    """nn.BCEWithLogitsLoss for multi-hot labels, mixed or plain.

    The loss is linear in the labels, so they are blended and the loss is computed once. For a plain
    target it is nn.BCEWithLogitsLoss, value for value.

    Args:
        weight, reduction, pos_weight: as in nn.BCEWithLogitsLoss.

    Shape: input (N, ...). The target is a tuple (a, b, lam) or the labels alone. Labels have
    input's shape and any dtype. lam is a number, or a tensor of shape () or (N,).

    Raises:
        ValueError, TypeError: if an argument or input is not allowed. The message names it and what
            is allowed.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018).
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
    ) -> None:
        _check_weight(weight)
        check_reduction(reduction)
        super().__init__(weight, reduction=reduction, pos_weight=pos_weight)

    def forward(self, input: Tensor, target: Any) -> Tensor:
        mixed = _as_mixed(target)
        if mixed is None:
            if not isinstance(target, Tensor):
                raise TypeError(
                    f"target must be a Tensor or a tuple (a, b, lam), got {type(target).__name__}"
                )
            return super().forward(
                input, target if target.is_floating_point() else target.to(input.dtype)
            )
        a, b, lam = mixed
        for name, labels in (("a", a), ("b", b)):
            if not isinstance(labels, Tensor):
                raise TypeError(f"target's {name} must be a Tensor, got {type(labels).__name__}")
            if labels.shape != input.shape:
                raise ValueError(
                    f"target's {name} must have input's shape {tuple(input.shape)}, got "
                    f"{tuple(labels.shape)}"
                )
        lam = check_lam(lam, input)
        lam = _broadcast(lam, input)
        wide = torch.promote_types(input.dtype, torch.float32)
        a, b = a.to(wide), b.to(wide)
        return super().forward(input, (lam * a + (1 - lam) * b).to(input.dtype))


def _check_weight(weight: Any, hint: str = "") -> None:
    if weight is not None and not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a Tensor or None, got {weight!r}{hint}")


def _as_mixed(target: Any) -> tuple[Any, Any, Any] | None:
    """Return a mixed target as a tuple, or None for a plain target.

    Some loaders and scatters turn tuples into lists.
    """
    if not isinstance(target, (tuple, list)):
        return None
    if len(target) != 3:
        raise ValueError(
            f"a mixed target must be a tuple of three, (y_i, y_j, lam), got {len(target)}"
        )
    a, b, lam = target
    return a, b, lam


def _weigh(name: str, first: Any, second: Any, lam: float | Tensor) -> Any:
    """Return lam*first + (1 - lam)*second in first's dtype, for one lam or one per sample."""
    shape = tuple(getattr(first, "shape", ()))
    if isinstance(lam, Tensor) and lam.ndim and lam.shape != shape[:1]:
        hint = (
            "reduction='none', and the mean of the result; or MixupCrossEntropyLoss, "
            "MixupBCEWithLogitsLoss" * (name == "loss")
        )
        expected = f"one value per sample, ({lam.shape[0]}, ...)" + (f" ({hint})" if hint else "")
        raise ValueError(
            f"a lam of shape {tuple(lam.shape)} needs a {name} that returns {expected}, got "
            f"shape {shape}"
        )
    lam = check_lam(lam, first)
    if not isinstance(first, Tensor):
        return lam * first + (1 - lam) * second
    lam = _broadcast(lam, first)
    mixed = lam * first + (1 - lam) * second
    # PyTorch promotes two 0-d tensors, so a float64 lam would make a float64 loss.
    return mixed.to(first.dtype) if first.is_floating_point() else mixed


def _broadcast(lam: float | Tensor, like: Tensor) -> float | Tensor:
    """Return lam on a tensor's device, in a shape that broadcasts along its batch."""
    if not isinstance(lam, Tensor) or lam.ndim == 0:
        return lam
    return on_device(lam, like.device, accumulator(like.dtype)).view(-1, *(1,) * (like.ndim - 1))
