"""What is timed: a `Case`, and an `Operation` with the contestants that are timed on it.

A contestant is made from a case and returns what takes the inputs; the first of a table is the baseline of its ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peers import AbsentError
from torch import Tensor, nn

import regfast

# Of images, and of rows of logits.
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last, "NC": torch.contiguous_format}
DIRECTIONS = ("forward", "backward", "forward+backward")
DTYPES = ("bfloat16", "float16", "float32", "float64")


def formats_of(shape: Sequence[int]) -> list[str]:
    """The formats that a tensor of this shape can have."""
    return [format for format in FORMATS if len(format) == len(shape)]


class Case(NamedTuple):
    """What one interleaved pass times: every contestant on the same inputs. `dtype` is the floating one, the output's."""

    operation: str
    arguments: tuple[Any, ...]
    shape: tuple[int, ...]
    format: str
    dtype: str
    direction: str

    @property
    def call(self) -> str:
        return f"{self.operation}({', '.join(map(str, self.arguments))})"

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return f"{self.call} {self.size} {self.format} {self.dtype} {self.direction}"


class Bytes(NamedTuple):
    """The device memory that a direction must at least read and write."""

    forward: int
    backward: int

    def of(self, direction: str) -> int:
        return {"forward": self.forward, "backward": self.backward}.get(direction, self.forward + self.backward)


Maker = Callable[[Case], Callable[..., Tensor]]


@dataclass(frozen=True)
class Operation:
    """`inputs` draws a call's tensors, those that require grad being differentiated, and so are a contestant's parameters.

    `function` is regfast's, and takes a case's arguments after the inputs; None for a training step, which is made of several and
    has no floor. `floor` takes the inputs and the output. Of the shapes, those of "toy" are for tests, "traffic" for traffic.py.
    """

    function: Callable[..., Tensor] | None
    contestants: dict[str, Maker]
    arguments: Sequence[tuple[Any, ...]]
    shapes: dict[str, Sequence[tuple[int, ...]]]
    inputs: Callable[[Case, torch.device], tuple[Tensor, ...]]
    floor: Callable[[tuple[Tensor, ...], Tensor], Bytes] = lambda inputs, y: Bytes(0, 0)
    directions: Sequence[str] = DIRECTIONS


def leaves(step: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """What a contestant's backward is to give the gradients of."""
    parameters = list(step.parameters()) if isinstance(step, nn.Module) else []
    return [tensor for tensor in inputs if tensor.requires_grad] + parameters


def images(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    x = torch.randn(case.shape, device=device, dtype=case.torch_dtype)
    return (x.contiguous(memory_format=FORMATS[case.format]).requires_grad_(),)


def compiled(make: Maker) -> Maker:
    # Static shapes: what the compiler can do at its best.
    return lambda case: torch.compile(make(case), dynamic=False)


def compiled_network(make: Maker) -> Maker:
    def make_compiled(case: Case) -> Callable[..., Tensor]:
        if not torch.cuda.is_available():
            raise AbsentError("a network takes minutes to compile for a CPU")
        return compiled(make)(case)

    return make_compiled


def compiled_reference(make: Maker) -> Maker:
    """regfast's PyTorch reference, compiled: on CUDA it is not what "regfast compiled" is."""

    def make_reference(case: Case) -> Callable[..., Tensor]:
        if not torch.cuda.is_available():
            raise AbsentError('without CUDA it is what "regfast compiled" is')
        step = compiled(make)(case)

        def reference(*inputs: Tensor) -> Tensor:
            with regfast.backend("reference"):
                return step(*inputs)

        return reference

    return make_reference
