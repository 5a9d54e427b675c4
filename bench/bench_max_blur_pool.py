"""MaxPool2dAA against its peers, which take a maximum of stride 1 and blur it."""

import pytest
from torch import nn

import bench_blur_pool
import regfast
from peers import load
from timing import AXES, IMAGES, compiled, images, size


def after_max(name):
    """The maximum, then that contestant's blur of MaxPool2dAA's taps: int(1.7 * stride)."""

    def make(channels, kernel, stride, padding):
        blur = bench_blur_pool.CONTESTANTS[name](channels, int(1.7 * stride), stride)
        return nn.Sequential(nn.MaxPool2d(kernel, 1, padding), blur)

    return make


def kornia(channels, kernel, stride, padding):
    if padding:
        # kornia's class cannot pad its maximum, and its documentation gives this equivalent.
        return after_max("kornia")(channels, kernel, stride, padding)
    return load("kornia").filters.MaxBlurPool2D(int(1.7 * stride), stride, max_pool_size=kernel)


# A layer of the channels, the kernel size, the stride and the padding.
CONTESTANTS = {
    "nn.MaxPool2d": lambda channels, *window: nn.MaxPool2d(*window),
    "regfast": lambda channels, *window: regfast.MaxPool2dAA(*window),
    "kornia": kornia,
    "timm": after_max("timm"),
    "antialiased-cnns": after_max("antialiased-cnns"),
    "composer": lambda _, *window: load("composer.algorithms.blurpool").BlurMaxPool2d(*window),
    "eager composite": after_max("eager composite"),
    "composite compiled": compiled(after_max("eager composite")),
}
CONTESTANTS["regfast compiled"] = compiled(CONTESTANTS["regfast"])


def floor(inputs, y):
    """The backward finds the maxima again, so it reads the input and the output's gradient."""
    return (inputs[0].nbytes + y.nbytes, 2 * inputs[0].nbytes + y.nbytes)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@AXES
@pytest.mark.parametrize("shape", IMAGES, ids=size)
@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1)], ids=str)
def test_max_blur_pool(benchmark, ready, window, shape, format, dtype, direction, contestant):
    layer = CONTESTANTS[contestant](shape[1], *window)
    benchmark(ready(layer, lambda: (images(shape, format, dtype),), direction, floor))
