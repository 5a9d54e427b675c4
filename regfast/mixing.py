"""MixUp and CutMix of a batch and of its labels: the module, the collator and the function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ._core.checks import Traceable, as_python, check_bool
from ._core.dispatch import may_read, on_device, outside_graphs
from ._core.draw import PAIRINGS, Stream, beta, boxes, check_alpha, check_generator, pairing
from ._core.normalise import Affine, result_dtype
from ._core.tensors import check_batch, check_lam, extremes
from .ops.mixup import blend

__all__ = ["MixUp", "MixedTarget", "MixupCollator", "mixup_data"]


class MixedTarget(NamedTuple):
    """The labels of a mixed batch: lam of a and 1 - lam of b. It is the tuple (y_i, y_j, lambda) of the book and the blog.

    a, b: the labels of the samples and of their partners, (B, ...): class indices, or dense ones (probabilities, multi-hot).
    lam: the weight of a in [0, 1]: a number, a 0-d or a (B,) tensor.
    """

    a: Tensor
    b: Tensor
    lam: float | Tensor

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> MixedTarget:
        """The same on another device; a lam that is a number stays one."""
        a, b = (labels.to(device, non_blocking=non_blocking) for labels in (self.a, self.b))
        return MixedTarget(
            a,
            b,
            self.lam.to(device, non_blocking=non_blocking)
            if isinstance(self.lam, Tensor)
            else self.lam,
        )

    def soft(self, num_classes: int, smoothing: float = 0.0) -> Tensor:
        """The blended labels as probabilities, (B, ..., num_classes), float32.

        Class indices become one-hot vectors in a new last dimension (nn.CrossEntropyLoss wants that of a map's probabilities
        second: `.movedim(-1, 1)`). Labels that are floating or bool are dense already, and keep their shape. Both are smoothed as
        nn.CrossEntropyLoss smooths: (1 - smoothing) * label + smoothing / num_classes.

        Raises:
            ValueError: for a smoothing or a lam outside [0, 1], a label that is no class (an ignored one has no soft target), or
                dense labels of another number of classes.
        """
        num_classes, smoothing = as_python(num_classes), as_python(smoothing)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes must be an integer of at least 1, got {num_classes!r}")
        lam = check_lam(self.lam, self.a)
        if not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing must be in [0, 1], got {smoothing}")
        a, b = (_dense(labels, num_classes) for labels in (self.a, self.b))
        if isinstance(lam, Tensor):
            lam = on_device(lam.float(), a.device)
            lam = lam.view(-1, *(1,) * (a.ndim - 1)) if lam.ndim else lam
        return (lam * a + (1 - lam) * b) * (1 - smoothing) + smoothing / num_classes


def _dense(labels: Tensor, num_classes: int) -> Tensor:
    """Labels as float32 probabilities."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        if labels.shape[-1:] != (num_classes,):
            raise ValueError(
                f"dense labels must have shape (B, ..., {num_classes}), got {tuple(labels.shape)}"
            )
        return labels.float()
    if may_read(labels) and labels.numel():
        low, high = extremes(labels)
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"labels must be in [0, {num_classes}), got {low if low < 0 else high}"
            )
    return (labels.unsqueeze(-1) == torch.arange(num_classes, device=labels.device)).float()


