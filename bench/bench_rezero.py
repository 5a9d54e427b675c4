"""The gated residual, x + alpha * activation(f), against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from timing import AXES, DEVICE, IMAGES, compiled, images

from regfast.functional import rezero


def composite(activation):
    function = getattr(F, activation)
    return lambda x, f, alpha: x + alpha.to(x.dtype) * function(f)


def regfast(activation):
    return lambda x, f, alpha: rezero(x, f, alpha, activation)


# A function with that activation. Compiled, regfast's is its reference.
CONTESTANTS = {
    "composite": composite,
    "regfast": regfast,
}
CONTESTANTS |= compiled(CONTESTANTS, "regfast", "composite")


def draw(shape, format, dtype):
    alpha = torch.full((1,), 0.5, device=DEVICE, requires_grad=True)
    return images(shape, format, dtype), images(shape, format, dtype), alpha


@pytest.mark.parametrize("contestant", CONTESTANTS)
@AXES
@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_rezero(benchmark, ready, activation, shape, format, dtype, direction, contestant):
    step = CONTESTANTS[contestant](activation)
    # The backward reads f, but need not write the gradient of x, which is that of the output.
    benchmark(ready(step, lambda: draw(shape, format, dtype), direction, rereads=False))
