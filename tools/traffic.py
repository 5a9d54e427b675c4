"""Counts what a launch asks of memory, without a GPU: its traffic at L1, L2 and device memory.

    python -m tools.traffic OP [OP ...] [--only CASE ...]

Triton's interpreter runs the launchers of a case in bfloat16, on its toy of tools/problems.py or on
--shape. Counted is what loads and stores touch where their mask is true, but no atomics, and whole
lines of 128 bytes, where a GPU moves sectors of 32. (Lanes of a pooling beyond the image read too:
where they are many, elements and L1 say little.) The columns are elements per element of the input,
and then bytes as multiples of what the operation must move:

    loads    the elements asked for; and stores
    L1       what loads and stores ask for
    lines    the lines under each load or store of a tile, summed: many where lanes are far apart
    L2       the distinct lines of each program, summed: re-use within a program is free
    device   what the L2 fetches or writes back, the programs running one after another
    grid     the distinct lines of the whole launch: fewer are not possible

The L2 is empty at first, drops what was used least recently, and holds what --l2 samples must move:
by default one, more than lies between neighbouring blocks and less than the batch, as on a GPU. (A
sample of rows of logits is one row, and labels share lines: give those eight.)
"""

from __future__ import annotations

import os

# Triton reads it where a kernel is defined.
os.environ["TRITON_INTERPRET"] = "1"

import argparse
import contextlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tabulate import tabulate
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from regfast.ops import OPERATIONS
from tests.interpreter import mended

from .problems import PROBLEMS, Calls

Row = dict[str, Any]

LINE = 128
FORMATS = ("contiguous", "channels_last")
KINDS, FIGURES = ("loads", "stores"), ("L1", "lines", "L2", "device", "grid")
COLUMNS = ("operation", "case", "format", "direction", "programs", *KINDS, *FIGURES)
# The key of a line: its number in a tensor, with the bit WRITE if it is stored to, and above that
# the tensor's number.
WRITE = 1 << 40


