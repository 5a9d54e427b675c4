"""MixUp's blend against its peers, of floats and of bytes that are normalised first.

timm, torchvision and kornia draw lam and mix one-hot labels in every call, which is what it costs.
"""

from functools import partial

import pytest
import torch
from peers import load
from timing import AXES, CUDA, DEVICE, DTYPES, FORMATS, compiled, images

from regfast.functional import mixup

LAM, CLASSES = 0.3, 10
BATCHES = [(512, 3, 224, 224), (256, 256, 56, 56)] if CUDA else [(32, 3, 224, 224)]
MEAN = torch.tensor([0.485, 0.456, 0.406], device=DEVICE).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], device=DEVICE).view(3, 1, 1)


def plain(x, index, lam):
    return lam * x + (1 - lam) * x[index]


def blend(mixer):
    return lambda x, index, lam: mixer(x, torch.zeros_like(index))[0]


def timm():
    """It writes to its batch: to a copy where that is differentiated."""
    mix = load("timm.data").Mixup(label_smoothing=0.0, num_classes=CLASSES)
    return blend(lambda x, y: mix(x.clone() if torch.is_grad_enabled() else x, y))


def kornia():
    """Its lambda is the partner's weight."""
    draws = dict(lambda_val=(1 - LAM, 1 - LAM), same_on_batch=True)
    return blend(load("kornia.augmentation").RandomMixUpV2(**draws, data_keys=["input", "class"]))


# A function of the batch, the partners and lam. Compiled, regfast's is its reference.
CONTESTANTS = {
    "plain PyTorch": lambda: plain,
    "regfast": lambda: mixup,
    "timm": timm,
    "torchvision": lambda: blend(load("torchvision.transforms.v2").MixUp(num_classes=CLASSES)),
    "kornia": kornia,
}


def normalise(mix, dtype, x, index, lam):
    """What people write by hand, before the blend."""
    return mix(x.float().div_(255).sub_(MEAN).div_(STD).to(dtype), index, lam)


# The same of bytes, for the dtype of the blend.
BYTES_CONTESTANTS = {
    name: lambda dtype, make=make: partial(normalise, make(), dtype)
    for name, make in CONTESTANTS.items()
} | {"regfast": lambda dtype: partial(mixup, mean=MEAN.flatten(), std=STD.flatten(), dtype=dtype)}
CONTESTANTS |= compiled(CONTESTANTS, "regfast", "plain PyTorch")
BYTES_CONTESTANTS |= compiled(BYTES_CONTESTANTS, "regfast", "plain PyTorch")


def draw(x):
    return x, torch.randperm(len(x), device=DEVICE), torch.tensor(LAM, device=DEVICE)


def draw_bytes(shape, format):
    x = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)
    return draw(x.contiguous(memory_format=FORMATS[format]))


@pytest.mark.parametrize("contestant", CONTESTANTS)
@AXES
@pytest.mark.parametrize("shape", BATCHES, ids=str)
def test_mixup(benchmark, ready, shape, format, dtype, direction, contestant):
    step = CONTESTANTS[contestant]()
    benchmark(ready(step, lambda: draw(images(shape, format, dtype)), direction, rereads=False))


@pytest.mark.parametrize("contestant", BYTES_CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", BATCHES[:1], ids=str)
def test_mixup_uint8(benchmark, ready, shape, format, dtype, contestant):
    step = BYTES_CONTESTANTS[contestant](getattr(torch, dtype))
    benchmark(ready(step, lambda: draw_bytes(shape, format), "forward", rereads=False))
