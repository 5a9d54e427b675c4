"""A gated residual in one pass: read the stream and the branch, write their sum.

The operation is elementwise, so a launch sees no shape. Its tensors are all laid out alike, and a
program takes their elements in memory order. The gradient of the gate is a sum over all elements,
in two stages: each program writes one partial sum, and a second kernel adds the partial sums.
There are no atomics, so two runs give the same bits.

Cost per element of e bytes:
    forward             3 e bytes; 2 loads, a multiply-add and the activation
    backward, "gate"    3 e bytes; 2 loads, 2 multiplications, an addition, the activation and its
                        derivative (dx is g)
    backward, "post"    5 e bytes; 3 loads, 3 multiplications, 2 additions and the derivative
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import LAUNCHES, Launch, keep, kinds_of, on_meta, scalar, wide_of

# Elements per iteration of a program, and its warps: 16 elements per thread, which are two 128-bit
# loads of half precision.
BLOCK, WARPS = 2048, 4
# The most programs of a backward: they fill a large device, and leave few partial sums to add.
PROGRAMS = 2048


@triton.jit
def _normal(u):
    """The normal distribution function at u, and exp(-u*u/2), its density without the factor.

    In float32 the tail beyond |u| is computed from the second (Abramowitz and Stegun, 7.1.26). The
    formula's error is 7.5e-8, and float32 arithmetic makes it 4e-7. A tail's relative error is
    larger, because that of its exponential is.
    """
    bell = tl.exp2(-0.7213475204444817 * u * u)
    if u.dtype == tl.float64:
        return 0.5 * (1.0 + tl.erf(0.7071067811865476 * u)), bell
    else:
        # A reciprocal square root and a product take two instructions, a division five.
        root = tl.rsqrt(1.0 + 0.2316418882 * tl.abs(u))
        t = root * root
        tail = 0.5307027145 * t - 0.7265760135
        tail = tail * t + 0.7107068705
        tail = tail * t - 0.142248368
        tail = (tail * t + 0.127414796) * t * bell
        return tl.where(u < 0, tail, 1.0 - tail), bell


@triton.jit
def _activate(u, ACTIVATION: tl.constexpr):
    """act(u)."""
    if ACTIVATION == "relu":
        return tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "leaky_relu":
        return tl.where(u > 0, u, 0.01 * u)
    elif ACTIVATION == "gelu":
        return u * _normal(u)[0]
    elif ACTIVATION == "silu":
        return u / (1.0 + tl.exp(-u))
    else:
        return u


@triton.jit
def _pull(u, g, ACTIVATION: tl.constexpr):
    """act'(u) * g. The gradient of a ReLU is 0 where u is not positive, and g where u is NaN."""
    if ACTIVATION == "relu":
        return tl.where(u <= 0, 0.0, g)
    elif ACTIVATION == "leaky_relu":
        return tl.where(u > 0, g, 0.01 * g)
    elif ACTIVATION == "gelu":
        cdf, bell = _normal(u)
        return g * (cdf + 0.3989422804014327 * u * bell)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-u))
        return g * (s * (1.0 + u * (1.0 - s)))
    else:
        return g


@triton.jit
def _forward_kernel(
    x_ptr, f_ptr, alpha_ptr, y_ptr, alpha: tl.float64, numel,
    ACTIVATION: tl.constexpr, FORM: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK elements of y.

    x_ptr, f_ptr, y_ptr: (numel,)
    alpha_ptr: (1,), or None where alpha is a number
    """
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + k, mask=k < numel).to(ACC)
    f = tl.load(f_ptr + k, mask=k < numel).to(ACC)
    gate = scalar(alpha_ptr, alpha, ACC)
    if FORM == "gate":
        y = x + gate * _activate(f, ACTIVATION)
    else:
        y = _activate(x + gate * f, ACTIVATION)
    tl.store(y_ptr + k, y.to(y_ptr.dtype.element_ty), mask=k < numel)


@triton.jit
def _backward_kernel(
    g_ptr, x_ptr, f_ptr, alpha_ptr, dx_ptr, df_ptr, partial_ptr, alpha: tl.float64, numel,
    ACTIVATION: tl.constexpr, FORM: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program computes every programs-th block of BLOCK elements, starting with its own.

    g_ptr, f_ptr: (numel,)
    x_ptr: (numel,), or None in the "gate" form
    alpha_ptr: (1,), or None where alpha is a number
    dx_ptr, df_ptr: (numel,), or None where not wanted
    partial_ptr: (programs,), or None where not wanted
    """
    gate = scalar(alpha_ptr, alpha, ACC)
    total = tl.zeros((BLOCK,), ACC)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, step):
        k = start + tl.arange(0, BLOCK)
        # Elements beyond the end are zeros, which add nothing to the sum.
        g = tl.load(g_ptr + k, mask=k < numel, other=0.0).to(ACC)
        f = tl.load(f_ptr + k, mask=k < numel, other=0.0).to(ACC)
        if FORM == "gate":
            if df_ptr is not None:
                df = _pull(f, gate * g, ACTIVATION)
            if partial_ptr is not None:
                total += g * _activate(f, ACTIVATION)
        else:
            x = tl.load(x_ptr + k, mask=k < numel, other=0.0).to(ACC)
            h = _pull(x + gate * f, g, ACTIVATION)
            df = gate * h
            if dx_ptr is not None:
                tl.store(dx_ptr + k, h.to(dx_ptr.dtype.element_ty), mask=k < numel)
            if partial_ptr is not None:
                total += h * f
        if df_ptr is not None:
            tl.store(df_ptr + k, df.to(df_ptr.dtype.element_ty), mask=k < numel)
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["programs"])
def _finish_kernel(partial_ptr, dalpha_ptr, programs, BLOCK: tl.constexpr):
    """One program adds all partial sums.

    partial_ptr: (programs,), with programs <= BLOCK
    dalpha_ptr: (1,)
    """
    i = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(partial_ptr + i, mask=i < programs, other=0.0))
    tl.store(dalpha_ptr, total.to(dalpha_ptr.dtype.element_ty))


