"""Compiles every kernel without a GPU: registers, spills, instructions, and how wide accesses are.

    python -m tools.compiled [--target sm_90 ...] [--dtype bf16 ...] [--only '2d k=2' ...] [--write]

Each launch is recorded from the operation's own launcher, on tensors that are never read, so that
the compiler is given what a GPU would be. The figures are the registers, spills and the stack; the
occupancy, in percent, that registers and shared memory leave; the instructions, those of the main
loop, those of its shortest turn, and how many of these an element takes; and how wide accesses are.

The figures are compared with compiled.csv beside this file: a kernel that spills, has a stack or
differs from its row is named, and the exit status is 1. With --write they become the table.
Under TRITON_INTERPRET=1 nothing can be compiled.
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import networkx as nx
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from regfast.kernels.launch import LAUNCHES, Launch, Target

from .assembly import AMDGCN, SASS, accesses, instructions, shortest
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


class Recorded(NamedTuple):
    """A launch that was recorded and not made; its values are by name, with the constants."""

    kernel: Any
    values: dict[str, Any]
    options: dict[str, Any]


def record(call: Callable[[], Any], target: str = "sm_90") -> list[Recorded]:
    """The launches that a call of a launcher would give a GPU of the target."""
    launches: list[Recorded] = []
    gpu = target_of(target)
    told = Target(gpu.warp_size, gpu.backend == "cuda" and gpu.arch >= 90)

    def note(launch: Launch, *args: Any) -> None:
        if launch.grid[0] > 0:
            given = dict(zip(launch.kernel.arg_names, (*args, *launch.numbers)))
            launches.append(Recorded(launch.kernel, given | launch.options, launch.options))

    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(Launch, "__call__", note))
        # A launch that was prepared for another target, or cut otherwise, must not be found.
        patches.enter_context(patch.dict(LAUNCHES, clear=True))
        for name, module in sys.modules.items():
            if name.startswith("regfast.kernels.") and hasattr(module, "target_of"):
                patches.enter_context(patch.object(module, "target_of", lambda device: told))
        call()
    return launches


def compile_for(target: str, launch: Recorded) -> Any:
    """What Triton compiles for a launch: specialised on None, on 1 and on multiples of 16."""
    kernel, values, options = launch
    signature, constants, attributes = {}, {}, {}
    for param in kernel.params:
        value = values[param.name]
        points, real = isinstance(value, torch.Tensor), param.annotation == "fp64"
        special = not (points or real or param.do_not_specialize)
        if param.is_constexpr or value is None or (special and value == 1):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        if points:
            signature[param.name] = "*" + TYPES[value.dtype]
        else:
            integer = "i32" if -(2**31) <= value < 2**31 else "i64"
            signature[param.name] = "fp64" if real else integer
        if points or (special and value % 16 == 0):
            attributes[(param.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    rest = {name: value for name, value in options.items() if name not in kernel.arg_names}
    return triton.compile(source, target=target_of(target), options=rest)


def read_nvidia(cubin: bytes) -> tuple[int, int, int, nx.DiGraph]:
    """The registers, the bytes of stack, the spills and the instructions of a program."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run([tools / "cuobjdump", "-res-usage", file.name]).stdout
        found = instructions(run([tools / "nvdisasm", "-c", file.name]).stdout, SASS)
    figure = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", usage)}
    spills = sum(name.startswith(("LDL", "STL")) for _, name in found.nodes(data="name"))
    return figure["REG"], figure["STACK"], spills, found


def read_amd(text: str) -> tuple[int, int, int, nx.DiGraph]:
    """Spills are vector registers in memory; scalar ones spill into lanes of vector registers."""
    count = {name: int(number) for name, number in re.findall(r"\.(\w+):\s+(\d+)$", text, re.M)}
    stack, spills = count["private_segment_fixed_size"], count["vgpr_spill_count"]
    return count["vgpr_count"], stack, spills, instructions(text, AMDGCN)


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


