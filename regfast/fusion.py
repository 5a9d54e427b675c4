"""Run a model that is already anti-aliased on regfast's layers."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from ._core.checks import per_axis
from ._core.dispatch import backend
from ._core.geometry import RATIO
from ._core.known import stride_of
from ._core.peers import PeerBlur, Taps, is_plain_blur, origin_of, read, read_taps, same_pads
from ._core.surgery import become, check_model, is_hooked, own_sequentials, replace, use_counts
from ._core.taps import binomial
from .convolution import Conv2dAA
from .pooling import BlurPool1d, BlurPool2d, BlurPool3d, MaxPool1dAA, MaxPool2dAA

__all__ = ["fuse"]

# A fused model has this attribute.
FUSED = "_regfast_fused"
_BLURS: dict[int, type[nn.Module]] = {1: BlurPool1d, 2: BlurPool2d}
_MAX_POOLS: dict[int, tuple[type[nn.Module], type[nn.Module]]] = {
    1: (nn.MaxPool1d, MaxPool1dAA),
    2: (nn.MaxPool2d, MaxPool2dAA),
}


def fuse(model: nn.Module) -> nn.Module:
    """Replace other libraries' blurs in a model by regfast's layers, in place.

    These are timm's `BlurPool2d`, antialiased-cnns' `BlurPool` and `BlurPool1D`, kornia's
    `BlurPool2D` and `MaxBlurPool2D`, and Composer's `BlurPool2d`, `BlurMaxPool2d` and `BlurConv2d`.
    A blur becomes a `regfast.BlurPool2d` with its taps and its border. A maximum with a blur
    becomes a `regfast.MaxPool2dAA`, also where an nn.MaxPool2d of stride 1 precedes the blur in an
    nn.Sequential. An nn.ReLU before either is folded in. A folded layer leaves an nn.Identity.

    The model computes the same function. Layers stay the same objects with their names, parameters,
    buffers, state_dict keys and hooks. A checkpoint of either model loads strictly into the other,
    and a blur then takes the checkpoint's taps. `antialias_report` lists what became of each layer
    and why. `restore` undoes the fusion. A second call changes nothing.

    Args:
        model: a module. It must not be compiled, scripted or wrapped for several processes.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: if the model is not such a module. Later, load_state_dict raises a
            ValueError for a checkpoint with a blur that no regfast layer computes.

    Example:
        >>> model = regfast.fuse(timm.create_model("resnetblur50", pretrained=True))
        >>> print(regfast.antialias_report(model))
    """
    check_model(model)
    for fusion in list(fusions(model).values()):
        if not fusion.obstacle:
            _apply(fusion)
    model.__dict__[FUSED] = True
    return model


class Fusion(NamedTuple):
    """What a blur of another library becomes, or the obstacle to its fusion.

    If `into` is Conv2dAA, the layer's own convolution becomes one. `folded` holds the places of the
    preceding layers that the fused layer takes in.
    """

    layer: nn.Module
    origin: str
    into: type[nn.Module]
    attributes: dict[str, Any]
    folded: tuple[tuple[nn.Module, str], ...] = ()
    obstacle: str = ""

    @property
    def why(self) -> str:
        """The report's reason for a layer that is not fused."""
        told = f"regfast.fuse leaves it: {self.obstacle}" if self.obstacle else "see regfast.fuse"
        return f"by {self.origin}; {told}"


def fusions(model: nn.Module) -> dict[int, Fusion]:
    """Return a `Fusion` for each blur of another library in a model, by the blur's id."""
    found = {}
    for module in model.modules():
        origin = origin_of(module)
        if origin is not None:
            found[id(module)] = _fusion(module, origin)
    uses = use_counts(model)
    for container, children in own_sequentials(model):
        for at, (_, child) in enumerate(children):
            fusion = found.get(id(child))
            if fusion is None or fusion.obstacle:
                continue
            # A hook must see the input that it saw before the fusion.
            if uses[id(child)] == 1 and not is_hooked(child):
                found[id(child)] = _folded(fusion, container, children[:at])
    return found


