"""What a call of each operation costs the host: a small network trains at the host's speed.

    python -m tools.host [--rounds 40] [--out FILE]

A row is the median of rounds that go around all calls, as a multiple of another row, beside its
limit; the worst by its limit comes last. On a GPU an operation may take as long as the expression
that it replaces, and a pooling twice as long as nn.MaxPool2d. Without one the launches are stubbed
out, and everything else is what runs on a GPU: the kernels' path, on CPU tensors with values that
are not read. The limits are then what is left with the launches taken off, by nn.MaxPool2d.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from timeit import timeit
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

# Triton reads this where a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import regfast
from regfast.functional import mixup, mixup_cross_entropy, rezero
from regfast.kernels import launch

CUDA = torch.cuda.is_available()
# A GPU's queue holds a thousand launches, and a call makes fewer than 25.
CALLS = 40 if CUDA else 200
STATES = ("no grad", "grad", "forward + backward")
BASE, BLEND = "nn.MaxPool2d", "lam*x + (1-lam)*x[index]"
# Without a GPU, how many times as long as nn.MaxPool2d each state may take.
LIMITS = {
    "MaxPool2dAA": (2.2, 3.0, 2.2),
    "BlurPool2d": (2.2, 3.0, 2.2),
    "mixup, lam a tensor": (4.0, 4.0, 3.0),
    "mixup, lam a number": (4.0, 4.0, 3.0),
    "mixup_cross_entropy": (5.0, 5.0, 3.5),
    "rezero": (2.5, 3.0, 2.4),
}


def calls() -> dict[str, tuple]:
    """The operations, and on a GPU what they replace: what each is a multiple of, inputs, call."""
    shape, size = ((2, 8, 16, 16), 32) if CUDA else ((1, 1, 4, 4), 8)
    with torch.device("cuda" if CUDA else "cpu"):
        image, batch = torch.randn(shape), torch.randn(8, 3, size, size)
        residual = batch, torch.randn_like(batch), torch.full((1,), 0.5)
        logits, (a, b) = torch.randn(8, 10), torch.randint(10, (2, 8))
        index, lam, loss = torch.randperm(8), torch.tensor(0.3), F.cross_entropy
        blur = nn.Conv2d(shape[1], shape[1], 3, 2, 1, groups=shape[1]).requires_grad_(False)

    ce, relu = "two cross entropies", "x + alpha*relu(f)"
    known = {
        BASE: (BASE, (image,), nn.MaxPool2d(2)),
        "MaxPool2dAA": (BASE, (image,), regfast.MaxPool2dAA(2)),
        "BlurPool2d": (BASE, (image,), regfast.BlurPool2d()),
        "mixup, lam a tensor": (BLEND, (batch,), lambda x: mixup(x, index, lam)),
        "mixup, lam a number": (BLEND, (batch,), lambda x: mixup(x, index, 0.3)),
        "mixup_cross_entropy": (ce, (logits,), lambda z: mixup_cross_entropy(z, (a, b, lam))),
        "rezero": (relu, residual, rezero),
        "max pool + grouped convolution": (BASE, (image,), nn.Sequential(nn.MaxPool2d(2, 1), blur)),
        BLEND: (BASE, (batch,), lambda x: lam * x + (1 - lam) * x[index]),
        ce: (BASE, (logits,), lambda z: lam * loss(z, a) + (1 - lam) * loss(z, b)),
        relu: (BASE, residual, lambda x, f, alpha: x + alpha * F.relu(f)),
    }
    return known if CUDA else {name: known[name] for name in (BASE, *LIMITS)}


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """The kernels' path; on a CPU without launches, and without looks at values."""
    with regfast.backend("triton"), contextlib.ExitStack() as stack:
        enter = stack.enter_context
        if not CUDA:
            handle = launch.CompiledKernel.__new__(launch.CompiledKernel)
            enter(patch.object(type(handle), "__getitem__", lambda *_: lambda *args: None))
            kernel, launched = type(launch.scalar), lambda *args, **options: handle
            enter(patch.object(kernel, "__getitem__", lambda *_: launched))
            enter(patch.dict(launch.LAUNCHES, clear=True))
            for name, module in sys.modules.items():
                if name.startswith("regfast.") and hasattr(module, "may_read"):
                    enter(patch.object(module, "may_read", lambda t: False))
        yield


def once(state: str, inputs: tuple[Tensor, ...], call: Callable[..., Tensor]) -> Callable[[], Any]:
    """One call in a state. A backward has the gradients of all inputs."""
    if state != "no grad":
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
    if state != "forward + backward":
        return lambda: call(*inputs)
    grad = torch.ones_like(call(*inputs))
    return lambda: torch.autograd.grad(call(*inputs), inputs, grad)


def measure(calls: dict[str, tuple], state: str, rounds: int) -> dict[str, float]:
    """The median microseconds of each call in a state."""
    timed = {name: once(state, *each) for name, (_, *each) in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    setup = torch.cuda.synchronize if CUDA else "pass"
    with torch.set_grad_enabled(state != "no grad"):
        for name, call in list(timed.items()) * (rounds + 2):
            times[name].append(1e6 * timeit(call, setup, number=CALLS) / CALLS)
    # The first two rounds warm up.
    return {name: median(each[2:]) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the rows in JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    timed, rows = calls(), []
    with as_on_cuda():
        found = {state: measure(timed, state, options.rounds) for state in STATES}
    for name, (replaced, *_) in timed.items():
        of = replaced if CUDA else BASE
        for (state, us), limit in zip(found.items(), LIMITS.get(name, (None,) * len(STATES))):
            if CUDA and limit:
                limit = 2.0 if of == BASE else 1.0
            row = {"operation": name, "state": state, "us": us[name], "of": of}
            rows.append(row | {"ratio": us[name] / us[of], "limit": limit})
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))
    limited = [(row["ratio"] / row["limit"], row) for row in rows if row["limit"]]
    share, row = max(limited, key=lambda each: each[0])
    print(f"worst: {row['operation']}, {row['state']}: {share:.2f} of its limit")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