class Launch:
    """What the programs of a launch ask of its tensors: arrays of (tensors, loads and stores).

    Lines are counted from the start of a tensor's storage, which CUDA's allocator aligns to whole
    lines and the CPU's does not. Arguments that share a storage are one tensor, with all names.
    """

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        found: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                start = value.untyped_storage().data_ptr()
                found[start, start + value.untyped_storage().nbytes()].append(name)
        self.kernel, self.names = kernel, ["/".join(found[span]) for span in sorted(found)]
        self.starts, self.ends = np.array(sorted(found)).T
        self.elements, self.asked, self.touched = (np.zeros((len(found), 2), int) for _ in range(3))
        self.programs: dict[int, list[np.ndarray]] = defaultdict(list)

    def note(self, builder: Any, pointers: Any, mask: Any, write: bool) -> None:
        """Counts a load or store of the running program; ValueError if it is of no tensor."""
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
        # A GPU starts programs with x varying fastest, the interpreter runs z fastest.
        (x, y, z), (size_x, size_y, _) = builder.grid_idx, builder.grid_dim
        self.programs[x + size_x * (y + size_y * z)].append(lines)

    def count(self, keys: np.ndarray) -> np.ndarray:
        """The number of keys by tensor, of its loads and of its stores."""
        return np.bincount(keys // WRITE, minlength=2 * len(self.names)).reshape(-1, 2)

    def figures(self, l2: int) -> dict[str, np.ndarray]:
        """The bytes of FIGURES with an L2 of so many bytes."""
        programs = [np.unique(np.concatenate(lines)) for _, lines in sorted(self.programs.items())]
        lines = np.concatenate(programs)
        missed = np.fromiter(misses(lines.tolist(), l2 // LINE), int)
        counts = [self.touched, *map(self.count, (lines, missed, np.unique(lines)))]
        return dict(zip(FIGURES, (self.asked, *(LINE * count for count in counts))))


def misses(keys: Iterable[int], capacity: int) -> Iterator[int]:
    """The keys, in their order, that a cache of `capacity` lines has to read or to write back.

    All stores to a line while it is in the cache are written back once; none reads it first.
    """
    cache: OrderedDict[int, int] = OrderedDict()
    for key in keys:
        line, write = key & ~WRITE, key & WRITE
        written = cache.pop(line, -1)
        if write > written:
            yield key
        cache[line] = max(write, written)
        if len(cache) > capacity:
            cache.popitem(last=False)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Yields the launches that the interpreter makes within the block."""
    launches: list[Launch] = []
    on_host = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def begin(executor, args, kwargs):
        given, named = on_host(executor, args, kwargs)
        launches.append(Launch(executor.fn.__name__, dict(zip(executor.arg_names, given)) | named))
        return given, named

    def noted_load(builder, pointers, mask, *args, **kwargs):
        launches[-1].note(builder, pointers, mask, write=False)
        return load(builder, pointers, mask, *args, **kwargs)

    def noted_store(builder, pointers, value, mask, *args):
        launches[-1].note(builder, pointers, mask, write=True)
        return store(builder, pointers, value, mask, *args)

    # Every load and store, masked or not, by pointers or by a descriptor, ends in these two.
    with (
        mended(),
        patch.object(GridExecutor, "_init_args_hst", begin),
        patch.multiple(
            InterpreterBuilder, create_masked_load=noted_load, create_masked_store=noted_store
        ),
    ):
        yield launches


def row_of(calls: Calls, direction: str, floor: int, l2: int) -> Row:
    """Sums over the launches of a call, each with an empty cache at first."""
    with recording() as launches:
        getattr(calls, direction)()
    figures = [launch.figures(l2) for launch in launches]
    totals = {name: int(sum(each[name].sum() for each in figures)) for name in FIGURES}
    elements = sum(launch.elements.sum(0) for launch in launches).tolist()
    row = {"direction": direction, "inputs": calls.elements, "floor": floor, "l2": l2}
    row["programs"] = sum(len(launch.programs) for launch in launches)
    return row | dict(zip(KINDS, elements)) | totals


def rows_of(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each case that is chosen, in each format and direction."""
    for (operation, case), problem in PROBLEMS.items():
        named = any(fnmatchcase(case, pattern) for pattern in options.only)
        shape = options.shape or problem.toy
        chosen = operation in options.operations and len(shape) == len(problem.toy)
        if chosen and (named if options.only else not problem.rare):
            for channels_last in problem.formats:
                torch.manual_seed(0)
                with mended():
                    calls = problem.make(shape, torch.bfloat16, channels_last, "cpu")
                key = {"operation": operation, "case": case, "format": FORMATS[channels_last]}
                for direction, floor in zip(("forward", "backward"), calls.floor):
                    if getattr(calls, direction) is not None:
                        l2 = int(options.l2 * floor / shape[0])
                        yield key | row_of(calls, direction, floor, l2)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("operations", nargs="+", choices=OPERATIONS, metavar="OP", help=", ".join(OPERATIONS))
    add("--only", nargs="+", default=[], metavar="CASE", help="cases or patterns, rare ones too")
    add("--shape", nargs="+", type=int, metavar="SIZE", help="for the cases of so many axes")
    add("--l2", type=float, default=1, metavar="SAMPLES", help="for how many it is (default: 1)")
    add("--out", type=Path, metavar="FILE", help="the rows in JSON")
    options = parser.parse_args()
    rows, table = list(rows_of(options)), []
    if not rows:
        parser.error("the options choose no case")
    for row in rows:
        units = dict.fromkeys(KINDS, row["inputs"]) | dict.fromkeys(FIGURES, row["floor"])
        table.append([row[name] / units[name] if name in units else row[name] for name in COLUMNS])
    print(tabulate(table, COLUMNS, tablefmt="pipe", floatfmt=".2f"))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
