"""BlurPool2d against its peers."""

import pytest
import torch
from peers import load
from timing import AXES, IMAGES, compiled, images
from torch import nn

import regfast


def composite(channels, taps, stride):
    """What people write by hand: a grouped convolution with the binomial filter."""
    window = dict(kernel_size=taps, stride=stride, padding=taps // 2, padding_mode="reflect")
    blur = nn.Conv2d(channels, channels, **window, groups=channels, bias=False)
    row = torch.tensor(regfast.filters.binomial(taps))
    blur.weight.data = torch.outer(row, row).expand_as(blur.weight).contiguous()
    return blur.requires_grad_(False)


# A layer of the channels, the taps and the stride. The baseline is torch.nn's cheapest decimation,
# because none of its layers blurs.
CONTESTANTS = {
    "nn.AvgPool2d": lambda _, taps, stride: nn.AvgPool2d(stride, ceil_mode=True),
    "regfast": lambda _, *window: regfast.BlurPool2d(*window),
    "kornia": lambda _, *window: load("kornia").filters.BlurPool2D(*window),
    "timm": lambda *window: load("timm").layers.BlurPool2d(*window),
    "antialiased-cnns": lambda c, *ts: load("antialiased_cnns").BlurPool(c, "reflect", *ts),
    "composite": composite,
}
CONTESTANTS |= compiled(CONTESTANTS, "regfast", "composite")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@AXES
@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("window", [(3, 2)], ids=str)
def test_blur_pool(benchmark, ready, window, shape, format, dtype, direction, contestant):
    layer = CONTESTANTS[contestant](shape[1], *window)
    benchmark(ready(layer, lambda: (images(shape, format, dtype),), direction, rereads=False))
