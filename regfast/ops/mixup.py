"""mixup: every sample of a batch blended with another one, or a box of it pasted, and normalised, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..dispatch import is_variable, may_read, on_device, use_triton
from ..reference.blur_pool import accumulator
from ..reference.mixup import mixup as reference
from ..sharding import is_sharded, on_parts, whole
from .schema import apply, check_like, define

__all__ = ["blend", "mixup"]

_FORMATS = {
    torch.preserve_format: None,
    torch.contiguous_format: None,
    torch.channels_last: 4,
    torch.channels_last_3d: 5,
}


def _forward(x, index, lam, box, scale, shift, dtype, memory_format):
    from ..kernels import mixup as kernels

    _check_op(x, index, lam, box, scale, shift)
    y = torch.empty_like(x, dtype=dtype, memory_format=memory_format)
    return kernels.mixup(x, index, lam, box, scale, shift, y)


def _forward_out(x, index, lam, box, scale, shift, out):
    from ..kernels import mixup as kernels

    _check_op(x, index, lam, box, scale, shift)
    check_like("mixup_out: out", out, x.shape, out)
    kernels.mixup(x, index, lam, box, scale, shift, out)


def _backward(grad, samples, starts, lam, box, scale, stride, dtype):
    from ..kernels import mixup as kernels

    _check_op(grad, samples, lam, box, scale, None)
    check_like("mixup_backward: starts", starts, (len(samples) + 1,), samples)
    dx = torch.empty_strided(grad.shape, stride, dtype=dtype, device=grad.device)
    return kernels.mixup_backward(grad, samples, starts, lam, box, scale, dx)


def _check_op(x: Tensor, index: Tensor, lam: Tensor, box: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> None:
    """Refuses what a kernel would read beyond, if an op is called by hand."""
    check_like("mixup: index", index, x.shape[:1], index)
    if lam.ndim:
        check_like("mixup: lam", lam, x.shape[:1], lam)
    if box is not None:
        check_like("mixup: box", box, (4,) if box.ndim == 1 else (len(x), 4), box)
    for numbers in (scale, shift):
        if numbers is not None:
            check_like("mixup: scale and shift", numbers, x.shape[1:2], numbers)
    for t in (index, lam, box, scale, shift):
        if t is not None and t.device != x.device:
            raise ValueError(f"mixup: all tensors must be on x's device, {x.device}, got one on {t.device}")


_MIX = "Tensor lam, Tensor? box, Tensor? scale, Tensor? shift"
define(
    f"mixup(Tensor x, Tensor index, {_MIX}, ScalarType dtype, MemoryFormat memory_format) -> Tensor",
    _forward,
    lambda x, *args: torch.empty_like(x, dtype=args[-2], memory_format=args[-1]),
)
define(f"mixup_out(Tensor x, Tensor index, {_MIX}, Tensor(a!) out) -> ()", _forward_out, lambda *args: None)
define(
    "mixup_backward(Tensor grad, Tensor samples, Tensor starts, Tensor lam, Tensor? box, Tensor? scale, SymInt[] stride, "
    "ScalarType dtype) -> Tensor",
    _backward,
    lambda grad, *args: torch.empty_strided(grad.shape, args[-2], dtype=args[-1], device=grad.device),
)


# The blend is affine in x, so its linear part is its tangent, and nothing of x is saved but its strides and dtype.
class _Mixup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lam, index, box, scale, shift, dtype, memory_format):
        ctx.save_for_backward(lam, index, box, scale)
        ctx.save_for_forward(lam, index, box, scale)
        ctx.dtype, ctx.memory_format = dtype, memory_format
        ctx.like = torch.empty_like(x, device="meta")
        return torch.ops.regfast.mixup(x, index, lam, box, scale, shift, dtype, memory_format)

    @staticmethod
    def backward(ctx, grad):
        args = ctx.saved_tensors, ctx.like.stride(), ctx.like.dtype, ctx.memory_format
        return apply(_Adjoint, _AdjointWithJvp, grad, *args), *(None,) * 7


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, pairing, stride, dtype, memory_format):
        ctx.pairing, ctx.stride, ctx.dtype, ctx.memory_format, ctx.grad_dtype = pairing, stride, dtype, memory_format, grad.dtype
        lam, index, box, scale = pairing
        # The samples that took the same partner side by side, and where each partner's begin.
        partners, samples = index.sort(stable=True)
        starts = torch.searchsorted(partners, torch.arange(len(index) + 1, device=index.device))
        return torch.ops.regfast.mixup_backward(grad, samples, starts, lam, box, scale, stride, dtype)

    @staticmethod
    def backward(ctx, t):
        lam, index, box, scale = ctx.pairing
        args = lam, index, box, scale, None, ctx.grad_dtype, ctx.memory_format
        return apply(_Mixup, _MixupWithJvp, t, *args), *(None,) * 4


class _MixupWithJvp(_Mixup):
    @staticmethod
    def jvp(ctx, t, *_others):
        lam, index, box, scale = ctx.saved_tensors
        return _MixupWithJvp.apply(t, lam, index, box, scale, None, ctx.dtype, ctx.memory_format)


class _AdjointWithJvp(_Adjoint):
    @staticmethod
    def jvp(ctx, t, *_others):
        return _AdjointWithJvp.apply(t, ctx.pairing, ctx.stride, ctx.dtype, ctx.memory_format)


def mixup(
    x: Tensor,
    index: Tensor,
    lam: float | Tensor,
    *,
    box: Tensor | Sequence[int] | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    out: Tensor | None = None,
) -> Tensor:
    """Blends every sample with its partner: lam*x + (1 - lam)*x[index]. Or pastes a box of the partner, as CutMix does.

    One read and one write of the batch, for any index. Differentiable in x and lam, any number of times. The host never waits for
    the device: what a CUDA tensor holds is checked under `regfast.debug` alone.

    Args:
        x: (B, ...), float16, bfloat16, float32 or float64, in any memory format; or uint8, which is divided by 255.
        index: (B,), the integer number of each sample's partner; any map, a permutation or not.
        lam: the weight of x in [0, 1]: a number, a 0-d or a (B,) tensor, on any device.
        box: four integers (y0, y1, x0, x1), (4,) or (B, 4), half-open, of the last two dimensions: the partner's pixels within
            it, x's around it, and lam is the weight of the labels alone. A sample whose box is (-1, -1, -1, -1) is blended.
        mean, std: what is subtracted from the blend, and what it is then divided by: a number or one a channel (dimension 1).
        dtype: the result's, floating; x's where it is floating, else float32 where mean and std are given.
        memory_format: the result's, `torch.preserve_format` being x's.
        out: a tensor to write to, of the result's shape, dtype and device; x itself for an index that is an involution
            (index[index[i]] = i), which is then blended in place. Neither x nor lam may require grad.

    Raises:
        ValueError, TypeError: for an argument that is not allowed; the message names it and what is.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018); Yun et al., "CutMix" (2019); the book chapter's
    MixupCollator.

    Example:
        >>> x = torch.randn(64, 3, 224, 224)
        >>> regfast.functional.mixup(x, torch.randperm(64), 0.7).shape
        torch.Size([64, 3, 224, 224])
    """
    check_batch(x)
    check_index(index, x)
    check_lam(lam, x)
    if not isinstance(lam, (Tensor, float, torch.SymFloat)):
        lam = float(lam)
    if box is not None:
        box = _box_of(box, x)
    dtype = result_dtype(x.dtype, dtype, mean, std)
    _check_format(memory_format, x)
    scale, shift = _affine_of(mean, std, x)
    if out is not None:
        _check_out(out, x, index, lam, dtype, memory_format)
    return blend(x, index, lam, box, scale, shift, dtype, memory_format, out)


def blend(
    x: Tensor,
    index: Tensor,
    lam: float | Tensor,
    box: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    out: Tensor | None = None,
) -> Tensor:
    """`mixup` with arguments already checked, and pairings that are trusted: what the modules call."""
    dtype = x.dtype if dtype is None else dtype
    if is_sharded(x, index, lam):
        if out is not None:
            raise ValueError("mixup: out must be None for a DTensor")
        index, box, scale, shift = (whole(t) for t in (index, box, scale, shift))
        # Every process wants all samples; and all of a sample, where it has a box or its channels numbers of their own.
        dims = range(1, x.ndim) if box is None and scale is None else ()
        weights = [lam] if isinstance(lam, Tensor) else []

        def own(x: Tensor, lam: float | Tensor = lam) -> Tensor:
            return blend(x, index, lam, box, scale, shift, dtype, memory_format)

        return on_parts(own, x, dims=dims, keeps=x.ndim, partial=weights)
    index = on_device(index, x.device).long()
    box = box if box is None else on_device(box, x.device)
    lam = on_device(lam, x.device) if isinstance(lam, Tensor) else lam
    if scale is not None and shift is not None:
        wide = accumulator(x.dtype, dtype)
        scale, shift = (on_device(numbers, x.device).to(wide).expand(x.shape[1]) for numbers in (scale, shift))
    dtypes = (dtype,) if x.dtype == torch.uint8 else (x.dtype, dtype)
    if not use_triton(x, dtypes=dtypes, elementwise=True, constants={"lam": lam}):
        y = reference(x, index, lam, box, scale, shift, dtype, memory_format)
        return y if out is None else out.copy_(y)
    if not isinstance(lam, Tensor):
        lam = torch.full((), lam, dtype=accumulator(x.dtype, dtype), device=x.device)
    if out is not None:
        torch.ops.regfast.mixup_out(x, index, lam, box, scale, shift, out)
        if not torch.compiler.is_compiling() and not out.is_inference():
            # For autograd: who has saved what was there must not use it.
            torch.autograd.graph.increment_version(out)
        return out
    return apply(_Mixup, _MixupWithJvp, x, lam, index, box, scale, shift, dtype, memory_format)


def check_batch(x: Any) -> None:
    """Refuses what is no batch of numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"mixup: x must be a Tensor, got {type(x).__name__}")
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise TypeError(f"mixup: x must be floating-point or uint8, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("mixup: x must be a batch, (B, ...), got a 0-d tensor")


def check_index(index: Any, x: Tensor) -> None:
    """Refuses an index that does not belong to the batch."""
    if not isinstance(index, Tensor):
        raise TypeError(f"mixup: index must be a Tensor, got {type(index).__name__}")
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"mixup: index must be int64 or int32, got {index.dtype}")
    if index.shape != x.shape[:1]:
        raise ValueError(f"mixup: index must have shape {tuple(x.shape[:1])}, an entry a sample of x, got {tuple(index.shape)}")
    if may_read(index) and index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= x.shape[0]:
            raise ValueError(f"mixup: index must be in [0, {x.shape[0]}), got {low if low < 0 else high}")


