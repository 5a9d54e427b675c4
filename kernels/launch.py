"""Layouts, alignment, and launches that are prepared once and then repeated.

A launcher looks its launch up in `LAUNCHES` by all that distinguishes it: the operation and its
arguments, shapes, strides, dtypes, device and alignment. Later calls run the compiled kernel by its
handle. That skips two thirds of a launch's time, in which Triton would specialise and hash the
arguments again.
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
# More than the layouts of a training run. A service that meets ever new sizes starts again.
LIMIT = 4096

# With REGFAST_LAUNCH=triton in the environment, every launch goes through Triton's own launcher.
BY_HANDLE = os.environ.get("REGFAST_LAUNCH", "handle")
if BY_HANDLE not in ("handle", "triton"):
    raise ValueError(f"REGFAST_LAUNCH must be 'handle' or 'triton', got {BY_HANDLE!r}")


def keep(key: Hashable, prepared: T) -> T:
    """Keep what a launcher has prepared for its next look-up, and return it."""
    if len(LAUNCHES) >= LIMIT:
        LAUNCHES.clear()
    LAUNCHES[key] = prepared
    return prepared


# Triton's debug and profiler switches, which change how it compiles a kernel.
_runtime, _compilation = knobs.runtime, knobs.compilation


class Launch:
    """A launch without its tensors: a kernel, its grid, its numbers, its constants and its options.

    A call takes the kernel's first arguments, tensors or None, and launches on the current stream
    of their device. The tensors must match those that the launch was prepared for: the same dtypes,
    and addresses aligned to 16 bytes if `aligned`.
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
        # A handle takes every argument by position, constants too.
        self.rest = (*numbers, *(options[name] for name in kernel.arg_names if name in options))
        # Triton specialises a kernel on the alignment of each address. A launch knows only whether
        # all are aligned.
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
    """A scalar argument in ACC: the number at `ptr`, or `number` where `ptr` is None.

    In the interpreter `number` is a Python number.
    """
    if ptr is not None:
        return tl.load(ptr).to(ACC)
    else:
        return (tl.zeros((), ACC) + number).to(ACC)


def kinds_of(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """What distinguishes launches by their tensors: dtypes and strides, and last the misalignment.

    The misalignment is the or of the addresses' low 4 bits: 0 where all are multiples of 16 bytes.
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
    """The greatest power of two, in bytes, that divides all addresses of this misalignment.

    It is 128, more than any vector, where they are multiples of 16: wider vectors are read 16 bytes
    at a time.
    """
    return misaligned & -misaligned or 128


def strides_of(*tensors: str, axes: str = "ncabw") -> list[str]:
    """The names of tensors' strides. Kernels do not specialise on them: one binary serves all."""
    return [f"{tensor}_stride_{axis}" for tensor in tensors for axis in axes]


class Layout(NamedTuple):
    """A tensor as a launch sees it, without data: sizes and strides of N, C, A, B and W."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_channels_last(self) -> bool:
        """Whether the channels lie closer together than the columns."""
        return self.strides[1] < self.strides[4]

    def is_cut(self, axis: int, count: int) -> bool:
        """Whether whole vectors of `count` successive elements along an axis make up the tensor."""
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
        """Whether a sample's elements, in the order of the memory format, are a run in memory."""
        expected = 1
        for axis in (1, 4, 3, 2) if channels_last else (4, 3, 2, 1):
            if self.shape[axis] > 1 and self.strides[axis] != expected:
                return False
            expected *= self.shape[axis]
        return True

    def is_dense(self) -> bool:
        """Whether a sample's elements, in any order, are a run in memory."""
        expected = 1
        for stride, size in sorted(zip(self.strides[1:], self.shape[1:])):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True


def on_meta(t: torch.Tensor) -> torch.Tensor:
    """A tensor without data, laid out as t is."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def contiguous(t: torch.Tensor | None) -> torch.Tensor | None:
    """A small tensor, or None, made contiguous for kernels that do not take its strides."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def wide_of(*dtypes: torch.dtype) -> tl.dtype:
    """The dtype of the arithmetic on tensors of these dtypes."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


class Target(NamedTuple):
    """What kernels are compiled for.

    `warp_size` is the threads of a warp. `packs` says whether instructions take 16-bit numbers two
    at a time.
    """

    warp_size: int
    packs: bool


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target of a device; a plain GPU's on a CPU or in the interpreter."""
    if device.type != "cuda" or knobs.runtime.interpret:
        return Target(32, False)
    found = torch.cuda.get_device_properties(device)
    return Target(
        found.warp_size, torch.version.hip is None and (found.major, found.minor) >= (9, 0)
    )
