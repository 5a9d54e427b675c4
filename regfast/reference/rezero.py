"""The gated residual in plain PyTorch: the specification, and the path of CPU and compiled code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .._core.layout import as_laid_out
from .._core.precision import accumulator, outside_autocast

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda u: u,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


def rezero(x: Tensor, f: Tensor, alpha: Tensor, activation: str, form: str) -> Tensor:
    """Return x + alpha*act(f), or with form "post" act(x + alpha*f), in x's memory format.

    x and f have one shape and are floating; alpha has one element. Arithmetic is in float32
    (float64 if one of them is) and is rounded once, to the wider of the dtypes of x and f. Source:
    Bachlechner et al., "ReZero is All You Need" (2020), the second form; the book chapter, the
    first.
    """
    with outside_autocast(x):
        wide, act = accumulator(x.dtype, f.dtype, alpha.dtype), ACTIVATIONS[activation]
        stream, branch, gate = x.to(wide), f.to(wide), alpha.to(wide).reshape(())
        if form == "gate":
            y = torch.addcmul(stream, act(branch), gate)
        else:
            y = act(torch.addcmul(stream, branch, gate))
        return as_laid_out(y.to(torch.promote_types(x.dtype, f.dtype)), x, torch.preserve_format)
