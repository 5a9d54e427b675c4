"""DTensors: compute an operation on each process's own part, where that part suffices."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def is_sharded(*tensors: Any) -> bool:
    """Return whether one of the tensors is a DTensor.

    A process that has not imported torch.distributed.tensor has none.
    """
    for t in tensors:
        if isinstance(t, Tensor) and type(t) not in (Tensor, Parameter):
            module = sys.modules.get("torch.distributed.tensor")
            if module is not None and isinstance(t, module.DTensor):
                return True
    return False


def whole(t: Any) -> Any:
    """Return the whole tensor of a DTensor, and anything else unchanged."""
    return t.full_tensor() if is_sharded(t) else t


def on_parts(
    function: Callable[..., Tensor],
    x: Any,
    *others: Any,
    dims: Sequence[int],
    keeps: int,
    partial: Sequence[Any] = (),
) -> Any:
    """Return function(x, *others, *partial) of DTensors; each process computes with its parts.

    x may be sharded along `dims` if evenly; otherwise it is gathered first. `others` have x's shape
    and take x's placements. Every process takes `partial` whole and adds its part of their
    gradient. The result has x's first `keeps` dimensions, and x's placements if they fit.
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
        # A dimension over two axes of the mesh would have to be even over both.
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
    fits = all(_fits(p, shape) for p in x.placements)
    return result.redistribute(mesh, x.placements) if fits else result


def _fits(placement: Any, shape: torch.Size) -> bool:
    return not placement.is_partial() and (not placement.is_shard() or placement.dim < len(shape))


def _replicated(t: Any, mesh: Any) -> Any:
    """Return a tensor that every process has as a DTensor, and a DTensor unchanged."""
    from torch.distributed.tensor import DTensor, Replicate

    if isinstance(t, DTensor):
        return t
    return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
