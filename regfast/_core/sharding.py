"""DTensors: an operation on each process's own part, where that part is all that it needs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def is_sharded(*tensors: Any) -> bool:
    """Whether one of them is a DTensor. (That torch.distributed.tensor has not been imported says no.)"""
    for t in tensors:
        if isinstance(t, Tensor) and type(t) not in (Tensor, Parameter):
            module = sys.modules.get("torch.distributed.tensor")
            if module is not None and isinstance(t, module.DTensor):
                return True
    return False


def whole(t: Any) -> Any:
    """A DTensor as the tensor that it is a part of; anything else as it is."""
    return t.full_tensor() if is_sharded(t) else t


def on_parts(
    function: Callable[..., Tensor],
    x: Any,
    *others: Any,
    dims: Sequence[int],
    keeps: int,
    partial: Sequence[Any] = (),
) -> Any:
    """function(x, *others, *partial) of DTensors, each process computing with its own parts.

    x may be sharded along `dims`, if evenly; otherwise it is gathered first. `others` have x's shape, and are laid out as it is.
    `partial` are small and wanted whole by every process, which adds its part of their gradient. The result has x's first `keeps`
    dimensions, and goes where x lay, if it can.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = next(t.device_mesh for t in (x, *others, *partial) if isinstance(t, DTensor))
    x = _replicated(x, mesh)
    own = [
        p
        if isinstance(p, Shard) and p.dim in dims and x.shape[p.dim] % mesh.size(axis) == 0
        else Replicate()
        for axis, p in enumerate(x.placements)
    ]
    sharded = [p.dim for p in own if isinstance(p, Shard)]
    if len(set(sharded)) < len(sharded):
        # One dimension over two axes of the mesh would have to be even over both.
        own = [Replicate()] * len(own)
    parts = [_replicated(t, mesh).redistribute(mesh, own).to_local() for t in (x, *others)]
    sums = [Partial() if isinstance(p, Shard) else p for p in own]
    every = [Replicate()] * mesh.ndim
    gathered = [
        _replicated(t, mesh).redistribute(mesh, every).to_local(grad_placements=sums)
        for t in partial
    ]
    y = function(*parts, *gathered)
    shape = torch.Size([*x.shape[:keeps], *y.shape[keeps:]])
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    result = DTensor.from_local(y, mesh, own, run_check=False, shape=shape, stride=stride)
    return (
        result.redistribute(mesh, x.placements)
        if all(_fits(p, shape) for p in x.placements)
        else result
    )


def _fits(placement: Any, shape: torch.Size) -> bool:
    return not placement.is_partial() and (not placement.is_shard() or placement.dim < len(shape))


def _replicated(t: Any, mesh: Any) -> Any:
    """A tensor that every process has, as a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    return (
        t
        if isinstance(t, DTensor)
        else DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    )
