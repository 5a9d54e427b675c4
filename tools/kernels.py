"""The kernels on a GPU: their times, their counters, a launch of each. `tools.gpu` runs this.

    python -m tools.kernels compile|launch|times|counters [--toy] [--out FILE] [--seconds S]

compile fills Triton's cache in many processes: a kernel takes seconds, and the other commands would
compile one after the other. launch makes a call of each problem, for compute-sanitizer. times gives
the device's time of a call, beside what is foretold. counters makes each call between a start and a
stop of ncu. FILE gets a row of JSON a line, as soon as it is known. After S seconds a command ends
by itself: ncu writes nothing before its program ends.

Without CUDA one toy runs in Triton's interpreter, which tests this program and says nothing.
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
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

# Triton reads it where a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from .compiled import KEYS, Entry, foretold, read_table
from .interpreter import mended
from .problems import PROBLEMS

Row = dict[str, Any]

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
synchronize = torch.cuda.synchronize if CUDA else lambda: None
PROCESSES = min(14, os.cpu_count() or 1)
# What is timed, the most telling first: by operation, the cases.
TIMED = {
    "max_blur_pool": ("2d k=2", "2d (3, 2, 1)", "2d narrow k=2", "2d narrow (3, 2, 1)"),
    "blur_pool": ("2d", "2d narrow"),
    "mixup": ("images", "boxes", "uint8", "uint8 from contiguous"),
    "mixup_cross_entropy": ("rows", "maps"),
    "rezero": ("gate relu", "gate gelu"),
}
# ncu's names. They are few, because for more of them it replays a launch more often.
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
REASONS = (
    "long_scoreboard", "short_scoreboard", "wait", "not_selected", "barrier", "math_pipe_throttle",
    "lg_throttle", "mio_throttle", "no_instruction",
)  # fmt: skip
COUNTERS = {
    "ns": "gpu__time_duration.sum",
    "DRAM %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 %": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "instructions": "smsp__inst_executed.sum",
} | {reason: STALL.format(reason) for reason in REASONS}


class Job(NamedTuple):
    """A problem in a format and a dtype."""

    problem: tuple[str, str]
    channels_last: bool
    dtype: torch.dtype

    def calls(self, toy: bool) -> Iterator[tuple[Row, Callable[[], Any]]]:
        """The forward and the backward: what is known of each beforehand, and its launcher."""
        problem, toy = PROBLEMS[self.problem], toy or not CUDA
        made = problem.calls(self.dtype, self.channels_last, DEVICE, toy)
        for direction, call, floor in zip(("forward", "backward"), made, made.floor):
            if direction in problem.directions:
                entry = Entry(self.problem[0], direction, self.problem[1], self.channels_last)
                key = entry.key(self.dtype, "sm_90")
                row = dict(zip(KEYS, key)) | {"elements": made.elements, "floor": floor}
                if not toy:
                    known = read_table()[key]
                    work = float(known["per_element"]), int(known["occupancy"])
                    row["per_element"] = work[0]
                    row["foretold_us"] = 1e6 * foretold(*work, made.elements, floor)
                yield row, call

    def launch(self, toy: bool) -> str:
        """Makes each call once. Returns the job's name."""
        for _, call in self.calls(toy):
            call()
        synchronize()
        return f"{' '.join(self.problem)} {'NHWC' if self.channels_last else 'NCHW'} {self.dtype}"


def jobs(toy: bool, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)) -> list[Job]:
    """The toys of all problems, or what is timed; without CUDA one of them."""
    timed = [(operation, case) for operation, cases in TIMED.items() for case in cases]
    found = [
        Job(problem, channels_last, dtype)
        for dtype in dtypes
        for problem in (PROBLEMS if toy else timed)
        for channels_last in PROBLEMS[problem].formats
    ]
    return found if CUDA else found[-1:]


def compiling(toy: bool) -> Iterator[Row]:
    # A process that is forked cannot use CUDA.
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as processes:
        futures = [processes.submit(job.launch, toy) for job in jobs(toy)]
        for future in as_completed(futures):
            yield {"compiled": str(future.exception() or future.result()), "of": len(futures)}


def launching(toy: bool) -> Iterator[Row]:
    wanted = jobs(toy)
    for number, job in enumerate(wanted, 1):
        yield {"launched": job.launch(toy), "number": number, "of": len(wanted)}


def device_seconds(call: Callable[[], Any]) -> float:
    """The mean over five calls of the time of all kernels that one launches; on a CPU, of one."""
    if not CUDA:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    call(), call()
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            call()
        synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    events = [event for event in profile.events() if event.device_type == on_device]
    return sum(event.time_range.elapsed_us() for event in events) / 5e6


def times(toy: bool) -> Iterator[Row]:
    """First the bytes a second that a copy of 1 GiB reads and writes, then each call's time."""
    x, y = torch.zeros((2, 2**30 if CUDA else 1), dtype=torch.uint8, device=DEVICE)
    yield {"copy": 2 * x.nbytes / device_seconds(lambda: y.copy_(x))}
    for job in jobs(toy):
        for row, call in job.calls(toy):
            try:
                yield row | {"us": 1e6 * device_seconds(call)}
            except Exception as error:
                yield row | {"error": str(error)[:300]}


def counters(toy: bool) -> Iterator[Row]:
    for job in jobs(toy, (torch.bfloat16,)):
        for row, call in job.calls(toy):
            call()
            synchronize()
            with torch.cuda.profiler.profile() if CUDA else contextlib.nullcontext():
                call()
                synchronize()
            yield row


def counted(rows: list[Row], text: str) -> list[Row]:
    """The rows of `counters`, each with what the raw page of ncu's CSV says of its launch.

    Both are in the order of launch. ValueError if a launch is not of its row's direction.
    """
    # ncu's messages are in between, and the first line has the units.
    lines = list(csv.DictReader(line for line in text.splitlines() if line.startswith('"')))[1:]
    found = []
    for row, line in zip(rows, lines):
        if row["direction"] not in line["Kernel Name"]:
            raise ValueError(f"{line['Kernel Name']} was counted where {row} was launched")
        # Commas are between thousands; a counter that the GPU lacks is "n/a".
        texts = {name: re.sub(r"[^\d.]", "", line[metric]) for name, metric in COUNTERS.items()}
        values = {name: float(text or math.nan) for name, text in texts.items()}
        stalls = sorted(((values.pop(reason), reason) for reason in REASONS), reverse=True)[:2]
        values["instructions an element"] = values.pop("instructions") * 32 / row["elements"]
        values["us"] = values.pop("ns") / 1e3
        found.append(row | values | {"stalls": stalls})
    return found


COMMANDS = {"compile": compiling, "launch": launching, "times": times, "counters": counters}


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--toy", action="store_true", help="the toys of all problems")
    parser.add_argument("--out", default=os.devnull, help="the file for the rows")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after so many")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    with open(options.out, "a") as out, contextlib.nullcontext() if CUDA else mended():
        for row in COMMANDS[options.command](options.toy):
            print(json.dumps(row), flush=True)
            print(json.dumps(row), file=out, flush=True)
            if time.monotonic() > end:
                break


if __name__ == "__main__":
    main()
