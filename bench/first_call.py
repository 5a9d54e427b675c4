"""One operation's first calls, in a process that has called nothing yet: what they take, and what they compile.

    TRITON_CACHE_DIR=EMPTY_FOLDER python bench/first_call.py OPERATION --device cuda

costs.py runs it, with a cold cache. It prints one row a figure, in JSON, on its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from contest import Case, formats_of, leaves
from contestants import FUNCTIONS, OPERATIONS
from interpreter import mended
from torch import Tensor

import regfast


@triton.jit
def _nothing(_x):
    pass


class Clock:
    """Times calls to their end on the device, and counts what Triton compiles in them."""

    def __init__(self, device: str) -> None:
        self.device, self.cache = device, Path(os.environ["TRITON_CACHE_DIR"])

    def compiled(self) -> int:
        """The kernels compiled so far: each leaves one file of Triton's first representation, whatever the target."""
        return len(list(self.cache.rglob("*.ttir")))

    def time(self, call: Callable[[], Any]) -> tuple[Any, float, int]:
        """What the call returns, its seconds, and the kernels that it compiled."""
        before, start = self.compiled(), time.perf_counter()
        result = call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return result, time.perf_counter() - start, self.compiled() - before


def train(case: Case, step: Callable[..., Tensor], clock: Clock) -> dict[str, tuple[float, int]]:
    """A forward and, where there is something to differentiate by, a backward: the seconds of each, and what it compiled."""
    inputs = OPERATIONS[case.operation].inputs(case, torch.device(clock.device))
    sources = leaves(step, inputs)
    y, *forward = clock.time(lambda: step(*inputs))
    if not sources:
        return {"forward": tuple(forward)}
    grad = torch.randn_like(y)
    _, *backward = clock.time(lambda: torch.autograd.grad(y, sources, grad))
    return {"forward": tuple(forward), "backward": tuple(backward)}


def first_calls(case: Case, clock: Clock) -> list[dict[str, Any]]:
    """The case's first calls, and how many kernels two other sizes compile, the first aligned as the case's is.

    The size is an image's, or the number of classes of logits that have no positions.
    """
    step = OPERATIONS[case.operation].contestants["regfast"](case)
    rows = [
        {"cost": f"first {direction}", "value": seconds / max(kernels, 1), "unit": "seconds a kernel"}
        for direction, (seconds, kernels) in train(case, step, clock).items()
    ]
    for what, more in (("a new size", 16), ("a size of another alignment", 3)):
        fixed = min(2, len(case.shape) - 1)
        other = case._replace(shape=(*case.shape[:fixed], *(size + more for size in case.shape[fixed:])))
        kernels = sum(kernels for _, kernels in train(other, step, clock).values())
        rows.append({"cost": f"compiled for {what}", "value": kernels, "unit": "kernels"})
    return [{"case": f"{case.call} {case.size} {case.format} {case.dtype}"} | row for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", choices=FUNCTIONS)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    options = parser.parse_args()
    operation, clock = OPERATIONS[options.operation], Clock(options.device)
    x = torch.zeros(1, device=options.device)
    # Triton builds its driver for the first kernel of all, whichever that is.
    _, seconds, _ = clock.time(lambda: _nothing[(1,)](x))
    rows = [{"cost": "first launch of all, of an empty kernel", "case": "", "value": seconds, "unit": "seconds"}]
    shape = operation.shapes["cuda" if options.device == "cuda" else "toy"][0]
    with mended(), regfast.backend("triton"):
        # One is enough for the interpreter, which compiles nothing.
        for format in formats_of(shape)[0 if options.device == "cuda" else -1 :]:
            case = Case(options.operation, operation.arguments[0], shape, format, "float32", "")
            rows += first_calls(case, clock)
    print(json.dumps([{"operation": options.operation, "contestant": "regfast"} | row for row in rows]))


if __name__ == "__main__":
    main()
