"""Conv2dAA against its peers: the convolutions of a ResNet's stages, and their blurs."""

from functools import partial

import pytest
from peers import load
from timing import AXES, CUDA, compiled, images
from torch import nn

import regfast

SHAPES = [(128, 128, 56, 56)] if CUDA else [(4, 64, 56, 56)]

plain = partial(nn.Conv2d, bias=False)


def timm(channels, out, kernel, stride, padding):
    """What timm's networks with an `aa_layer` do."""
    blur = load("timm").layers.BlurPool2d(out, stride=stride)
    return nn.Sequential(plain(channels, out, kernel, 1, padding), blur)


# A layer of the channels in and out, the kernel size, the stride and the padding.
CONTESTANTS = {
    "nn.Conv2d": plain,
    "regfast": partial(regfast.Conv2dAA, bias=False, blur="after"),
    "regfast before": partial(regfast.Conv2dAA, bias=False, blur="before"),
    "timm": timm,
}
CONTESTANTS |= compiled(CONTESTANTS, "regfast")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@AXES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [(128, 3, 2, 1), (128, 1, 2, 0)], ids=str)
def test_convolution(benchmark, ready, window, shape, format, dtype, direction, contestant):
    layer = CONTESTANTS[contestant](shape[1], *window)
    benchmark(ready(layer, lambda: (images(shape, format, dtype),), direction))
