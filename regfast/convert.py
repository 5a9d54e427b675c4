"""A model that exists, anti-aliased in one line: and back."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from types import CodeType
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from ._core.checks import check_bool, per_axis
from .convolution import Conv1dAA, Conv2dAA, blur_layers, is_hooked
from .pooling import AvgPool1dAA, AvgPool2dAA, AvgPool3dAA, MaxPool1dAA, MaxPool2dAA, MaxPool3dAA

__all__ = ["Report", "ReportRow", "antialias", "antialias_report", "restore"]

_MAX_POOLS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MaxPool1d: MaxPool1dAA, nn.MaxPool2d: MaxPool2dAA, nn.MaxPool3d: MaxPool3dAA,
}  # fmt: skip
_AVG_POOLS: dict[type[nn.Module], type[nn.Module]] = {
    nn.AvgPool1d: AvgPool1dAA, nn.AvgPool2d: AvgPool2dAA, nn.AvgPool3d: AvgPool3dAA,
}  # fmt: skip
_CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv1d: Conv1dAA, nn.Conv2d: Conv2dAA}
_TWINS = _MAX_POOLS | _AVG_POOLS | _CONVOLUTIONS
_DECIMATING = (*_TWINS, nn.Conv3d)


def _blur_of(layer: type[nn.Module]) -> dict[str, Any]:
    """What a layer has beyond its twin, at its defaults: the arguments that it takes by keyword."""
    parameters = inspect.signature(layer).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


_ARGUMENTS: dict[type[nn.Module], dict[str, Any]] = {
    **dict.fromkeys(_MAX_POOLS.values(), _blur_of(MaxPool1dAA)),
    **dict.fromkeys(_AVG_POOLS.values(), _blur_of(AvgPool1dAA)),
    **dict.fromkeys(_CONVOLUTIONS.values(), _blur_of(Conv1dAA)),
}

# Element by element and without state: a blur may come after them.
_ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish,
    nn.PReLU, nn.RReLU, nn.ReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink,
    nn.Threshold,
)  # fmt: skip
_FUNCTIONS = {f"{name}_pool{rank}d" for name in ("max", "avg") for rank in (1, 2, 3)} | {"conv1d", "conv2d"}

# Attributes, beside a module's own: its `_Mark`; of what took an activation's place, that activation; of a model, the arguments.
_MARK, _ORIGINAL, _OPTIONS = "_regfast_converted", "_regfast_original", "_regfast_antialias"


class ReportRow(NamedTuple):
    """A layer that decimates: what became of it, and why."""

    name: str
    type: str
    done: str
    why: str


class Report(list[ReportRow]):
    """What `antialias` did to a model, or would do. Printed, a table."""

    def __str__(self) -> str:
        if not self:
            return "nothing decimates"
        header = ReportRow("name", "type", "done", "why")
        widths = [max(len(row[column]) for row in (header, *self)) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row.why]).rstrip() for row in (header, *self)
        ]
        left = sum(row.done == "left" for row in self)
        return "\n".join([*lines, f"{len(self) - left} anti-aliased, {left} left"])


class _Options(NamedTuple):
    """The arguments of `antialias`."""

    max_pool: bool = True
    conv: bool = True
    avg_pool: bool = True
    blur: Literal["after", "before"] = "after"
    min_channels: int = 16
    skip: tuple[str | type[nn.Module], ...] = ()


class _Step(NamedTuple):
    """A module to convert, and what the report says of it; where its blur comes after an activation, that one's place."""

    module: nn.Module
    attributes: dict[str, Any]
    done: str
    why: str
    place: tuple[nn.Sequential, str] | None = None


