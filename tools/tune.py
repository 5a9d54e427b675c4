"""The best cut of every launch of a pooling: a sweep over what a lane has, warps and rows a program streams.

    python bench/tune.py OP [--try columns=4,8 rows=8,16 ...] [--formats NHWC] [--dtypes bfloat16] [--device cuda] [--out DIR]

For each class of launches (arguments, shape, format, dtype, direction) the candidates are all combinations of `SPACE`. They are
compiled first, side by side and without the GPU; one that spills or has a stack is never launched. The others are timed turn by
turn, the best of them again for longer and with the pinned cut. What it prints is the best of a class and how it compares with
the pinned one, of kernels/cuts.py, which is changed by hand. DIR has tune-OP.json, with every candidate, and tune-OP.md.

On a CPU the kernels are compiled for sm_90 and run in Triton's interpreter, on toys: that tests this program, and says nothing.
"""

from __future__ import annotations

import os

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    # Triton reads it where a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"

import argparse
import contextlib
import itertools
import statistics
import sys
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import compiled
import report
from conftest import some_of
from contest import DTYPES, FORMATS, Case
from contestants import OPERATIONS
from interpreter import mended
from measure import COPY, Call, copy_tensors, interleave, stopwatch_of

from regfast._core.geometry import Window
from regfast._core.layout import empty_output
from regfast.kernels.cuts import CUTS, Cut
from regfast.kernels.launch import LAUNCHES

# Of the fields of a Cut. (A candidate has one choice of columns, so that `held` bounds nothing.)
SPACE = {"columns": (4, 8, 14, 22), "vector": (2, 4, 8), "unroll": (1, 2), "rows": (8, 16, 32), "num_warps": (4, 8)}
TOY = {"columns": (2, 4), "vector": (1, 2), "unroll": (1,), "rows": (2, 4), "num_warps": (1,)}
# More elements than these of a row would spill, after minutes of compiling.
LARGEST = 32
DIRECTIONS = ("forward", "backward")
COLUMNS = ("input", "format", "dtype", "direction", "best", "median ms", "of copy", "pinned", "its time", "tried", "spill")


class Candidate(NamedTuple):
    """A cut, and what the compiler made of it: the figures of compiled.py."""

    cut: Cut
    figures: dict[str, int | str]

    @property
    def launchable(self) -> bool:
        return not (self.figures["spills"] or self.figures["stack"])


def figures(case: Case, cut: Cut, target: str) -> tuple[str, dict[str, int | str]]:
    """The launch that a cut comes to, which cuts beyond a tensor's alignment share, and the compiler's figures for it."""
    with cut_by(cut, {}):
        recorded = record(case, target)
    given = [arg for arg in recorded.args if not isinstance(arg, torch.Tensor)]
    return repr((given, recorded.options)), compiled.figures(recorded, target)


def record(case: Case, target: str = "sm_90") -> compiled.Recorded:
    """The launch that a GPU of the target would be given."""
    x, window = meta(case), window_of(case)
    call = compiled.POOLINGS[case.operation, case.direction]
    (recorded,) = compiled.record(lambda: call(x, empty_output(x, window), window), target)
    return recorded


def window_of(case: Case) -> Window:
    return compiled.WINDOWS[case.operation](*case.arguments)


def meta(case: Case) -> torch.Tensor:
    """A tensor of the case without data."""
    return torch.empty(case.shape, dtype=case.torch_dtype, device="meta", memory_format=FORMATS[case.format])


def compile_all(case: Case, space: dict[str, tuple[int, ...]], target: str, processes: ProcessPoolExecutor) -> list[Candidate]:
    """The candidates of a class, those that come to the same launch once. (No rows are compiled for: they are an argument.)"""
    # Innermost columns: a lane is of one channel.
    vectors = space["vector"] if case.format == "NHWC" else (1,)
    rows, base = space["rows"], pinned(case)
    choices = itertools.product(space["columns"], vectors, space["unroll"], space["num_warps"])
    cuts = [
        base._replace(columns=(columns,), vector=vector, unroll=unroll, rows=rows[0], num_warps=num_warps)
        for columns, vector, unroll, num_warps in choices
        if columns * vector <= LARGEST
    ]
    with patch.dict(os.environ):
        # The processes that this starts are to define kernels that can be compiled.
        os.environ.pop("TRITON_INTERPRET", None)
        found = processes.map(partial(figures, case, target=target), cuts)
    launches = {launch: (cut, figures) for cut, (launch, figures) in reversed(list(zip(cuts, found)))}
    return [Candidate(cut._replace(rows=count), figures) for cut, figures in launches.values() for count in rows]


@contextlib.contextmanager
def cut_by(cut: Cut | None, launches: dict[Hashable, Any]) -> Iterator[None]:
    """Within the block launches are cut so, None being as pinned.

    `launches` has those that are prepared, all by this cut, and gets those that are prepared now.
    """
    cuts = {} if cut is None else {kind: (cut,) * len(pinned) for kind, pinned in CUTS.items()}
    with patch.dict(LAUNCHES, launches, clear=True), patch.dict(CUTS, cuts):
        yield
        launches.update(LAUNCHES)


