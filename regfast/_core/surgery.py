"""What `antialias` and `fuse` share: how a layer becomes another and back, and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

# Attributes, beside a module's own: its `Mark`; of what took a layer's place, that layer.
_MARK, _ORIGINAL = "_regfast_converted", "_regfast_original"


class ReportRow(NamedTuple):
    """A layer that decimates: what became of it, and why."""

    name: str
    type: str
    done: str
    why: str


class Report(list[ReportRow]):
    """What `antialias` and `fuse` did to a model, or would do. Printed, a table."""

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

    Its class before and after, the attributes that it was given, those that were written over, the
    report's words (where `done` is empty, another module has them), and its hook on loading.
    """

    twin: type[nn.Module]
    into: type[nn.Module]
    added: tuple[str, ...]
    replaced: dict[str, Any]
    done: str
    why: str
    on_load: Callable[[Any, Any], None] | None


def mark_of(module: nn.Module) -> Mark | None:
    """The `Mark` of a converted module; None of another."""
    return module.__dict__.get(_MARK)


def become(
    module: nn.Module,
    into: type[nn.Module],
    attributes: dict[str, Any],
    done: str = "",
    why: str = "",
    on_load: Callable[[Any, Any], None] | None = None,
) -> None:
    """Makes a module one of another class, with these attributes beside its own, and marks it.

    `on_load` is called after the module has loaded a state_dict, as a post hook of torch.nn's.

    Raises:
        ValueError, TypeError: for what the class refuses. The module is then neither; try a copy.
    """
    twin, before = type(module), dict(module.__dict__)
    # Past the setters of layers, which check one attribute at a time.
    object.__setattr__(module, "__class__", into)
    module.__dict__.update(attributes)
    make: Any = getattr(module, "_make_window", None)
    if make is not None:
        module.__dict__["_window"] = make()
    added = tuple(name for name in module.__dict__ if name not in before)
    # What was the same before is the layer's own still, and what surgery makes of it is to stay.
    replaced = {
        name: before[name]
        for name, value in attributes.items()
        if name in before and before[name] != value
    }
    module.__dict__[_MARK] = Mark(twin, into, added, replaced, done, why, on_load)
    if on_load is not None:
        module.register_load_state_dict_post_hook(on_load)


def replace(container: nn.Module, key: str, replacement: nn.Module) -> None:
    """Puts a layer without state in the place of another, which it keeps for `undo`."""
    original: Any = container._modules[key]
    # Not as a child: it has no state, and is no part of the model now.
    replacement.__dict__[_ORIGINAL] = original
    container._modules[key] = replacement.train(original.training)


def undo(model: nn.Module) -> None:
    """Makes all modules what they were before `become` and `replace`.

    Raises:
        ValueError: for a module that has become another since; nothing is undone then.
    """
    for name, module in model.named_modules():
        mark = mark_of(module)
        if mark is not None and type(module) is not mark.into:
            found = f"model.{name} is a {type(module).__name__} by now"
            raise ValueError(f"{found}, no {mark.into.__name__}: undo that first")
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
    """Each nn.Sequential of a model that runs its children in order, and these with their keys."""
    for module in model.modules():
        if not isinstance(module, nn.Sequential) or "forward" in module.__dict__:
            continue
        if type(module).forward is nn.Sequential.forward:
            children = module._modules.items()
            yield module, [(key, child) for key, child in children if child is not None]


def use_counts(model: nn.Module) -> Counter[int]:
    """How many places of a model each of its modules is in, by id."""
    return Counter(id(child) for parent in model.modules() for child in parent._modules.values())


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, which a fused one would not call, or a forward of its own."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in module.__dict__


def check_model(model: Any) -> None:
    """Refuses what is no module, and one that is wrapped, compiled or scripted.

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
            told = "convert a model before it is wrapped or sharded for several devices"
            raise ValueError(f"{where}: {told}")
        if "OptimizedModule" in kinds or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{where} that is compiled: convert a model before torch.compile")
        if isinstance(module, torch.jit.ScriptModule):
            told = "convert a model before it is scripted or traced"
            raise ValueError(f"{where}, whose layers are fixed: {told}")