def is_blur(module: nn.Module) -> bool:
    """Return whether a module is a blur and nothing else, regfast's or another library's."""
    return isinstance(module, (BlurPool1d, BlurPool2d, BlurPool3d)) or is_plain_blur(module)


def _fusion(layer: nn.Module, origin: str) -> Fusion:
    """Return how a layer is fused by itself."""
    fusion = Fusion(layer, origin, type(layer), {})
    try:
        taps, blurs = read(layer)
        for blur in blurs:
            into, attributes = _layer_of(blur, taps)
            if _agrees(layer, into(**attributes), len(taps)):
                if hasattr(layer, "conv"):
                    into, attributes = Conv2dAA, _convolution(layer, blur, attributes)
                return fusion._replace(into=into, attributes=attributes)
    except (RuntimeError, TypeError, ValueError) as error:
        return fusion._replace(obstacle=str(error))
    return fusion._replace(obstacle="in this version it computes another function")


def _layer_of(blur: PeerBlur, taps: Taps) -> tuple[type[nn.Module], dict[str, Any]]:
    """Return the regfast layer that computes a blur, and its arguments.

    Raises:
        ValueError: if the layer does not have the blur's border.
    """
    sizes, rank = tuple(map(len, taps)), len(taps)
    filter = _filter(taps)
    modes: dict[str, Any] = dict(filter=filter, padding_mode=blur.padding_mode, activation=None)
    if blur.pads == same_pads(sizes):
        padding: Any = "same"
    elif all(before == after for before, after in blur.pads):
        padding = tuple(before for before, _ in blur.pads)
    else:
        raise ValueError(f"no regfast layer has its border, {blur.pads}")
    attributes = dict(kernel_size=sizes, stride=blur.stride, padding=padding, **modes)
    if blur.pool is None:
        return _BLURS[rank], attributes
    if padding != "same":
        raise ValueError(f"no regfast layer has its border after a maximum, {blur.pads}")
    return _MAX_POOLS[rank][1], _with_maximum(attributes, blur.pool)


def _filter(taps: Taps) -> Any:
    """Return taps as a layer's argument: their name, or the taps if they have none."""
    named = (binomial(len(axis)) for axis in taps)
    pairs = ((tap, other) for axis, row in zip(taps, named) for tap, other in zip(axis, row))
    return "binomial" if all(abs(tap - other) < 1e-6 for tap, other in pairs) else taps


def _with_maximum(attributes: dict[str, Any], pool: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an anti-aliased max pooling from those of its blur and maximum."""
    # At stride 1 ceil_mode changes nothing, and the blur does not take it.
    rest: dict[str, Any] = dict(return_indices=False, ceil_mode=False, ratio=RATIO)
    return attributes | rest | pool | dict(blur_size=attributes["kernel_size"])


def _convolution(layer: Any, blur: PeerBlur, attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes that make the convolution of Composer's BlurConv2d do all its work."""
    convolution, first = layer.conv, layer.blur_first
    if type(convolution) is not nn.Conv2d or is_hooked(convolution):
        raise ValueError("its convolution has hooks or is no nn.Conv2d")
    blurs, own = (per_axis("stride", s, 2, 1) for s in (blur.stride, convolution.stride))
    if (blurs if first else own) != (1, 1):
        raise ValueError(f"its blur and its convolution both have a stride, {blurs} and {own}")
    return dict(
        stride=own if first else blurs, blur="before" if first else "after",
        blur_size=attributes["kernel_size"], blur_filter=attributes["filter"],
        blur_padding_mode=attributes["padding_mode"], activation=None,
    )  # fmt: skip


def _agrees(layer: Any, ours: nn.Module, rank: int) -> bool:
    """Return whether two layers agree on an image of odd and even sides, without a convolution.

    Versions differ, and the installed one may be newer than this code.
    """
    theirs = copy.copy(layer)
    own = layer._buffers.items()
    buffers = {key: value.detach().to("cpu", torch.float32) for key, value in own}
    theirs.__dict__["_buffers"] = buffers
    if hasattr(layer, "conv"):
        theirs.__dict__["_modules"] = {"conv": nn.Identity()}
    (filters,) = buffers.values()
    channels = filters.shape[0] if filters.ndim == rank + 2 else 2
    side, draw = 16 + 2 * max(filters.shape[-rank:]), torch.Generator().manual_seed(0)
    image = torch.randn(1, channels, *(side + 1, side)[:rank], generator=draw, device="cpu")
    with torch.no_grad(), backend("reference"):
        expected, found = type(layer).forward(theirs, image), ours(image)
    # The outputs are float32 sums of some tens of products of order one.
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=1e-5)


