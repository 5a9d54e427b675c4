"""The plan of `antialias` and its report, layer by layer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from ._core.geometry import BlurPaddingMode
from ._core.known import (
    ACTIVATIONS,
    functional_calls,
    is_norm_act,
    is_normalisation,
    is_patch_embedding,
    otherwise_decimating,
    stride_of,
)
from ._core.peers import origin_of
from ._core.surgery import ReportRow, become, is_hooked, mark_of, own_sequentials, use_counts
from .convolution import FOLLOWER, Conv1dAA, Conv2dAA
from .fusion import fusions, is_blur
from .pooling import (
    AvgPool1dAA,
    AvgPool2dAA,
    AvgPool3dAA,
    MaxPool1dAA,
    MaxPool2dAA,
    MaxPool3dAA,
)

# A converted model holds its `Options` under this attribute.
OPTIONS = "_regfast_antialias"

_Twins = dict[type[nn.Module], type[nn.Module]]
_MAX_POOLS: _Twins = {
    nn.MaxPool1d: MaxPool1dAA, nn.MaxPool2d: MaxPool2dAA, nn.MaxPool3d: MaxPool3dAA,
}  # fmt: skip
_AVG_POOLS: _Twins = {
    nn.AvgPool1d: AvgPool1dAA, nn.AvgPool2d: AvgPool2dAA, nn.AvgPool3d: AvgPool3dAA,
}  # fmt: skip
_CONVOLUTIONS: _Twins = {nn.Conv1d: Conv1dAA, nn.Conv2d: Conv2dAA}
_TWINS = _MAX_POOLS | _AVG_POOLS | _CONVOLUTIONS
_DECIMATING = (*_TWINS, nn.Conv3d)


class Options(NamedTuple):
    """The arguments of `antialias`."""

    max_pool: bool = True
    conv: bool = True
    avg_pool: bool = True
    blur: Literal["after", "before"] = "after"
    min_channels: int = 16
    skip: tuple[str | type[nn.Module], ...] = ()
    blur_size: int | None = None
    filter: Any = "binomial"
    padding_mode: BlurPaddingMode | None = None

    def attributes(self, twin: type[nn.Module]) -> dict[str, Any]:
        """Return the keyword arguments that an anti-aliased layer has beyond its plain twin."""
        own = dict(_DEFAULTS[twin])
        prefix = "blur_" if "blur_filter" in own else ""
        own |= {"blur_size": self.blur_size, f"{prefix}filter": self.filter}
        if self.padding_mode is not None:
            own[f"{prefix}padding_mode"] = self.padding_mode
        return own

    def why(self, reason: str) -> str:
        """Return the report's reason for a blur: the given one, and what the caller chose."""
        names = ("blur_size", "filter", "padding_mode")
        values = {name: getattr(self, name) for name in names}
        chosen = [f"{n}={v!r}" for n, v in values.items() if v != self._field_defaults[n]]
        return "; ".join(filter(None, [reason, ", ".join(chosen)]))


class Step(NamedTuple):
    """A module to convert, and the report's words on it.

    If its blur comes after an activation, `place` is the activation's place.
    """

    module: nn.Module
    attributes: dict[str, Any]
    done: str
    why: str
    place: tuple[nn.Module, str] | None = None


class _Place(NamedTuple):
    """The place of an activation that a blur may follow; `name` is its name in the report."""

    container: nn.Module
    key: str
    name: str


def twin_of(module: nn.Module) -> type[nn.Module]:
    """Return the anti-aliased class of a layer."""
    return _TWINS[type(module)]


