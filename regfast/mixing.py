"""MixUp and CutMix of a batch and its labels: the module, the collator and the function."""

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
    """The labels of a mixed batch: lam of a and 1 - lam of b.

    This is the tuple (y_i, y_j, lambda) of the book and the blog.

    a, b: the labels of the samples and of their partners, (B, ...): class indices or dense labels
        (probabilities, multi-hot).
    lam: the weight of a, in [0, 1]: a number, or a tensor of shape () or (B,).
    """

    a: Tensor
    b: Tensor
    lam: float | Tensor

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> MixedTarget:
        """Return the target on another device; a lam that is a number stays one."""
        a, b = (labels.to(device, non_blocking=non_blocking) for labels in (self.a, self.b))
        return MixedTarget(
            a,
            b,
            self.lam.to(device, non_blocking=non_blocking)
            if isinstance(self.lam, Tensor)
            else self.lam,
        )

    def soft(self, num_classes: int, smoothing: float = 0.0) -> Tensor:
        """Return the blended labels as probabilities, (B, ..., num_classes), float32.

        Class indices become one-hot vectors in a new last dimension. (For maps of labels,
        nn.CrossEntropyLoss takes the classes second: `.movedim(-1, 1)`.) Labels that are
        floating-point or bool are dense already and keep their shape. Both are smoothed as in
        nn.CrossEntropyLoss: (1 - smoothing) * label + smoothing / num_classes.

        Raises:
            ValueError: if smoothing or lam is outside [0, 1], a label is not a class (an ignored
                one has no soft target), or dense labels have another number of classes.
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
    """Return labels as float32 probabilities."""
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
    """Mix a batch with itself: x becomes lam*x + (1 - lam)*x[index], y becomes (y, y[index], lam).

    Call it as `x, target = mix(x, y)` on a batch that is already on the device. Mixing,
    normalisation and cast are one pass.

    In training mode the target is a `MixedTarget`, for `MixupCrossEntropyLoss`, `MixupLoss` or any
    code that takes (y_i, y_j, lam). In eval mode nothing is mixed: x is normalised and cast as in
    training, and y is returned unchanged, so that metrics work and these losses are the plain
    ones. `mix(x)` then returns x alone. (The module is not a child of the model. `model.eval()`
    does not reach it; call `mix.eval()`.)

    Args:
        alpha: lam is drawn from Beta(alpha, alpha). 0 mixes nothing; with a cutmix_alpha over 0, it
            leaves CutMix alone.
        pairing: the choice of each sample's partner. "random": torch.randperm. "pairs": a random
            perfect matching (an odd batch pairs its last sample with itself). "flip": the batch in
            reverse, as in timm. "roll": the previous sample, as in torchvision.
        per_sample: whether each sample has its own lam, box, and draws with `prob` and
            `switch_prob`.
        prob: the probability of mixing; otherwise lam is 1.
        cutmix_alpha: if over 0, CutMix: a box of the partner is pasted. Its share of the area,
            1 - lam, is drawn from Beta(cutmix_alpha, cutmix_alpha). lam is then corrected to the
            part of the box inside the image.
        switch_prob: the probability of CutMix in place of MixUp if both alphas are over 0.
        mean, std: the constants that normalise x, a number or one per channel. x of uint8 is
            divided by 255 first.
        dtype: the result's floating-point dtype. If None, x's (float32 for uint8 with mean and
            std).
        generator: the source of all draws, on its own device: with a CUDA generator the draws are
            on the device. If None, the module has its own generator on the host. That one is
            reproducible from torch.manual_seed, differs by rank and by DataLoader worker, and is
            saved and restored with the state_dict.

    Shape: x (B, ...), with CutMix (B, C, ..., H, W); floating-point or uint8. y (B, ...). lam is
    float32, (), or (B,) with per_sample. The host never waits for the device.

    A graph of torch.compile cannot draw from a generator. Compile what follows the module; or draw
    outside with `draw` and blend inside with `regfast.functional.mixup`.

    Raises:
        ValueError, TypeError: if an argument or input is not allowed. The message names it and what
            is allowed.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018); Yun et al., "CutMix"
    (2019).

    Example:
        >>> mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        >>> mix = regfast.MixUp(0.2, mean=mean, std=std, dtype=torch.bfloat16)
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
        # Not buffers: casting a model to half precision must not cast them.
        self._affine = None if mean is None else Affine(mean, std)
        self._stream = Stream(generator)

    def forward(
        self, x: Tensor, y: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor | MixedTarget]:
        check_batch(x)
        if y is None:
            if self.training:
                raise TypeError(
                    "y must be a Tensor of labels in training mode, got None; in eval mode "
                    "mix(x) is x normalised"
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
        """Draw (index, lam, box) as one call does, for `regfast.functional.mixup`.

        Args:
            B: the number of samples.
            size: (H, W) of the images; only CutMix needs it.
            device: the device of the results; if None, the generator's.

        Returns:
            index: (B,), int64.
            lam: float32, (), or (B,) with per_sample.
            box: None without CutMix; else int64, (4,), or (B, 4) with per_sample. A sample that is
                blended and not pasted has -1s.

        Raises:
            ValueError: if CutMix has no size.
        """
        B, size = as_python(B), as_python(size)
        if isinstance(B, bool) or not isinstance(B, int) or B < 0:
            raise ValueError(
                "B must be a number of samples, got "
                f"{B if isinstance(B, (int, float)) else type(B).__name__}"
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
                    "size must be the images' (H, W), at least 1, where cutmix_alpha is over 0, "
                    f"got {size!r}"
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
        """Return x normalised and cast as in training."""
        dtype, scale, shift = self._constants(x)
        if scale is None and x.is_floating_point():
            return x.to(dtype)
        return blend(x, torch.arange(len(x), device=x.device), 1.0, None, scale, shift, dtype)

    def _constants(self, x: Tensor) -> tuple[torch.dtype, Tensor | None, Tensor | None]:
        """Return the result's dtype, and the scale and shift that normalise x, on x's device."""
        dtype = result_dtype(x.dtype, self.dtype, self.mean, self.std)
        return dtype, *((None, None) if self._affine is None else self._affine.of(x, dtype))

    def get_extra_state(self) -> Tensor:
        return self._stream.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self._stream.set_state(state)

    def extra_repr(self) -> str:
        normalised = "" if self.mean is None else f", mean={self.mean}, std={self.std}"
        return (
            f"alpha={self.alpha}, pairing={self.pairing!r}, per_sample={self.per_sample}, "
            f"prob={self.prob}, cutmix_alpha={self.cutmix_alpha}, "
            f"switch_prob={self.switch_prob}{normalised}, dtype={self.dtype}"
        )


class MixupCollator:
    """The book's collate function: it collates a batch and mixes it with one lam and a permutation.

    `DataLoader(data, collate_fn=MixupCollator())` gives (x, (y_i, y_j, lam)). The tuple is a
    `MixedTarget`, and lam a Python float. It works in the loader's workers, forked or spawned:
    each has its own stream, which differs from epoch to epoch and is reproducible from
    torch.manual_seed. (`MixUp` mixes on the device instead, and takes uint8 images.)

    Args:
        alpha: lam is drawn from Beta(alpha, alpha); 0 mixes nothing.
        base_collate: makes a batch (x, y) from samples; x must be floating-point.
        generator: the source of all draws without workers. Each worker's copy is seeded from it and
            from the worker.

    Raises:
        ValueError, TypeError: if an argument or batch is not allowed. The message names it and what
            is allowed.

    Source: the book chapter's MixupCollator, which drew the same numbers in every worker, from
    NumPy's global state.

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
        name = getattr(self.base_collate, "__name__", self.base_collate)
        return f"MixupCollator(alpha={self.alpha}, base_collate={name})"


def mixup_data(
    x: Tensor, y: Tensor, alpha: float = 1.0, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor, float | Tensor]:
    """The blog's function: (mixed_x, y_a, y_b, lam), with one lam and a random permutation.

    Args:
        x: (B, ...), floating-point.
        y: labels, (B, ...).
        alpha: lam is drawn from Beta(alpha, alpha); 0 gives lam = 1, which mixes nothing.
        generator: the source of the draws; if None, torch's global generator on the host.

    Returns:
        mixed_x, y_a, y_b, and lam as a Python float. With a CUDA generator lam is a 0-d tensor, so
        that the host does not wait for it.

    Raises:
        ValueError, TypeError: if an argument is not allowed. The message names it and what is
            allowed.
    """
    alpha = check_alpha("alpha", alpha)
    check_generator(generator)
    check_batch(x)
    if not x.is_floating_point():
        raise TypeError(
            f"x must be floating-point, got {x.dtype}: convert it, or take regfast.MixUp, which "
            "normalises bytes"
        )
    _check_labels(y, x)
    generator = torch.default_generator if generator is None else generator
    lam: float | Tensor = beta(alpha, (), generator)
    if generator.device.type == "cpu":
        lam = float(lam)
    index, b = _partners(x, y, pairing("random", len(x), generator))
    return blend(x, index, lam), y, b, lam


def _partners(x: Tensor, y: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index on x's device, sent there once, and the partners' labels."""
    index = on_device(drawn, x.device)
    # Labels on another device use the host's draw, and do not wait for a copy back.
    return index, y[index if y.device == x.device else on_device(drawn, y.device)]


def _check_labels(y: Any, x: Tensor) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a Tensor of labels, got {type(y).__name__}")
    if y.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"y must have shape ({x.shape[0]}, ...), labels of each sample of x, got "
            f"{tuple(y.shape)}"
        )


def _check_probability(name: str, value: Any) -> float:
    value = as_python(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)