class MixUp(Traceable):
    """Mixes a batch with itself: x becomes lam*x + (1 - lam)*x[index], in one pass, and y the tuple (y, y[index], lam).

    Called as `x, target = mix(x, y)` on a batch that is already on the device. In training mode the target is a `MixedTarget`,
    for `MixupCrossEntropyLoss`, `MixupLoss` or whatever takes (y_i, y_j, lam). In eval mode nothing is mixed: x is normalised and
    cast as in training, and y goes out as it came in, so that metrics work, and these losses are then the plain ones; `mix(x)` is
    x alone. (It is no child of the model: `model.eval()` does not reach it, `mix.eval()` does.)

    Args:
        alpha: lam is drawn from Beta(alpha, alpha). 0 mixes nothing, or leaves CutMix alone where cutmix_alpha is over 0.
        pairing: a sample's partner. "random": torch.randperm. "pairs": a random perfect matching (an odd batch leaves its last
            sample with itself). "flip": the batch in reverse, as in timm. "roll": the sample before, as in torchvision.
        per_sample: whether each sample has a lam of its own, a box, and its own chances `prob` and `switch_prob`.
        prob: the chance that anything is mixed; else lam is 1.
        cutmix_alpha: where over 0, CutMix: a box of the partner is pasted, of an area whose share 1 - lam is drawn from
            Beta(cutmix_alpha, cutmix_alpha); lam is then corrected to the area that the image's border left of the box.
        switch_prob: the chance of CutMix in place of MixUp where both alphas are over 0.
        mean, std: what x is normalised by, a number or one a channel; x of uint8 is divided by 255 first.
        dtype: the result's, floating; x's by default (float32 for uint8 with mean and std).
        generator: drawn from as it is, and everything is drawn where it lies: with a CUDA generator on the device. By default a
            generator of the module's own, on the host: reproducible from torch.manual_seed, distinct by rank and by DataLoader
            worker, saved and restored with the state_dict.

    Shape: x (B, ...), with CutMix (B, C, ..., H, W); floating or uint8. y (B, ...). lam is float32, () or, with per_sample, (B,).
    The host never waits for the device.

    A generator cannot be drawn from within a graph of torch.compile: compile what follows the module, or draw outside with `draw`
    and blend within by `regfast.functional.mixup`.

    Raises:
        ValueError, TypeError: for an argument or an input that is not allowed; the message names it and what is.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018); Yun et al., "CutMix" (2019).

    Example:
        >>> mix = regfast.MixUp(0.2, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), dtype=torch.bfloat16)
        >>> x = torch.randint(256, (8, 3, 224, 224), dtype=torch.uint8)
        >>> x, target = mix(x, torch.arange(8))
        >>> x.dtype, target.lam.shape
        (torch.bfloat16, torch.Size([]))
    """

    def __init__(
        self,
        alpha: float = 0.25,
        *,
        pairing: str = "random",
        per_sample: bool = False,
        prob: float = 1.0,
        cutmix_alpha: float = 0.0,
        switch_prob: float = 0.5,
        mean: float | Sequence[float] | Tensor | None = None,
        std: float | Sequence[float] | Tensor | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.alpha = check_alpha("alpha", alpha)
        self.cutmix_alpha = check_alpha("cutmix_alpha", cutmix_alpha)
        self.prob = _check_probability("prob", prob)
        self.switch_prob = _check_probability("switch_prob", switch_prob)
        if pairing not in PAIRINGS:
            raise ValueError(
                f"pairing must be one of {', '.join(map(repr, PAIRINGS))}, got {pairing!r}"
            )
        check_bool("per_sample", per_sample)
        result_dtype(torch.float32, dtype, mean, std)
        self.pairing = pairing
        self.per_sample = per_sample
        self.dtype = dtype
        self.mean = mean = as_python(mean)
        self.std = std = as_python(std)
        # No buffers: a model that is cast to half precision must not take them along. On each device they are wanted once.
        self._affine = None if mean is None else Affine(mean, std)
        self._stream = Stream(generator)

    def forward(
        self, x: Tensor, y: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor | MixedTarget]:
        check_batch(x)
        if y is None:
            if self.training:
                raise TypeError(
                    "y must be a Tensor of labels in training mode, got None; in eval mode mix(x) is x normalised"
                )
            return self._unmixed(x)
        _check_labels(y, x)
        if not self.training:
            return self._unmixed(x), y
        dtype, scale, shift = self._constants(x)
        if self.cutmix_alpha > 0 and x.ndim < 4:
            raise ValueError(
                f"CutMix is for images, (B, C, ..., H, W), got x of shape {tuple(x.shape)}"
            )
        drawn, lam, box = self.draw(len(x), x.shape[-2:])
        lam = on_device(lam, x.device)
        index, b = _partners(x, y, drawn)
        return blend(x, index, lam, box, scale, shift, dtype), MixedTarget(y, b, lam)

    @outside_graphs(
        "a torch.Generator cannot be drawn from in a graph: draw outside, with MixUp.draw"
    )
    def draw(
        self, B: int, size: Sequence[int] | None = None, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What one call draws, (index, lam, box): the arguments of `regfast.functional.mixup`, for those who call that.

        Args:
            B: the number of samples.
            size: (H, W) of the images; needed for CutMix alone.
            device: where the draws go; by default they stay with the generator.

        Returns:
            index, (B,) int64; lam, float32, () or with per_sample (B,); and box: None without CutMix, else (4,) or (B, 4) int64,
            -1s where a sample is blended and not pasted.

        Raises:
            ValueError: for CutMix without a size.
        """
        B, size = as_python(B), as_python(size)
        if isinstance(B, bool) or not isinstance(B, int) or B < 0:
            raise ValueError(
                f"B must be a number of samples, got {B if isinstance(B, (int, float)) else type(B).__name__}"
            )
        generator = self._stream.generator
        shape = (B,) if self.per_sample else ()

        def happens(probability: float) -> Tensor:
            return torch.rand(shape, generator=generator, device=generator.device) < probability

        index = pairing(self.pairing, B, generator)
        lam, box = beta(self.alpha, shape, generator), None
        if self.cutmix_alpha > 0:
            if not isinstance(size, Sequence) or len(size) != 2 or min(size) < 1:
                raise ValueError(
                    f"size must be the images' (H, W), at least 1, where cutmix_alpha is over 0, got {size!r}"
                )
            pasted = happens(self.switch_prob if self.alpha > 0 else 1.0)
            box, left = boxes(
                beta(self.cutmix_alpha, shape, generator), int(size[0]), int(size[1]), generator
            )
            box, lam = box.where(pasted.unsqueeze(-1), -1), left.where(pasted, lam)
        if self.prob < 1:
            mixed = happens(self.prob)
            lam = lam.where(mixed, 1.0)
            box = box if box is None else box.where(mixed.unsqueeze(-1), -1)
        if device is None:
            return index, lam, box
        device = torch.device(device)
        index, lam = (on_device(t, device) for t in (index, lam))
        return index, lam, box if box is None else on_device(box, device)

    def _unmixed(self, x: Tensor) -> Tensor:
        """x normalised and cast as in training."""
        dtype, scale, shift = self._constants(x)
        if scale is None and x.is_floating_point():
            return x.to(dtype)
        return blend(x, torch.arange(len(x), device=x.device), 1.0, None, scale, shift, dtype)

    def _constants(self, x: Tensor) -> tuple[torch.dtype, Tensor | None, Tensor | None]:
        """The result's dtype, and what normalises x's channels, where x is."""
        dtype = result_dtype(x.dtype, self.dtype, self.mean, self.std)
        return dtype, *((None, None) if self._affine is None else self._affine.of(x, dtype))

    def get_extra_state(self) -> Tensor:
        return self._stream.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self._stream.set_state(state)

    def extra_repr(self) -> str:
        normalised = "" if self.mean is None else f", mean={self.mean}, std={self.std}"
        return (
            f"alpha={self.alpha}, pairing={self.pairing!r}, per_sample={self.per_sample}, prob={self.prob}, "
            f"cutmix_alpha={self.cutmix_alpha}, switch_prob={self.switch_prob}{normalised}, dtype={self.dtype}"
        )


class MixupCollator:
    """The book's collate function: collates a batch and mixes it, with one lam for all and a random permutation.

    `DataLoader(data, collate_fn=MixupCollator())` gives (x, (y_i, y_j, lam)), the tuple a `MixedTarget` and lam a Python float.
    It works in the loader's workers, forked or spawned: each has a stream of its own, which differs from epoch to epoch and
    is reproducible from torch.manual_seed. (`MixUp` mixes on the device instead, and takes uint8 images.)

    Args:
        alpha: lam is drawn from Beta(alpha, alpha); 0 mixes nothing.
        base_collate: what makes a batch (x, y) of samples; x must be floating-point.
        generator: drawn from as it is, where there are no workers; else each worker's copy is seeded from it and from the worker.

    Raises:
        ValueError, TypeError: for an argument, or a batch, that is not allowed; the message names it and what is.

    Source: the book chapter's MixupCollator, which drew from NumPy's global state: the same in every worker.

    Example:
        >>> images, labels = torch.rand(64, 3, 32, 32), torch.randint(10, (64,))
        >>> data = torch.utils.data.TensorDataset(images, labels)
        >>> loader = torch.utils.data.DataLoader(data, 16, collate_fn=regfast.MixupCollator(0.2))
        >>> x, (y_i, y_j, lam) = next(iter(loader))
        >>> x.shape, y_j.shape, type(lam)
        (torch.Size([16, 3, 32, 32]), torch.Size([16]), <class 'float'>)
    """

    def __init__(
        self,
        alpha: float = 0.25,
        base_collate: Callable[[Any], Any] = default_collate,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        self.alpha = check_alpha("alpha", alpha)
        if not callable(base_collate):
            raise TypeError(f"base_collate must be callable, got {base_collate!r}")
        self.base_collate = base_collate
        self._stream = Stream(generator)

    def __call__(self, batch: Any) -> tuple[Tensor, MixedTarget]:
        collated = self.base_collate(batch)
        if not isinstance(collated, (tuple, list)) or len(collated) != 2:
            found = (
                f"{len(collated)} of them"
                if isinstance(collated, (tuple, list))
                else type(collated).__name__
            )
            raise ValueError(f"base_collate must return a pair (x, y), got {found}")
        x, y = collated
        x, a, b, lam = mixup_data(x, y, self.alpha, generator=self._stream.generator)
        return x, MixedTarget(a, b, float(lam))

    def __repr__(self) -> str:
        return f"MixupCollator(alpha={self.alpha}, base_collate={getattr(self.base_collate, '__name__', self.base_collate)})"


def mixup_data(
    x: Tensor, y: Tensor, alpha: float = 1.0, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor, float | Tensor]:
    """The blog's function: (mixed_x, y_a, y_b, lam), with one lam for the batch and a random permutation.

    Args:
        x: (B, ...), floating-point.
        y: labels, (B, ...).
        alpha: lam is drawn from Beta(alpha, alpha); 0 gives lam = 1, which mixes nothing.
        generator: drawn from as it is; torch's global one on the host by default.

    Returns:
        lam is a Python float; with a CUDA generator a 0-d tensor, so that the host need not wait for it.

    Raises:
        ValueError, TypeError: for an argument that is not allowed; the message names it and what is.
    """
    alpha = check_alpha("alpha", alpha)
    check_generator(generator)
    check_batch(x)
    if not x.is_floating_point():
        raise TypeError(
            f"x must be floating-point, got {x.dtype}: convert it, or take regfast.MixUp, which normalises bytes"
        )
    _check_labels(y, x)
    generator = torch.default_generator if generator is None else generator
    lam: float | Tensor = beta(alpha, (), generator)
    if generator.device.type == "cpu":
        lam = float(lam)
    index, b = _partners(x, y, pairing("random", len(x), generator))
    return blend(x, index, lam), y, b, lam


def _partners(x: Tensor, y: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The index where x is, sent there once, and the partners' labels."""
    index = on_device(drawn, x.device)
    # Labels that are elsewhere do not wait for it to come back.
    return index, y[index if y.device == x.device else on_device(drawn, y.device)]


def _check_labels(y: Any, x: Tensor) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a Tensor of labels, got {type(y).__name__}")
    if y.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"y must have shape ({x.shape[0]}, ...), labels of each sample of x, got {tuple(y.shape)}"
        )


def _check_probability(name: str, value: Any) -> float:
    value = as_python(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)
