"""What the compiler makes of every kernel, with no GPU: registers, spills, the loop's instructions, and how wide accesses are.

    python bench/compiled.py [--target sm_90 ...] [--dtype bf16 ...] [--only '2d k=2' ...] [--write]

Each launch of `ENTRIES` is recorded from the operation's own launcher, on tensors that are never
read: what is compiled is what a GPU would be given, the same blocks, the same specialisation on
alignment. There are the registers, spills and the stack; the occupancy, in percent, that registers
and shared memory leave; the instructions, those of the main loop, those of a turn of it on its
shortest way, and how many of these an element takes; and how wide accesses are.

Without --write the figures are compared with compiled.csv beside this file, and a kernel that spills,
has a stack or differs from its row is named and makes the exit status 1; with it they become the
table. (Not to be run under TRITON_INTERPRET=1, which leaves nothing to compile.)
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from regfast._core.geometry import Window, blur_window, max_blur_window
from regfast._core.layout import CHANNELS_LAST, empty_output
from regfast.kernels import blur_pool, max_blur_pool, mixup, mixup_cross_entropy, rezero
from regfast.kernels.launch import LAUNCHES, Launch, Target

TABLE = Path(__file__).with_suffix(".csv")
# Whose figures the table has. Of another Triton's kernels, only spills and stacks are complained of.
TRITON = "3.7.1"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("fp16", "bf16", "fp32")
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def target_of(name: str) -> GPUTarget:
    """Triton's target of an architecture: "sm_90", "gfx942"."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def kind_of(name: str) -> Target:
    """What launchers are told of an architecture."""
    found = target_of(name)
    return Target(found.warp_size, found.backend == "cuda" and found.arch >= 90)


class Recorded(NamedTuple):
    """A launch that was not made: the kernel, its arguments and its options."""

    kernel: Any
    args: tuple
    options: dict[str, Any]

    @property
    def values(self) -> dict[str, Any]:
        """The kernel's arguments by name, constants too."""
        names = self.kernel.arg_names
        return dict(zip(names, self.args)) | {k: v for k, v in self.options.items() if k in names}


def record(call: Callable[[], Any], target: str = "sm_90") -> list[Recorded]:
    """The launches that a call of a launcher would give a GPU of the target."""
    launches: list[Recorded] = []

    def note(launch: Launch, *args: Any) -> None:
        if launch.grid[0] > 0:
            launches.append(Recorded(launch.kernel, (*args, *launch.numbers), launch.options))

    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(Launch, "__call__", note))
        # A launch that was prepared for another target, or cut otherwise, must not be found.
        patches.enter_context(patch.dict(LAUNCHES, clear=True))
        for name, module in sys.modules.items():
            if name.startswith("regfast.kernels.") and hasattr(module, "target_of"):
                replaced = patch.object(module, "target_of", lambda device: kind_of(target))
                patches.enter_context(replaced)
        call()
    return launches


def source_of(launch: Recorded) -> tuple[ASTSource, dict[str, Any]]:
    """The source and compiler options of one launch, specialised as Triton's launcher would: on None, 1 and multiples of 16."""
    kernel, _, options = launch
    values = launch.values
    signature, constants, attributes = {}, {}, {}
    for param in kernel.params:
        value = values[param.name]
        if param.is_constexpr or value is None:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = "*" + TYPES[value.dtype]
            attributes[(param.num,)] = [["tt.divisibility", 16]]
        elif param.annotation == "fp64":
            # Of a number that is no integer the type alone counts.
            signature[param.name] = "fp64"
        elif value == 1 and not param.do_not_specialize:
            signature[param.name], constants[param.name] = "constexpr", value
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(param.num,)] = [["tt.divisibility", 16]]
    rest = {name: value for name, value in options.items() if name not in kernel.arg_names}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), rest


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def nvidia_figures(cubin: bytes) -> tuple[dict[str, int | str], Way]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    figure = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    found = instructions(sass, SASS)
    ops = [one.name for one in found]
    return dict(
        registers=int(figure["REG"]), stack=int(figure["STACK"]),
        spills=sum(op.startswith(("LDL", "STL")) for op in ops), instructions=len(ops),
        loads=widths(sass_bits(ops, "LDG")), stores=widths(sass_bits(ops, "STG")),
    ), shortest(found)  # fmt: skip