def _folded(fusion: Fusion, container: nn.Module, before: list[tuple[str, nn.Module]]) -> Fusion:
    """Return a fusion that also takes in a maximum and a ReLU before its layer in a container."""
    into, attributes, taken = fusion.into, fusion.attributes, 0
    rank = next((rank for rank, blur in _BLURS.items() if blur is into), None)
    if rank is not None and before and _is_maximum(before[-1][1], _MAX_POOLS[rank][0]):
        pool: Any = before[-1][1]
        if attributes["padding"] == "same":
            own = dict(kernel_size=pool.kernel_size, padding=pool.padding, dilation=pool.dilation)
            into, attributes = _MAX_POOLS[rank][1], _with_maximum(attributes, own)
            taken = 1
    if into is not Conv2dAA and len(before) > taken and _is_relu(before, -1 - taken):
        attributes, taken = attributes | {"activation": "relu"}, taken + 1
    try:
        into(**attributes)
    except (TypeError, ValueError):
        return fusion
    folded = tuple((container, key) for key, _ in before[len(before) - taken :])
    return fusion._replace(into=into, attributes=attributes, folded=folded)


def _is_maximum(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module is an nn.MaxPool of stride 1 that may be folded."""
    if type(module) is not kind or is_hooked(module) or module.return_indices:
        return False
    return all(s == 1 for s in stride_of(module))


def _is_relu(before: list[tuple[str, nn.Module]], at: int) -> bool:
    """Return whether the module at that place is an nn.ReLU that may be folded."""
    module = before[at][1]
    if type(module) is not nn.ReLU or is_hooked(module):
        return False
    # An in-place ReLU that comes first changes a tensor that other code may read.
    return not module.inplace or len(before) + at > 0


def _apply(fusion: Fusion) -> None:
    layer: Any = fusion.layer
    for container, key in fusion.folded:
        replace(container, key, nn.Identity())
    names = [key for _, key in fusion.folded]
    why = fusion.origin + (f", with {' and '.join(names)} before it" if names else "")
    if fusion.into is Conv2dAA:
        become(layer.conv, Conv2dAA, fusion.attributes)
        become(layer, nn.Sequential, {}, "fused convolution", why, _read_again)
    else:
        done = "fused blur" if fusion.into in _BLURS.values() else "fused max-blur pool"
        become(layer, fusion.into, fusion.attributes, done, why, _read_again)


def _read_again(module: Any, keys: Any) -> None:
    """Set a fused layer's taps to those of the checkpoint that it has just loaded."""
    ((name, buffer),) = module._buffers.items()
    if name in module._non_persistent_buffers_set or buffer.is_meta:
        return
    convolution = module._modules.get("conv")
    layer, argument = (convolution, "blur_filter") if convolution else (module, "filter")
    try:
        setattr(layer, argument, _filter(read_taps(module, layer.rank)))
    except ValueError as error:
        told = "regfast.restore the model before it is loaded"
        found = f"no regfast layer computes a blur of the checkpoint: {error}"
        raise ValueError(f"{found}; {told}") from error
