"""mixup: blend each sample with its partner, or paste a box of it, and normalise, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .._core.autograd import (
    gradients,
    is_differentiated_again,
    is_variable,
    needs_graph,
    unwatched_apply,
)
from .._core.checks import as_python
from .._core.dispatch import is_its_memory, is_watched, may_read, on_device, use_triton
from .._core.layout import as_tensor
from .._core.normalise import Affine, result_dtype
from .._core.precision import accumulator
from .._core.sharding import is_sharded, on_parts, whole
from .._core.tensors import check_batch, check_lam, check_like, extremes
from ..reference.mixup import mixup as reference
from .schema import define, kernels_of

__all__ = ["blend", "mixup"]

_FORMATS = {
    torch.preserve_format: None,
    torch.contiguous_format: None,
    torch.channels_last: 4,
    torch.channels_last_3d: 5,
}


def _forward_op(x, index, lam, box, scale, shift, dtype, memory_format):
    _check_op(x, index, lam, box, scale, shift)
    return kernels_of("mixup").mixup(x, index, lam, box, scale, shift, dtype, memory_format)


def _out_op(x, index, lam, box, scale, shift, out):
    _check_op(x, index, lam, box, scale, shift)
    check_like("mixup_out: out", out, x.shape, out)
    kernels_of("mixup").mixup(
        x, index, lam, box, scale, shift, out.dtype, torch.preserve_format, out
    )


def _backward_op(grad, index, lam, box, scale, stride, dtype):
    _check_op(grad, index, lam, box, scale, None)
    return kernels_of("mixup").mixup_backward(grad, index, lam, box, scale, tuple(stride), dtype)


def _fake_gradient(grad, index, lam, box, scale, stride, dtype):
    return torch.empty_like(
        torch.empty_strided(grad.shape, stride, dtype=dtype, device=grad.device)
    )


def _check_op(
    x: Tensor,
    index: Tensor,
    lam: Tensor,
    box: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    """Raise if a kernel would read beyond an operand. Direct calls of the operators need this."""
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
            raise ValueError(
                f"mixup: all tensors must be on x's device, {x.device}, got one on {t.device}"
            )


_MIX = "Tensor index, Tensor lam, Tensor? box, Tensor? scale"
define(
    f"mixup(Tensor x, {_MIX}, Tensor? shift, ScalarType dtype, "
    "MemoryFormat memory_format) -> Tensor",
    _forward_op,
    lambda x, *args: torch.empty_like(x, dtype=args[-2], memory_format=args[-1]),
)
define(
    f"mixup_out(Tensor x, {_MIX}, Tensor? shift, Tensor(a!) out) -> ()", _out_op, lambda *args: None
)
define(
    f"mixup_backward(Tensor grad, {_MIX}, SymInt[] stride, ScalarType dtype) -> Tensor",
    _backward_op,
    _fake_gradient,
)


def _forward(x, index, lam, box, scale, shift, result, watched):
    if watched:
        return torch.ops.regfast.mixup(x, index, lam, box, scale, shift, *result)
    return kernels_of("mixup").mixup(x, index, lam, box, scale, shift, *result)


def _backward(grad, index, lam, box, scale, stride, dtype, watched):
    if watched or is_watched(grad) or not is_its_memory(grad):
        lam = as_tensor(lam, accumulator(grad.dtype, dtype), grad.device)
        return torch.ops.regfast.mixup_backward(grad, index, lam, box, scale, stride, dtype)
    return kernels_of("mixup").mixup_backward(grad, index, lam, box, scale, stride, dtype)


class _Mixup(torch.autograd.Function):
    """Saves x's strides and dtype, not its data: the blend is affine in x."""

    @staticmethod
    def forward(ctx, x, index, lam, box, scale, shift, result, watched):
        tensor, number = (lam, None) if isinstance(lam, Tensor) else (None, lam)
        ctx.save_for_backward(index, tensor, box, scale)
        ctx.arguments = number, x.stride(), x.dtype, result, watched
        return _forward(x, index, lam, box, scale, shift, result, watched)

    @staticmethod
    def backward(ctx, grad):
        (index, tensor, box, scale), (number, stride, x_dtype, result, watched) = (
            ctx.saved_tensors,
            ctx.arguments,
        )
        lam = number if tensor is None else tensor
        if is_differentiated_again():
            # The blend is affine: every batch of this shape has the same gradient.
            zeros = grad.new_zeros((), dtype=x_dtype).expand(grad.shape).requires_grad_()
            shift = None if scale is None else torch.zeros_like(scale)
            (dx,) = gradients(
                lambda x: reference(x, index, lam, box, scale, shift, *result),
                (zeros,),
                (True,),
                grad,
            )
        else:
            dx = _backward(grad, index, lam, box, scale, stride, x_dtype, watched)
        return dx, *(None,) * 7


