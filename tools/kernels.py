"""The kernels on a GPU: their times, their counters, a launch of each. `tools.gpu` runs this.

    python -m tools.kernels compile|launch|times|counters [--toy] [--seconds S]

compile fills Triton's cache in many processes. launch makes each call once, for compute-sanitizer.
times gives the device's time of a call, beside what is foretold. counters makes each call between a
start and a stop of ncu, which writes nothing before its program ends: so after S seconds a command
ends by itself. All print a row of JSON a call. The exit status is 1 if a call failed.
Without CUDA a toy runs in Triton's interpreter, which tests this program and says nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from typing import Any

import torch

# Triton reads it where a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tests.interpreter import mended

from .compiled import ENTRIES, Entry, foretold, read_table
from .problems import Call

Row = dict[str, Any]
Job = tuple[Entry, torch.dtype]

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
synchronize = torch.cuda.synchronize if CUDA else lambda: None
PROCESSES = min(14, os.cpu_count() or 1)
# The cases that are timed.
TIMED = {
    "2d k=2", "2d (3, 2, 1)", "2d narrow k=2", "2d narrow (3, 2, 1)", "2d", "2d narrow", "images",
    "boxes", "uint8", "uint8 from contiguous", "rows", "maps", "gate relu", "gate gelu",
}  # fmt: skip
# Each direction of what is timed launches one kernel of such a name. A second one sorts an index or
# ends a sum, and is not counted.
COUNTED = "^_(forward|backward)_kernel"
# ncu's names. They are few, because for more of them it replays a launch more often.
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
REASONS = ("long_scoreboard", "wait", "not_selected", "barrier")
COUNTERS = {
    "ns": "gpu__time_duration.sum",
    "DRAM %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 %": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "instructions": "smsp__inst_executed.sum",
} | {reason: STALL.format(reason) for reason in REASONS}


def jobs(toy: bool, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)) -> list[Job]:
    """Both directions of what is timed, or of all toys; without CUDA of the last."""
    both = [entry for entry in ENTRIES if entry.direction in ("forward", "backward")]
    wanted = [entry for entry in both if toy or entry.case in TIMED]
    return [(entry, dtype) for dtype in dtypes for entry in (wanted if CUDA else wanted[-2:])]


def row_of(job: Job, use: Callable[[Call], Row], toy: bool) -> Row:
    """What is known of a call, and what `use` says of it, or its error. No tensor is kept."""
    (entry, dtype), toy = job, toy or not CUDA
    key = entry.key(dtype, "sm_90")
    row: Row = {
        "kernel": f"{entry.operation} {entry.case} {entry.direction}",
        "tensors": f"{'NHWC' if entry.channels_last else 'NCHW'} {key[-2]}",
    }
    try:
        with contextlib.nullcontext() if CUDA else mended():
            made = entry.problem.calls(dtype, entry.channels_last, DEVICE, toy)
            floor = made.floor[entry.direction == "backward"]
            row |= {"elements": made.elements, "floor": floor}
            if not toy:
                known = read_table()[key]
                work = float(known["per_element"]), int(known["occupancy"])
                row["per_element"] = work[0]
                row["foretold_us"] = 1e6 * foretold(*work, made.elements, floor)
            return row | use(getattr(made, entry.direction))
    except Exception as error:
        return row | {"error": str(error)[:300]}


def launch(call: Call) -> Row:
    call()
    synchronize()
    return {}


def measure(call: Call) -> Row:
    """The microseconds of all kernels that a call launches: the mean of five, on a CPU one."""
    if not CUDA:
        start = time.perf_counter()
        call()
        return {"us": 1e6 * (time.perf_counter() - start)}
    call(), call()
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            call()
        synchronize()
    events = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return {"us": sum(event.time_range.elapsed_us() for event in events) / 5}


def count(call: Call) -> Row:
    launch(call)
    with torch.cuda.profiler.profile() if CUDA else contextlib.nullcontext():
        return launch(call)


USES = {"compile": launch, "launch": launch, "times": measure, "counters": count}


def rows_of(command: str, toy: bool) -> Iterator[Row]:
    """The rows of all jobs. The first of `times` is the bytes a second of a copy, both ways."""
    if command == "times":
        x, y = torch.zeros((2, 2**30 if CUDA else 1), dtype=torch.uint8, device=DEVICE)
        yield {"copy": 2e6 * x.nbytes / measure(lambda: y.copy_(x))["us"]}
    wanted = jobs(toy, (torch.bfloat16,)) if command == "counters" else jobs(toy)
    # A process that is forked cannot use CUDA. Where there is no work for them, none starts.
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as processes:
        apply = processes.map if command == "compile" else map
        yield from apply(row_of, wanted, repeat(USES[command]), repeat(toy))


def counted(rows: list[Row], text: str, copy: float) -> list[Row]:
    """A table of what the raw page of ncu's CSV says of the launches of `counters`.

    Both are in the order of launch: ValueError if a direction differs. `copy` is in bytes a second.
    """
    # ncu's messages are in between. The line of units has no kernel.
    page = csv.DictReader(line for line in text.splitlines() if line.startswith('"'))
    lines = [line for line in page if re.search(COUNTED, line["Kernel Name"])]
    found = []
    for row, line in zip((row for row in rows if "error" not in row), lines):
        if row["kernel"].split()[-1] not in line["Kernel Name"]:
            raise ValueError(f"{line['Kernel Name']} was counted where {row} was launched")
        # Commas are between thousands; a counter that the GPU lacks is "n/a".
        texts = {name: re.sub(r"[^\d.]", "", line[metric]) for name, metric in COUNTERS.items()}
        values = {name: float(text or math.nan) for name, text in texts.items()}
        us, instructions = values.pop("ns") / 1e3, 32 * values.pop("instructions")
        stalls = sorted(((values.pop(reason), reason) for reason in REASONS), reverse=True)[:2]
        found.append(
            {"kernel": f"{row['kernel']} {row['tensors']}", "us": us}
            | {"of copy": 1e6 * row["floor"] / us / copy, **values}
            | {"instructions an element": instructions / row["elements"]}
            | {"foretold": row["per_element"]}
            | {"stalls (cycles an issue)": " ".join(f"{name}:{n:.1f}" for n, name in stalls)}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=USES)
    parser.add_argument("--toy", action="store_true", help="the toys of all problems")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after so many")
    options = parser.parse_args()
    end, errors = time.monotonic() + options.seconds, []
    for row in rows_of(options.command, options.toy):
        print(json.dumps(row), flush=True)
        errors += [f"{row['kernel']} {row['tensors']}: {row['error']}"] if "error" in row else []
        if time.monotonic() > end:
            break
    raise SystemExit("\n".join(errors) or 0)


if __name__ == "__main__":
    main()
