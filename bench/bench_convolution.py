"""Conv2dAA against its peers: the convolutions of a ResNet's stages, and their blurs."""

import pytest
from torch import nn

import regfast
from peers import load
from timing import AXES, CUDA, compiled, images, size

SHAPES = [(128, 128, 56, 56)] if CUDA else [(4, 64, 56, 56)]


def plain(*window):
    return nn.Conv2d(*window, bias=False)


def blurred(blur):
    return lambda *window: regfast.Conv2dAA(*window, bias=False, blur=blur)


def timm(channels, out, kernel, stride, padding):
    """What timm's networks with an `aa_layer` do."""
    blur = load("timm").layers.BlurPool2d(out, stride=stride)
    return nn.Sequential(plain(channels, out, kernel, 1, padding), blur)


def composer(*window):
    """Composer's surgery on the plain one: by its default the blur comes first."""
    return load("composer.algorithms.blurpool").BlurConv2d.from_conv2d(plain(*window))


# A layer of the channels in and out, the kernel size, the stride and the padding.
CONTESTANTS = {
    "nn.Conv2d": plain,
    "regfast": blurred("after"),
    "regfast before": blurred("before"),
    "timm": timm,
    "composer": composer,
    "regfast compiled": compiled(blurred("after")),
    "regfast before compiled": compiled(blurred("before")),
}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@AXES
@pytest.mark.parametrize("shape", SHAPES, ids=size)
@pytest.mark.parametrize("window", [(128, 3, 2, 1), (128, 1, 2, 0)], ids=str)
def test_convolution(benchmark, ready, window, shape, format, dtype, direction, contestant):
    layer = CONTESTANTS[contestant](shape[1], *window)
    benchmark(ready(layer, lambda: (images(shape, format, dtype),), direction))