_apply = unwatched_apply(_Mixup)


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
    """Blend each sample with its partner, lam*x + (1 - lam)*x[index], or paste a box as CutMix
    does.

    One read and one write of the batch, for any index. Differentiable in x and lam, any number of
    times. The host never waits for the device: the values of CUDA tensors are checked only under
    `regfast.debug`.

    Args:
        x: (B, ...), float16, bfloat16, float32 or float64, in any memory format; or uint8, which is
            divided by 255.
        index: (B,), the index of each sample's partner; any map, a permutation or not.
        lam: the weight of x in [0, 1]: a number, a 0-d or a (B,) tensor, on any device.
        box: four integers (y0, y1, x0, x1), or a tensor of them, (4,) or (B, 4): a half-open box in
            the last two dimensions. The result has the partner's pixels inside the box and x's
            outside it, and lam is the weight of the labels alone. A sample with the box
            (-1, -1, -1, -1) is blended.
        mean, std: the result is (blend - mean)/std; a number or one per channel (dimension 1).
        dtype: the result's, floating; x's by default, or float32 for uint8 with mean and std.
        memory_format: the result's; `torch.preserve_format` keeps x's.
        out: a tensor to write to, of the result's shape, dtype and device. Neither x nor lam may
            require grad. `out` may be x if index is an involution (index[index[i]] = i).

    Raises:
        ValueError, TypeError: for an invalid argument; the message names it and what is allowed.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018); Yun et al., "CutMix"
    (2019); the book chapter's MixupCollator.

    Example:
        >>> x = torch.randn(64, 3, 224, 224)
        >>> regfast.functional.mixup(x, torch.randperm(64), 0.7).shape
        torch.Size([64, 3, 224, 224])
    """
    check_batch(x)
    check_index(index, x)
    lam = check_lam(lam, x)
    if not isinstance(lam, (Tensor, float, torch.SymFloat)):
        lam = float(lam)
    if box is not None:
        box = _box_of(box, x)
    dtype = result_dtype(x.dtype, dtype, mean, std)
    _check_format(memory_format, x)
    scale, shift = (None, None) if mean is None else Affine(mean, std).of(x, dtype)
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
    """Blend like `mixup`, with checked arguments and a trusted index; the modules call this."""
    dtype = x.dtype if dtype is None else dtype
    watched = is_watched(x, index, lam, box) or not is_its_memory(x)
    if watched and is_sharded(x, index, lam):
        return _blend_parts(x, index, lam, box, scale, shift, dtype, memory_format, out)
    dtypes = (dtype,) if x.dtype == torch.uint8 else (x.dtype, dtype)
    index = on_device(index, x.device)
    box = box if box is None else on_device(box, x.device)
    lam = on_device(lam, x.device, accumulator(*dtypes)) if isinstance(lam, Tensor) else lam
    if not use_triton(x, *dtypes, elementwise=True, lam=lam):
        y = reference(x, index, lam, box, scale, shift, dtype, memory_format)
        return y if out is None else out.copy_(y)
    if watched:
        lam = as_tensor(lam, accumulator(*dtypes), x.device)
    if out is not None:
        return _blend_into(out, x, index, lam, box, scale, shift, watched or is_watched(out))
    result = dtype, memory_format
    if needs_graph(x):
        return (_Mixup.apply if watched else _apply)(
            x, index, lam, box, scale, shift, result, watched
        )
    return _forward(x, index, lam, box, scale, shift, result, watched)


def _blend_parts(x, index, lam, box, scale, shift, dtype, memory_format, out) -> Tensor:
    """Blend DTensors; see `blend`."""
    if out is not None:
        raise ValueError("mixup: out must be None for a DTensor")
    index, box, scale, shift = (whole(t) for t in (index, box, scale, shift))
    # Every process needs all samples, and whole samples if there are boxes or numbers per channel.
    dims = range(1, x.ndim) if box is None and scale is None else ()

    def own(x: Tensor, lam: float | Tensor = lam) -> Tensor:
        return blend(x, index, lam, box, scale, shift, dtype, memory_format)

    return on_parts(
        own, x, dims=dims, keeps=x.ndim, partial=[lam] if isinstance(lam, Tensor) else []
    )


def _blend_into(out, x, index, lam, box, scale, shift, watched) -> Tensor:
    if watched or not is_its_memory(out):
        torch.ops.regfast.mixup_out(x, index, lam, box, scale, shift, out)
    else:
        kernels_of("mixup").mixup(
            x, index, lam, box, scale, shift, out.dtype, torch.preserve_format, out
        )
    if not torch.compiler.is_compiling() and not out.is_inference():
        # A graph that saved the old values must not use the new ones.
        torch.autograd.graph.increment_version(out)
    return out


