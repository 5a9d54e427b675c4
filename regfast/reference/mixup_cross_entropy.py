"""The cross entropy of blended labels in plain PyTorch: the specification and the CPU's path."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.precision import accumulator, outside_autocast


def mixup_cross_entropy(
    z: Tensor,
    a: Tensor,
    b: Tensor,
    lam: Tensor,
    weight: Tensor | None,
    ignore_index: int | None,
    reduction: str,
    label_smoothing: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return lam*CE(z, a) + (1 - lam)*CE(z, b), with F.cross_entropy for CE.

    z is (N, C, ...), floating; a and b (N, ...), integer; lam () or (N,); weight None or (C,);
    ignore_index None if no label is ignored; reduction "mean", "sum" or "none". The result is () or
    (N, ...), of `dtype`. Sums are float32 (float64 for float64). "mean" divides each term by its
    own denominator, the sum of the weights of its labels, for every lam. Source: Zhang et al.,
    "mixup: Beyond Empirical Risk Minimization" (2018); label smoothing: Szegedy et al., "Rethinking
    the Inception Architecture for Computer Vision" (2016).
    """
    with outside_autocast(z):
        wide = accumulator(z.dtype)
        # Both labels at once: one gather, and one scatter for its gradient.
        labels = torch.stack([a, b], 1).long()
        ignored = None if ignore_index is None else labels == ignore_index
        labels = _without(labels, ignored)
        log_p = torch.log_softmax(z, 1, dtype=wide)
        scores = log_p.gather(1, labels)
        label_weight = None if weight is None else weight.to(wide)[labels]
        if label_weight is not None:
            scores = scores * label_weight
        if label_smoothing:
            spread = label_smoothing / z.shape[1] * _of_all_classes(log_p, weight)
            scores = (1 - label_smoothing) * scores + spread
        # Not a product with zero: zero times infinity is NaN.
        scores = _without(scores, ignored)
        lam = lam.to(wide)
        # The shares carry the sign: a negation of its own would cost a pass.
        shares = torch.stack([-lam, lam - 1], -1)
        rows = [dim for dim in range(z.ndim) if dim != 1]
        if reduction == "mean":
            shares = shares / _denominators(labels, label_weight, ignored, rows)
        if reduction != "none" and lam.ndim == 0:
            return scores.sum(rows).dot(shares).to(dtype)
        losses = scores * shares.view(-1, 2, *(1,) * (z.ndim - 2))
        return (losses.sum(1) if reduction == "none" else losses.sum()).to(dtype)


def _without(t: Tensor, ignored: Tensor | None) -> Tensor:
    """Return t with zeros where labels are ignored."""
    return t if ignored is None else t.masked_fill(ignored, 0)


def _of_all_classes(log_p: Tensor, weight: Tensor | None) -> Tensor:
    """Return the weighted sum of each row's scores over all classes, (N, 1, ...)."""
    if weight is not None:
        log_p = log_p * weight.to(log_p.dtype).view(-1, *(1,) * (log_p.ndim - 2))
    return log_p.sum(1, keepdim=True)


def _denominators(
    labels: Tensor, label_weight: Tensor | None, ignored: Tensor | None, rows: list[int]
) -> Tensor | int:
    """Return what a mean divides each term by.

    It is the sum of the weights of the labels that are not ignored; without weights, their number.
    """
    if label_weight is not None:
        return _without(label_weight, ignored).sum(rows)
    return labels.numel() // 2 if ignored is None else (~ignored).sum(rows)
