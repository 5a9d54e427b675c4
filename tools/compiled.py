"""Compiles every kernel without a GPU: registers, spills, instructions, and how wide accesses are.

    python -m tools.compiled [--target sm_90 ...] [--dtype bf16 ...] [--only '2d k=2' ...] [--write]

Each launch of `ENTRIES` is recorded from the operation's own launcher, on tensors that are never
read: what is compiled is what a GPU would be given, the same blocks, the same specialisation on
alignment. The figures are the registers, spills and the stack; the occupancy, in percent, that
registers and shared memory leave; the instructions, those of the main loop, those of a turn of it
on its shortest way, and how many of these an element takes; and how wide accesses are.

Without --write the figures are compared with compiled.csv beside this file. A kernel that spills,
has a stack or differs from its row is named, and the exit status is 1. With --write the figures
become the table. Under TRITON_INTERPRET=1 nothing can be compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
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

from regfast.kernels.launch import LAUNCHES, Launch, Target

from .assembly import AMDGCN, SASS, Way, instructions, sass_bits, shortest, widths
from .problems import PROBLEMS, Problem, Work

TABLE = Path(__file__).with_suffix(".csv")
# The Triton of the table's figures. With another one, only spills and stacks are complained of.
TRITON = "3.7.1"
# An H200: the bytes a second of a device copy, measured, and the instructions a second that the
# lanes of 132 multiprocessors can issue, of 4 warps each a clock.
COPY, SLOTS = 4.28e12, 132 * 4 * 32 * 1.9e9
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("fp16", "bf16", "fp32")
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
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
    """A launch that was recorded and not made: the kernel, its arguments and its options."""

    kernel: Any
    args: tuple
    options: dict[str, Any]

    @property
    def values(self) -> dict[str, Any]:
        """The kernel's arguments by name, with the constants."""
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
    """A launch's source and options, specialised as by Triton: on None, 1 and multiples of 16."""
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
            # Triton specialises on integers alone.
            signature[param.name] = "fp64"
        elif value == 1 and not param.do_not_specialize:
            signature[param.name], constants[param.name] = "constexpr", value
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(param.num,)] = [["tt.divisibility", 16]]
    rest = {name: value for name, value in options.items() if name not in kernel.arg_names}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), rest