def check_lam(lam: Any, x: Tensor) -> None:
    """Refuses a lam that is no weight, or not one of each sample."""
    if isinstance(lam, Tensor):
        if not lam.is_floating_point():
            raise TypeError(f"lam must be floating-point, got {lam.dtype}")
        if lam.ndim and lam.shape != x.shape[:1]:
            raise ValueError(f"lam must be a number, 0-d or of shape {tuple(x.shape[:1])}, got {tuple(lam.shape)}")
        if not may_read(lam) or not lam.numel():
            return
        outside = lam.detach()[~((lam >= 0) & (lam <= 1))]
        if outside.numel():
            raise ValueError(f"lam must be in [0, 1], got {outside.flatten()[0].item()}")
    elif isinstance(lam, bool) or not isinstance(lam, (Real, torch.SymFloat)):
        raise TypeError(f"lam must be a number or a Tensor, got {type(lam).__name__}")
    elif not torch.compiler.is_compiling() and not 0 <= float(lam) <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")


def _box_of(box: Any, x: Tensor) -> Tensor:
    """A box as a tensor, checked."""
    if not isinstance(box, Tensor):
        if not isinstance(box, Sequence) or not all(isinstance(edge, Integral) for edge in box):
            raise TypeError(f"mixup: box must be four integers (y0, y1, x0, x1) or a Tensor, got {box!r}")
        box = torch.tensor([int(edge) for edge in box], device="cpu")
    if box.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"mixup: box must be int64 or int32, got {box.dtype}")
    if x.ndim < 4:
        raise ValueError(f"mixup: a box belongs to images, (B, C, ..., H, W), got x of shape {tuple(x.shape)}")
    if box.ndim not in (1, 2) or box.shape[-1] != 4 or (box.ndim == 2 and box.shape[0] != x.shape[0]):
        raise ValueError(f"mixup: box must have shape (4,) or {(x.shape[0], 4)}, got {tuple(box.shape)}")
    if may_read(box):
        y0, y1, x0, x1 = box.view(-1, 4).unbind(1)
        fits = (y0 >= 0) & (y1 >= y0) & (y1 <= x.shape[-2]) & (x0 >= 0) & (x1 >= x0) & (x1 <= x.shape[-1])
        wrong = box.view(-1, 4)[~(fits | (box.view(-1, 4) == -1).all(1))]
        if len(wrong):
            allowed = f"0 <= y0 <= y1 <= {x.shape[-2]} and 0 <= x0 <= x1 <= {x.shape[-1]}, or (-1, -1, -1, -1)"
            raise ValueError(f"mixup: box must be {allowed}, got {tuple(wrong[0].tolist())}")
    return box


