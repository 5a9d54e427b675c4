"""The gated residual, x + alpha * activation(f), against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from regfast.functional import rezero
from timing import AXES, DEVICE, IMAGES, compiled, images, size


def composite(activation):
    function = getattr(F, activation)
    return lambda x, f, alpha: x + alpha.to(x.dtype) * function(f)


def regfast(activation):
    return lambda x, f, alpha: rezero(x, f, alpha, activation)


# A function with that activation. Compiled, regfast's is its reference.
CONTESTANTS = {
    "eager composite": composite,
    "regfast": regfast,
    "regfast compiled": compiled(regfast),
    "composite compiled": compiled(composite),
}


def draw(shape, format, dtype):
    alpha = torch.full((1,), 0.5, device=DEVICE, requires_grad=True)
    return images(shape, format, dtype), images(shape, format, dtype), alpha


def floor(inputs, y):
    """Two read and one written. The gradient of the stream is that of the output."""
    return (3 * y.nbytes, 3 * y.nbytes)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@AXES
@pytest.mark.parametrize("shape", IMAGES, ids=size)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_rezero(benchmark, ready, activation, shape, format, dtype, direction, contestant):
    step = CONTESTANTS[contestant](activation)
    benchmark(ready(step, lambda: draw(shape, format, dtype), direction, floor))