def time_all(case: Case, cuts: dict[str, Cut | None], device: torch.device, turns: int) -> dict[str, float]:
    """Median seconds of each cut, None being the pinned one, and of a device copy; one that fails has none."""
    window = window_of(case)
    x = OPERATIONS[case.operation].inputs(case, device)[0].detach()
    g = torch.randn_like(empty_output(x, window))
    call = compiled.POOLINGS[case.operation, case.direction]
    source, target = copy_tensors(device)

    def preparation(cut: Cut | None) -> Callable[[int], Call]:
        launches: dict[Hashable, Any] = {}

        def run() -> Any:
            with cut_by(cut, launches):
                return call(x, g, window)

        return lambda _turn: run

    prepare = {name: preparation(cut) for name, cut in cuts.items()}
    prepare[COPY] = lambda _turn: lambda: target.copy_(source)
    watch, errors = stopwatch_of(device.type), {}
    # The first turn compiles.
    interleave(prepare, watch, 1, errors)
    seconds = interleave({name: prepare[name] for name in prepare if name not in errors}, watch, turns, errors)
    for name, why in errors.items():
        print(f"{case}: {name}: {why}")
    return {name: statistics.median(times) for name, times in seconds.items() if times}


def tune(case: Case, candidates: list[Candidate], device: torch.device) -> dict[str, Any]:
    """The class's row: its best cut, the pinned one beside it, and every candidate.

    Raises:
        RuntimeError: where no candidate runs, because all spill or fail, or the pinned cut does not.
    """
    allowed = {written(each.cut): each.cut for each in candidates if each.launchable}
    few, many = (5, 30) if device.type == "cuda" else (1, 1)
    first = time_all(case, allowed, device, few)
    best = sorted(first.keys() - {COPY}, key=first.__getitem__)[:6]
    again = time_all(case, {"pinned": None} | {name: allowed[name] for name in best}, device, many)
    if not again.keys() & best or "pinned" not in again:
        raise RuntimeError("no candidate runs, or not the pinned cut")
    winner = min(again.keys() & best, key=again.__getitem__)
    source, _ = copy_tensors(device)
    x = meta(case)
    floor = OPERATIONS[case.operation].floor((x,), empty_output(x, window_of(case))).of(case.direction)
    return case._asdict() | {
        "best": written(allowed[winner]),
        "median_ms": 1e3 * again[winner],
        "of_copy": floor / again[winner] / (2 * source.nbytes / again[COPY]),
        "pinned": written(pinned(case)),
        "pinned_ms": 1e3 * again["pinned"],
        "candidates": [
            {"cut": written(each.cut), "launched": written(each.cut) in first}
            | ({"median_ms": 1e3 * first[written(each.cut)]} if written(each.cut) in first else {})
            | each.figures
            for each in candidates
        ],
    }


def pinned(case: Case) -> Cut:
    """The cut that the launcher takes."""
    asked = []

    class Asked(tuple):
        def __getitem__(self, i):
            asked.append(super().__getitem__(i))
            return asked[-1]

    with patch.dict(CUTS, {kind: Asked(cuts) for kind, cuts in CUTS.items()}):
        record(case)
    return asked[0]


def written(cut: Cut) -> str:
    """A cut as traffic.py takes it for a candidate: columns=8/14,rows=4."""
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in cut._asdict().items()}
    return ",".join(f"{name}={'/'.join(map(str, value))}" for name, value in values.items())


def cells(row: dict[str, Any]) -> list[str]:
    case = Case(*(row[field] for field in Case._fields))
    tried = row["candidates"]
    spill = sum(bool(each["spills"] or each["stack"]) for each in tried)
    times = [f"{row['median_ms']:.3f}", f"{row['of_copy']:.0%}", row["pinned"], f"{row['pinned_ms'] / row['median_ms']:.2f}x"]
    return [f"{case.call} {case.size}", case.format, case.dtype, case.direction, row["best"], *times, str(len(tried)), str(spill)]


def architecture() -> str:
    """The device's, as compiled.py names it."""
    if torch.version.hip:
        return torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def field(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, values = text.partition("=")
    if name not in SPACE:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SPACE)}")
    try:
        return name, tuple(map(int, values.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form rows=8,16") from error


def parse(argv: list[str]) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", choices=compiled.WINDOWS, metavar="OP")
    parser.add_argument("--try", dest="fields", type=field, nargs="+", default=[], metavar="FIELD=INTEGER,...", help="of SPACE")
    parser.add_argument("--formats", type=some_of(tuple(FORMATS)), default=["NCHW", "NHWC"], help="default: NCHW,NHWC")
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=["bfloat16", "float32"], help="default: bfloat16,float32")
    parser.add_argument("--directions", type=some_of(DIRECTIONS), default=list(DIRECTIONS), help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/tune"), help="default: %(default)s")
    return parser.parse_args(argv)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    row, toy = OPERATIONS[options.operation], options.device == "cpu"
    choices = itertools.product(
        row.arguments[: 1 if toy else None], [(1, 4, 8, 16)] if toy else row.shapes["cuda"], options.formats,
        options.dtypes[: 1 if toy else None], options.directions,
    )  # fmt: skip
    return (Case(options.operation, *choice) for choice in choices)


def main(argv: list[str]) -> int:
    """0, or 1 where some class has no candidate that runs: the others have their rows."""
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    device, found, rows = torch.device(options.device), report.setting(options.device), []
    status = 0
    cuda = device.type == "cuda"
    space = (SPACE if cuda else TOY) | dict(options.fields)
    target = architecture() if cuda else "sm_90"
    results = options.out / f"tune-{options.operation}.json"
    with mended(), ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as processes:
        for case in cases(options):
            try:
                rows.append(tune(case, compile_all(case, space, target, processes), device))
            except RuntimeError as error:
                print(f"{case}: {error}", flush=True)
                status = 1
                continue
            report.keep(results, found | {"rows": rows}, indent=1)
            print(" | ".join(cells(rows[-1])), flush=True)
    table = report.markdown([list(COLUMNS), *map(cells, rows)], right=("median ms", "of copy", "its time", "tried", "spill"))
    results.with_suffix(".md").write_text(table + "\n")
    print(f"\n{table}\n\nwritten: {results} {results.with_suffix('.md')}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