def antialias(
    model: nn.Module,
    *,
    max_pool: bool = True,
    conv: bool = True,
    avg_pool: bool = True,
    blur: Literal["after", "before"] = "after",
    min_channels: int = 16,
    skip: str | type[nn.Module] | Iterable[str | type[nn.Module]] = (),
) -> nn.Module:
    """Anti-aliases the layers of a model that decimate, in place: nn.MaxPool, nn.AvgPool, nn.Conv1d and nn.Conv2d with a stride.

    A module becomes its anti-aliased twin: it stays the same object, with its name, parameters, state_dict keys, hooks, dtype,
    device, memory format and flags, in every place where it is used. Where an nn.Sequential has a normalisation and an activation
    after a convolution, the blur comes after the activation, whose place it takes; elsewhere, right after the convolution.
    `antialias_report` says which, and what was left alone and why. `restore` undoes it. Converting twice is converting once.

    Args:
        model: a module; of any kind but wrapped for several processes, compiled or scripted. It may itself be a pooling layer.
        max_pool, conv, avg_pool: which layers.
        blur: "after" a convolution; or "before" it, at a quarter of the arithmetic with stride 2.
        min_channels: convolutions of fewer input channels, such as an image's, are left alone.
        skip: names of modules (patterns with * as well), with all that is in them, or types of modules.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: for an argument that is not allowed, and for a model that must be converted earlier; the message
            names it and what to do. The model is then untouched.

    Source: Zhang, "Making Convolutional Networks Shift-Invariant Again" (2019).

    Example:
        >>> model = regfast.antialias(torchvision.models.resnet50())
        >>> print(regfast.antialias_report(model))
    """
    _check_model(model)
    options = _check_options(model, max_pool, conv, avg_pool, blur, min_channels, skip)
    # All of it is planned before the first change.
    for _, step in list(_plan(model, options)):
        if step is not None:
            _convert(step)
    model.__dict__[_OPTIONS] = options
    return model


def antialias_report(model: nn.Module) -> Report:
    """What `antialias` did to a model and left alone; of a model that it has not seen, what it would do.

    Returns:
        A list of (name, type, done, why), a row a layer that decimates; printed, a table.
    """
    _check_model(model)
    options = model.__dict__.get(_OPTIONS)
    plan = _plan(model, options or _Options())
    if options is None:
        return Report(row for row, _ in plan)
    late = dict(done="left", why="it has come since: convert the model again")
    return Report(row if step is None else row._replace(**late) for row, step in plan)


def restore(model: nn.Module) -> nn.Module:
    """Undoes `antialias`, in place: layers are again what they were, with the parameters that they have now. Returns the model.

    Anti-aliased layers that `antialias` did not make stay.
    """
    _check_model(model)
    if _MARK in model.__dict__ and model.__dict__.get("blur", "after") is None:
        raise ValueError(f"the blur of model, a {type(model).__name__}, is in another layer: restore the nn.Sequential of both")
    for name, module in model.named_modules():
        mark = module.__dict__.get(_MARK)
        if mark is not None and type(module) is not _TWINS[mark.twin]:
            expected = _TWINS[mark.twin].__name__
            raise ValueError(f"model.{name} is a {type(module).__name__} by now, no {expected}: undo that first")
    for module in list(model.modules()):
        for key, child in list(module._modules.items()):
            if child is not None and _ORIGINAL in child.__dict__:
                module._modules[key] = child.__dict__[_ORIGINAL].train(child.training)
        if _MARK in module.__dict__:
            mark = module.__dict__.pop(_MARK)
            for name in mark.added:
                del module.__dict__[name]
            # Past the setters of layers.
            object.__setattr__(module, "__class__", mark.twin)
        module.__dict__.pop(_OPTIONS, None)
    return model


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    for name, module in model.named_modules():
        kinds = {base.__name__ for base in type(module).__mro__}
        where = f"model{'.' if name else ''}{name} is a {type(module).__name__}"
        if kinds & {"DistributedDataParallel", "DDP", "DataParallel", "FullyShardedDataParallel", "FSDPModule"}:
            raise ValueError(f"{where}: convert a model before it is wrapped or sharded for several devices")
        if "OptimizedModule" in kinds or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{where} that is compiled: convert a model before torch.compile")
        if "ScriptModule" in kinds:
            raise ValueError(f"{where}, whose layers are fixed: convert a model before it is scripted or traced")


def _check_options(
    model: nn.Module, max_pool: Any, conv: Any, avg_pool: Any, blur: Any, min_channels: Any, skip: Any
) -> _Options:
    for name, value in (("max_pool", max_pool), ("conv", conv), ("avg_pool", avg_pool)):
        check_bool(name, value)
    if blur not in ("after", "before"):
        raise ValueError(f"blur must be 'after' or 'before', got {blur!r}")
    (channels,) = per_axis("min_channels", min_channels, 1, 0)
    entries = tuple(skip) if isinstance(skip, Iterable) and not isinstance(skip, (str, type)) else (skip,)
    for entry in entries:
        if not isinstance(entry, str) and not (isinstance(entry, type) and issubclass(entry, nn.Module)):
            raise TypeError(f"skip must be names of modules or types of modules, got {entry!r}")
        if next(_matches(model, entry), None) is None:
            raise ValueError(f"skip: no module of the model is {entry!r}")
    return _Options(max_pool, conv, avg_pool, blur, channels, entries)


