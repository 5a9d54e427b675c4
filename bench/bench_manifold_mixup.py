"""A ResNet-18's training step with manifold mixup after layer2, without its optimizer."""

import pytest
import torch

from bench_mixup import plain
from bench_mixup_cross_entropy import two_terms
from peers import load
from regfast import ManifoldMixup, MixupCrossEntropyLoss
from timing import CUDA, DEVICE, DTYPES, FORMATS, compiled_network, images, size

SHAPES = [(256, 3, 224, 224)] if CUDA else [(16, 3, 64, 64)]
LAM, ALPHA, CLASSES = 0.3, 0.25, 10


def mixed_by_hand(hidden):
    """A step that mixes what `hidden` gives of the layers before."""

    def make(network):
        *layers, linear = network.children()
        prefix, rest = torch.nn.Sequential(*layers[:6]), torch.nn.Sequential(*layers[6:])

        def step(x, y, index, lam):
            z = linear(rest(hidden(prefix, x, index, lam)).flatten(1))
            return two_terms(z, y, y[index], lam)

        return step

    return make


def two_prefixes(prefix, x, index, lam):
    """The blog's: the layers before run on the batch, and again on its partners."""
    return lam * prefix(x) + (1 - lam) * prefix(x[index, :])


def one_prefix(prefix, x, index, lam):
    return plain(prefix(x), index, lam)


def regfast(network):
    loss = MixupCrossEntropyLoss()
    mixed = ManifoldMixup(network, ["layer2"], include_input=False, alpha=ALPHA)
    return lambda x, y, index, lam: loss(*mixed(x, y))


# A step of the network: a function of the batch, its labels, its partners and lam to the loss.
CONTESTANTS = {
    "plain PyTorch": mixed_by_hand(two_prefixes),
    "plain PyTorch, one prefix": mixed_by_hand(one_prefix),
    "regfast": regfast,
    "regfast compiled": compiled_network(regfast),
    "plain PyTorch compiled": compiled_network(mixed_by_hand(two_prefixes)),
}


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
@pytest.mark.parametrize("shape", SHAPES, ids=size)
def test_manifold_mixup(benchmark, ready, shape, format, dtype, contestant):
    network = resnet18(format, dtype)
    step, drawn = CONTESTANTS[contestant](network), lambda: draw(shape, format, dtype)
    benchmark(ready(step, drawn, "forward+backward", parameters=network.parameters()))
