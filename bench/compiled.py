"""What the compiler makes of every kernel, with no GPU: registers, spills, the loop's instructions, and how wide accesses are.

    python bench/compiled.py [--target sm_90 ...] [--only 2d ...] [--write]

Each launch of `ENTRIES` is recorded from the operation's own launcher, on tensors that are never
read: what is compiled is what a GPU would be given, the same blocks, the same specialisation on
alignment. Without --write the figures are compared with compiled.csv beside this file, and a kernel
that spills, has a stack or differs from its row is named and makes the exit status 1; with it they
become the table. (Not to be run under TRITON_INTERPRET=1, which leaves nothing to compile.)
"""

from __future__ import annotations

import argparse
import csv
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
from regfast.kernels.launch import LAUNCHES, Launch

TABLE = Path(__file__).with_suffix(".csv")
# Whose figures the table has. Of another Triton's kernels, only spills and stacks are complained of.
TRITON = "3.7.1"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def target_of(name: str) -> GPUTarget:
    """Triton's target of an architecture: "sm_90", "gfx942"."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


class Recorded(NamedTuple):
    """A launch that was not made: the kernel, its arguments and its options."""

    kernel: Any
    args: tuple
    options: dict[str, Any]


def record(call: Callable[[], Any], target: str = "sm_90") -> list[Recorded]:
    """The launches that a call of a launcher would give a GPU of the target."""
    launches: list[Recorded] = []

    def note(launch: Launch, *args: Any) -> None:
        if launch.grid[0] > 0:
            launches.append(Recorded(launch.kernel, (*args, *launch.numbers), launch.options))

    with (
        patch.object(Launch, "__call__", note),
        # A launch that was prepared for another target, or cut otherwise, must not be found.
        patch.dict(LAUNCHES, clear=True),
        patch.object(max_blur_pool, "warp_size", lambda device: target_of(target).warp_size),
    ):
        call()
    return launches


def source_of(launch: Recorded) -> tuple[ASTSource, dict[str, Any]]:
    """The source and compiler options of one launch, specialised as Triton's launcher would: on None, 1 and multiples of 16."""
    kernel, args, options = launch
    values = dict(zip(kernel.arg_names, args)) | {name: value for name, value in options.items() if name in kernel.arg_names}
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


