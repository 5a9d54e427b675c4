"""The chapter's networks, and those of timm and torchvision by name."""

from __future__ import annotations

from libraries import load
from torch import nn

import regfast


def cnn(channels: int, classes: int, width: int) -> nn.Sequential:
    """The chapter's CNN: six convolutions, with a pooling after every second one."""
    layers: list[nn.Module] = []
    for out in (width, 2 * width, 4 * width):
        for _ in range(2):
            layers += [
                nn.Conv2d(channels, out, 3, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
            channels = out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


def resnet(
    channels: int, classes: int, width: int, rezero: bool, blocks: int = 28
) -> nn.Sequential:
    """The chapter's residual network: 28 blocks of two convolutions, in three stages.

    A pooling follows the first stage, and another the second.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    channels = width
    for block in range(blocks):
        stage = 3 * block // blocks
        layers.append(regfast.ResidualBlock(channels, width << stage, ReZero=rezero))
        channels = width << stage
        if stage < 2 and 3 * (block + 1) // blocks > stage:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


def make(
    name: str,
    channels: int,
    classes: int,
    *,
    width: int = 32,
    rezero: bool = False,
    antialias: bool = False,
) -> nn.Module:
    """Make a network by name: "cnn", "resnet", "timm:NAME" or "torchvision:NAME".

    `width` is the channels of the first convolution of "cnn" and "resnet". `antialias` converts the
    network.

    Raises:
        ValueError: if the name is unknown, or `rezero` is set for a network other than "resnet".
        ImportError: if a library does not import.
    """
    library, _, kind = name.partition(":")
    if rezero and name != "resnet":
        raise ValueError(f"--rezero is of --model resnet, got --model {name}")
    if name == "cnn":
        model: nn.Module = cnn(channels, classes, width)
    elif name == "resnet":
        model = resnet(channels, classes, width, rezero)
    elif library in ("timm", "torchvision") and kind:
        model = _of_library(library, kind, channels, classes)
    else:
        raise ValueError(
            f"--model must be cnn, resnet, timm:NAME or torchvision:NAME, got {name!r}"
        )
    return regfast.antialias(model) if antialias else model


def _of_library(library: str, kind: str, channels: int, classes: int) -> nn.Module:
    module, name = load(library), f"--model {library}:{kind}"
    if library == "timm":
        try:
            return module.create_model(kind, num_classes=classes, in_chans=channels)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{name}: timm makes no such model: {error}") from error
    # Only classifiers: a detector would download the weights of its backbone.
    if kind not in module.models.list_models(module.models):
        raise ValueError(f"{name}: torchvision has no such classifier")
    if channels != 3:
        raise ValueError(
            f"{name}: torchvision's models take images of 3 channels, and these have {channels}"
        )
    return module.models.get_model(kind, num_classes=classes)
