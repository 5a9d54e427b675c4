"""How much a classifier's prediction depends on shifts of its image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._core.checks import per_axis
from ._core.geometry import Size

__all__ = ["ShiftConsistency", "shift_consistency"]


class ShiftConsistency(NamedTuple):
    """The result of `shift_consistency`.

    deviation: the standard deviation of a class's probability over all shifts of an image; the
        median over the images. Lower is better.
    consistency: the chance that two random shifts of an image get the same class. Higher is better.
    probability: the probability of that class, (N, shifts), float32, on the host. Shifts are in
        row-major order.
    prediction: the predicted class, (N, shifts), int64, on the host.
    """

    deviation: float
    consistency: float
    probability: Tensor
    prediction: Tensor

    def __repr__(self) -> str:
        shifts = f"{len(self.prediction)} images at {self.prediction.shape[1]} shifts"
        scores = f"deviation={self.deviation:.4f}, consistency={self.consistency:.4f}"
        return f"ShiftConsistency({scores}, {shifts})"


def shift_consistency(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    crop: Size,
    batch_size: int = 256,
    progress: bool = True,
) -> ShiftConsistency:
    """Run a classifier on every crop of its images and measure how much its predictions change.

    The crops are one pixel apart.

    Args:
        model: returns logits, (B, classes). It runs in evaluation mode, and each module then gets
            its former mode back.
        images: (N, C, H, W), at least as large as the crop, as the model takes them. They may be on
            any device: the crops are sent to the model's.
        labels: the true classes, (N,). If None, the classes predicted for the centre crops.
        crop: the size of the model's input, an integer or (height, width).
        batch_size: the number of crops per batch.
        progress: whether to show a progress bar; this needs rich.

    Returns:
        The median deviation and the consistency, with every probability and prediction. The
        standard deviation is over all (H - height + 1) * (W - width + 1) shifts, not over a sample.
        The consistency is the expectation over all pairs of shifts.

    Raises:
        ValueError, TypeError: if an argument is not allowed. The message names it and what is
            allowed.

    Source: the book chapter's first exercise. For the consistency: Zhang, "Making Convolutional
    Networks Shift-Invariant Again" (2019), which estimates it from one random pair per image.

    Example:
        >>> measure = regfast.metrics.shift_consistency
        >>> deviation, consistency, *_ = measure(model, images, labels, crop=224)
    """
    height, width = _check(model, images, labels, crop)
    (batch_size,) = per_axis("batch_size", batch_size, 1, 1)
    device = next(model.parameters(), images).device
    # A view of shape (N, C, shifts down, shifts across, height, width).
    crops = images.unfold(2, height, 1).unfold(3, width, 1)
    down, across = crops.shape[2:4]
    probability, prediction = [], []
    with _evaluating(model), torch.no_grad():
        if labels is None:
            centres = crops[:, :, (down - 1) // 2, (across - 1) // 2].split(batch_size)
            labels = torch.cat([_logits(model, part.to(device)).argmax(1) for part in centres])
        labels = labels.to(device).long()
        for chosen in _track(
            torch.arange(len(images) * down * across, device=images.device).split(batch_size),
            progress,
        ):
            image, shift = chosen // (down * across), chosen % (down * across)
            logits = _logits(model, crops[image, :, shift // across, shift % across].to(device))
            _check_classes(labels, logits)
            followed = labels[image.to(device)].unsqueeze(1)
            probability.append(logits.float().softmax(1).gather(1, followed).squeeze(1).cpu())
            prediction.append(logits.argmax(1).cpu())
    probabilities, predictions = (
        torch.cat(parts).view(len(images), -1) for parts in (probability, prediction)
    )
    deviation = probabilities.std(1, correction=0).quantile(0.5).item()
    return ShiftConsistency(deviation, _agreement(predictions), probabilities, predictions)


def _check(model: Any, images: Any, labels: Any, crop: Any) -> tuple[int, int]:
    """Return the crop's height and width."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a Tensor, got {type(images).__name__}")
    if images.ndim != 4 or not images.numel():
        raise ValueError(f"images must be (N, C, H, W), and some, got shape {tuple(images.shape)}")
    height, width = per_axis("crop", crop, 2, 1)
    if height > images.shape[2] or width > images.shape[3]:
        raise ValueError(
            f"crop must be at most the images' size, {tuple(images.shape[2:])}, got {crop!r}"
        )
    if labels is not None:
        if (
            not isinstance(labels, Tensor)
            or labels.is_floating_point()
            or labels.is_complex()
            or labels.dtype == torch.bool
        ):
            found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels must be a Tensor of integers, got {found}")
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels must have shape {tuple(images.shape[:1])}, one per image, got "
                f"{tuple(labels.shape)}"
            )
    return height, width


def _check_classes(labels: Tensor, logits: Tensor) -> None:
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"labels must be in [0, {logits.shape[1]}), the model's classes, got "
            f"{low if low < 0 else high}"
        )


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch)
    if (
        not isinstance(logits, Tensor)
        or logits.ndim != 2
        or len(logits) != len(batch)
        or not logits.numel()
    ):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must give logits, ({len(batch)}, classes), got {found}")
    return logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode; at the end give each module its former mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _track(batches: Sequence[Tensor], progress: bool) -> Iterable[Tensor]:
    if progress:
        try:
            from rich.progress import track
        except ImportError:
            return batches
        return track(batches, description="shifts")
    return batches


def _agreement(predictions: Tensor) -> float:
    """Return the chance that two independent shifts of an image agree, from (N, shifts) classes."""
    total = 0.0
    for row in predictions:
        _, counts = row.unique(return_counts=True)
        total += (counts / len(row)).square().sum().item()
    return total / len(predictions)
