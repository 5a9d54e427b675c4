"""Anti-aliased ResNets against their peers: inference ("forward"), and a training step without its
optimizer ("forward+backward"). The baseline aliases; timm's blurs do not reach its shortcuts."""

import pytest

import regfast
from peers import load
from timing import AXES, CUDA, FORMATS, compiled_network, images, size

SHAPES = [(128, 3, 224, 224)] if CUDA else [(4, 3, 96, 96)]


def timm(name, **arguments):
    return load("timm").create_model(name, num_classes=10, **arguments)


def antialiased_cnns(name):
    return getattr(load("antialiased_cnns"), name)(num_classes=10)


def composer(name):
    """Composer's surgery with its own defaults: a blur comes before its convolution."""
    network = timm(name)
    load("composer.algorithms.blurpool").apply_blurpool(network)
    return network


def regfast_after(name):
    return regfast.antialias(timm(name), blur="after")


# A network of that name.
CONTESTANTS = {
    "plain": timm,
    "regfast": regfast_after,
    "regfast before": lambda name: regfast.antialias(timm(name), blur="before"),
    "timm": lambda name: timm(name, aa_layer=load("timm").layers.BlurPool2d),
    "timm with regfast's blur": lambda name: timm(name, aa_layer=regfast.BlurPool2d),
    "antialiased-cnns": antialiased_cnns,
    "composer": composer,
    "regfast compiled": compiled_network(regfast_after),
    "plain compiled": compiled_network(timm),
}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@AXES
@pytest.mark.parametrize("shape", SHAPES, ids=size)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_networks(benchmark, ready, name, shape, format, dtype, direction, contestant):
    network = CONTESTANTS[contestant](name).to(memory_format=FORMATS[format])
    benchmark(ready(network, lambda: (images(shape, format, dtype).detach(),), direction))