# An instruction: the condition that it is under, its name, its first operands, and the label that it
# branches to if it does. Of a label there is the name alone.
SASS = r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;\n]*?)(?:`\((\.L\w+)\))?\s*;|^(\.L\w+):"
AMDGCN = r"^\s+()([a-z][a-z0-9_]+)()(?:[ \t]+(\.LBB\w+))?|^(\.L\w+):"
ENDS = ("EXIT", "s_endpgm")


class Instruction(NamedTuple):
    """An instruction of an assembly: its name, and the places of those that may follow it."""

    name: str
    following: list[int]


def instructions(text: str, pattern: str) -> list[Instruction]:
    """Every instruction of an assembly."""
    found: list[tuple[str, str, bool]] = []
    labels: dict[str, int] = {}
    for match in re.finditer(pattern, text, flags=re.M):
        condition, name, operands, target, label = match.groups()
        if label:
            labels[label] = len(found)
        else:
            found.append((name, target, not condition and not operands.strip()))
    listed = []
    for i, (name, target, always) in enumerate(found):
        to = labels.get(target)
        # Where an AMD GPU skips what no lane does, one does it.
        goes = name == "s_branch" or (always and name == "BRA")
        goes = goes or (name == "s_cbranch_execnz" and to is not None and to > i)
        following = [to] if to is not None and name != "s_cbranch_execz" else []
        if not goes and not (always and name in ENDS) and i + 1 < len(found):
            following.append(i + 1)
        listed.append(Instruction(name, following))
    return listed


class Loop(NamedTuple):
    """A loop: the places of its first instruction, of the last ones of a turn, and of all."""

    first: int
    last: set[int]
    places: set[int]


def loops_of(found: list[Instruction]) -> list[Loop]:
    """The loops of a program. (A jump backwards to what cannot come to it again is none.)"""
    before: list[list[int]] = [[] for _ in found]
    for i, one in enumerate(found):
        for following in one.following:
            before[following].append(i)
    reached = distances(found, {0})
    loops: dict[int, Loop] = {}
    for first, sources in enumerate(before):
        turned = {i for i in sources if i >= first and i in reached}
        if not turned:
            continue
        places, waiting = {first}, list(turned)
        while waiting:
            i = waiting.pop()
            if i not in places and i >= first:
                places.add(i)
                waiting += before[i]
        # What comes after the first instruction, and to the last.
        places &= distances(found, {first}, places).keys()
        last = turned & places
        # (A program ends with a jump to itself.)
        if last and len(places) > 1:
            loops[first] = Loop(first, last, places)
    return list(loops.values())


def distances(
    found: list[Instruction], starts: set[int], within: set[int] | None = None
) -> dict[int, int]:  # fmt: skip
    """How many instructions are taken at least from `starts` to each that is reached, perhaps `within` a part."""
    steps, waiting = dict.fromkeys(starts, 0), list(starts)
    for i in waiting:
        for following in found[i].following:
            if following not in steps and (within is None or following in within):
                steps[following] = steps[i] + 1
                waiting.append(following)
    return steps


class Way(NamedTuple):
    """The instructions of a main loop, those of a turn of it, and those taken around it: once a turn of
    the loop that it is in, or else once a program.

    A turn takes the shortest way through, on which no border is and nothing rare. Without a loop, a turn
    is the whole program.
    """

    loop: int
    executed: int
    around: int


def shortest(found: list[Instruction]) -> Way:
    """The way through a program. The main loop is the longest one that has no other within it."""
    loops = loops_of(found)
    ends = {i for i, one in enumerate(found) if one.name in ENDS}
    if not loops:
        return Way(0, max(ends) + 1, 0)
    firsts = {loop.first for loop in loops}
    innermost = [loop for loop in loops if loop.places & firsts == {loop.first}]
    main = max(innermost, key=lambda loop: len(loop.places))
    turn = distances(found, {main.first}, main.places)
    outer = [loop for loop in loops if loop is not main and main.first in loop.places]
    start, ends, within = 0, ends, None
    if outer:
        start, ends, within = min(outer, key=lambda loop: len(loop.places))
    to = distances(found, {start}, within)[main.first]
    after = distances(found, main.last, within)
    left = min(after[end] for end in ends if end in after)
    return Way(len(main.places), min(turn[last] for last in main.last) + 1, to + left)


def sass_bits(ops: list[str], kind: str) -> list[int]:
    """The width of every access of a kind; one that names none is of 32 bits."""
    named = [re.search(r"\.[US]?(8|16|64|128)\b", op) for op in ops if op.startswith(kind)]
    return [int(width.group(1)) if width else 32 for width in named]


def amd_figures(text: str) -> tuple[dict[str, int | str], Way]:
    """Spills are those of vector registers, to memory. (Scalar registers spill into lanes of vector registers.)"""
    counts = {name: int(count) for name, count in re.findall(r"\.(\w+):\s+(\d+)$", text, flags=re.M)}
    found = instructions(text, AMDGCN)
    ops = [one.name for one in found]
    bits = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    loads, stores = (
        [bits.get(width, 16) for op in ops for width in re.findall(rf"^(?:global|buffer)_{kind}_(\w+)", op)]
        for kind in ("load", "store")
    )
    return dict(
        registers=counts["vgpr_count"], stack=counts["private_segment_fixed_size"],
        spills=counts["vgpr_spill_count"], instructions=len(ops),
        loads=widths(loads), stores=widths(stores),
    ), shortest(found)  # fmt: skip


def widths(bits: list[int]) -> str:
    """How many accesses there are of each width in bits, the widest first: "2x128 4x16"."""
    return " ".join(f"{bits.count(width)}x{width}" for width in sorted(set(bits), reverse=True))


def occupancy(target: str, registers: int, shared: int, num_warps: int) -> int:
    """The warps that an SM has of a kernel, or the waves that a SIMD has, in percent of the most."""
    if target.startswith("gfx"):
        waves = min(8, 512 // (-(-registers // 8) * 8))
        # Of a workgroup on four SIMDs.
        blocks = min(4 * waves // num_warps, 64 * 1024 // max(shared, 1))
        return 100 * blocks * num_warps // (4 * 8)
    # A quarter of the registers, and of the warps, is each scheduler's. A block has 1 KiB of shared
    # memory that is not its own.
    warps = min(64, 4 * (16384 // (-(-registers // 8) * 256)))
    memory = (163 if target == "sm_80" else 228) * 1024
    return 100 * min(32, warps // num_warps, memory // (shared + 1024)) * num_warps // 64


class Work(NamedTuple):
    """What a turn of a kernel's main loop, or a kernel without one, comes to.

    `lane` are the elements of a thread: their number, or of a pooling rows, columns and channels. What
    is done around the loop is done once in so many `turns`, and not counted where they are many.
    """

    lane: tuple[float, ...]
    turns: float = math.inf

    def per_element(self, way: Way) -> float:
        """The instructions of an element."""
        return (way.executed + way.around / self.turns) / math.prod(self.lane)


def figures(launch: Recorded, target: str, work: Work | None = None) -> dict[str, int | str]:
    """What the compiler makes of a launch; without `work` nothing is said of an element."""
    source, rest = source_of(launch)
    compiled = triton.compile(source, target=target_of(target), options=rest)
    amd = target.startswith("gfx")
    assembly = compiled.asm["amdgcn" if amd else "cubin"]
    found, way = amd_figures(assembly) if amd else nvidia_figures(assembly)
    shared = compiled.metadata.shared
    found |= dict(
        shared=shared, occupancy=occupancy(target, int(found["registers"]), shared, rest["num_warps"]),
        loop=way.loop, executed=way.executed,
        elements="x".join(f"{size:g}" for size in work.lane) if work else "",
        per_element=f"{work.per_element(way):.2f}" if work else "",
    )  # fmt: skip
    return {name: found[name] for name in FIGURES}


class Problem(NamedTuple):
    """What an operation is compiled for: in which directions, with channels innermost or not, and how its launcher is called.

    A direction names a kernel: a forward or a backward may launch a second one, "order" or "finish".
    `call` takes a direction, a dtype and whether channels are innermost, and calls the launcher that
    launches that kernel; of several launches of one kernel `launch` says which. `work` takes a launch
    and the threads of a program. A `rare` problem is compiled for fewer targets and dtypes.
    """

    directions: tuple[str, ...]
    formats: tuple[bool, ...]
    call: Callable[[str, torch.dtype, bool], Any]
    work: Callable[[Recorded, int], Work | None]
    launch: int = 0
    rare: bool = False

    def is_for(self, dtype: torch.dtype, target: str) -> bool:
        return not self.rare or (dtype != torch.float16 and target == "sm_90")


def pool(
    rank: int, kernel_size: int, stride: int, padding: int, padding_mode: str = "partial",
    ceil_mode: bool = False, ratio: float = 1.7, blur_size: int | None = None,
) -> Window:  # fmt: skip
    border = ratio, blur_size, "binomial", padding_mode
    return max_blur_window(rank, kernel_size, stride, padding, 1, False, ceil_mode, *border)


def blur(rank: int) -> Window:
    return blur_window(rank, 3, 2, "same", "binomial", "reflect")


# Of an input, a gradient and a window.
POOLINGS: dict[tuple[str, str], Callable[[torch.Tensor, torch.Tensor, Window], torch.Tensor]] = {
    ("max_blur_pool", "forward"): lambda x, g, w: max_blur_pool.max_blur_pool(x, w),
    ("max_blur_pool", "backward"): lambda x, g, w: max_blur_pool.max_blur_pool_backward(g, x, w),
    ("blur_pool", "forward"): lambda x, g, w: blur_pool.blur_pool(x, w),
    ("blur_pool", "backward"): lambda x, g, w: blur_pool.blur_pool_backward(g, x.shape, x.stride(), w),
}
# Of the benchmark's arguments.
WINDOWS: dict[str, Callable[..., Window]] = {
    "max_blur_pool": lambda k, s, p: pool(2, k, s, p),
    "blur_pool": lambda k, s: blur_window(2, k, s, "same", "binomial", "reflect"),
}


def pooled(launch: Recorded, threads: int) -> Work:
    """A turn is a group of rows, of a lane's columns and channels, all of x or of its gradient."""
    values = launch.values
    return Work((values["H"].group, values["W"].group, values["ACCESS"].vector))


def pooling(
    operation: str, window: Window, shape: tuple[int, ...], launch: int = 0, rare: bool = False
) -> Problem:  # fmt: skip
    def call(direction: str, dtype: torch.dtype, channels_last: bool) -> None:
        memory_format = CHANNELS_LAST[window.rank] if channels_last else torch.contiguous_format
        x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
        POOLINGS[operation, direction](x, empty_output(x, window), window)

    directions = tuple(direction for owner, direction in POOLINGS if owner == operation)
    formats = (False, True) if window.rank > 1 else (False,)
    return Problem(directions, formats, call, pooled, launch, rare)


def activated(window: Window) -> Problem:
    """Images rectified on the way, of which a blur is a pooling too."""
    return pooling("max_blur_pool", window._replace(activation="relu"), IMAGE, rare=True)


def batch(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> torch.Tensor:
    """A batch without data."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def blended(launch: Recorded, threads: int) -> Work | None:
    """A turn of a forward is a block of a sample, and of a backward that of one whose partner it is.

    There is one such, for the index is a permutation. In place a turn is of a pair of samples or of none.
    """
    values = launch.values
    if values.get("IN_PLACE"):
        return None
    planes = values["ORDER"].planes
    real = values["size_c"] / planes if planes else 1
    turns = values["batch"] / values["step"] if "IN_PLACE" in values else 1
    return Work((values["BLOCK"] * real / threads,), turns)


def blend(
    read: torch.dtype | None = None, from_contiguous: bool = False, boxes: bool = False,
    in_place: bool = False, directions: tuple[str, ...] = ("forward",),
) -> Problem:  # fmt: skip
    """MixUp of images, read in another dtype and then normalised, or in another format, or in place
    and with a lam that is a number; or CutMix, with a lam a sample.
    """
    n, c, *_ = shape = (512, 3, 224, 224)
    index = torch.empty(n, dtype=torch.int64)
    lam = 0.5 if in_place else torch.empty(n if boxes else ())
    box = torch.empty((n, 4), dtype=torch.int64) if boxes else None
    scale, shift = (None, None) if read is None else torch.empty((2, c))

    def call(direction: str, dtype: torch.dtype, channels_last: bool) -> None:
        x = batch(shape, read or dtype, channels_last and not from_contiguous)
        if direction == "forward":
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            mixup.mixup(x, index, lam, box, scale, shift, dtype, memory_format, x if in_place else None)
        else:
            mixup.mixup_backward(x, index, lam, box, scale, x.stride(), dtype)

    return Problem(directions, (True,) if from_contiguous else (False, True), call, blended)


def of_rows(launch: Recorded, threads: int) -> Work:
    """A turn is a tile of rows, of all their classes or of a block of them."""
    values = launch.values
    blocks = -(-values["classes"] // values["BLOCK_C"])
    if blocks > 1 or "turns" not in values:
        # A backward's program has one tile.
        turns = blocks
    else:
        # A forward's rows are side by side in the end, after so many tiles; or there is no more to a
        # tile than a turn.
        turns = values["turns"] if values["TURNS"] > 1 else math.inf
    return Work((values["ROWS"] * values["classes"] / blocks / threads,), turns)


def loss(shape: tuple[int, ...], smoothed: bool = False, directions: tuple[str, ...] = ("forward", "backward")) -> Problem:
    """The mean loss of logits, in float32; smoothed, and with weights of the classes."""
    n, c, *positions = shape
    a = torch.empty((n, *positions), dtype=torch.int64)
    weight, smoothing = (torch.empty(c), 0.1) if smoothed else (None, 0.0)
    lam, g, statistics = torch.empty(()), torch.empty(()), torch.empty(2 * a.numel() + 2)

    def call(direction: str, dtype: torch.dtype, channels_last: bool) -> None:
        z = batch(shape, dtype, channels_last)
        if direction == "backward":
            mixup_cross_entropy.mixup_cross_entropy_backward(g, z, a, a, lam, weight, statistics, -100, "mean", smoothing)
        else:
            mixup_cross_entropy.mixup_cross_entropy(z, a, a, lam, weight, -100, "mean", smoothing, torch.float32)

    return Problem(directions, (False, True) if positions else (False,), call, of_rows)


def of_block(launch: Recorded, threads: int) -> Work:
    """A turn is a block."""
    return Work((launch.values["BLOCK"] / threads,))


def residual(
    activation: str, form: str = "gate", branch: torch.dtype | None = None, directions: tuple[str, ...] = ("forward", "backward")
) -> Problem:
    """A stream and its branch, which may be of another dtype. They are laid out alike, however that is."""
    shape, alpha = (8, 64, 112, 112), torch.empty(1)

    def call(direction: str, dtype: torch.dtype, channels_last: bool) -> None:
        x, f = batch(shape, dtype), batch(shape, branch or dtype)
        if direction == "forward":
            rezero.rezero(x, f, alpha, activation, form)
        else:
            g, post = batch(shape, torch.promote_types(x.dtype, f.dtype)), form == "post"
            rezero.rezero_backward(g, x if post else None, f, alpha, activation, form, post, True, True)

    return Problem(directions, (False,), call, of_block)


SIGNAL, IMAGE, VOLUME = (64, 64, 4096), (256, 64, 112, 112), (16, 64, 32, 32, 32)
NARROW, ODD = (256, 256, 28, 28), (256, 256, 27, 27)
# What borders or another blur make different.
RARE = {
    "2d (3, 2, 0) ceil": pool(2, 3, 2, 0, ceil_mode=True),
    "2d k=2 reflect": pool(2, 2, 2, 0, "reflect"),
    "2d k=2 reflect 4": pool(2, 2, 2, 0, "reflect", blur_size=4),
    "2d k=2 zeros": pool(2, 2, 2, 0, "zeros"),
    "2d k=2 ratio 2.5": pool(2, 2, 2, 0, ratio=2.5),
}
PROBLEMS = {
    ("max_blur_pool", "1d k=2"): pooling("max_blur_pool", pool(1, 2, 2, 0), SIGNAL),
    ("max_blur_pool", "2d k=2"): pooling("max_blur_pool", pool(2, 2, 2, 0), IMAGE),
    ("max_blur_pool", "2d (3, 2, 1)"): pooling("max_blur_pool", pool(2, 3, 2, 1), IMAGE),
    ("max_blur_pool", "2d (3, 2, 1) relu"): activated(pool(2, 3, 2, 1)),
    ("max_blur_pool", "2d narrow k=2"): pooling("max_blur_pool", pool(2, 2, 2, 0), NARROW, rare=True),
    ("max_blur_pool", "2d narrow (3, 2, 1)"): pooling("max_blur_pool", pool(2, 3, 2, 1), NARROW, rare=True),
    ("max_blur_pool", "2d odd k=2"): pooling("max_blur_pool", pool(2, 2, 2, 0), ODD, rare=True),
    **{("max_blur_pool", case): pooling("max_blur_pool", window, IMAGE, rare=True) for case, window in RARE.items()},
    ("blur_pool", "1d"): pooling("blur_pool", blur(1), SIGNAL),
    ("blur_pool", "2d"): pooling("blur_pool", blur(2), IMAGE),
    ("blur_pool", "2d narrow"): pooling("blur_pool", blur(2), NARROW, rare=True),
    ("blur_pool", "3d first"): pooling("blur_pool", blur(3), VOLUME, rare=True),
    ("blur_pool", "3d second"): pooling("blur_pool", blur(3), VOLUME, launch=1, rare=True),
    ("blur_pool", "2d relu"): activated(blur(2)),
    ("mixup", "images"): blend(directions=("forward", "order", "backward")),
    ("mixup", "images in place"): blend(in_place=True),
    ("mixup", "boxes"): blend(boxes=True, directions=("forward", "backward")),
    ("mixup", "uint8"): blend(torch.uint8),
    ("mixup", "uint8 from contiguous"): blend(torch.uint8, from_contiguous=True),
    ("mixup_cross_entropy", "rows"): loss((65536, 1000), directions=("forward", "finish", "backward")),
    ("mixup_cross_entropy", "rows smoothed"): loss((65536, 1000), smoothed=True),
    ("mixup_cross_entropy", "maps"): loss((8, 21, 256, 256)),
    ("mixup_cross_entropy", "maps smoothed"): loss((8, 21, 256, 256), smoothed=True),
    ("rezero", "gate relu"): residual("relu", directions=("forward", "backward", "finish")),
    ("rezero", "gate gelu"): residual("gelu"),
    ("rezero", "gate relu of bf16"): residual("relu", branch=torch.bfloat16),
    ("rezero", "post relu"): residual("relu", "post"),
}


class Entry(NamedTuple):
    """One launch of an operation: which kernel, on what."""

    operation: str
    direction: str
    case: str
    channels_last: bool

    @property
    def problem(self) -> Problem:
        return PROBLEMS[self.operation, self.case]

    def record(self, dtype: torch.dtype, target: str) -> Recorded:
        """What the launcher would give a GPU of the target."""
        call, kernel = self.problem.call, f"_{self.direction}_kernel"
        launches = record(lambda: call(self.direction, dtype, self.channels_last), target)
        return [each for each in launches if each.kernel.__name__ == kernel][self.problem.launch]

    def key(self, dtype: torch.dtype, target: str) -> tuple[str, ...]:
        """The KEYS of a row."""
        layout = "channels last" if self.channels_last else "contiguous"
        return self.operation, self.direction, self.case, layout, TYPES[dtype], target


ENTRIES = [
    Entry(operation, direction, case, channels_last)
    for (operation, case), problem in PROBLEMS.items()
    for direction in problem.directions
    for channels_last in problem.formats
]
KEYS = ("operation", "direction", "case", "format", "dtype", "target")
FIGURES = (
    "registers", "occupancy", "shared", "stack", "spills", "instructions", "loop", "executed",
    "elements", "per_element", "loads", "stores",
)  # fmt: skip


def row_of(entry: Entry, dtype: torch.dtype, target: str) -> dict[str, str]:
    """A row of the table: what was compiled, and its figures."""
    launch = entry.record(dtype, target)
    threads = launch.options["num_warps"] * target_of(target).warp_size
    # A second launch has a few numbers, and no elements.
    has_elements = entry.direction in ("forward", "backward")
    work = entry.problem.work(launch, threads) if has_elements else None
    key = dict(zip(KEYS, entry.key(dtype, target)))
    return {name: str(value) for name, value in (key | figures(launch, target, work)).items()}


Job = tuple[Entry, torch.dtype, str]


def jobs_for(targets: Iterable[str], dtypes: Iterable[str], only: Iterable[str]) -> list[Job]:
    """What is compiled, of the cases that a pattern matches."""
    chosen = [entry for entry in ENTRIES if any(fnmatchcase(entry.case, pattern) for pattern in only)]
    types = [dtype for dtype, name in TYPES.items() if name in dtypes]
    return [job for job in itertools.product(chosen, types, targets) if job[0].problem.is_for(*job[1:])]


def rows_for(jobs: list[Job]) -> list[dict[str, str]]:
    """The rows of the jobs."""
    with ProcessPoolExecutor(2) as processes:
        return list(processes.map(row_of, *zip(*jobs)))


def complaints(rows: list[dict[str, str]], table: dict[tuple[str, ...], dict[str, str]]) -> list[str]:
    """What is wrong with the rows, or not as the table has it, if that is of this Triton."""
    found, comparable = [], triton.__version__ == TRITON
    for row in rows:
        key = tuple(row[name] for name in KEYS)
        bad = [f"{name} {row[name]}" for name in ("spills", "stack") if row[name] != "0"]
        known = table.get(key, {})
        changed = [name for name in row if row[name] != known.get(name)] if comparable else []
        bad += [f"{name} {known.get(name, 'not in the table')} -> {row[name]}" for name in changed]
        if bad:
            found.append(f"{' '.join(key)}: {', '.join(bad)}")
    return found


def read_table() -> dict[tuple[str, ...], dict[str, str]]:
    with TABLE.open(newline="") as file:
        return {tuple(row[name] for name in KEYS): row for row in csv.DictReader(file)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--only", nargs="+", metavar="CASE", default=["*"], help="cases, or patterns of them")
    parser.add_argument("--write", action="store_true", help="make the figures the table")
    arguments = parser.parse_args()
    rows = rows_for(jobs_for(arguments.target, arguments.dtype, arguments.only))
    if arguments.write:
        table = read_table() if TABLE.exists() else {}
        table |= {tuple(row[name] for name in KEYS): row for row in rows}
        # In this order, and no others: none of before a figure was added.
        keys = [entry.key(dtype, target) for entry, dtype, target in jobs_for(TARGETS, DTYPES, ["*"])]
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, (*KEYS, *FIGURES), lineterminator="\n")
            writer.writeheader()
            known = [table[key] for key in keys if key in table]
            writer.writerows(row for row in known if row.keys() == rows[0].keys())
    found = complaints(rows, read_table())
    print(*found, f"{len(rows)} kernels compiled with triton {triton.__version__}, {len(found)} to look at", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
