"""BlurPool2d against its peers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regfast
from peers import load
from timing import AXES, IMAGES, compiled, images, size


class Composite(nn.Module):
    """What people write by hand: reflect, then a grouped convolution with the binomial filter."""

    def __init__(self, channels, taps, stride):
        super().__init__()
        row = torch.tensor(regfast.filters.binomial(taps))
        weight = torch.outer(row, row).expand(channels, 1, taps, taps).contiguous()
        self.register_buffer("weight", weight)
        self.pad, self.stride = ((taps - 1) // 2, taps // 2) * 2, stride

    def forward(self, x):
        padded = F.pad(x, self.pad, mode="reflect")
        return F.conv2d(padded, self.weight, stride=self.stride, groups=x.shape[1])


def antialiased_cnns(channels, taps, stride):
    return load("antialiased_cnns").BlurPool(channels, filt_size=taps, stride=stride)


# A layer of the channels, the taps and the stride. The baseline is torch.nn's cheapest decimation,
# because none of its layers blurs. Composer's filter has three taps.
CONTESTANTS = {
    "nn.AvgPool2d": lambda channels, taps, stride: nn.AvgPool2d(stride, ceil_mode=True),
    "regfast": lambda channels, taps, stride: regfast.BlurPool2d(taps, stride),
    "kornia": lambda channels, taps, stride: load("kornia").filters.BlurPool2D(taps, stride),
    "timm": lambda channels, taps, stride: load("timm").layers.BlurPool2d(channels, taps, stride),
    "antialiased-cnns": antialiased_cnns,
    "composer": lambda _, taps, stride: load("composer.algorithms.blurpool").BlurPool2d(stride),
    "eager composite": Composite,
    "composite compiled": compiled(Composite),
}
CONTESTANTS["regfast compiled"] = compiled(CONTESTANTS["regfast"])


def floor(inputs, y):
    """A blur is linear: its backward needs the output's gradient alone."""
    return (inputs[0].nbytes + y.nbytes, inputs[0].nbytes + y.nbytes)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@AXES
@pytest.mark.parametrize("shape", IMAGES, ids=size)
@pytest.mark.parametrize("window", [(3, 2)], ids=str)
def test_blur_pool(benchmark, ready, window, shape, format, dtype, direction, contestant):
    layer = CONTESTANTS[contestant](shape[1], *window)
    benchmark(ready(layer, lambda: (images(shape, format, dtype),), direction, floor))
