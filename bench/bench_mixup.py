"""MixUp's blend against its peers, of floats and of bytes that are normalised first.

timm, torchvision and kornia draw lam and mix one-hot labels in every call, which is what it costs.
"""

import pytest
import torch

from peers import load
from regfast.functional import mixup
from timing import AXES, CUDA, DEVICE, DTYPES, FORMATS, compiled, images, size

LAM, ALPHA, CLASSES = 0.3, 0.25, 10
BATCHES = [(512, 3, 224, 224), (256, 256, 56, 56)] if CUDA else [(32, 3, 224, 224)]


def plain(x, index, lam):
    return lam * x + (1 - lam) * x[index, :]


def timm():
    """timm's, which writes to its batch: to a copy where the batch is differentiated."""
    mixer = load("timm.data").Mixup(mixup_alpha=ALPHA, label_smoothing=0.0, num_classes=CLASSES)

    def mix(x, y):
        return mixer(x.clone() if x.requires_grad and torch.is_grad_enabled() else x, y)

    return mix


def torchvision():
    return load("torchvision.transforms.v2").MixUp(alpha=ALPHA, num_classes=CLASSES)


def kornia():
    # Its lambda is the partner's weight.
    draws = dict(lambda_val=(1 - LAM, 1 - LAM), same_on_batch=True)
    return load("kornia.augmentation").RandomMixUpV2(**draws, data_keys=["input", "class"])


def blend(make_mixer):
    def make():
        mixer = make_mixer()
        return lambda x, index, lam: mixer(x, torch.zeros_like(index))[0]

    return make


# A function of the batch, the partners and lam. Compiled, regfast's is its reference.
CONTESTANTS = {
    "plain PyTorch": lambda: plain,
    "regfast": lambda: mixup,
    "regfast compiled": compiled(lambda: mixup),
    "timm": blend(timm),
    "torchvision": blend(torchvision),
    "kornia": blend(kornia),
    "plain PyTorch compiled": compiled(lambda: plain),
}


def normalised(name):
    """The contestant of floats after what people write by hand to normalise bytes."""

    def make(dtype):
        mix = CONTESTANTS[name]()

        def step(x, index, lam, mean, std):
            floats = x.float().div_(255).sub_(mean).div_(std)
            return mix(floats.to(getattr(torch, dtype)), index, lam)

        return step

    return make


def regfast_bytes(dtype):
    dtype = getattr(torch, dtype)
    return lambda x, index, lam, mean, std: mixup(
        x, index, lam, mean=mean.flatten(), std=std.flatten(), dtype=dtype
    )


# A function of the bytes, the partners, lam, the mean and the deviation of the channels.
BYTES_CONTESTANTS = {
    "plain PyTorch": normalised("plain PyTorch"),
    "regfast": regfast_bytes,
    "regfast compiled": compiled(regfast_bytes),
    **{name: normalised(name) for name in ("timm", "torchvision", "kornia")},
    "plain PyTorch compiled": compiled(normalised("plain PyTorch")),
}


def partners(samples):
    return torch.randperm(samples, device=DEVICE), torch.tensor(LAM, device=DEVICE)


def draw_bytes(shape, format):
    x = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)
    ends = (0.485, 0.406), (0.229, 0.225)
    mean, std = (torch.linspace(*pair, shape[1], device=DEVICE).view(-1, 1, 1) for pair in ends)
    return x.contiguous(memory_format=FORMATS[format]), *partners(shape[0]), mean, std


def floor(inputs, y):
    return (inputs[0].nbytes + y.nbytes, inputs[0].nbytes + y.nbytes)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@AXES
@pytest.mark.parametrize("shape", BATCHES, ids=size)
def test_mixup(benchmark, ready, shape, format, dtype, direction, contestant):
    def draw():
        return images(shape, format, dtype), *partners(shape[0])

    benchmark(ready(CONTESTANTS[contestant](), draw, direction, floor))


@pytest.mark.parametrize("contestant", BYTES_CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", BATCHES[:1], ids=size)
def test_mixup_uint8(benchmark, ready, shape, format, dtype, contestant):
    step = BYTES_CONTESTANTS[contestant](dtype)
    benchmark(ready(step, lambda: draw_bytes(shape, format), "forward", floor))
