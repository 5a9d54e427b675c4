"""The blend of MixUp in plain PyTorch: the specification and the path of the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.autograd import is_differentiated, is_variable
from .._core.dispatch import is_watched, may_read
from .._core.layout import as_laid_out, as_tensor, is_channels_last
from .._core.precision import accumulator, gradient_dtype, outside_autocast


def mixup(
    x: Tensor,
    index: Tensor,
    lam: float | Tensor,
    box: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """Return scale*v + shift, where v is lam*x + (1 - lam)*x[index], divided by 255 for uint8.

    With a box, v is x[index] inside it and x outside it. x is (B, ...), floating or uint8; index
    (B,); lam a number, () or (B,); box None, (4,) or (B, 4); scale and shift None or (C,), for
    dimension 1. A sample is blended if the first entry of its box is negative. The result has x's
    shape.

    A value with a weight of zero has no effect, even if it is infinite or NaN. If lam is
    differentiated it counts: the derivative by lam is the difference of both values. Sums are
    float32 (float64 if x or the result is) and are rounded once. Source: Zhang et al., "mixup:
    Beyond Empirical Risk Minimization" (2018); the box: Yun et al., "CutMix" (2019).
    """
    with outside_autocast(x):
        arguments = scale, shift, dtype
        box = None if box is None else box.expand(x.shape[0], 4)
        weight = _weight(lam, x, accumulator(x.dtype, dtype))
        if _prefers_parts(x, index, weight, box):
            return _in_parts(
                x,
                index,
                weight,
                box,
                *arguments,
                torch.empty_like(x, dtype=dtype, memory_format=memory_format),
            )
        wide = x.to(gradient_dtype(x, dtype))
        return as_laid_out(
            _mixed(wide, _take(wide, index), weight, box, *arguments), x, memory_format
        )


def _weight(lam: float | Tensor, x: Tensor, dtype: torch.dtype) -> float | Tensor:
    """Return lam in `dtype`, in a shape that broadcasts over x.

    A compiler gets a tensor: it would make a graph for each number.
    """
    if torch.compiler.is_compiling():
        lam = as_tensor(lam, dtype, x.device)
    if not isinstance(lam, Tensor):
        return lam
    return lam.to(dtype).view(-1, *(1,) * (x.ndim - 1)) if lam.ndim else lam.to(dtype)


def _prefers_parts(x: Tensor, index: Tensor, lam: float | Tensor, box: Tensor | None) -> bool:
    """Return whether to mix some samples at a time: eagerly on a CPU, without derivatives."""
    if x.device.type != "cpu" or is_watched(x, index, lam, box) or is_differentiated(x):
        return False
    return not isinstance(lam, Tensor) or not is_differentiated(lam)


# Elements of a part: what it needs stays in a core's cache and in reused memory.
_PART = 2**18


def _in_parts(
    x: Tensor,
    index: Tensor,
    lam: float | Tensor,
    box: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
    y: Tensor,
) -> Tensor:
    """Fill y, some samples at a time."""
    count = max(_PART // max(x.shape[1:].numel(), 1), 1)
    plain = (
        box is None
        and scale is None
        and x.dtype == dtype == accumulator(dtype)
        and not _leaves_out(lam)
    )
    # lam is on the CPU, so that item() does not wait.
    lam = lam.item() if isinstance(lam, Tensor) and lam.ndim == 0 else lam
    for first in range(0, x.shape[0], count):
        part = slice(first, first + count)
        own, partner = x[part], _take(x, index[part])
        weight = lam[part] if isinstance(lam, Tensor) else lam
        if plain:
            _blend_into(y[part], own, partner, weight)
        else:
            y[part] = _mixed(
                own, partner, weight, None if box is None else box[part], scale, shift, dtype
            )
    return y


def _blend_into(y: Tensor, own: Tensor, partner: Tensor, lam: float | Tensor) -> None:
    """Write `_blend` to y without another tensor. This overwrites `partner`."""
    partner.mul_(1 - lam)
    if isinstance(lam, Tensor):
        torch.addcmul(partner, own, lam, out=y)
    else:
        torch.add(partner, own, alpha=lam, out=y)


def _mixed(
    x: Tensor,
    partner: Tensor,
    lam: float | Tensor,
    box: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Mix samples with as many partners, one box per sample."""
    wide = accumulator(x.dtype, dtype)
    own, partner = x.to(wide), partner.to(wide)
    y = _blend(own, partner, lam)
    if box is not None:
        pasted = torch.where(_inside(box, x.shape), partner, own)
        y = torch.where((box[:, 0] < 0).view(-1, *(1,) * (x.ndim - 1)), y, pasted)
    if x.dtype == torch.uint8:
        y = y / 255
    if scale is not None and shift is not None:
        channels = (-1, *(1,) * (x.ndim - 2))
        y = torch.addcmul(shift.to(wide).view(channels), y, scale.to(wide).view(channels))
    return y.to(dtype)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Return x[index] in x's memory format.

    index_select has the faster gradient, by several times, but its output is contiguous.
    """
    if x.ndim >= 4 and not torch._C._are_functorch_transforms_active() and is_channels_last(x):
        return x.movedim(1, -1).index_select(0, index).movedim(-1, 1)
    return x.index_select(0, index)


def _blend(own: Tensor, partner: Tensor, lam: float | Tensor) -> Tensor:
    """Return lam*own + (1 - lam)*partner; the second product and the sum take one pass."""
    if not isinstance(lam, Tensor):
        if lam in (0, 1):
            return own.clone() if lam else partner
        return torch.add(own * lam, partner, alpha=1 - lam)
    y = torch.addcmul(own * lam, partner, 1 - lam)
    if is_variable(lam) or not _leaves_out(lam):
        return y
    return torch.where(lam == 1, own, torch.where(lam == 0, partner, y))


def _leaves_out(lam: float | Tensor) -> bool:
    """Return whether a weight may be zero: zero times infinity is not zero."""
    if not isinstance(lam, Tensor):
        return lam in (0, 1)
    return not may_read(lam) or bool(((lam == 0) | (lam == 1)).any())


def _inside(box: Tensor, shape: torch.Size) -> Tensor:
    """Return where the last two dimensions lie in their sample's box: (B, 1, ..., H, W)."""
    y0, y1, x0, x1 = (edge.view(-1, *(1,) * (len(shape) - 1)) for edge in box.unbind(1))
    row = torch.arange(shape[-2], device=box.device).view(-1, 1)
    column = torch.arange(shape[-1], device=box.device)
    return (y0 <= row) & (row < y1) & (x0 <= column) & (column < x1)
