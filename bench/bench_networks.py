"""Anti-aliased ResNets against their peers: inference ("forward"), and a training step without its
optimizer ("forward+backward"). The baseline aliases; timm's blurs do not reach its shortcuts."""

import pytest
from peers import load
from timing import AXES, CUDA, FORMATS, compiled, images

import regfast

SHAPES = [(128, 3, 224, 224)] if CUDA else [(4, 3, 96, 96)]


def timm(name, **arguments):
    return load("timm").create_model(name, num_classes=10, **arguments)


# A network of that name.
CONTESTANTS = {
    "plain": timm,
    "regfast": lambda name: regfast.antialias(timm(name), blur="after"),
    "regfast before": lambda name: regfast.antialias(timm(name), blur="before"),
    "timm": lambda name: timm(name, aa_layer=load("timm").layers.BlurPool2d),
    "timm with regfast's blur": lambda name: timm(name, aa_layer=regfast.BlurPool2d),
    "antialiased-cnns": lambda name: getattr(load("antialiased_cnns"), name)(num_classes=10),
}
if CUDA:  # for a CPU a network takes minutes to compile
    CONTESTANTS |= compiled(CONTESTANTS, "regfast", "plain")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@AXES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_networks(benchmark, ready, name, shape, format, dtype, direction, contestant):
    network = CONTESTANTS[contestant](name).to(memory_format=FORMATS[format])
    benchmark(ready(network, lambda: (images(shape, format, dtype).detach(),), direction))
