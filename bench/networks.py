"""Who is timed against the anti-aliased convolutions, and against whole networks that have them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contest import FORMATS, Case, Maker, Operation, compiled, compiled_network, images
from peers import load
from torch import Tensor, nn

import regfast

CLASSES = 10


def plain_convolution(case: Case) -> nn.Module:
    return nn.Conv2d(case.shape[1], *case.arguments, bias=False)


def antialiased_convolution(case: Case, blur: str) -> nn.Module:
    return regfast.Conv2dAA(case.shape[1], *case.arguments, bias=False, blur=blur)


def timm_convolution(case: Case) -> nn.Module:
    """What timm's networks with an `aa_layer` do."""
    channels, kernel_size, stride, padding = case.arguments
    blur = load("timm").layers.BlurPool2d(channels, stride=stride)
    return nn.Sequential(nn.Conv2d(case.shape[1], channels, kernel_size, 1, padding, bias=False), blur)


def composer_convolution(case: Case) -> nn.Module:
    """Composer's surgery on the plain one: by its default the blur comes first."""
    blur = load("composer.algorithms.blurpool").BlurConv2d
    return blur.from_conv2d(plain_convolution(case))


class Network(nn.Module):
    """A classifier of images: in training where somebody differentiates, otherwise in evaluation."""

    def __init__(self, network: nn.Module, format: str) -> None:
        super().__init__()
        self.network = network.to(memory_format=FORMATS[format])

    def forward(self, x: Tensor) -> Tensor:
        if self.network.training != torch.is_grad_enabled():
            self.network.train(torch.is_grad_enabled())
        return self.network(x)


def network_of(make: Callable[[str], nn.Module]) -> Maker:
    """The network that `make` gives for the operation's name, from the same random numbers every time."""

    def make_network(case: Case) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Network(make(case.operation), case.format)

    return make_network


def timm_network(name: str, **arguments: Any) -> nn.Module:
    return load("timm").create_model(name, num_classes=CLASSES, **arguments)


def timm_blurred(name: str) -> nn.Module:
    return timm_network(name, aa_layer=load("timm").layers.BlurPool2d)


def timm_regfast(name: str) -> nn.Module:
    """timm's anti-aliased network with regfast's blur in the place of its own."""
    return timm_network(name, aa_layer=regfast.BlurPool2d)


def antialiased(name: str, blur: str) -> nn.Module:
    return regfast.antialias(timm_network(name), blur=blur)


def antialiased_cnns(name: str) -> nn.Module:
    return getattr(load("antialiased_cnns"), name)(num_classes=CLASSES)


def composer(name: str) -> nn.Module:
    """Composer's surgery with its own defaults: a blur comes before its convolution."""
    network = timm_network(name)
    load("composer.algorithms.blurpool").apply_blurpool(network)
    return network


def batch(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """Images, which nobody differentiates by."""
    return tuple(x.detach() for x in images(case, device))


def throughput() -> Operation:
    """A whole network. The baseline aliases; timm's blurs do not reach its shortcuts."""
    return Operation(
        function=None,
        contestants={
            "plain": network_of(timm_network),
            "regfast": network_of(partial(antialiased, blur="after")),
            "regfast before": network_of(partial(antialiased, blur="before")),
            "timm": network_of(timm_blurred),
            "timm with regfast's blur": network_of(timm_regfast),
            "antialiased-cnns": network_of(antialiased_cnns),
            "composer": network_of(composer),
            "regfast compiled": compiled_network(network_of(partial(antialiased, blur="after"))),
            "plain compiled": compiled_network(network_of(timm_network)),
        },
        arguments=[()],
        shapes={"cpu": [(4, 3, 96, 96)], "cuda": [(128, 3, 224, 224)], "toy": [(2, 3, 32, 32)]},
        inputs=batch,
        directions=("forward", "forward+backward"),
    )


NETWORKS = {
    "convolution": Operation(
        function=None,
        contestants={
            "nn.Conv2d": plain_convolution,
            "regfast": partial(antialiased_convolution, blur="after"),
            "regfast before": partial(antialiased_convolution, blur="before"),
            "timm": timm_convolution,
            "composer": composer_convolution,
            "regfast compiled": compiled(partial(antialiased_convolution, blur="after")),
            "regfast before compiled": compiled(partial(antialiased_convolution, blur="before")),
        },
        # Of a ResNet's stages.
        arguments=[(128, 3, 2, 1), (128, 1, 2, 0)],
        shapes={"cpu": [(4, 64, 56, 56)], "cuda": [(128, 128, 56, 56)], "toy": [(2, 8, 13, 12)]},
        inputs=images,
        directions=("forward", "forward+backward"),
    ),
    "resnet18": throughput(),
    "resnet50": throughput(),
}