def check_index(index: Any, x: Tensor) -> None:
    """Raise unless `index` has one entry per sample of x, all in range."""
    if not isinstance(index, Tensor):
        raise TypeError(f"mixup: index must be a Tensor, got {type(index).__name__}")
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"mixup: index must be int64 or int32, got {index.dtype}")
    if index.shape != x.shape[:1]:
        expected = f"{tuple(x.shape[:1])}, one entry per sample of x"
        raise ValueError(f"mixup: index must have shape {expected}, got {tuple(index.shape)}")
    if may_read(index) and index.numel():
        low, high = extremes(index)
        if low < 0 or high >= x.shape[0]:
            raise ValueError(
                f"mixup: index must be in [0, {x.shape[0]}), got {low if low < 0 else high}"
            )


def _box_of(box: Any, x: Tensor) -> Tensor:
    """Return a box as a tensor, checked."""
    box = as_python(box)
    if not isinstance(box, Tensor):
        if not isinstance(box, Sequence) or not all(isinstance(edge, Integral) for edge in box):
            raise TypeError(
                f"mixup: box must be four integers (y0, y1, x0, x1) or a Tensor, got {box!r}"
            )
        box = torch.tensor([int(edge) for edge in box], device="cpu")
    if box.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"mixup: box must be int64 or int32, got {box.dtype}")
    if x.ndim < 4:
        raise ValueError(
            f"mixup: a box belongs to images, (B, C, ..., H, W), got x of shape {tuple(x.shape)}"
        )
    if (
        box.ndim not in (1, 2)
        or box.shape[-1] != 4
        or (box.ndim == 2 and box.shape[0] != x.shape[0])
    ):
        raise ValueError(
            f"mixup: box must have shape (4,) or {(x.shape[0], 4)}, got {tuple(box.shape)}"
        )
    if may_read(box):
        y0, y1, x0, x1 = box.view(-1, 4).unbind(1)
        fits = (
            (y0 >= 0)
            & (y1 >= y0)
            & (y1 <= x.shape[-2])
            & (x0 >= 0)
            & (x1 >= x0)
            & (x1 <= x.shape[-1])
        )
        wrong = box.view(-1, 4)[~(fits | (box.view(-1, 4) == -1).all(1))]
        if len(wrong):
            rows, columns = f"0 <= y0 <= y1 <= {x.shape[-2]}", f"0 <= x0 <= x1 <= {x.shape[-1]}"
            allowed = f"{rows} and {columns}, or (-1, -1, -1, -1)"
            raise ValueError(f"mixup: box must be {allowed}, got {tuple(wrong[0].tolist())}")
    return box


def _check_format(memory_format: Any, x: Tensor) -> None:
    if memory_format not in _FORMATS:
        allowed = ", ".join(map(str, _FORMATS))
        raise TypeError(f"mixup: memory_format must be one of {allowed}, got {memory_format!r}")
    if _FORMATS[memory_format] not in (None, x.ndim):
        allowed = f"{_FORMATS[memory_format]}-d tensors"
        raise ValueError(f"mixup: {memory_format} is for {allowed}, got shape {tuple(x.shape)}")


def _check_out(
    out: Any,
    x: Tensor,
    index: Tensor,
    lam: float | Tensor,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    """Raise for an `out` that cannot hold the result, or that autograd could not follow."""
    if not isinstance(out, Tensor):
        raise TypeError(f"mixup: out must be a Tensor, got {type(out).__name__}")
    expected, found = (tuple(x.shape), dtype, x.device), (tuple(out.shape), out.dtype, out.device)
    if found != expected:
        raise ValueError(
            f"mixup: out must have the shape, dtype and device {expected}, got {found}"
        )
    if memory_format != torch.preserve_format:
        raise ValueError(
            f"mixup: out has a memory format of its own, got memory_format={memory_format}"
        )
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
        if may_read(index) and not torch.equal(
            index[index.long()], torch.arange(len(index)).to(index)
        ):
            needed = "an involution, index[index[i]] = i for every i"
            raise ValueError(f"mixup: out=x needs {needed}, got {index.tolist()}")
    elif _may_overlap(out, x):
        raise ValueError("mixup: out must be x itself or share no memory with it")


def _may_overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether the memory of a, from its first to its last element, meets that of b."""
    if not {type(a), type(b)} <= {Tensor, Parameter} or a.numel() == 0:
        return False
    (start_a, end_a), (start_b, end_b) = (_extent(t) for t in (a, b))
    return a.device == b.device and start_a < end_b and start_b < end_a


def _extent(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
