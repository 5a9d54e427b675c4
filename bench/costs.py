"""What the benchmark's medians do not say: memory, the host's time, and a first call's.

    python bench/costs.py [--only OP ...] [--device cpu|cuda] [--out FILE]

Each figure is a row: cost, operation, contestant, case, value, unit; or "absent" or "error" in place of a value. The file is
written anew after each row, so that what stops this loses nothing. On a CPU the sizes are toys, which test the code alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contest import Case, formats_of, leaves
from contestants import FUNCTIONS, OPERATIONS
from measure import Call, describe, enter, interleave, stopwatch
from report import keep
from torch import Tensor

Row = dict[str, Any]


def case_of(operation: str, device: str) -> Case:
    """The case that costs are measured on: the operation's first arguments and shape, images with innermost channels."""
    cuda, row = device == "cuda", OPERATIONS[operation]
    shape = row.shapes["cuda" if cuda else "toy"][0]
    return Case(operation, row.arguments[0], shape, formats_of(shape)[-1], "bfloat16" if cuda else "float32", "")


def memory(operation: str, device: str) -> Iterator[Row]:
    """What a forward saves for its backward beside x and y, and what a training step needs beside them and their gradients."""
    case = case_of(operation, device)
    names = tuple(name for name in OPERATIONS[operation].contestants if "compiled" not in name)
    field = enter(case, names, torch.device(device))
    of_case = {"operation": operation, "case": f"{case.call} {case.size} {case.format} {case.dtype}", "unit": "bytes"}
    for problem, reasons in (("absent", field.absent), ("error", field.errors)):
        yield from (of_case | {"cost": "saved beside x", "contestant": name, problem: why} for name, why in reasons.items())
    for name, step in field.steps.items():
        row = of_case | {"contestant": name}
        yield row | {"cost": "saved beside x", "value": saved(step, field.inputs[0])}
        if device == "cuda":
            yield row | {"cost": "peak beside x, y and gradients", "value": peak(step, field.inputs[0], field.grads[0])}


def saved(step: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps after a forward, the inputs and the output not counted."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = step(*inputs)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, y)}
    return sum(size for storage, size in kept.items() if storage not in known)


def peak(step: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> int:
    """The most bytes asked of the device in a forward and a backward, the output and the gradients not counted."""

    def requested(what: str) -> int:
        return torch.cuda.memory_stats()[f"requested_bytes.all.{what}"]

    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = requested("current")
    y = step(*inputs)
    sources = leaves(step, inputs)
    gradients = torch.autograd.grad(y, sources, grad) if sources else ()
    return requested("peak") - before - y.nbytes - sum(gradient.nbytes for gradient in gradients)


def host_time(operation: str, device: str) -> Iterator[Row]:
    """What one call takes the host, without gradients: on toys, so that the device is never the slower of the two."""
    calls, turns = (100, 50) if device == "cuda" else (10, 3)
    row = OPERATIONS[operation]
    case = case_of(operation, device)._replace(shape=row.shapes["toy"][0])
    inputs, image = row.inputs(case, torch.device(device)), torch.rand(2, 4, 13, 12, device=device)
    contestants = {"F.max_pool2d": partial(F.max_pool2d, image, 2), "regfast": partial(row.function, *inputs, *case.arguments)}

    def preparation(call: Call) -> Callable[[int], Call]:
        def repeat() -> None:
            for _ in range(calls):
                call()

        def prepare(_turn: int) -> Call:
            if device == "cuda":
                torch.cuda.synchronize()
            return repeat

        return prepare

    prepare, errors = {name: preparation(call) for name, call in contestants.items()}, {}
    with torch.no_grad():
        interleave(prepare, stopwatch, 2, errors)
        seconds = interleave(prepare, stopwatch, turns, errors)
    of_case = {"cost": "host time of a call", "operation": operation, "case": f"{case.call} {case.size}", "unit": "us"}
    yield from (of_case | {"contestant": name, "error": why} for name, why in errors.items())
    for name, times in seconds.items():
        yield of_case | {"contestant": name, "value": 1e6 * statistics.median(times) / calls}


def first_call(operation: str, device: str) -> Iterator[Row]:
    """A first call's time and what it compiles, with nothing in Triton's cache: a process of its own finds out."""
    command = [sys.executable, str(Path(__file__).with_name("first_call.py")), operation, "--device", device]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        if device == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    yield from json.loads(done.stdout.splitlines()[-1])


def rows_of(operations: list[str], device: str) -> Iterator[Row]:
    """Everything measured. A measure that fails gives a row that says why, and the next one follows."""
    for operation in operations:
        yield from guarded("memory", operation, memory(operation, device))
        yield from guarded("host time of a call", operation, host_time(operation, device))
        yield from guarded("first call", operation, first_call(operation, device))


def guarded(cost: str, operation: str, rows: Iterator[Row]) -> Iterator[Row]:
    try:
        yield from rows
    except Exception as error:
        yield {"cost": cost, "operation": operation, "contestant": "regfast", "case": "", "error": describe(error)}


def main() -> int:
    """0, or 1 where regfast has no figure that it should have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FUNCTIONS, default=FUNCTIONS, metavar="OP")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out/costs.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for row in rows_of(options.only, options.device):
        rows.append(row)
        keep(options.out, rows, indent=1)
        print(row, flush=True)
    return int(any("error" in row for row in rows if row["contestant"] == "regfast"))


if __name__ == "__main__":
    sys.exit(main())
