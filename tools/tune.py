"""The best cut of every launch of a pooling: a sweep over what a lane has and a program streams.

    python -m tools.tune "2d k=2" "2d (3, 2, 1)" [--dtype bf16] [--format channels_last]
        [--direction backward] [--try columns=4,8 rows=8,16] [--out DIR]

Each case of tools/problems.py is swept in each dtype, format and direction. The candidates, all
combinations of `SPACE`, are compiled first, without the GPU; one that spills or has a stack is
never launched. The others are timed, and the best six again for longer, beside the pinned cut of
kernels/cuts.py, which is changed by hand. DIR gets tune.json, with every candidate, and tune.md,
with a row for each sweep. The exit status is 1 if a sweep has no row.

All calls have the same tensors. Images have 100 MB or more, about twice an H200's L2, so that each
finds little there from the one before. Signals of 16 bits (34 MB) fit: their times only rank cuts.
On a CPU the first value of each field is compiled for sm_90 and interpreted on the case's toy.
"""

from __future__ import annotations

import os

import torch

# Triton reads this where a kernel is defined. The processes that compile are "__mp_main__".
if __name__ == "__mp_main__":
    os.environ.pop("TRITON_INTERPRET", None)
elif __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import argparse
import json
import re
import timeit
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from tabulate import tabulate
from triton.errors import TritonError

from regfast.kernels.cuts import CUTS, Cut, _outputs_for
from regfast.kernels.launch import LAUNCHES

from .compiled import DTYPES, ENTRIES, KEYS, TYPES, Entry, figures, record
from .interpreter import mended
from .problems import POOLINGS, Call

CUDA = torch.cuda.is_available()
# A volume's second launch is swept with its first.
POOLED = [each for each in ENTRIES if each[:2] in POOLINGS and not each.problem.launch]
FORMATS, DIRECTIONS = ("contiguous", "channels_last"), ("forward", "backward")
# Rows vary slowest: a kernel that is compiled for some is found in Triton's cache for others.
SPACE = {"rows": (8, 16, 32), "columns": (4, 8, 14, 22), "vector": (2, 4, 8), "unroll": (1, 2)}
SPACE["num_warps"] = (4, 8)


def candidates_of(entry: Entry, space: dict[str, tuple[int, ...]]) -> list[Cut]:
    """All combinations. A lane has several channels only where they are innermost."""
    space = space if entry.channels_last else space | {"vector": (1,)}
    return [
        # `held`, here 0, bounds nothing where there is one choice of columns.
        Cut((columns,), vector, 0, unroll, rows, num_warps)
        for rows, columns, vector, unroll, num_warps in product(*space.values())
        # More elements of a row would spill, after minutes of compiling.
        if columns * vector <= 32
    ]


def call_of(entry: Entry, dtype: torch.dtype, device: str) -> Call:
    calls = entry.problem.calls(dtype, entry.channels_last, device, toy=device == "cpu")
    return getattr(calls, entry.direction)


def pinned_of(entry: Entry, dtype: torch.dtype) -> Cut:
    """The cut that the launcher takes."""
    with patch("regfast.kernels.cuts._outputs_for", wraps=_outputs_for) as noted:
        record(call_of(entry, dtype, "meta"))
    return noted.call_args.args[0]


def cut_by(cut: Cut) -> Any:
    """A context in which every launch is cut so."""
    return patch.dict(CUTS, {kind: (cut,) * len(pinned) for kind, pinned in CUTS.items()})


def figures_of(entry: Entry, dtype: torch.dtype, target: str, cut: Cut) -> dict[str, Any]:
    """The compiler's figures; of two launches, those of the one that spills."""
    with cut_by(cut):
        found = [figures(each, target) for each in record(call_of(entry, dtype, "meta"), target)]
    return max(found, key=lambda each: (each["spills"], each["stack"], each["registers"]))


def time_by(cut: Cut, call: Call, rep: int) -> float:
    """The median milliseconds of a call, on a GPU in a graph of `rep` milliseconds of calls."""
    with patch.dict(LAUNCHES, clear=True), cut_by(cut):
        if CUDA:
            return triton.testing.do_bench_cudagraph(call, rep=rep, return_mode="median")
        return 1e3 * timeit.timeit(call, number=1)


def best_of(call: Call, pinned: Cut, candidates: dict[Cut, dict[str, Any]]) -> dict[str, Any]:
    """The best cut of a call, the pinned one beside it, and every candidate with its figures."""
    allowed = [cut for cut, said in candidates.items() if not said["spills"] and not said["stack"]]
    if not allowed:
        raise RuntimeError("no candidate is without spills and a stack")
    first = {cut: time_by(cut, call, 5) for cut in allowed}
    again = {cut: time_by(cut, call, 50) for cut in sorted(allowed, key=first.__getitem__)[:6]}
    best = min(again, key=again.__getitem__)
    tried = [
        {"cut": str(cut), "launched": cut in first, "median_ms": first.get(cut), **said}
        for cut, said in candidates.items()
    ]
    found = {"best": str(best), "median_ms": again[best], "pinned": str(pinned)}
    return found | {"pinned_ms": time_by(pinned, call, 50), "candidates": tried}


def field(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, values = text.partition("=")
    if name not in SPACE or not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", values):
        raise argparse.ArgumentTypeError(f"{text!r} is not as rows=8,16: {', '.join(SPACE)}")
    return name, tuple(map(int, values.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = partial(parser.add_argument, nargs="+")
    add("cases", choices=dict.fromkeys(each.case for each in POOLED), metavar="CASE")
    add("--dtype", choices=DTYPES, default=["bf16", "fp32"])
    add("--format", choices=FORMATS, default=FORMATS)
    add("--direction", choices=DIRECTIONS, default=DIRECTIONS)
    add("--try", dest="fields", type=field, default=[], metavar="FIELD=INTEGER,...")
    parser.add_argument("--out", type=Path, default=Path("out/tune"), help="default: %(default)s")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sweeps = [
        (entry, dtype)
        for entry, dtype in product(POOLED, TYPES)
        if entry.case in options.cases and entry.direction in options.direction
        if FORMATS[entry.channels_last] in options.format and TYPES[dtype] in options.dtype
    ]
    if not sweeps:
        parser.error(f"no case of {options.cases} has a format of {options.format}")
    space, target, rows = {name: values[:1] for name, values in SPACE.items()}, "sm_90", []
    if CUDA:
        found, space = triton.runtime.driver.active.get_current_target(), SPACE
        target = f"sm_{found.arch}" if found.backend == "cuda" else found.arch
    with mended(), ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
        for entry, dtype in sweeps:
            candidates = candidates_of(entry, space | dict(options.fields))
            compiled = processes.map(partial(figures_of, entry, dtype, target), candidates)
            call, key = call_of(entry, dtype, "cuda" if CUDA else "cpu"), entry.key(dtype, target)
            try:
                row = best_of(call, pinned_of(entry, dtype), dict(zip(candidates, compiled)))
                rows.append(dict(zip(KEYS, key)) | row)
            except (TritonError, RuntimeError) as error:
                print(f"{' '.join(key)}: {error}", flush=True)
            (options.out / "tune.json").write_text(json.dumps(rows, indent=1) + "\n")
    short = [{name: row[name] for name in row if name != "candidates"} for row in rows]
    table = tabulate(short, headers="keys", tablefmt="github", floatfmt=".4f")
    (options.out / "tune.md").write_text(table + "\n")
    print(f"{table}\n\nwritten: {options.out / 'tune.json'} {options.out / 'tune.md'}")
    return int(len(rows) < len(sweeps))


if __name__ == "__main__":
    raise SystemExit(main())
