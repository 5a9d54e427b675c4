"""Who is timed against the poolings."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from contest import Bytes, Case, Operation, compiled, compiled_reference, images
from peers import AbsentError, load
from torch import Tensor, nn

import regfast


class Blur(nn.Module):
    """What people write by hand: reflect, then a grouped convolution with the binomial filter."""

    def __init__(self, channels: int, size: int, stride: int) -> None:
        super().__init__()
        taps = torch.tensor(regfast.filters.binomial(size))
        self.register_buffer("weight", torch.outer(taps, taps).expand(channels, 1, size, size).contiguous())
        before = (size - 1) // 2
        self.pad = (before, size - 1 - before) * 2
        self.stride, self.channels = stride, channels

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, self.pad, mode="reflect"), self.weight, stride=self.stride, groups=self.channels)


def eager_blur(case: Case) -> nn.Module:
    size, stride = case.arguments
    return Blur(case.shape[1], size, stride)


def kornia_blur(case: Case) -> nn.Module:
    return load("kornia").filters.BlurPool2D(*case.arguments)


def timm_blur(case: Case) -> nn.Module:
    size, stride = case.arguments
    return load("timm").layers.BlurPool2d(case.shape[1], filt_size=size, stride=stride)


def antialiased_cnns_blur(case: Case) -> nn.Module:
    size, stride = case.arguments
    return load("antialiased_cnns").BlurPool(case.shape[1], filt_size=size, stride=stride)


def composer_blur(case: Case) -> nn.Module:
    size, stride = case.arguments
    if size != 3:
        raise AbsentError("its blur has three taps")
    return load("composer.algorithms.blurpool").BlurPool2d(stride)


def composer_max_blur(case: Case) -> nn.Module:
    return load("composer.algorithms.blurpool").BlurMaxPool2d(*case.arguments)


def after_max(make_blur: Callable[[Case], nn.Module]) -> Callable[[Case], nn.Module]:
    """A stride-1 maximum before the blur that MaxPool2dAA would take: int(1.7 * stride) taps."""

    def make(case: Case) -> nn.Module:
        kernel, stride, padding = case.arguments
        return nn.Sequential(nn.MaxPool2d(kernel, 1, padding), make_blur(case._replace(arguments=(int(1.7 * stride), stride))))

    return make


def kornia_max_blur(case: Case) -> nn.Module:
    kernel, stride, padding = case.arguments
    if padding:
        # kornia's class cannot pad its maximum; its documentation gives this sequence as the equivalent.
        return after_max(kornia_blur)(case)
    return load("kornia").filters.MaxBlurPool2D(int(1.7 * stride), stride, max_pool_size=kernel)


def regfast_max_blur(case: Case) -> nn.Module:
    return regfast.MaxPool2dAA(*case.arguments)


def regfast_blur(case: Case) -> nn.Module:
    return regfast.BlurPool2d(*case.arguments)


# On the CPU a call takes milliseconds and the two commands minutes at most; on CUDA x is several times any L2.
# For traffic.py they are small, because a program takes the interpreter up to half a second: 10 to 50 programs, 10 s a row of the
# table. Yet most axes have several blocks, so that what neighbours read twice is there, and no whole number of lines is filled.
IMAGES = {
    "cpu": [(8, 64, 112, 112)],
    "cuda": [(256, 64, 112, 112), (256, 256, 28, 28)],
    "toy": [(2, 4, 13, 12)],
    "traffic": [(3, 32, 32, 56)],
}

POOLINGS = {
    "max_blur_pool": Operation(
        function=regfast.functional.max_blur_pool2d,
        contestants={
            "nn.MaxPool2d": lambda case: nn.MaxPool2d(*case.arguments),
            "regfast": regfast_max_blur,
            "regfast compiled": compiled(regfast_max_blur),
            "reference compiled": compiled_reference(regfast_max_blur),
            "kornia": kornia_max_blur,
            "timm": after_max(timm_blur),
            "antialiased-cnns": after_max(antialiased_cnns_blur),
            "composer": composer_max_blur,
            "eager composite": after_max(eager_blur),
            "composite compiled": compiled(after_max(eager_blur)),
        },
        arguments=[(2, 2, 0), (3, 2, 1)],
        shapes=IMAGES,
        inputs=images,
        # The backward finds the maxima again, so it reads x as well as grad_y.
        floor=lambda inputs, y: Bytes(inputs[0].nbytes + y.nbytes, 2 * inputs[0].nbytes + y.nbytes),
    ),
    "blur_pool": Operation(
        function=regfast.functional.blur_pool2d,
        contestants={
            # No layer of torch.nn blurs. This is its cheapest decimation: every input is read once, for one output.
            "nn.AvgPool2d": lambda case: nn.AvgPool2d(case.arguments[1], ceil_mode=True),
            "regfast": regfast_blur,
            "regfast compiled": compiled(regfast_blur),
            "reference compiled": compiled_reference(regfast_blur),
            "kornia": kornia_blur,
            "timm": timm_blur,
            "antialiased-cnns": antialiased_cnns_blur,
            "composer": composer_blur,
            "eager composite": eager_blur,
            "composite compiled": compiled(eager_blur),
        },
        arguments=[(3, 2)],
        shapes=IMAGES,
        inputs=images,
        # A blur is linear: its backward needs grad_y alone.
        floor=lambda inputs, y: Bytes(inputs[0].nbytes + y.nbytes, inputs[0].nbytes + y.nbytes),
    ),
}