def _matches(model: nn.Module, entry: str | type[nn.Module]) -> Iterator[nn.Module]:
    """The modules that an entry of `skip` stands for, and all that is in them."""
    for name, module in model.named_modules(remove_duplicate=False):
        if name == entry or fnmatchcase(name, entry) if isinstance(entry, str) else isinstance(module, entry):
            yield from module.modules()


class _Mark(NamedTuple):
    """What a converted module keeps of its conversion: its class before, the attributes it was given, and the report's words."""

    twin: type[nn.Module]
    added: tuple[str, ...]
    done: str
    why: str


def _plan(model: nn.Module, options: _Options) -> Iterator[tuple[ReportRow, _Step | None]]:
    """A row for each layer that decimates or may, and what to do about it, if anything."""
    skipped = {id(module) for entry in options.skip for module in _matches(model, entry)}
    uses = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    places = dict(_activations(model))
    for name, module in model.named_modules():
        row = ReportRow(name or "(the model)", type(module).__name__, "left", "")
        if _MARK in module.__dict__:
            mark = module.__dict__[_MARK]
            yield row._replace(done=mark.done, why=mark.why), None
        elif type(module) in _ARGUMENTS:
            yield row._replace(why="it was anti-aliased already"), None
        elif isinstance(module, _DECIMATING):
            if any(s > 1 for s in _stride(module)):
                reason = "it is among those to skip" if id(module) in skipped else _obstacle(module, options)
                if reason is not None:
                    yield row._replace(why=reason), None
                else:
                    step = _step(module, options, places.get(id(module)), uses[id(module)] > 1, skipped)
                    yield row._replace(done=step.done, why=step.why), step
        else:
            called = _functional_calls(module)
            if called:
                yield row._replace(why=f"its forward calls {', '.join(called)}, which is no layer"), None


def _stride(module: Any) -> tuple[int, ...]:
    stride = module.kernel_size if module.stride is None else module.stride
    return tuple(stride) if isinstance(stride, Sequence) else (stride,)


def _obstacle(module: Any, options: _Options) -> str | None:
    """Why a layer that decimates is to be left alone, or None."""
    if isinstance(module, LazyModuleMixin):
        return "it is lazy: run the model once before"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrised"
    if type(module) is nn.Conv3d:
        return "there is no anti-aliased nn.Conv3d"
    if type(module) not in _TWINS:
        return "it is a subclass, which may compute another function"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    for kinds, name in ((_MAX_POOLS, "max_pool"), (_AVG_POOLS, "avg_pool"), (_CONVOLUTIONS, "conv")):
        if type(module) in kinds and not getattr(options, name):
            return f"{name}=False"
    if getattr(module, "return_indices", False):
        return "it returns indices, and a blurred maximum has none"
    if isinstance(module, nn.modules.conv._ConvNd) and module.in_channels < options.min_channels:
        return f"it has {module.in_channels} input channels, fewer than min_channels={options.min_channels}"
    if isinstance(module, nn.modules.conv._ConvNd) and not module.weight.is_floating_point():
        return f"its numbers are {module.weight.dtype}, which no blur takes"
    attributes = _ARGUMENTS[_TWINS[type(module)]]
    own = [name for name in attributes if hasattr(module, name)]
    if own:
        return f"it has an attribute {own[0]!r} of its own"
    try:
        _swap(copy.copy(module), attributes)
    except (ValueError, TypeError) as error:
        return f"it cannot be: {error}"
    return None


