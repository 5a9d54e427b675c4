"""MaxPool2dAA against its peers, which take a maximum of stride 1 and blur it."""

import bench_blur_pool
import pytest
from timing import AXES, IMAGES, compiled, images
from torch import nn

import regfast


def after_max(name):
    """The maximum, then that contestant's blur of MaxPool2dAA's taps: int(1.7 * stride)."""

    def make(channels, kernel, stride, padding):
        blur = bench_blur_pool.CONTESTANTS[name](channels, int(1.7 * stride), stride)
        return nn.Sequential(nn.MaxPool2d(kernel, 1, padding), blur)

    return make


# A layer of the channels, the kernel size, the stride and the padding. kornia's MaxBlurPool2D
# cannot pad its maximum, and kornia documents it as this maximum and blur.
CONTESTANTS = {
    "nn.MaxPool2d": lambda _, *window: nn.MaxPool2d(*window),
    "regfast": lambda _, *window: regfast.MaxPool2dAA(*window),
    "kornia": after_max("kornia"),
    "timm": after_max("timm"),
    "antialiased-cnns": after_max("antialiased-cnns"),
    "composite": after_max("composite"),
}
CONTESTANTS |= compiled(CONTESTANTS, "regfast", "composite")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@AXES
@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1)], ids=str)
def test_max_blur_pool(benchmark, ready, window, shape, format, dtype, direction, contestant):
    layer = CONTESTANTS[contestant](shape[1], *window)
    # The backward finds the maxima again.
    benchmark(ready(layer, lambda: (images(shape, format, dtype),), direction, rereads=True))