def output_of(tool: str, *arguments: str) -> str:
    """What one of the NVIDIA tools that Triton brings along prints."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def nvidia_figures(cubin: bytes) -> tuple[dict[str, int | str], Way]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = output_of("cuobjdump", "-res-usage", file.name)
        sass = output_of("nvdisasm", "-c", file.name)
    figure = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    found = instructions(sass, SASS)
    ops = [one.name for one in found]
    return dict(
        registers=int(figure["REG"]), stack=int(figure["STACK"]),
        spills=sum(op.startswith(("LDL", "STL")) for op in ops), instructions=len(ops),
        loads=widths(sass_bits(ops, "LDG")), stores=widths(sass_bits(ops, "STG")),
    ), shortest(found)  # fmt: skip


def amd_figures(text: str) -> tuple[dict[str, int | str], Way]:
    """Spills are vector registers in memory; scalar ones spill into lanes of vector registers."""
    counts = {name: int(count) for name, count in re.findall(r"\.(\w+):\s+(\d+)$", text, re.M)}
    found = instructions(text, AMDGCN)
    ops = [one.name for one in found]
    bits = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    loads, stores = (
        [bits.get(match[1], 16) for op in ops if (match := re.match(pattern, op))]
        for pattern in (r"(?:global|buffer)_load_(\w+)", r"(?:global|buffer)_store_(\w+)")
    )
    return dict(
        registers=counts["vgpr_count"], stack=counts["private_segment_fixed_size"],
        spills=counts["vgpr_spill_count"], instructions=len(ops),
        loads=widths(loads), stores=widths(stores),
    ), shortest(found)  # fmt: skip


def occupancy(target: str, registers: int, shared: int, num_warps: int) -> int:
    """The warps of a kernel that a multiprocessor has, or waves a SIMD, in percent of the most."""
    if target.startswith("gfx"):
        waves = min(8, 512 // (-(-registers // 8) * 8))
        # A workgroup is spread over four SIMDs.
        blocks = min(4 * waves // num_warps, 64 * 1024 // max(shared, 1))
        return 100 * blocks * num_warps // (4 * 8)
    # A quarter of the registers, and of the warps, is each scheduler's. A block has 1 KiB of shared
    # memory that is not its own.
    warps = min(64, 4 * (16384 // (-(-registers // 8) * 256)))
    memory = (163 if target == "sm_80" else 228) * 1024
    return 100 * min(32, warps // num_warps, memory // (shared + 1024)) * num_warps // 64


def foretold(per_element: float, occupancy: float, elements: int, floor: int) -> float:
    """The seconds that an H200 is foretold to take: tools/notes.md has the model and its errors.

    A kernel takes `per_element` instructions, has `occupancy` percent of a multiprocessor's warps,
    and must move `floor` bytes of device memory. The model knows nothing of the L2.
    """
    bandwidth, slots = 0.95 * COPY, 0.65 * SLOTS / (2 if occupancy < 12 else 1)
    return max(floor / bandwidth, per_element * elements / slots)


def figures(launch: Recorded, target: str, work: Work | None = None) -> dict[str, int | str]:
    """What the compiler makes of a launch. Without `work` the figures of an element are empty."""
    source, rest = source_of(launch)
    compiled = triton.compile(source, target=target_of(target), options=rest)
    amd = target.startswith("gfx")
    assembly = compiled.asm["amdgcn" if amd else "cubin"]
    found, way = amd_figures(assembly) if amd else nvidia_figures(assembly)
    shared = compiled.metadata.shared
    found |= dict(
        shared=shared, loop=way.loop, executed=way.executed,
        occupancy=occupancy(target, int(found["registers"]), shared, rest["num_warps"]),
        elements="x".join(f"{size:g}" for size in work.lane) if work else "",
        per_element=f"{work.per_element(way):.2f}" if work else "",
    )  # fmt: skip
    return {name: found[name] for name in FIGURES}


class Entry(NamedTuple):
    """One launch: a kernel of an operation, on the tensors of a case in a format."""

    operation: str
    direction: str
    case: str
    channels_last: bool

    @property
    def problem(self) -> Problem:
        return PROBLEMS[self.operation, self.case]

    def record(self, dtype: torch.dtype, target: str) -> Recorded:
        """The launch that a GPU of the target would be given."""
        calls, kernel = self.problem.calls(dtype, self.channels_last), f"_{self.direction}_kernel"
        both = [call for call in (calls.forward, calls.backward) if call is not None]
        launches = [launch for call in both for launch in record(call, target)]
        return [each for each in launches if each.kernel.__name__ == kernel][self.problem.launch]

    def is_for(self, dtype: torch.dtype, target: str) -> bool:
        """Whether the table has this row."""
        return not self.problem.rare or (dtype != torch.float16 and target == "sm_90")

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
    # The others, "order" and "finish", take a few numbers.
    has_elements = entry.direction in ("forward", "backward")
    work = entry.problem.work(launch.values, threads) if has_elements else None
    key = dict(zip(KEYS, entry.key(dtype, target)))
    return {name: str(value) for name, value in (key | figures(launch, target, work)).items()}


Job = tuple[Entry, torch.dtype, str]
Table = dict[tuple[str, ...], dict[str, str]]


def jobs_for(targets: Iterable[str], dtypes: Iterable[str], only: Iterable[str]) -> list[Job]:
    """The entries with a case that a pattern of `only` matches, for all targets and dtypes."""
    chosen = [entry for entry in ENTRIES if any(fnmatchcase(entry.case, each) for each in only)]
    types = [dtype for dtype, name in TYPES.items() if name in dtypes]
    return [job for job in itertools.product(chosen, types, targets) if job[0].is_for(*job[1:])]


def complaints(rows: list[dict[str, str]], table: Table) -> list[str]:
    """The rows with a spill or a stack, or with other figures than the table has of this Triton."""
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


def read_table() -> Table:
    with TABLE.open(newline="") as file:
        return {tuple(row[name] for name in KEYS): row for row in csv.DictReader(file)}


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--target", nargs="+", choices=TARGETS, default=TARGETS)
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    add("--only", nargs="+", metavar="CASE", default=["*"], help="cases, or patterns of them")
    add("--write", action="store_true", help="make the figures the table")
    arguments = parser.parse_args()
    jobs = jobs_for(arguments.target, arguments.dtype, arguments.only)
    with ProcessPoolExecutor(2) as processes:
        rows = list(processes.map(row_of, *zip(*jobs)))
    if arguments.write:
        table = read_table() if TABLE.exists() else {}
        table |= {tuple(row[name] for name in KEYS): row for row in rows}
        # In the order of ENTRIES, without rows of an older table: other cases, or other figures.
        keys = [entry.key(*rest) for entry, *rest in jobs_for(TARGETS, DTYPES, ["*"])]
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, (*KEYS, *FIGURES), lineterminator="\n")
            writer.writeheader()
            writer.writerows(r for k in keys if (r := table.get(k, {})).keys() == rows[0].keys())
    found = complaints(rows, read_table())
    print(*found, sep="\n", end="\n" * bool(found))
    print(f"{len(rows)} kernels compiled with triton {triton.__version__}, {len(found)} to look at")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
