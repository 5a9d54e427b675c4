"""Checks of non-tensor arguments. Each raises an error that names the value and what is allowed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Traceable(nn.Module):
    """A module that torch.jit.script refuses with one line that names the alternatives."""

    def __prepare_scriptable__(self) -> None:
        name = type(self).__name__
        instead = "use torch.export.export or torch.jit.trace"
        raise RuntimeError(f"torch.jit.script cannot compile {name}: {instead}")


def as_python(value: Any) -> Any:
    """Return NumPy's numbers and arrays as Python's, and anything else unchanged."""
    # Test for numbers first: a compiler's symbolic number has no attributes.
    if isinstance(value, (int, float, Tensor)) or not hasattr(value, "tolist"):
        return value
    return value.tolist()


def per_axis(name: str, value: Any, rank: int, minimum: int) -> tuple[int, ...]:
    """Return `value` as one integer per axis; one integer stands for all axes, as in torch.nn."""
    value = as_python(value)
    entries = (
        tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    )
    if len(entries) not in (1, rank):
        raise ValueError(f"{name} must be one integer or {rank}, got {value!r}")
    integers = []
    for entry in entries:
        try:
            if isinstance(entry, bool):
                raise TypeError
            integers.append(operator.index(entry))
        except TypeError:
            raise TypeError(
                f"{name} must be an integer or a tuple of {rank} of them, got {value!r}"
            ) from None
        if integers[-1] < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return tuple(integers) if len(integers) == rank else tuple(integers) * rank


def check_bool(name: str, value: Any) -> None:
    """Raise a TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
