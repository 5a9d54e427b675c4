"""A ResNet-18's training step with manifold mixup after layer2, without its optimizer."""

import pytest
import torch
import torch.nn.functional as F
from peers import load
from timing import CUDA, DEVICE, DTYPES, FORMATS, compiled, images
from torch import nn

from regfast import ManifoldMixup, MixupCrossEntropyLoss

SHAPES = [(256, 3, 224, 224)] if CUDA else [(16, 3, 64, 64)]
LAM, CLASSES = 0.3, 10


def by_hand(network):
    """The blog's runs the layers before the mix twice: on the batch, and on its partners."""
    *layers, linear = network.children()
    prefix, rest = nn.Sequential(*layers[:6]), nn.Sequential(*layers[6:], nn.Flatten(), linear)

    def step(x, y, index, lam):
        z = rest(lam * prefix(x) + (1 - lam) * prefix(x[index]))
        return lam * F.cross_entropy(z, y) + (1 - lam) * F.cross_entropy(z, y[index])

    return step


def regfast(network):
    loss, mixed = MixupCrossEntropyLoss(), ManifoldMixup(network, ["layer2"], include_input=False)
    return lambda x, y, index, lam: loss(*mixed(x, y))


# A step of the network: a function of the batch, its labels, its partners and lam to the loss.
CONTESTANTS = {"plain PyTorch": by_hand, "regfast": regfast}
if CUDA:  # for a CPU a network takes minutes to compile
    CONTESTANTS |= compiled(CONTESTANTS, "regfast", "plain PyTorch")


def resnet18(format, dtype):
    network = load("torchvision.models").resnet18(num_classes=CLASSES)
    return network.to(DEVICE, getattr(torch, dtype), memory_format=FORMATS[format])


def draw(shape, format, dtype):
    y = torch.randint(CLASSES, shape[:1], device=DEVICE)
    index, lam = torch.randperm(shape[0], device=DEVICE), torch.tensor(LAM, device=DEVICE)
    return images(shape, format, dtype).detach(), y, index, lam


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_manifold_mixup(benchmark, ready, shape, format, dtype, contestant):
    network = resnet18(format, dtype)
    step, drawn = CONTESTANTS[contestant](network), lambda: draw(shape, format, dtype)
    benchmark(ready(step, drawn, "forward+backward", parameters=network.parameters()))
