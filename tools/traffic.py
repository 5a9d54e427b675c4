"""What a launch asks of memory, counted with no GPU: a model of its traffic at L1, at L2 and at device memory.

    python bench/traffic.py OP [OP ...] [--candidates columns=8,unroll=2 rows=4 ...] [--out FILE]

An operation's own launchers run in Triton's interpreter on a toy problem. What their loads and stores touch where the mask is
true is counted: the elements, and the distinct lines of 128 bytes. (Atomics are not. A GPU also moves parts of lines, 32 bytes at
a time, so that a tile's edge may cost it less than is counted here. A pooling's lanes beyond the last read what that one does:
of a toy whose lanes are no whole programs, elements and L1 say little.) The table has

    loads, stores   the elements asked for, per element of the first input

and, in bytes, as multiples of the floor, which is what the operation must move:

    L1       what loads and stores ask for
    lines    the lines under each load or store of a tile, summed: far more than L1 where neighbouring lanes are far apart
    L2       the distinct lines of each program, summed: all re-use within a program is free, and none between programs
    device   what the L2 has to fetch or to write back, the programs running one after another in launch order
    grid     the distinct lines of the whole launch: with fewer it cannot be done

The L2 is empty at first, drops what was used least recently and is sized in bytes, so that cuts into few large programs and into
many small ones have the same. It holds the floor of --l2 samples, by default one, which is more than lies between neighbouring
blocks and less than the batch, as on a GPU: an H100's 50 MB hold 25 of 256 samples of (64, 112, 112), pooled in bfloat16. (A
sample of (N, C) logits is one row, whose label shares its line with others': give those eight.)

A candidate changes fields of the cut that a launcher asks for: of the poolings' `CUTS`, or of what the loss's `cut_for` answers.
It is ranked with the pinned cut, by device, then L1, then L2, each to a hundredth of the floor. The pinned cut is the toy's; a
large batch may be cut otherwise, and what it gets can be given as a candidate. A pooling's lane is a thread, so that its
warps are a cut too; of the loss they change nothing here.
"""

from __future__ import annotations

import os

# Triton reads it where a kernel is defined.
os.environ["TRITON_INTERPRET"] = "1"

import argparse
import contextlib
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import report
import torch
from contest import DTYPES, FORMATS, Case, formats_of, leaves
from contestants import FUNCTIONS, OPERATIONS
from interpreter import mended
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

import regfast
from regfast.kernels.cuts import CUTS
from regfast.kernels.launch import LAUNCHES
from regfast.ops import OPERATIONS as KERNELS
from regfast.ops.schema import kernels_of

LINE = 128
KINDS = ("loads", "stores")
DIRECTIONS = ("forward", "backward")
FIGURES = ("L1", "lines", "L2", "device", "grid")
COLUMNS = ("operation", "format", "direction", "cut", "programs", *KINDS, *FIGURES)
# The key of a line: its number in a tensor, with the bit WRITE if it is stored to, and above that the tensor's number.
WRITE = 1 << 40


class CandidateError(Exception):
    """A candidate that cannot be measured, and why."""


