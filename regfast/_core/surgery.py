"""Shared by `antialias` and `fuse`: convert a layer, convert it back, and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

# Attributes of modules: the `Mark` of a converted one; the original layer of a replacement.
_MARK, _ORIGINAL = "_regfast_converted", "_regfast_original"


class ReportRow(NamedTuple):
    """A layer that decimates, what was done to it, and why."""

    name: str
    type: str
    done: str
    why: str


class Report(list[ReportRow]):
    """What `antialias` and `fuse` did to a model, or would do. It prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "nothing decimates"
        table = (ReportRow("name", "type", "done", "why"), *self)
        widths = [max(len(row[column]) for row in table) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row.why]).rstrip()
            for row in table
        ]
        kinds = Counter(_kind(row) for row in self)
        named = ("fused", "already blurred")
        counts = [f"{kinds[kind]} {kind}" for kind in named if kinds[kind]]
        counts = [f"{kinds['anti-aliased']} anti-aliased", *counts, f"{kinds['left']} left"]
        return "\n".join([*lines, ", ".join(counts)])


def _kind(row: ReportRow) -> str:
    if row.done in ("left", "already blurred"):
        return row.done
    return "fused" if row.done.startswith("fused") else "anti-aliased"


class Mark(NamedTuple):
    """What a converted module keeps of its conversion.

    `twin` is its class before and `into` its class after. `added` are the attributes that it
    gained, and `replaced` the old values of those that were overwritten. `done` and `why` are the
    words of the report; an empty `done` leaves them to another module. `on_load` is its hook on
    loading.
    """

    twin: type[nn.Module]
    into: type[nn.Module]
    added: tuple[str, ...]
    replaced: dict[str, Any]
    done: str
    why: str
    on_load: Callable[[Any, Any], None] | None


def mark_of(module: nn.Module) -> Mark | None:
    """Return the `Mark` of a converted module, else None."""
    return module.__dict__.get(_MARK)


def become(
    module: nn.Module,
    into: type[nn.Module],
    attributes: dict[str, Any],
    done: str = "",
    why: str = "",
    on_load: Callable[[Any, Any], None] | None = None,
) -> None:
    """Change a module's class to `into`, set these attributes, and mark the module.

    `on_load` is called after the module has loaded a state_dict, as a post hook of torch.nn.

    Raises:
        ValueError, TypeError: if the class refuses an argument. The module is then half
            converted; try a copy.
    """
    twin, before = type(module), dict(module.__dict__)
    # Bypass the layers' setters, which check one attribute at a time.
    object.__setattr__(module, "__class__", into)
    module.__dict__.update(attributes)
    make: Any = getattr(module, "_make_window", None)
    if make is not None:
        module.__dict__["_window"] = make()
    added = tuple(name for name in module.__dict__ if name not in before)
    # An attribute with an equal value stays the layer's own, and later surgery on it stays too.
    replaced = {
        name: before[name]
        for name, value in attributes.items()
        if name in before and before[name] != value
    }
    module.__dict__[_MARK] = Mark(twin, into, added, replaced, done, why, on_load)
    if on_load is not None:
        module.register_load_state_dict_post_hook(on_load)


def replace(container: nn.Module, key: str, replacement: nn.Module) -> None:
    """Put a stateless layer in the place of another; it keeps the original for `undo`."""
    original: Any = container._modules[key]
    # Not as a child: the original has no state and is no longer part of the model.
    replacement.__dict__[_ORIGINAL] = original
    container._modules[key] = replacement.train(original.training)


def undo(model: nn.Module) -> None:
    """Undo every `become` and `replace` in a model.

    Raises:
        ValueError: if a module has since become another class; nothing is undone then.
    """
    for name, module in model.named_modules():
        mark = mark_of(module)
        if mark is not None and type(module) is not mark.into:
            found = f"model.{name} is now a {type(module).__name__}"
            raise ValueError(f"{found}, not a {mark.into.__name__}: undo that first")
    for module in list(model.modules()):
        for key, child in list(module._modules.items()):
            if child is not None and _ORIGINAL in child.__dict__:
                module._modules[key] = child.__dict__[_ORIGINAL].train(child.training)
        mark = module.__dict__.pop(_MARK, None)
        if mark is not None:
            for name in mark.added:
                del module.__dict__[name]
            module.__dict__.update(mark.replaced)
            hooks = module._load_state_dict_post_hooks
            for number in [number for number, hook in hooks.items() if hook is mark.on_load]:
                del hooks[number]
            object.__setattr__(module, "__class__", mark.twin)


def own_sequentials(
    model: nn.Module,
) -> Iterator[tuple[nn.Sequential, list[tuple[str, nn.Module]]]]:
    """Yield each nn.Sequential of a model that runs its children in order, and the children."""
    for module in model.modules():
        if not isinstance(module, nn.Sequential) or "forward" in module.__dict__:
            continue
        if type(module).forward is nn.Sequential.forward:
            children = module._modules.items()
            yield module, [(key, child) for key, child in children if child is not None]


def use_counts(model: nn.Module) -> Counter[int]:
    """Count the places in a model of each module, by id."""
    return Counter(id(child) for parent in model.modules() for child in parent._modules.values())


def is_hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks, which a fused one would not call, or its own forward."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in module.__dict__


def check_model(model: Any) -> None:
    """Raise unless `model` is a module that is not wrapped, compiled or scripted.

    Raises:
        TypeError, ValueError: with the module's name and what to do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    wrappers = {"DistributedDataParallel", "DDP", "DataParallel", "FullyShardedDataParallel"}
    for name, module in model.named_modules():
        kinds = {base.__name__ for base in type(module).__mro__}
        where = f"model{'.' if name else ''}{name} is a {type(module).__name__}"
        if kinds & {*wrappers, "FSDPModule"}:
            hint = "convert a model before it is wrapped or sharded for several devices"
            raise ValueError(f"{where}: {hint}")
        if "OptimizedModule" in kinds or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{where} that is compiled: convert a model before torch.compile")
        if isinstance(module, torch.jit.ScriptModule):
            hint = "convert a model before it is scripted or traced"
            raise ValueError(f"{where} with fixed layers: {hint}")