def result_dtype(x_dtype: torch.dtype, dtype: torch.dtype | None, mean: Any, std: Any) -> torch.dtype:
    """The dtype of the result."""
    if (mean is None) != (std is None):
        raise ValueError(f"mixup: mean and std come together, got mean={mean!r} and std={std!r}")
    if dtype is None:
        if x_dtype != torch.uint8:
            return x_dtype
        if mean is None:
            raise ValueError("mixup: x of torch.uint8 needs mean and std, or a floating dtype for x/255")
        return torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"mixup: dtype must be floating-point, got {dtype!r}")
    return dtype


def _check_format(memory_format: Any, x: Tensor) -> None:
    if memory_format not in _FORMATS:
        raise TypeError(f"mixup: memory_format must be one of {', '.join(map(str, _FORMATS))}, got {memory_format!r}")
    if _FORMATS[memory_format] not in (None, x.ndim):
        raise ValueError(f"mixup: {memory_format} is for {_FORMATS[memory_format]}-d tensors, got shape {tuple(x.shape)}")


def affine(mean: Any, std: Any) -> tuple[Tensor, Tensor]:
    """What a mean and a deviation, numbers or one a channel, make of a value v: scale*v + shift, () or (C,) in float64."""
    mean, std = (_numbers(name, value) for name, value in (("mean", mean), ("std", std)))
    # One of them may have been given in numbers.
    device = std.device if mean.device.type == "cpu" else mean.device
    mean, std = (on_device(numbers, device) for numbers in (mean, std))
    if mean.ndim and std.ndim and 1 not in (len(mean), len(std)) and len(mean) != len(std):
        raise ValueError(f"mixup: mean and std must be of the same channels, got {len(mean)} and {len(std)}")
    if may_read(std) and not (std > 0).all():
        raise ValueError(f"mixup: std must be positive, got {std.tolist()}")
    return 1 / std, -mean / std