def _step(module: Any, options: _Options, place: tuple[nn.Sequential, str] | None, shared: bool, skipped: set[int]) -> _Step:
    """How to convert a layer, which `shared` is used in several places."""
    twin = _TWINS[type(module)]
    attributes = dict(_ARGUMENTS[twin])
    if type(module) in _MAX_POOLS:
        return _Step(module, attributes, "max-blur pool", "")
    if type(module) in _AVG_POOLS:
        return _Step(module, attributes, "blur and average", "")
    if options.blur == "before":
        return _Step(module, attributes | {"blur": "before"}, "blur before convolution", "")
    reason = "it is used in several places" if shared else _not_after_activation(place, skipped)
    if place is not None and reason is None:
        return _Step(module, attributes | {"blur": None}, "blur after activation", f"in the place of {place[1]}", place)
    trial: Any = copy.copy(module)
    _swap(trial, attributes)
    if trial._commutes():
        return _Step(module, attributes, "blur before convolution", "of one pixel, that is the same function")
    return _Step(module, attributes, "blur after convolution", reason or "")


def _not_after_activation(place: tuple[nn.Sequential, str] | None, skipped: set[int]) -> str | None:
    """Why a blur cannot come after an activation, or None."""
    if place is None:
        return "no activation follows it in an nn.Sequential"
    container, key = place
    activation: Any = container._modules[key]
    if [*activation.parameters(), *activation.buffers()]:
        return f"the activation after it, {key}, has parameters"
    if id(activation) in skipped:
        return f"the activation after it, {key}, is among those to skip"
    if is_hooked(activation):
        return f"the activation after it, {key}, has hooks or a forward of its own"
    return None


def _activations(model: nn.Module) -> Iterator[tuple[int, tuple[nn.Sequential, str]]]:
    """Of each convolution that an activation follows in an nn.Sequential, behind a normalisation or not: that one's place."""
    for container in model.modules():
        if not isinstance(container, nn.Sequential) or type(container).forward is not nn.Sequential.forward:
            continue
        if "forward" in container.__dict__:
            continue
        children = list(container._modules.items())
        for at, (_, child) in enumerate(children):
            if isinstance(child, nn.modules.conv._ConvNd):
                rest = children[at + 1 : at + 3]
                if rest and _is_normalisation(rest[0][1]):
                    rest = rest[1:]
                if rest and isinstance(rest[0][1], _ACTIVATIONS):
                    yield id(child), (container, rest[0][0])


def _is_normalisation(module: Any) -> bool:
    """Whether it is one, of images of any size: nn.LayerNorm counts the elements of the last axes."""
    fixed = (nn.LayerNorm.forward, nn.RMSNorm.forward)
    named = "Norm" in type(module).__name__ and not isinstance(module, nn.modules.conv._ConvNd)
    return named and type(module).forward not in fixed


def _functional_calls(module: nn.Module) -> list[str]:
    """The functions that decimate and that a module's forward and the methods it calls name, as far as that can be seen."""
    kind = type(module)
    if kind.__module__.startswith(("torch.nn.", "regfast.")):
        return []
    codes = _codes(kind.forward)
    for code in codes:  # which grows
        called = [*code.co_consts, *(getattr(kind, name, None) for name in code.co_names)]
        codes += [found for item in called for found in _codes(item) if found not in codes]
    names = dict.fromkeys(name for code in codes for name in code.co_names)
    return [name for name in names if name in _FUNCTIONS and not hasattr(module, name)]


def _codes(item: Any) -> list[CodeType]:
    """The code of a function or a method, or what is code itself: one, or none."""
    code = item if inspect.iscode(item) else getattr(inspect.unwrap(item), "__code__", None)
    return [code] if inspect.iscode(code) else []


def _swap(module: Any, attributes: dict[str, Any]) -> tuple[type[nn.Module], tuple[str, ...]]:
    """Makes a module its anti-aliased twin. Its class before, and the attributes it has got."""
    twin, before = type(module), set(module.__dict__)
    object.__setattr__(module, "__class__", _TWINS[twin])
    for name, value in attributes.items():
        setattr(module, name, value)
    return twin, tuple(name for name in module.__dict__ if name not in before)


def _convert(step: _Step) -> None:
    module: Any = step.module
    twin, added = _swap(module, step.attributes)
    module.__dict__[_MARK] = _Mark(twin, added, step.done, step.why)
    if step.place is not None:
        container, key = step.place
        activation: Any = container._modules[key]
        layers = blur_layers([activation], module._window)
        replacement = (layers[0] if len(layers) == 1 else nn.Sequential(*layers)).train(activation.training)
        # Not as a child: it has no state, and is no part of the model now.
        replacement.__dict__[_ORIGINAL] = activation
        container._modules[key] = replacement