def matches(model: nn.Module, entry: str | type[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules that an entry of `skip` selects, and all modules in them."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(entry, str):
            found = name == entry or fnmatchcase(name, entry)
        else:
            found = isinstance(module, entry)
        if found:
            yield from module.modules()


def plan(model: nn.Module, options: Options) -> Iterator[tuple[ReportRow, Step | None]]:
    """Yield a row for each layer that decimates or may, and the step that converts it, if any."""
    skipped = {id(module) for entry in options.skip for module in matches(model, entry)}
    uses, places, blurred = use_counts(model), dict(_places(model)), dict(_blurred(model))
    peers = fusions(model)
    for name, module in model.named_modules():
        row = ReportRow(name or "(the model)", type(module).__name__, "left", "")
        mark = mark_of(module)
        if mark is not None:
            if mark.done:
                yield row._replace(done=mark.done, why=mark.why), None
        elif isinstance(module, tuple(_TWINS.values())):
            yield row._replace(done="already blurred", why="it is regfast's own"), None
        elif id(module) in peers:
            yield row._replace(done="already blurred", why=peers[id(module)].why), None
        elif not isinstance(module, _DECIMATING):
            reason = otherwise_decimating(module) or functional_calls(module)
            if reason:
                yield row._replace(why=reason), None
        elif any(s > 1 for s in stride_of(module)):
            reason = "it is in `skip`" if id(module) in skipped else None
            reason = reason or _obstacle(module, options)
            if reason:
                yield row._replace(why=reason), None
            elif id(module) in blurred:
                yield row._replace(done="already blurred", why=blurred[id(module)]), None
            else:
                shared = uses[id(module)] > 1
                step = _step(module, options, places.get(id(module)), shared, skipped)
                yield row._replace(done=step.done, why=step.why), step


def _obstacle(module: Any, options: Options) -> str | None:
    """Return why a layer that decimates is left alone, or None."""
    if isinstance(module, LazyModuleMixin):
        return "it is lazy: run the model once first"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrised"
    if type(module) is nn.Conv3d:
        return "there is no anti-aliased nn.Conv3d"
    if type(module) not in _TWINS:
        return "it is a subclass, which may compute another function"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    for kinds, name in (
        (_MAX_POOLS, "max_pool"), (_AVG_POOLS, "avg_pool"), (_CONVOLUTIONS, "conv"),
    ):  # fmt: skip
        if type(module) in kinds and not getattr(options, name):
            return f"{name}=False"
    if getattr(module, "return_indices", False):
        return "it returns indices, and a blurred maximum has none"
    reason = _convolution_obstacle(module, options) if type(module) in _CONVOLUTIONS else None
    if reason:
        return reason
    attributes = options.attributes(twin_of(module))
    own = [name for name in attributes if hasattr(module, name)]
    if own:
        return f"it has an attribute {own[0]!r} of its own"
    try:
        become(copy.copy(module), twin_of(module), attributes)
    except (ValueError, TypeError) as error:
        return f"it cannot be converted: {error}"
    return None


def _convolution_obstacle(module: Any, options: Options) -> str | None:
    if is_patch_embedding(module, options.min_channels):
        patches = " x ".join(map(str, module.kernel_size))
        return f"it embeds patches of {patches} that do not overlap"
    if module.in_channels < options.min_channels:
        found = f"it has {module.in_channels} input channels"
        return f"{found}, fewer than min_channels={options.min_channels}"
    if not module.weight.is_floating_point():
        return f"no blur takes its dtype, {module.weight.dtype}"
    return None


def _step(
    module: Any, options: Options, place: _Place | None, shared: bool, skipped: set[int]
) -> Step:
    """Return how to convert a layer; `shared` tells that several places use it."""
    attributes = options.attributes(twin_of(module))

    def step(done: str, reason: str = "", place: Any = None, **changed: Any) -> Step:
        return Step(module, attributes | changed, done, options.why(reason), place)

    if type(module) in _MAX_POOLS:
        return step("max-blur pool")
    if type(module) in _AVG_POOLS:
        return step("blur and average")
    if options.blur == "before":
        return step("blur before convolution", blur="before")
    reason = "it is used in several places" if shared else _not_after_activation(place, skipped)
    if place is not None and reason is None:
        where = f"in the place of {place.name}"
        own = {"blur": None, FOLLOWER: None}
        return step("blur after activation", where, (place.container, place.key), **own)
    trial: Any = copy.copy(module)
    become(trial, twin_of(module), attributes)
    if trial._commutes():
        return step(
            "blur before convolution", "for a pointwise convolution, that is the same function"
        )
    return step("blur after convolution", reason or "")


def _not_after_activation(place: _Place | None, skipped: set[int]) -> str | None:
    """Return why a blur cannot come after an activation, or None."""
    if place is None:
        return "no activation follows it in an nn.Sequential"
    activation: Any = place.container._modules[place.key]
    found = f"the activation after it, {place.name},"
    if [*activation.parameters(), *activation.buffers()]:
        return f"{found} has parameters"
    if id(activation) in skipped:
        return f"{found} is in `skip`"
    if is_hooked(activation):
        return f"{found} has hooks or a forward of its own"
    return None


def _places(model: nn.Module) -> Iterator[tuple[int, _Place]]:
    """Yield the place of the activation that follows each convolution in an nn.Sequential.

    A normalisation may stand between the two, or may itself end with the activation.
    """
    uses = use_counts(model)
    for container, children in own_sequentials(model):
        for at, (_, child) in enumerate(children):
            rest = children[at + 1 : at + 3]
            if not rest or not isinstance(child, nn.modules.conv._ConvNd):
                continue
            key, follower = rest[0]
            inner = follower._modules.get("act") if is_norm_act(follower) else None
            if isinstance(inner, ACTIVATIONS) and uses[id(follower)] == 1:
                yield id(child), _Place(follower, "act", f"{key}.act")
                continue
            if is_normalisation(follower) and len(rest) > 1:
                key, follower = rest[1]
            if isinstance(follower, ACTIVATIONS):
                yield id(child), _Place(container, key, key)


def _blurred(model: nn.Module) -> Iterator[tuple[int, str]]:
    """Yield each layer that is already blurred, and by which blur.

    In an nn.Sequential a blur follows the layer, or a blur of stride 1 precedes it. Only
    normalisations and activations may stand between a layer and the blur after it. A convolution
    inside another library's blur is blurred too.
    """
    for module in model.modules():
        origin = origin_of(module)
        if origin is not None:
            yield from ((id(child), f"by {origin}") for child in module._modules.values())
    for _, children in own_sequentials(model):
        for at, (_, child) in enumerate(children):
            if at and is_blur(children[at - 1][1]):
                key, blur = children[at - 1]
                if all(s == 1 for s in stride_of(blur)):
                    yield id(child), f"by {key}, a blur before it"
            for key, other in children[at + 1 :]:
                if is_blur(other):
                    yield id(child), f"by {key}, a blur after it"
                if not is_normalisation(other) and not isinstance(other, _BETWEEN):
                    break


_BETWEEN = (*ACTIVATIONS, nn.Identity)


def _by_keyword(layer: type[nn.Module]) -> dict[str, Any]:
    parameters = inspect.signature(layer).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


_DEFAULTS: dict[type[nn.Module], dict[str, Any]] = {
    **dict.fromkeys(_MAX_POOLS.values(), _by_keyword(MaxPool1dAA)),
    **dict.fromkeys(_AVG_POOLS.values(), _by_keyword(AvgPool1dAA)),
    **dict.fromkeys(_CONVOLUTIONS.values(), _by_keyword(Conv1dAA)),
}
