"""What every launcher shares: how tensors lie, how they are aligned, and a launch that is prepared once and then repeated.

A launcher looks its launch up in `LAUNCHES` by all that distinguishes it: the operation and its arguments, shapes, strides,
dtypes, device and alignment. A launch made before is repeated by the compiled kernel's handle, which skips what takes Triton
two thirds of a launch: to specialise, and to hash, arguments that it has specialised and hashed before.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Hashable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel

T = TypeVar("T")

LAUNCHES: dict[Hashable, Any] = {}
# More than the layouts of any one training run; a service that meets new sizes for ever begins anew.
LIMIT = 4096

# The environment's REGFAST_LAUNCH=triton has Triton make every launch the ordinary way.
BY_HANDLE = os.environ.get("REGFAST_LAUNCH", "handle")
if BY_HANDLE not in ("handle", "triton"):
    raise ValueError(f"REGFAST_LAUNCH must be 'handle' or 'triton', got {BY_HANDLE!r}")


def keep(key: Hashable, prepared: T) -> T:
    """Keeps what a launcher has prepared, for its next look-up."""
    if len(LAUNCHES) >= LIMIT:
        LAUNCHES.clear()
    LAUNCHES[key] = prepared
    return prepared


# Triton's switches by which it would now compile a kernel otherwise than it did: to debug, or for a profiler.
_runtime, _compilation = knobs.runtime, knobs.compilation


class Launch:
    """A launch but for its tensors: a kernel, its grid, its numbers in their order, its constants and its options.

    Called with a kernel's first arguments, tensors or None, it launches on their device's current stream. The tensors must be
    those that it was prepared for: of the same dtypes, and aligned to 16 bytes where `aligned` says so.
    """

    __slots__ = (
        "device",
        "grid",
        "handle",
        "hooks",
        "kernel",
        "numbers",
        "options",
        "repeatable",
        "rest",
    )

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: tuple[int, ...],
        device: torch.device,
        aligned: bool,
        **options: Any,
    ) -> None:
        self.kernel, self.grid, self.numbers, self.options = (
            kernel,
            (programs, 1, 1),
            numbers,
            options,
        )
        self.device = device.index if device.type == "cuda" else None
        # A handle takes every argument by its place, constants too.
        self.rest = (*numbers, *(options[name] for name in kernel.arg_names if name in options))
        # Triton specialises a kernel on each address's alignment, and here only that of all together is known.
        self.repeatable = aligned and BY_HANDLE == "handle"
        self.hooks = getattr(kernel, "pre_run_hooks", ())
        self.handle: Any = None

    def __call__(self, *args: Any) -> None:
        if self.device is not None and self.device != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self(*args)
        elif (
            self.handle is None or self.hooks or _runtime.debug or _compilation.instrumentation_mode
        ):
            if not self.grid[0]:
                return
            compiled = self.kernel[self.grid](*args, *self.numbers, **self.options)
            ordinary = not (_runtime.debug or _compilation.instrumentation_mode)
            if self.repeatable and ordinary and isinstance(compiled, CompiledKernel):
                self.handle = compiled[self.grid]
        else:
            self.handle(*args, *self.rest)


@triton.jit
def scalar(ptr, number, ACC: tl.constexpr):
    """A scalar argument in ACC: read where it is a tensor, else the number (which in the interpreter is Python's)."""
    if ptr is not None:
        return tl.load(ptr).to(ACC)
    else:
        return (tl.zeros((), ACC) + number).to(ACC)


def kinds_of(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """What distinguishes launches by their tensors: the dtype and strides of each, and last what their addresses miss of 16.

    That is the bits, or'ed together, by which they are no multiples of 16 bytes: 0 where all are.
    """
    kinds: list[Any] = []
    low = 0
    for t in tensors:
        if t is None:
            kinds.append(None)
        else:
            kinds += t.dtype, t.stride()
            low |= t.data_ptr()
    kinds.append(low & 15)
    return tuple(kinds)


def alignment_of(misaligned: int) -> int:
    """The greatest power of two, in bytes, of which all the addresses are multiples that `kinds_of` calls so.

    128, which is more than any vector, where they are multiples of 16: a wider vector is read 16 bytes at a time.
    """
    return misaligned & -misaligned or 128


def strides_of(*tensors: str, axes: str = "ncabw") -> list[str]:
    """The names of tensors' strides, on which kernels are not specialised: a binary serves every size."""
    return [f"{tensor}_stride_{axis}" for tensor in tensors for axis in axes]


class Layout(NamedTuple):
    """A tensor as a launch sees it, without its data: five entries each, of N, C, A, B and W."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_channels_last(self) -> bool:
        """Whether the channels lie closer together than the columns."""
        return self.strides[1] < self.strides[4]

    def is_cut(self, axis: int, count: int) -> bool:
        """Whether the tensor is cut into vectors of `count` successive elements along an axis."""
        others = (
            stride for dim, stride in enumerate(self.strides) if dim != axis and self.shape[dim] > 1
        )
        dense = self.strides[axis] == 1 or self.shape[axis] == 1
        return (
            dense
            and self.shape[axis] % count == 0
            and all(stride % count == 0 for stride in others)
        )

    def is_flat(self, channels_last: bool) -> bool:
        """Whether a sample's elements, in the order of the format, are a run in memory."""
        expected = 1
        for axis in (1, 4, 3, 2) if channels_last else (4, 3, 2, 1):
            if self.shape[axis] > 1 and self.strides[axis] != expected:
                return False
            expected *= self.shape[axis]
        return True

    def is_dense(self) -> bool:
        """Whether a sample's elements, in some order, are a run in memory."""
        expected = 1
        for stride, size in sorted(zip(self.strides[1:], self.shape[1:])):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True


def on_meta(t: torch.Tensor) -> torch.Tensor:
    """A tensor without data that lies as t does."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    """A small tensor, or none, as kernels read it that are not told its strides."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def wide_of(*dtypes: torch.dtype) -> tl.dtype:
    """What the arithmetic on tensors of these dtypes is in."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


class Target(NamedTuple):
    """What kernels are cut and written for: the threads of a warp, and whether 16-bit numbers are taken two an instruction."""

    warp_size: int
    packs: bool


@functools.cache
def target_of(device: torch.device) -> Target:
    """What a device is; a plain GPU where none runs the kernels."""
    if device.type != "cuda" or knobs.runtime.interpret:
        return Target(32, False)
    found = torch.cuda.get_device_properties(device)
    return Target(
        found.warp_size, torch.version.hip is None and (found.major, found.minor) >= (9, 0)
    )