class Launch:
    """What the programs of one launch ask of the tensors they are given. A figure is an array, (tensors, loads and stores).

    Lines are counted from the start of a tensor's storage, which CUDA's allocator aligns to whole lines and the CPU's does not.
    Arguments that share a storage are one tensor, with the names of all.
    """

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        names, ends = defaultdict(list), {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                names[storage.data_ptr()].append(name)
                ends[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()
        self.kernel = kernel
        self.names = ["/".join(names[start]) for start in sorted(names)]
        self.starts, self.ends = np.array(sorted(ends)), np.array([ends[start] for start in sorted(ends)])
        self.elements, self.asked, self.touched = (np.zeros((len(names), 2), int) for _ in range(3))
        self.programs: dict[int, list[np.ndarray]] = defaultdict(list)

    def note(self, builder: InterpreterBuilder, pointers: TensorHandle, mask: TensorHandle, write: bool) -> None:
        """Counts one load or store of the running program.

        Raises:
            ValueError: for an address in none of the tensors.
        """
        # The interpreter computes masks as integers.
        addresses = pointers.data[mask.data.astype(bool)].astype(np.int64)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        tensors = np.searchsorted(self.starts, addresses, side="right") - 1
        if np.any((tensors < 0) | (addresses + size > self.ends[tensors])):
            raise ValueError(f"{self.kernel} asks for an address outside the tensors it was given")
        kinds = (2 * tensors + write) * WRITE
        lines = np.unique(kinds + (addresses - self.starts[tensors]) // LINE)
        self.elements += self.count(kinds)
        self.asked += size * self.count(kinds)
        self.touched += self.count(lines)
        # A GPU starts programs with x varying fastest, the interpreter runs them with z varying fastest.
        (x, y, z), (size_x, size_y, _) = builder.grid_idx, builder.grid_dim
        self.programs[x + size_x * (y + size_y * z)].append(lines)

    def count(self, keys: np.ndarray) -> np.ndarray:
        """How many of the keys are of each tensor's loads and of its stores."""
        return np.bincount(keys // WRITE, minlength=2 * len(self.names)).reshape(-1, 2)

    def figures(self, l2: int) -> dict[str, np.ndarray]:
        """The elements, and the bytes of FIGURES with an L2 of so many bytes."""
        lines = np.concatenate([np.unique(np.concatenate(noted)) for _, noted in sorted(self.programs.items())])
        missed = np.fromiter(misses(lines.tolist(), l2 // LINE), int)
        counts = (self.touched, self.count(lines), self.count(missed), self.count(np.unique(lines)))
        return {"elements": self.elements} | dict(zip(FIGURES, (self.asked, *(LINE * count for count in counts))))


def misses(keys: Iterable[int], capacity: int) -> Iterator[int]:
    """Of the lines asked for one after another, those that a cache of `capacity` lines has to read or to write back.

    A line is written back once for all stores to it while it is in the cache, and a store does not read it first.
    """
    cache: OrderedDict[int, bool] = OrderedDict()
    for key in keys:
        line, write = key & ~WRITE, bool(key & WRITE)
        if line not in cache or (write and not cache[line]):
            yield key
        cache[line] = cache.get(line, False) or write
        cache.move_to_end(line)
        if len(cache) > capacity:
            cache.popitem(last=False)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Yields the launches that the interpreter makes within the block."""
    launches: list[Launch] = []
    on_host = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def begin(executor, args, kwargs):
        given = on_host(executor, args, kwargs)
        launches.append(Launch(executor.fn.__name__, dict(zip(executor.arg_names, given[0])) | given[1]))
        return given

    def noted_load(builder, pointers, mask, *args, **kwargs):
        launches[-1].note(builder, pointers, mask, write=False)
        return load(builder, pointers, mask, *args, **kwargs)

    def noted_store(builder, pointers, value, mask, *args, **kwargs):
        launches[-1].note(builder, pointers, mask, write=True)
        return store(builder, pointers, value, mask, *args, **kwargs)

    # Every load and store, masked or not, by pointers or by a descriptor, ends in these two.
    with (
        mended(),
        patch.object(GridExecutor, "_init_args_hst", begin),
        patch.object(InterpreterBuilder, "create_masked_load", noted_load),
        patch.object(InterpreterBuilder, "create_masked_store", noted_store),
    ):
        yield launches


class Asked(tuple):
    """Cuts to choose from, of which the one that is asked for is answered by a function."""

    answer: Callable[[Any], Any]

    def __getitem__(self, i):
        return self.answer(super().__getitem__(i))


@contextlib.contextmanager
def cut_by(candidate: dict[str, Any]) -> Iterator[list[Any]]:
    """Within the block every cut that a launcher asks for has the candidate's fields. Yields what was asked for."""
    answers: list[Any] = []

    def answer(cut):
        if not candidate.keys() <= set(cut._fields):
            raise CandidateError(f"{written(candidate)}: the fields of a cut are {', '.join(cut._fields)}")
        # One number stands for a choice of one.
        fields = {
            name: (value,) if isinstance(getattr(cut, name), tuple) and isinstance(value, int) else value
            for name, value in candidate.items()
        }
        answers.append(cut._replace(**fields))
        return answers[-1]

    def changed(cut_for: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: answer(cut_for(*args, **kwargs))

    asked = type("Asked", (Asked,), {"answer": staticmethod(answer)})
    with contextlib.ExitStack() as patches:
        # A launch that has been prepared asks for no cut.
        patches.enter_context(patch.dict(LAUNCHES, clear=True))
        patches.enter_context(patch.dict(CUTS, {kind: asked(cuts) for kind, cuts in CUTS.items()}))
        for module in map(kernels_of, KERNELS):
            if hasattr(module, "cut_for"):
                patches.enter_context(patch.object(module, "cut_for", changed(module.cut_for)))
        yield answers


def written(cut: dict[str, Any]) -> str:
    """A cut as a candidate is given: columns=8/14,rows=4."""
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in cut.items()}
    return ",".join(f"{name}={'/'.join(map(str, value))}" for name, value in values.items())


class Record(NamedTuple):
    """What a call returned, the launches it made and the cuts they asked for."""

    result: Any
    launches: list[Launch]
    cuts: list[Any]


def record(call: Callable[[], Any], candidate: dict[str, Any]) -> Record:
    """Calls with the kernels cut as the candidate says.

    Raises:
        CandidateError: where a cut has no such fields, no launcher asks for a cut, or the kernel does not run when so cut.
    """
    with regfast.backend("triton"), recording() as launches, cut_by(candidate) as cuts:
        try:
            result = call()
        except InterpreterError as error:
            if candidate:
                raise CandidateError(f"{written(candidate)}: {error}") from error
            raise
    if candidate and not cuts:
        raise CandidateError(f"{written(candidate)}: no launcher asks for a cut")
    return Record(result, launches, cuts)


def rows_of(case: Case, directions: list[str], candidate: dict[str, Any], samples: float) -> list[report.Row]:
    """A row for each direction, with the candidate's cut; the L2 holds the floor of so many samples."""
    torch.manual_seed(0)
    operation = OPERATIONS[case.operation]
    inputs = operation.inputs(case, torch.device("cpu"))
    step = operation.contestants["regfast"](case)
    if isinstance(step, torch.nn.Module):
        step = step.to(case.torch_dtype)
    sources = leaves(step, inputs)
    records = {"forward": record(lambda: step(*inputs), candidate)}
    y = records["forward"].result
    if "backward" in directions:
        records["backward"] = record(lambda: torch.autograd.grad(y, sources, torch.ones_like(y)), candidate)
    rows = []
    for direction in directions:
        floor = operation.floor(inputs, y).of(direction)
        sizes = {"inputs": inputs[0].numel(), "floor": floor, "l2": int(samples * floor / case.shape[0])}
        cut = "; ".join(dict.fromkeys(written(cut._asdict()) for cut in records[direction].cuts))
        key = case._replace(direction=direction)._asdict() | {"cut": cut, "pinned": not candidate}
        rows.append(key | sizes | figures_of(records[direction].launches, sizes["l2"]))
    return rows


def figures_of(launches: list[Launch], l2: int) -> dict[str, Any]:
    """The sums over launches, each of which begins with an empty cache, and every launch's figures by tensor."""
    figures = [launch.figures(l2) for launch in launches]
    totals = {name: sum(int(each[name].sum()) for each in figures) for name in FIGURES}
    totals |= {kind: sum(int(each["elements"][:, i].sum()) for each in figures) for i, kind in enumerate(KINDS)}
    details = [
        {
            "kernel": launch.kernel,
            "programs": len(launch.programs),
            "tensors": {
                name: {kind: {figure: int(values[t, i]) for figure, values in each.items()} for i, kind in enumerate(KINDS)}
                for t, name in enumerate(launch.names)
            },
        }
        for launch, each in zip(launches, figures)
    ]
    return {"programs": sum(len(launch.programs) for launch in launches)} | totals | {"launches": details}


def rank(row: report.Row) -> tuple[float, ...]:
    return tuple(round(row[figure] / row["floor"], 2) for figure in ("device", "L1", "L2"))


def cells(row: report.Row) -> list[str]:
    case = Case(*(row[field] for field in Case._fields))
    counts = [f"{row[kind] / row['inputs']:.2f}" for kind in KINDS]
    ratios = [f"{row[figure] / row['floor']:.2f}" for figure in FIGURES]
    cut = row["cut"] + " (pinned)" * (row["pinned"] and bool(row["cut"]))
    return [case.call, case.format, case.direction, cut, str(row["programs"]), *counts, *ratios]


def integers(separator: str) -> Callable[[str], tuple[int, ...]]:
    def parse(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(separator)))

    parse.__name__ = f"integers joined by '{separator}'"
    return parse


def candidate(text: str) -> dict[str, Any]:
    try:
        fields = {name: tuple(map(int, value.split("/"))) for name, value in (pair.split("=") for pair in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form columns=8/14,rows=4") from error
    return {name: value if len(value) > 1 else value[0] for name, value in fields.items()}


def cases(operation: str, options: argparse.Namespace) -> Iterator[Case]:
    """Those of the shapes that the operation has for this, in the formats chosen."""
    row = OPERATIONS[operation]
    for arguments in [options.arguments] if options.arguments else row.arguments:
        for shape in [options.shape] if options.shape else row.shapes["traffic"]:
            formats = [format for format in options.format if format in formats_of(shape)]
            yield from (Case(operation, arguments, shape, format, options.dtype, "") for format in formats)


def parse(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("operations", nargs="+", choices=FUNCTIONS, metavar="OP", help=" or ".join(FUNCTIONS))
    add("--arguments", type=integers(","), help="instead of each operation's own, for example 2,2,0")
    add("--shape", type=integers("x"), help="instead of the operation's own")
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    add("--format", choices=FORMATS, nargs="+", default=list(FORMATS), help="default: all")
    add("--direction", choices=DIRECTIONS, nargs="+", default=DIRECTIONS, help="default: all")
    add("--candidates", type=candidate, nargs="+", default=[], metavar="FIELD=INTEGER,...", help="cuts to rank")
    add("--l2", type=float, default=1.0, metavar="SAMPLES", help="how many samples' floor it holds (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="the figures in JSON, by launch, tensor, loads and stores")
    return parser, parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """0, or 2 where an option asks for what there is not."""
    parser, options = parse(argv)
    found, rows = report.setting("cpu"), []
    for operation in options.operations:
        directions = [direction for direction in options.direction if direction in OPERATIONS[operation].directions]
        for case in cases(operation, options):
            try:
                cuts = [rows_of(case, directions, fields, options.l2) for fields in ({}, *options.candidates)]
            except CandidateError as error:
                parser.error(f"{case.call}: {error}")
            for same_direction in zip(*cuts):
                rows += sorted(same_direction, key=rank)
    print(report.markdown([list(COLUMNS), *map(cells, rows)], right=COLUMNS[4:]))
    if options.out:
        report.keep(options.out, found | {"rows": rows}, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
