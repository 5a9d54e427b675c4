"""A gated residual in one pass: the stream and the branch are read, and their sum is written.

It is elementwise, so a launch sees no shape: all its tensors are laid out alike, and are taken in the order in which they lie.
The gradient of the gate is a sum over all elements, in two stages: a program adds up what it reads and writes one number, and
those are added. There are no atomics, so two runs give the same bits.

Two numbers, per element of e bytes:
    forward                3 e bytes; 2 loads, a multiply-add and the activation
    backward, "gate"       3 e bytes; 2 loads, 2 multiplications, an addition, the activation and its derivative (dx *is* g)
    backward, "post"       5 e bytes; 3 loads, 3 multiplications, 2 additions and the derivative
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lanes import device_guard

# Elements a turn of a program, and its warps: 16 elements a thread, two 128-bit loads of half precision.
BLOCK, WARPS = 2048, 4
# A backward's programs at most: enough to fill a large device, and few numbers to add at the end.
PROGRAMS = 2048


@triton.jit
def _activate(u, ACTIVATION: tl.constexpr):
    """act(u)."""
    if ACTIVATION == "relu":
        return tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "leaky_relu":
        return tl.where(u > 0, u, 0.01 * u)
    elif ACTIVATION == "gelu":
        return 0.5 * u * (1.0 + tl.erf(0.7071067811865476 * u))
    elif ACTIVATION == "silu":
        return u / (1.0 + tl.exp(-u))
    else:
        return u


@triton.jit
def _pull(u, g, ACTIVATION: tl.constexpr):
    """act'(u) * g. A ReLU gives no gradient to what is not positive, and keeps that of NaN."""
    if ACTIVATION == "relu":
        return tl.where(u <= 0, 0.0, g)
    elif ACTIVATION == "leaky_relu":
        return tl.where(u > 0, g, 0.01 * g)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(0.7071067811865476 * u))
        return g * (cdf + u * 0.3989422804014327 * tl.exp(-0.5 * u * u))
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-u))
        return g * (s * (1.0 + u * (1.0 - s)))
    else:
        return g


@triton.jit
def _forward_kernel(
    x_ptr, f_ptr, alpha_ptr, y_ptr, numel, ACTIVATION: tl.constexpr, FORM: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Shapes: x, f and y (numel,); alpha (1,). This program processes BLOCK elements."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + k, mask=k < numel).to(ACC)
    f = tl.load(f_ptr + k, mask=k < numel).to(ACC)
    alpha = tl.load(alpha_ptr).to(ACC)
    if FORM == "gate":
        y = x + alpha * _activate(f, ACTIVATION)
    else:
        y = _activate(x + alpha * f, ACTIVATION)
    tl.store(y_ptr + k, y.to(y_ptr.dtype.element_ty), mask=k < numel)


@triton.jit
def _backward_kernel(
    g_ptr, x_ptr, f_ptr, alpha_ptr, dx_ptr, df_ptr, partial_ptr, numel, ACTIVATION: tl.constexpr, FORM: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Shapes: g, x, f, dx and df (numel,), partial (programs,); alpha (1,). x is None in the gate's form, and dx, df or partial
    where nobody wants it.

    This program processes every programs-th block of BLOCK elements, from its own on.
    """
    alpha = tl.load(alpha_ptr).to(ACC)
    total = tl.zeros((BLOCK,), ACC)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, step):
        k = start + tl.arange(0, BLOCK)
        # Beyond the end zeros, which add nothing to the sum.
        g = tl.load(g_ptr + k, mask=k < numel, other=0.0).to(ACC)
        f = tl.load(f_ptr + k, mask=k < numel, other=0.0).to(ACC)
        if FORM == "gate":
            if df_ptr is not None:
                df = _pull(f, alpha * g, ACTIVATION)
            if partial_ptr is not None:
                total += g * _activate(f, ACTIVATION)
        else:
            x = tl.load(x_ptr + k, mask=k < numel, other=0.0).to(ACC)
            h = _pull(x + alpha * f, g, ACTIVATION)
            df = alpha * h
            if dx_ptr is not None:
                tl.store(dx_ptr + k, h.to(dx_ptr.dtype.element_ty), mask=k < numel)
            if partial_ptr is not None:
                total += h * f
        if df_ptr is not None:
            tl.store(df_ptr + k, df.to(df_ptr.dtype.element_ty), mask=k < numel)
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(total))


def laid_out_as(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t in the order in which `like` lies, which is dense; copied only where it lies in another."""
    if all(size == 1 or a == b for size, a, b in zip(t.shape, t.stride(), like.stride())):
        return t
    return torch.empty_strided(t.shape, like.stride(), dtype=t.dtype, device=t.device).copy_(t)


def wide_of(*tensors: torch.Tensor) -> tl.dtype:
    """What the arithmetic is in."""
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def rezero(x: torch.Tensor, f: torch.Tensor, alpha: torch.Tensor, activation: str, form: str, y: torch.Tensor) -> torch.Tensor:
    """Fills y, dense and of x's shape."""
    if y.numel() == 0:
        return y
    x, f = laid_out_as(x, y), laid_out_as(f, y)
    options = dict(ACTIVATION=activation, FORM=form, ACC=wide_of(x, f, alpha), BLOCK=BLOCK, num_warps=WARPS)
    with device_guard(y):
        _forward_kernel[(triton.cdiv(y.numel(), BLOCK),)](x, f, alpha, y, y.numel(), **options)
    return y


def rezero_backward(
    g: torch.Tensor, x: torch.Tensor | None, f: torch.Tensor, alpha: torch.Tensor, activation: str, form: str, dx: torch.Tensor,
    df: torch.Tensor, dalpha: torch.Tensor,
) -> None:  # fmt: skip
    """Fills the gradients that are not empty: dx and df, laid out alike and dense, and dalpha, 0-d."""
    if f.numel() == 0:
        dalpha.zero_()
        return
    like = torch.empty_like(f, device="meta")
    g, f = laid_out_as(g, like), laid_out_as(f, like)
    x = None if x is None else laid_out_as(x, like)
    programs = min(triton.cdiv(f.numel(), BLOCK), PROGRAMS)
    partial = f.new_empty(programs, dtype=dalpha.dtype) if dalpha.numel() else None
    outputs = (t if t is not None and t.numel() else None for t in (dx, df, partial))
    options = dict(ACTIVATION=activation, FORM=form, ACC=wide_of(g, f, alpha), BLOCK=BLOCK, num_warps=WARPS)
    with device_guard(f):
        _backward_kernel[(programs,)](g, x, f, alpha, *outputs, f.numel(), **options)
    if partial is not None:
        torch.sum(partial, 0, out=dalpha)