def _lies(t: torch.Tensor, strides: tuple[int, ...]) -> bool:
    """Whether t is laid out by these dense strides."""
    return t.stride() == strides or all(
        size == 1 or a == b for size, a, b in zip(t.shape, t.stride(), strides)
    )


def _laid_out(t: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """t, laid out by these dense strides; copied only if it has others."""
    if _lies(t, strides):
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def _prepare_forward(
    x: torch.Tensor, f: torch.Tensor, alpha: float | torch.Tensor, activation: str, form: str,
    misaligned: int,
) -> tuple[torch.dtype, bool, Launch]:  # fmt: skip
    """The output's dtype, whether an input must be copied into its layout, and the launch."""
    dtype = torch.promote_types(x.dtype, f.dtype)
    wide = wide_of(dtype, *([alpha.dtype] if isinstance(alpha, torch.Tensor) else []))
    launch = Launch(
        _forward_kernel, triton.cdiv(x.numel(), BLOCK), (x.numel(),), x.device, not misaligned,
        ACTIVATION=activation, FORM=form, ACC=wide, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    strides = torch.empty_like(on_meta(x)).stride()
    return dtype, not all(_lies(t, strides) for t in (x, f)), launch


def rezero(
    x: torch.Tensor, f: torch.Tensor, alpha: float | torch.Tensor, activation: str, form: str
) -> torch.Tensor:
    """x + alpha*act(f), or act(x + alpha*f), for x and f of one shape.

    The result has x's memory format and the promoted dtype of x and f.
    """
    pointer, number = (alpha, 0.0) if isinstance(alpha, torch.Tensor) else (None, alpha)
    kinds = kinds_of(x, f, pointer)
    key = ("rezero", activation, form, x.shape, x.device, kinds)
    dtype, copies, launch = LAUNCHES.get(key) or keep(
        key, _prepare_forward(x, f, alpha, activation, form, kinds[-1])
    )
    y = torch.empty_like(x, dtype=dtype)
    if copies:
        x, f = _laid_out(x, y.stride()), _laid_out(f, y.stride())
    launch(x, f, pointer, y, number)
    return y


def _prepare_backward(
    g: torch.Tensor, f: torch.Tensor, alpha: float | torch.Tensor, activation: str, form: str,
    misaligned: int,
) -> tuple[tuple[int, ...], int, torch.dtype, Launch, Launch]:  # fmt: skip
    """The gradients' strides, the partial sums' number and dtype, and the two launches.

    The first launch writes the gradients and the partial sums, the second adds the partial sums.
    """
    wide = (
        torch.float64
        if torch.float64 in (g.dtype, f.dtype, getattr(alpha, "dtype", None))
        else torch.float32
    )
    programs = max(min(triton.cdiv(f.numel(), BLOCK), PROGRAMS), 1)
    launch = Launch(
        _backward_kernel, programs, (f.numel(),), f.device, not misaligned,
        ACTIVATION=activation, FORM=form, ACC=wide_of(wide), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    finish = Launch(_finish_kernel, 1, (programs,), f.device, True, BLOCK=PROGRAMS, num_warps=WARPS)
    return torch.empty_like(on_meta(f)).stride(), programs, wide, launch, finish


def rezero_backward(
    g: torch.Tensor, x: torch.Tensor | None, f: torch.Tensor, alpha: float | torch.Tensor,
    activation: str, form: str, wants_x: bool, wants_f: bool, wants_alpha: bool,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """The gradients of x and f, laid out as f is, and of alpha; None for those not wanted."""
    pointer, number = (alpha, 0.0) if isinstance(alpha, torch.Tensor) else (None, alpha)
    kinds = kinds_of(g, x, f, pointer)
    key = (
        "rezero_backward",
        activation,
        form,
        wants_x,
        wants_f,
        wants_alpha,
        f.shape,
        f.device,
        kinds,
    )
    strides, programs, wide, launch, finish = LAUNCHES.get(key) or keep(
        key, _prepare_backward(g, f, alpha, activation, form, kinds[-1])
    )
    dx = x.new_empty_strided(f.shape, strides) if wants_x else None
    df = f.new_empty_strided(f.shape, strides) if wants_f else None
    partial = f.new_empty(programs, dtype=wide) if wants_alpha else None
    x = None if x is None else _laid_out(x, strides)
    launch(_laid_out(g, strides), x, _laid_out(f, strides), pointer, dx, df, partial, number)
    if partial is None:
        return dx, df, None
    dalpha = pointer.new_empty(pointer.shape)
    finish(partial, dalpha)
    return dx, df, dalpha
