"""What a call of each operation costs the host: a small network trains at the host's speed.

    python tools/host.py [--rounds 40] [--cpu]

Without a GPU the launches are stubbed out, everything else is what runs on one: the kernels' path is taken, on CPU tensors, whose
values are not read, as those of CUDA tensors are not. With a GPU the launches are made. A row is the median of rounds that go
around all calls, as a multiple of nn.MaxPool2d's on a (1, 1, 4, 4) CPU tensor in the same state, beside the limit that it is
held to; the last line is the row that is worst by that. The limits are what is left of twice nn.MaxPool2d's time on CUDA, or of
the expression that an operation replaces, when the launches themselves are taken off.

With --cpu it is the reference's path that is timed, of batches so small that calls are most of it, as multiples of what each
operation replaces on the same batch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch

# Triton reads it where a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import regfast
from regfast.functional import mixup, mixup_cross_entropy, rezero

STATES = ("no grad", "grad", "forward + backward")
# By operation, what each state may take: multiples of nn.MaxPool2d's time.
LIMITS = {
    "MaxPool2dAA": (2.2, 3.0, 2.2),
    "BlurPool2d": (2.2, 3.0, 2.2),
    "mixup, lam a tensor": (4.0, 4.0, 3.0),
    "mixup, lam a number": (4.0, 4.0, 3.0),
    "mixup_cross_entropy": (5.0, 5.0, 3.5),
    "rezero": (2.5, 3.0, 2.4),
}
CALLS = 200

Calls = dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]


def calls(device: str) -> Calls:
    """By operation, an input and the call of it."""
    image, batch = torch.randn(1, 1, 4, 4), torch.randn(8, 3, 8, 8, device=device)
    index, lam = torch.randperm(8, device=device), torch.tensor(0.3, device=device)
    logits, alpha = torch.randn(8, 10, device=device), torch.full((1,), 0.5, device=device, requires_grad=True)
    a, b = torch.randint(10, (2, 8), device=device)
    branch = torch.randn(8, 3, 8, 8, device=device, requires_grad=True)
    return {
        "nn.MaxPool2d": (image, torch.nn.MaxPool2d(2)),
        "MaxPool2dAA": (image.to(device), regfast.MaxPool2dAA(2)),
        "BlurPool2d": (image.to(device), regfast.BlurPool2d()),
        "mixup, lam a tensor": (batch, lambda x: mixup(x, index, lam)),
        "mixup, lam a number": (batch, lambda x: mixup(x, index, 0.3)),
        "mixup_cross_entropy": (logits, lambda z: mixup_cross_entropy(z, (a, b, lam))),
        "rezero": (batch, lambda x: rezero(x, branch, alpha)),
    }


@contextlib.contextmanager
def as_on_cuda(device: str) -> Iterator[None]:
    """The kernels' path; on a CPU without launches, and without looks at values."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(regfast.backend("triton"))
        if device == "cpu":
            from regfast.kernels import launch
            from regfast.ops import OPERATIONS
            from regfast.ops.schema import kernels_of

            kernel_type = type(launch.scalar)
            for operation in OPERATIONS:
                kernels_of(operation)
            compiled = launch.CompiledKernel
            handle = compiled.__new__(compiled)
            stack.enter_context(patch.object(compiled, "__getitem__", lambda self, grid: lambda *args: None))
            stack.enter_context(patch.object(kernel_type, "__getitem__", lambda self, grid: lambda *args, **options: handle))
            stack.enter_context(patch.dict(launch.LAUNCHES, clear=True))
            for module in [m for name, m in sys.modules.items() if name.startswith("regfast.") and hasattr(m, "may_read")]:
                stack.enter_context(patch.object(module, "may_read", lambda t: False))
        yield


def once(state: str, x: torch.Tensor, call: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
    """One call in a state."""
    if state == "no grad":
        return lambda: call(x)
    x = x.detach().requires_grad_()
    if state == "grad":
        return lambda: call(x)
    y = call(x)
    grad = torch.ones_like(y)
    return lambda: torch.autograd.grad(call(x), x, grad)


def small_batches() -> Calls:
    """Of a small batch on the CPU, each operation and, before it, what it replaces."""
    image, batch, index, lam = torch.randn(2, 8, 16, 16), torch.randn(8, 3, 32, 32), torch.randperm(8), torch.tensor(0.3)
    return {
        "nn.MaxPool2d(2) of (2, 8, 16, 16)": (image, torch.nn.MaxPool2d(2)),
        "MaxPool2dAA(2)": (image, regfast.MaxPool2dAA(2)),
        "lam*x + (1-lam)*x[index] of (8, 3, 32, 32)": (batch, lambda x: lam * x + (1 - lam) * x[index]),
        "mixup": (batch, lambda x: mixup(x, index, lam)),
    }


def measure(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """By operation, the median seconds of a call in each state."""
    found: dict[str, list[float]] = {}
    for state in STATES:
        timed = {name: once(state, x, call) for name, (x, call) in calls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        with torch.set_grad_enabled(state != "no grad"):
            for turn in range(-2, rounds):
                for name, call in timed.items():
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(CALLS):
                        call()
                    # The first turns warm up.
                    if turn >= 0:
                        seconds[name].append((time.perf_counter() - start) / CALLS)
        for name, times in seconds.items():
            found.setdefault(name, []).append(statistics.median(times))
    return found


def written(ratios: Sequence[float]) -> str:
    return " / ".join(f"{ratio:.2f}" for ratio in ratios)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--cpu", action="store_true", help="small batches on the CPU")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.cpu:
        rows = list(measure(small_batches(), options.rounds).items())
        for (replaced, base), (name, seconds) in zip(rows[::2], rows[1::2]):
            ratios = [own / other for own, other in zip(seconds, base)]
            print(f"{name} by {replaced}: {written(ratios)} ({' / '.join(STATES)})")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with as_on_cuda(device):
        found = measure(calls(device), options.rounds)
    base = found.pop("nn.MaxPool2d")
    print(f"nn.MaxPool2d: {' / '.join(f'{seconds * 1e6:.1f}' for seconds in base)} us ({' / '.join(STATES)})")
    worst = {}
    for name, seconds in found.items():
        ratios = [own / other for own, other in zip(seconds, base)]
        worst[name] = max(ratio / limit for ratio, limit in zip(ratios, LIMITS[name]))
        measured, limits = written(ratios), written(LIMITS[name])
        print(f"{name:<22} {measured:<20} at most {limits:<16} {worst[name]:.2f}")
    name = max(worst, key=worst.__getitem__)
    print(f"worst: {name} {worst[name]:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
