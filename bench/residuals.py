"""Who is timed against the gated residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from contest import Bytes, Case, Operation, compiled, images
from poolings import IMAGES
from torch import Tensor

from regfast.functional import rezero

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def composite(x: Tensor, f: Tensor, alpha: Tensor, activation: str) -> Tensor:
    """What people write by hand."""
    return x + alpha * ACTIVATIONS[activation](f)


def stream_and_branch(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    return (*images(case, device), *images(case, device), torch.full((1,), 0.5, device=device, requires_grad=True))


def three_tensors(inputs: tuple[Tensor, ...], y: Tensor) -> Bytes:
    """The forward reads two and writes one. So does the backward: the gradient of the stream is that of the output."""
    x, f, _ = inputs
    return Bytes(x.nbytes + f.nbytes + y.nbytes, y.nbytes + 2 * f.nbytes)


# In a compiled graph regfast's is its reference, so that "reference compiled" would be "regfast compiled".
RESIDUALS = {
    "rezero": Operation(
        function=rezero,
        contestants={
            "eager composite": lambda case: lambda x, f, alpha: composite(x, f, alpha.to(x.dtype), *case.arguments),
            "regfast": lambda case: lambda x, f, alpha: rezero(x, f, alpha, *case.arguments),
            "regfast compiled": compiled(lambda case: lambda x, f, alpha: rezero(x, f, alpha, *case.arguments)),
            "composite compiled": compiled(lambda case: lambda x, f, alpha: composite(x, f, alpha.to(x.dtype), *case.arguments)),
        },
        arguments=[("relu",), ("gelu",)],
        shapes=IMAGES,
        inputs=stream_and_branch,
        floor=three_tensors,
    ),
}