def _numbers(name: str, value: Any) -> Tensor:
    """A number or a channel's each, as a constant."""
    if isinstance(value, (bool, str)) or not isinstance(value, (Real, Sequence, Tensor)):
        raise TypeError(f"mixup: {name} must be a number, a sequence of numbers or a Tensor, got {value!r}")
    t = value.detach().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
    if t.ndim > 1 or t.numel() == 0:
        raise ValueError(f"mixup: {name} must be a number or one a channel, got shape {tuple(t.shape)}")
    return t


def _affine_of(mean: Any, std: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """`affine`, on x's device, for x's channels."""
    if mean is None:
        return None, None
    scale, shift = affine(mean, std)
    check_channels((scale, shift), x)
    return scale, shift


def check_channels(affine: Iterable[Tensor], x: Tensor) -> None:
    """Refuses a mean and a deviation of other channels than x's."""
    if x.ndim < 2:
        raise ValueError(f"mixup: mean and std belong to channels, dimension 1, got x of shape {tuple(x.shape)}")
    for numbers in affine:
        if numbers.ndim and numbers.shape[0] not in (1, x.shape[1]):
            raise ValueError(f"mixup: mean and std must be numbers or {x.shape[1]}, one a channel of x, got {numbers.shape[0]}")


def _check_out(
    out: Any, x: Tensor, index: Tensor, lam: float | Tensor, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Refuses an `out` that cannot hold the result, or that autograd could not follow."""
    if not isinstance(out, Tensor):
        raise TypeError(f"mixup: out must be a Tensor, got {type(out).__name__}")
    expected, found = (tuple(x.shape), dtype, x.device), (tuple(out.shape), out.dtype, out.device)
    if found != expected:
        raise ValueError(f"mixup: out must have the shape, dtype and device {expected}, got {found}")
    if memory_format != torch.preserve_format:
        raise ValueError(f"mixup: out has a memory format of its own, got memory_format={memory_format}")
    for name, t in (("x", x), ("lam", lam), ("out", out)):
        if isinstance(t, Tensor) and is_variable(t):
            raise ValueError(f"mixup: out= has no gradient, and {name} requires one")
    if torch._C._are_functorch_transforms_active():
        raise ValueError("mixup: out= has no transform of torch.func")
    if torch.compiler.is_compiling():
        return
    if torch._debug_has_internal_overlap(out) == 1:
        raise ValueError(f"mixup: out must not overlap itself, got strides {out.stride()}")
    if out is x:
        if may_read(index) and not torch.equal(index[index.long()], torch.arange(len(index)).to(index)):
            raise ValueError(f"mixup: out=x needs an involution, index[index[i]] = i for every i, got {index.tolist()}")
    elif _may_overlap(out, x):
        raise ValueError("mixup: out must be x itself or share no memory with it")


def _may_overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory from the first to the last element of one meets that of the other."""
    if not {type(a), type(b)} <= {Tensor, Parameter} or a.numel() == 0:
        return False
    (start_a, end_a), (start_b, end_b) = (_extent(t) for t in (a, b))
    return a.device == b.device and start_a < end_b and start_b < end_a


def _extent(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