def figures(launch: Recorded, target: str, work: Work | None = None) -> dict[str, Any]:
    """What the compiler makes of a launch. Without `work` the figures of an element are empty."""
    compiled = compile_for(target, launch)
    asm, shared = compiled.asm, compiled.metadata.shared
    read = read_amd(asm["amdgcn"]) if "amdgcn" in asm else read_nvidia(asm["cubin"])
    registers, stack, spills, program = read
    way = shortest(program)
    return dict(
        registers=registers,
        occupancy=occupancy(target, registers, shared, launch.options["num_warps"]),
        shared=shared, stack=stack, spills=spills,
        instructions=len(program), loop=way.loop, executed=way.executed,
        elements="x".join(f"{size:g}" for size in work.lane) if work else "",
        per_element=f"{work.per_element(way):.2f}" if work else "",
        loads=accesses(program, "load"), stores=accesses(program, "store"),
    )  # fmt: skip


class Entry(NamedTuple):
    """One launch: a kernel of an operation, on the tensors of a case in a format."""

    operation: str
    direction: str
    case: str
    channels_last: bool

    @property
    def problem(self) -> Problem:
        return PROBLEMS[self.operation, self.case]

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


def row_of(entry: Entry, dtype: torch.dtype, target: str) -> dict[str, str]:
    """A row of the table: what was compiled, and its figures."""
    calls = entry.problem.calls(dtype, entry.channels_last)
    both = [call for call in (calls.forward, calls.backward) if call is not None]
    launches = [launch for call in both for launch in record(call, target)]
    name, work = f"_{entry.direction}_kernel", None
    launch = [each for each in launches if each.kernel.__name__ == name][entry.problem.launch]
    # The others, "order" and "finish", take a few numbers.
    if entry.direction in ("forward", "backward"):
        threads = launch.options["num_warps"] * target_of(target).warp_size
        work = entry.problem.work(launch.values, threads)
    row = dict(zip(KEYS, entry.key(dtype, target))) | figures(launch, target, work)
    return {name: str(value) for name, value in row.items()}


def jobs_for(targets: Iterable[str], dtypes: Iterable[str], only: Iterable[str]) -> list[tuple]:
    """The rows of cases that a pattern of `only` matches; rare ones have fewer dtypes, a target."""
    return [
        (entry, dtype, target)
        for entry, dtype, target in itertools.product(ENTRIES, TYPES, targets)
        if TYPES[dtype] in dtypes and any(fnmatchcase(entry.case, each) for each in only)
        if not entry.problem.rare or (dtype != torch.float16 and target == "sm_90")
    ]


def complaint(row: dict[str, str], known: dict[str, str]) -> str:
    """What spills, has a stack, or with the table's Triton is not as in its row."""
    known = known | {"spills": "0", "stack": "0"}
    names = row if triton.__version__ == TRITON else ("spills", "stack")
    changed = [name for name in names if row[name] != known.get(name)]
    return ", ".join(f"{n} {known.get(n, 'not in the table')} -> {row[n]}" for n in changed)


def read_table() -> dict[tuple[str, ...], dict[str, str]]:
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
    options = parser.parse_args()
    for each in options.only:
        if not jobs_for(options.target, options.dtype, [each]):
            parser.error(f"--only {each!r} chooses no kernel of these targets and dtypes")
    jobs = jobs_for(options.target, options.dtype, options.only)
    with ProcessPoolExecutor(2) as processes:
        rows = list(processes.map(row_of, *zip(*jobs)))
    found, table = {tuple(row[name] for name in KEYS): row for row in rows}, read_table()
    if options.write:
        table |= found
        # In the order of ENTRIES, without the rows of cases that are no more.
        keys = [entry.key(*rest) for entry, *rest in jobs_for(TARGETS, DTYPES, ["*"])]
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(table[key] for key in keys if key in table)
    said = {key: complaint(row, table.get(key, {})) for key, row in found.items()}
    bad = [f"{' '.join(key)}: {text}" for key, text in said.items() if text]
    for line in bad:
        print(line)
    print(f"{len(rows)} kernels compiled with triton {triton.__version__}, {len(bad)} to look at")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
