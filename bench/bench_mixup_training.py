"""A ResNet-18's training step without its optimizer: with MixUp, and with manifold mixup."""

import pytest
import torch
import torch.nn.functional as F

from bench_mixup import ALPHA, CLASSES, kornia, partners, plain, timm, torchvision
from bench_mixup_cross_entropy import two_terms
from peers import load
from regfast import ManifoldMixup, MixedTarget, MixupCrossEntropyLoss
from regfast.functional import mixup
from timing import CUDA, DEVICE, DTYPES, FORMATS, compiled_network, images, size

SHAPES = [(256, 3, 224, 224)] if CUDA else [(16, 3, 64, 64)]


def plain_step(network):
    def step(x, y, index, lam):
        return two_terms(network(plain(x, index, lam)), y, y[index], lam)

    return step


def regfast_step(network):
    loss = MixupCrossEntropyLoss()
    return lambda x, y, index, lam: loss(
        network(mixup(x, index, lam)), MixedTarget(y, y[index], lam)
    )


def peer_step(make_mixer, loss):
    def make(network):
        mixer = make_mixer()

        def step(x, y, index, lam):
            x, target = mixer(x, y)
            return loss(network(x), target)

        return step

    return make


def timm_loss(z, target):
    return load("timm.loss").SoftTargetCrossEntropy()(z, target)


def soft_loss(z, target):
    return F.cross_entropy(z, target.to(z.dtype))


def kornia_loss(z, target):
    """What kornia's documentation gives for its labels, (a, b, lambda) in columns."""
    lam = target[:, 2]
    a, b = (F.cross_entropy(z, target[:, i].long(), reduction="none") for i in (0, 1))
    return ((1 - lam) * a + lam * b).mean()


# A step of the network: a function of the batch, its labels, its partners and lam to the loss.
CONTESTANTS = {
    "plain PyTorch": plain_step,
    "regfast": regfast_step,
    "regfast compiled": compiled_network(regfast_step),
    "timm": peer_step(timm, timm_loss),
    "torchvision": peer_step(torchvision, soft_loss),
    "kornia": peer_step(kornia, kornia_loss),
    "plain PyTorch compiled": compiled_network(plain_step),
}


def manifold(hidden):
    """Manifold mixup after layer2, of which `hidden` gives the mixed output."""

    def make(network):
        *layers, linear = network.children()
        prefix, rest = torch.nn.Sequential(*layers[:6]), torch.nn.Sequential(*layers[6:])

        def step(x, y, index, lam):
            z = linear(rest(hidden(prefix, x, index, lam)).flatten(1))
            return two_terms(z, y, y[index], lam)

        return step

    return make


def two_prefixes(prefix, x, index, lam):
    """The blog's: all up to the layer runs on the batch, and again on its partners."""
    return lam * prefix(x) + (1 - lam) * prefix(x[index, :])


def one_prefix(prefix, x, index, lam):
    return plain(prefix(x), index, lam)


def regfast_manifold(network):
    loss = MixupCrossEntropyLoss()
    mixed = ManifoldMixup(network, ["layer2"], include_input=False, alpha=ALPHA)
    return lambda x, y, index, lam: loss(*mixed(x, y))


MANIFOLD_CONTESTANTS = {
    "plain PyTorch": manifold(two_prefixes),
    "regfast": regfast_manifold,
    "regfast compiled": compiled_network(regfast_manifold),
    "plain PyTorch, one prefix": manifold(one_prefix),
    "plain PyTorch compiled": compiled_network(manifold(two_prefixes)),
}


def network(format, dtype):
    resnet18 = load("torchvision.models").resnet18(num_classes=CLASSES)
    return resnet18.to(DEVICE, getattr(torch, dtype), memory_format=FORMATS[format])


def draw(shape, format, dtype):
    y = torch.randint(CLASSES, shape[:1], device=DEVICE)
    return images(shape, format, dtype).detach(), y, *partners(shape[0])


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=size)
def test_mixup_step(benchmark, ready, shape, format, dtype, contestant):
    model = network(format, dtype)
    step, drawn = CONTESTANTS[contestant](model), lambda: draw(shape, format, dtype)
    benchmark(ready(step, drawn, "forward+backward", parameters=model.parameters()))


@pytest.mark.parametrize("contestant", MANIFOLD_CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=size)
def test_manifold_mixup(benchmark, ready, shape, format, dtype, contestant):
    model = network(format, dtype)
    step, drawn = MANIFOLD_CONTESTANTS[contestant](model), lambda: draw(shape, format, dtype)
    benchmark(ready(step, drawn, "forward+backward", parameters=model.parameters()))