def nvidia_figures(cubin: bytes) -> dict[str, int | str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    figure = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    ops = [op for _, op, _ in instructions(sass, SASS)]
    loads, stores = sass_bits(ops, "LDG"), sass_bits(ops, "STG")
    return dict(
        registers=int(figure["REG"]), stack=int(figure["STACK"]), shared=int(figure["SHARED"]),
        spills=sum(op.startswith(("LDL", "STL")) for op in ops), instructions=len(ops), loop=longest_loop(sass, SASS),
        loads=widths(loads), stores=widths(stores),
    )  # fmt: skip


# An instruction's name, and the label that it branches to if it does.
SASS = r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)[^;\n]*?(?:`\((\.L\w+)\))?\s*;"
AMDGCN = r"^\s+([a-z][a-z0-9_]+)(?:[ \t]+(\.LBB\w+))?"


def instructions(text: str, pattern: str) -> list[tuple[int, str, str]]:
    """Every instruction of an assembly: where in the text it is, its name, and the label that it names, if any."""
    return [(found.start(), found.group(1), found.group(2) or "") for found in re.finditer(pattern, text, flags=re.M)]


def longest_loop(text: str, pattern: str) -> int:
    """The instructions from a branch's label back to the branch, of the longest loop."""
    found = instructions(text, pattern)
    labels = {label.group(1): label.start() for label in re.finditer(r"^(\.L\w+):", text, flags=re.M)}
    lengths = [
        sum(labels[label] < place <= end for place, _, _ in found) for end, _, label in found if labels.get(label, end) < end
    ]
    return max(lengths, default=0)


def sass_bits(ops: list[str], kind: str) -> list[int]:
    """The width of every access of a kind; one that names none is of 32 bits."""
    named = [re.search(r"\.[US]?(8|16|64|128)\b", op) for op in ops if op.startswith(kind)]
    return [int(width.group(1)) if width else 32 for width in named]


def amd_figures(text: str) -> dict[str, int | str]:
    """Spills are those of vector registers, to memory. (Scalar registers spill into lanes of vector registers.)"""
    counts = {name: int(count) for name, count in re.findall(r"\.(\w+):\s+(\d+)$", text, flags=re.M)}
    ops = [op for _, op, _ in instructions(text, AMDGCN)]
    bits = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    loads, stores = (
        [bits.get(width, 16) for op in ops for width in re.findall(rf"^(?:global|buffer)_{kind}_(\w+)", op)]
        for kind in ("load", "store")
    )
    return dict(
        registers=counts["vgpr_count"], stack=counts["private_segment_fixed_size"], shared=counts["group_segment_fixed_size"],
        spills=counts["vgpr_spill_count"], instructions=len(ops), loop=longest_loop(text, AMDGCN),
        loads=widths(loads), stores=widths(stores),
    )  # fmt: skip


def widths(bits: list[int]) -> str:
    """How many accesses there are of each width in bits, the widest first: "2x128 4x16"."""
    return " ".join(f"{bits.count(width)}x{width}" for width in sorted(set(bits), reverse=True))


def figures(launch: Recorded, target: str) -> dict[str, int | str]:
    source, rest = source_of(launch)
    compiled = triton.compile(source, target=target_of(target), options=rest)
    return amd_figures(compiled.asm["amdgcn"]) if target.startswith("gfx") else nvidia_figures(compiled.asm["cubin"])


class Problem(NamedTuple):
    """What an operation is compiled for: in which directions, with channels innermost or not, and how its launcher is called.

    A direction names a kernel: a forward or a backward may launch a second one, "order" or "finish".
    `call` takes a direction, a dtype and whether channels are innermost, and calls the launcher that
    launches that kernel.
    """

    directions: tuple[str, ...]
    formats: tuple[bool, ...]
    call: Callable[[str, torch.dtype, bool], Any]


def pool(rank: int, kernel_size: int, stride: int, padding: int, padding_mode: str = "partial") -> Window:
    return max_blur_window(rank, kernel_size, stride, padding, 1, False, False, 1.7, None, "binomial", padding_mode)


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


def pooling(operation: str, window: Window, shape: tuple[int, ...]) -> Problem:
    def call(direction: str, dtype: torch.dtype, channels_last: bool) -> None:
        memory_format = CHANNELS_LAST[window.rank] if channels_last else torch.contiguous_format
        x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
        POOLINGS[operation, direction](x, empty_output(x, window), window)

    directions = tuple(direction for owner, direction in POOLINGS if owner == operation)
    return Problem(directions, (False, True) if window.rank > 1 else (False,), call)


def activated(window: Window) -> Problem:
    """Images rectified on the way, of which a blur is a pooling too."""
    return pooling("max_blur_pool", window._replace(activation="relu"), IMAGE)


def batch(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> torch.Tensor:
    """A batch on the host, uninitialised: by their addresses a launcher knows whether it writes where it reads."""
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def blend(
    read: torch.dtype | None = None, from_contiguous: bool = False, boxes: bool = False,
    in_place: bool = False, directions: tuple[str, ...] = ("forward",),
) -> Problem:  # fmt: skip
    """MixUp of images, read in another dtype and then normalised, or in another format, or in place
    and with a lam that is a number; or CutMix, with a lam a sample.
    """
    n, c, *_ = shape = (8, 3, 224, 224)
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

    return Problem(directions, (True,) if from_contiguous else (False, True), call)


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

    return Problem(directions, (False, True) if positions else (False,), call)


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

    return Problem(directions, (False,), call)


SIGNAL, IMAGE, VOLUME = (64, 64, 4096), (256, 64, 112, 112), (16, 64, 32, 32, 32)
PROBLEMS = {
    ("max_blur_pool", "1d k=2"): pooling("max_blur_pool", pool(1, 2, 2, 0), SIGNAL),
    ("max_blur_pool", "2d k=2"): pooling("max_blur_pool", pool(2, 2, 2, 0), IMAGE),
    ("max_blur_pool", "2d (3, 2, 1)"): pooling("max_blur_pool", pool(2, 3, 2, 1), IMAGE),
    ("max_blur_pool", "2d k=2 reflect"): pooling("max_blur_pool", pool(2, 2, 2, 0, "reflect"), IMAGE),
    ("max_blur_pool", "2d (3, 2, 1) relu"): activated(pool(2, 3, 2, 1)),
    ("max_blur_pool", "3d k=2"): pooling("max_blur_pool", pool(3, 2, 2, 0), VOLUME),
    ("blur_pool", "1d"): pooling("blur_pool", blur(1), SIGNAL),
    ("blur_pool", "2d"): pooling("blur_pool", blur(2), IMAGE),
    ("blur_pool", "2d relu"): activated(blur(2)),
    ("blur_pool", "3d"): pooling("blur_pool", blur(3), VOLUME),
    ("mixup", "images"): blend(directions=("forward", "order", "backward")),
    ("mixup", "images in place"): blend(in_place=True),
    ("mixup", "boxes"): blend(boxes=True, directions=("forward", "backward")),
    ("mixup", "uint8"): blend(torch.uint8),
    ("mixup", "uint8 from contiguous"): blend(torch.uint8, from_contiguous=True),
    ("mixup_cross_entropy", "rows"): loss((1024, 1000), directions=("forward", "finish", "backward")),
    ("mixup_cross_entropy", "rows smoothed"): loss((1024, 1000), smoothed=True),
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

    def record(self, dtype: torch.dtype, target: str) -> Recorded:
        """What the launcher would give a GPU of the target."""
        call = PROBLEMS[self.operation, self.case].call
        launches = record(lambda: call(self.direction, dtype, self.channels_last), target)
        (launch,) = [launch for launch in launches if launch.kernel.__name__ == f"_{self.direction}_kernel"]
        return launch


ENTRIES = [
    Entry(operation, direction, case, channels_last)
    for (operation, case), problem in PROBLEMS.items()
    for direction in problem.directions
    for channels_last in problem.formats
]
KEYS = ("operation", "direction", "case", "format", "dtype", "target")


def row_of(entry: Entry, dtype: torch.dtype, target: str) -> dict[str, str]:
    """A row of the table: what was compiled, and its figures."""
    layout = "channels last" if entry.channels_last else "contiguous"
    key = dict(zip(KEYS, (entry.operation, entry.direction, entry.case, layout, TYPES[dtype], target)))
    return {name: str(value) for name, value in (key | figures(entry.record(dtype, target), target)).items()}


def rows_for(targets: list[str], only: list[str]) -> list[dict[str, str]]:
    """The rows of the targets, of the cases that begin with one of `only`."""
    chosen = [entry for entry in ENTRIES if any(entry.case.startswith(case) for case in only)]
    jobs = itertools.product(chosen, (torch.float16, torch.bfloat16, torch.float32), targets)
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
    parser.add_argument("--only", nargs="+", metavar="CASE", default=[""], help="cases by the beginning of their name: 2d")
    parser.add_argument("--write", action="store_true", help="make the figures the table")
    arguments = parser.parse_args()
    rows = rows_for(arguments.target, arguments.only)
    if arguments.write:
        table = read_table() if TABLE.exists() else {}
        table |= {tuple(row[name] for name in KEYS): row for row in rows}
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(table.values())
    found = complaints(rows, read_table())
    print(*found, f"{len(rows)} kernels compiled with triton {triton.__version__}, {len(found)} to look at", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
