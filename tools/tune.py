"""The best cut of every launch of a pooling: a sweep over what a lane has and a program streams.

    python -m tools.tune "max_blur_pool * 2d k=2 *" [--rows 8 16] [--columns 8] [--out FILE]

A sweep is a row of tools/compiled.csv in bf16 or fp32; a pattern matches its first five columns.
All combinations of the fields are compiled first, without the GPU; one that spills or has a stack
is never launched. The others are timed, and the best six and the pinned cut of kernels/cuts.py,
which is changed by hand, again for longer.

Images have 100 MB or more, about twice an H200's L2: a call finds little of the one before there.
Signals of 16 bits (34 MB) fit: their times only rank cuts. On a CPU one cut is compiled for sm_90
and interpreted on the case's toy.
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
import timeit
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton

from regfast.kernels.cuts import CUTS, Cut
from regfast.kernels.launch import LAUNCHES
from tests.interpreter import mended

from .compiled import ENTRIES, Entry, figures, record
from .problems import Call

CUDA = torch.cuda.is_available()
# A volume's second launch is swept with its first.
SWEEPS = {
    " ".join(entry.key(dtype, "")[:-1]): (entry, dtype)
    for entry, dtype in product(ENTRIES, (torch.bfloat16, torch.float32))
    if entry.operation in ("max_blur_pool", "blur_pool") and not entry.problem.launch
}
# Rows vary slowest: a kernel that is compiled for some is found in Triton's cache for others.
SPACE = dict(
    rows=(8, 16, 32), columns=(4, 8, 14, 22), vector=(2, 4, 8), unroll=(1, 2), num_warps=(4, 8)
)


def candidates_of(entry: Entry, options: argparse.Namespace) -> list[Cut]:
    """All combinations. A lane has several channels only where they are innermost."""
    vectors = options.vector if entry.channels_last else [1]
    fields = options.rows, options.columns, vectors, options.unroll, options.num_warps
    return [
        # `held`, here 0, bounds nothing where there is one choice of columns.
        Cut((columns,), vector, 0, unroll, rows, num_warps)
        for rows, columns, vector, unroll, num_warps in product(*fields)
        # More elements of a row would spill, after minutes of compiling.
        if columns * vector <= 32
    ]


def call_of(entry: Entry, dtype: torch.dtype, device: str) -> Call:
    calls = entry.problem.calls(dtype, entry.channels_last, device, toy=device == "cpu")
    return getattr(calls, entry.direction)


def cut_by(cut: Cut | None) -> Any:
    """A context in which every launch is cut so; without a cut, as it is pinned."""
    cuts = {kind: (cut,) * len(pinned) for kind, pinned in CUTS.items()}
    return patch.dict(CUTS, cuts if cut else {})


def figures_of(entry: Entry, dtype: torch.dtype, target: str, cut: Cut | None) -> dict[str, Any]:
    """The compiler's figures; of two launches, those of the one that spills."""
    with cut_by(cut):
        found = [figures(each, target) for each in record(call_of(entry, dtype, "meta"), target)]
    return max(found, key=lambda each: (each["spills"], each["stack"], each["registers"]))


def time_by(cut: Cut | None, call: Call, rep: int) -> float:
    """The median milliseconds of a call, on a GPU in a graph of `rep` milliseconds of calls."""
    with patch.dict(LAUNCHES, clear=True), cut_by(cut):
        if CUDA:
            return triton.testing.do_bench_cudagraph(call, rep=rep, return_mode="median")
        return 1e3 * timeit.timeit(call, number=1)


def best_of(call: Call, candidates: dict[Cut | None, dict[str, Any]]) -> dict[str, Any]:
    """The best cut of a call, the pinned one beside it, and every candidate with its figures."""
    allowed = [cut for cut, said in candidates.items() if not said["spills"] and not said["stack"]]
    first = {cut: time_by(cut, call, 5) for cut in allowed}
    again = {None, *sorted(allowed, key=first.__getitem__)[:6]}
    last = {cut: time_by(cut, call, 50) for cut in again}
    best = min(last, key=last.__getitem__)
    tried = [
        {"cut": str(cut or "pinned"), "ms": first.get(cut)} | candidates[cut] for cut in candidates
    ]
    found = {"best": str(best or "pinned"), "ms": last[best], "pinned_ms": last[None]}
    return found | {"candidates": tried}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="+", metavar="PATTERN", help="of rows of compiled.csv")
    for name, values in SPACE.items():
        default = values if CUDA else values[:1]
        parser.add_argument(f"--{name}", nargs="+", type=int, default=default, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="all candidates in JSON")
    options, target, rows = parser.parse_args(), "sm_90", []
    names = [name for name in SWEEPS if any(fnmatchcase(name, each) for each in options.sweeps)]
    if not names:
        parser.error("the patterns match none of\n" + "\n".join(SWEEPS))
    if CUDA:
        found = triton.runtime.driver.active.get_current_target()
        target = f"sm_{found.arch}" if found.backend == "cuda" else found.arch
    with mended(), ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
        for name in names:
            candidates = [None, *candidates_of(SWEEPS[name][0], options)]
            compiled = processes.map(partial(figures_of, *SWEEPS[name], target), candidates)
            call = call_of(*SWEEPS[name], "cuda" if CUDA else "cpu")
            rows.append({"sweep": name} | best_of(call, dict(zip(candidates, compiled))))
            print("{sweep}: {best} {ms:.4f} ms, pinned {pinned_ms:.4f} ms".format(**rows[-1]))
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
