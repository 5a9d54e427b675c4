"""The blend of MixUp in plain PyTorch: the specification, and the path of the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.autograd import is_differentiated
from .._core.layout import as_laid_out, is_channels_last
from .._core.precision import accumulator, outside_autocast


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
    """lam*x + (1 - lam)*x[index], with a box x[index] within it and x around it; of uint8 images by 255; then scale*v + shift.

    x is (B, ...), floating or uint8; index (B,); lam a number, () or (B,); box None, (4,) or (B, 4), and where its first entry is
    negative the sample is blended all the same; scale and shift None or (C,), of dimension 1. The result has x's shape.
    Sums are float32 (float64 where x or the result is) and are rounded once. Source: Zhang et al., "mixup: Beyond Empirical Risk
    Minimization" (2018); the box: Yun et al., "CutMix" (2019).
    """
    with outside_autocast(x):
        arguments = scale, shift, dtype
        box = None if box is None else box.expand(x.shape[0], 4)
        if _prefers_parts(x, lam):
            return _in_parts(x, index, lam, box, *arguments, torch.empty_like(x, dtype=dtype, memory_format=memory_format))
        return as_laid_out(_mixed(x, _take(x, index), lam, box, *arguments), x, memory_format)


def _prefers_parts(x: Tensor, lam: float | Tensor) -> bool:
    """Whether to mix some samples at a time: eagerly on a CPU, where nobody differentiates."""
    traced = torch.compiler.is_compiling() or is_differentiated(x) or (isinstance(lam, Tensor) and is_differentiated(lam))
    return x.device.type == "cpu" and not traced


# Elements of a part: what it needs stays in a core's cache, and in memory that is used again.
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
    """Fills y, some samples at a time."""
    count = max(_PART // max(x.shape[1:].numel(), 1), 1)
    plain = box is None and scale is None and x.dtype == dtype == accumulator(dtype)
    # (A CPU's tensor, which nobody need wait for.)
    lam = lam.item() if isinstance(lam, Tensor) and lam.ndim == 0 else lam
    for first in range(0, x.shape[0], count):
        part = slice(first, first + count)
        own, partner = x[part], _take(x, index[part])
        weight = lam[part] if isinstance(lam, Tensor) else lam
        if plain:
            _blend_into(y[part], own, partner, _weight(weight, x.ndim, dtype))
        else:
            y[part] = _mixed(own, partner, weight, None if box is None else box[part], scale, shift, dtype)
    return y


def _blend_into(y: Tensor, own: Tensor, partner: Tensor, lam: float | Tensor) -> None:
    """Fills y with `_blend`, and makes no other tensor: `partner` is spent."""
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
    """Samples mixed with as many partners, one box each."""
    wide = accumulator(x.dtype, dtype)
    own, partner = x.to(wide), partner.to(wide)
    y = _blend(own, partner, _weight(lam, x.ndim, wide))
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
    """x[index] in x's memory format. (index_select's gradient is several times faster; its output, contiguous.)"""
    if x.ndim >= 4 and not torch._C._are_functorch_transforms_active() and is_channels_last(x):
        return x.movedim(1, -1).index_select(0, index).movedim(-1, 1)
    return x.index_select(0, index)


def _blend(own: Tensor, partner: Tensor, lam: float | Tensor) -> Tensor:
    """lam*own + (1 - lam)*partner, the second product and the sum in one pass."""
    if torch.compiler.is_compiling():
        # A compiler fuses it by itself. (And Inductor 2.13 keeps an earlier call's `alpha` where it is an expression of lam.)
        return own * lam + partner * (1 - lam)
    if isinstance(lam, Tensor):
        return torch.addcmul(own * lam, partner, 1 - lam)
    return torch.add(own * lam, partner, alpha=1 - lam)


def _weight(lam: float | Tensor, ndim: int, dtype: torch.dtype) -> float | Tensor:
    """lam as it meets a tensor of `ndim` dimensions."""
    if not isinstance(lam, Tensor):
        return lam
    return lam.to(dtype).view(-1, *(1,) * (ndim - 1)) if lam.ndim else lam.to(dtype)


def _inside(box: Tensor, shape: torch.Size) -> Tensor:
    """Where the last two dimensions lie within their sample's box: (B, 1, ..., H, W)."""
    y0, y1, x0, x1 = (edge.view(-1, *(1,) * (len(shape) - 1)) for edge in box.unbind(1))
    row = torch.arange(shape[-2], device=box.device).view(-1, 1)
    column = torch.arange(shape[-1], device=box.device)
    return (y0 <= row) & (row < y1) & (x0 <= column) & (column < x1)
