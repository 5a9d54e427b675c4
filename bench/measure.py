"""Timing contestants side by side: turn by turn in one pass, so that a machine's moods fall on all of them alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from contest import Bytes, Case, leaves
from contestants import OPERATIONS
from peers import AbsentError
from torch import Tensor

COPY = "device copy"
INPUT_SETS = 2

Call = Callable[[], Any]


class Rounds(NamedTuple):
    """How often each contestant of a case is timed: as often as there are seconds for, and at least `least` times."""

    seconds: float
    least: int

    def count(self, turn_seconds: float) -> int:
        return max(self.least, min(100, int(self.seconds / turn_seconds)))


USUAL, QUICK = Rounds(3.0, 7), Rounds(0.3, 3)


class Pass(NamedTuple):
    """One interleaved pass: each contestant's seconds, or why it has none; and the bytes that bound them, if they do."""

    case: Case
    baseline: str
    seconds: dict[str, list[float]]
    absent: dict[str, str]
    errors: dict[str, str]
    bytes: int
    copy_bytes: int

    def row(self, name: str) -> dict[str, Any]:
        """The contestant's line of the report. Where a time or its baseline is missing, so is what follows from it."""
        row = self.case._asdict() | {"contestant": name, "absent": self.absent.get(name), "error": self.errors.get(name)}
        if name not in self.seconds:
            return row
        median, copy = statistics.median(self.seconds[name]), statistics.median(self.seconds[COPY])
        copy_bandwidth = self.copy_bytes / copy
        row |= {"median_ms": 1e3 * median, "rounds": len(self.seconds[name]), "copy_gb_per_s": copy_bandwidth / 1e9}
        if self.bytes:
            bandwidth = self.bytes / median
            row |= {"bytes": self.bytes, "gb_per_s": bandwidth / 1e9, "of_copy": bandwidth / copy_bandwidth}
        if self.baseline in self.seconds:
            row |= {"baseline": self.baseline, "ratio": median / statistics.median(self.seconds[self.baseline])}
        return row


@lru_cache(maxsize=1)
def measure(case: Case, names: tuple[str, ...], device: torch.device, rounds: Rounds) -> Pass:
    """Times the named contestants, and the baseline and a device copy with them."""
    baseline = next(iter(OPERATIONS[case.operation].contestants))
    field = enter(case._replace(direction=""), tuple(dict.fromkeys((baseline, *names))), device)
    absent, errors = dict(field.absent), dict(field.errors)
    source, target = copy_tensors(device)
    prepare = {name: preparation(step, case.direction, field) for name, step in field.steps.items()}
    prepare[COPY] = lambda _turn: lambda: target.copy_(source)
    watch = stopwatch_of(device.type)
    with torch.set_grad_enabled(case.direction != "forward"):
        # The first call compiles and allocates; the second says how many there is time for.
        warm = interleave(prepare, watch, 2, errors)
        turns = rounds.count(sum(seconds[-1] for seconds in warm.values()))
        seconds = interleave({name: prepare[name] for name in warm}, watch, turns, errors)
    return Pass(case, baseline, seconds, absent, errors, field.bytes.of(case.direction), 2 * source.nbytes)


class Field(NamedTuple):
    """The contestants of a case, made and checked, with the tensors they share. All directions use the same ones."""

    steps: dict[str, Callable[..., Tensor]]
    absent: dict[str, str]
    errors: dict[str, str]
    inputs: list[tuple[Tensor, ...]]
    grads: list[Tensor]
    bytes: Bytes


@lru_cache(maxsize=1)
def enter(case: Case, names: tuple[str, ...], device: torch.device) -> Field:
    # Dynamo gives up on a function that it has compiled eight times, silently: each case starts afresh.
    torch.compiler.reset()
    torch.manual_seed(0)
    operation = OPERATIONS[case.operation]
    inputs = [operation.inputs(case, device) for _ in range(INPUT_SETS)]
    steps, absent, errors = {}, {}, {}
    y = None
    for name in names:
        try:
            step = operation.contestants[name](case)
            if isinstance(step, torch.nn.Module):
                step = step.to(device=device, dtype=case.torch_dtype)
            with torch.no_grad():
                output = step(*inputs[0])
            y = output if y is None else y
            if output.shape != y.shape:
                raise ValueError(f"gives {tuple(output.shape)}, not {tuple(y.shape)}")
            steps[name] = step
        except AbsentError as reason:
            absent[name] = str(reason)
        except Exception as error:
            errors[name] = describe(error)
    if y is None:
        return Field(steps, absent, errors, inputs, [], Bytes(0, 0))
    return Field(steps, absent, errors, inputs, [torch.randn_like(y) for _ in inputs], operation.floor(inputs[0], y))


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def preparation(step: Callable[..., Tensor], direction: str, field: Field) -> Callable[[int], Call]:
    """Of a turn, the call to time. What is not of its direction is done before."""

    def prepare(turn: int) -> Call:
        inputs, grad = field.inputs[turn % INPUT_SETS], field.grads[turn % INPUT_SETS]
        sources = leaves(step, inputs)
        if direction == "forward":
            return lambda: step(*inputs)
        if direction == "backward":
            y = step(*inputs)
            return lambda: torch.autograd.grad(y, sources, grad)
        return lambda: torch.autograd.grad(step(*inputs), sources, grad)

    return prepare


def interleave(
    prepare: dict[str, Callable[[int], Call]], watch: Callable[[Call], float], turns: int, errors: dict[str, str]
) -> dict[str, list[float]]:
    """Every contestant once a turn, in an order drawn anew. One that raises leaves the field, and `errors` says why."""
    seconds: dict[str, list[float]] = {name: [] for name in prepare}
    draw = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for turn in range(turns):
            for name in draw.sample(list(seconds), len(seconds)):
                try:
                    seconds[name].append(watch(prepare[name](turn)))
                except Exception as error:
                    errors[name] = describe(error)
                    del seconds[name]
    finally:
        gc.enable()
    return seconds


def stopwatch(call: Call) -> float:
    start = time.perf_counter()
    kept = call()
    end = time.perf_counter()
    # Freeing the result belongs to nobody's time.
    del kept
    return end - start


def cuda_stopwatch(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Reading a large tensor empties the L2 without leaving it anything to write back, and keeps the device busy while the
    # host queues the call: the device's time is measured, not the host's.
    copy_tensors(torch.device("cuda"))[0].amax()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def stopwatch_of(device_type: str) -> Callable[[Call], float]:
    return cuda_stopwatch if device_type == "cuda" else stopwatch


@lru_cache(maxsize=1)
def copy_tensors(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the bandwidth of a copy is measured on."""
    count = 2**28 if device.type == "cuda" else 2**25
    return torch.rand(count, device=device), torch.empty(count, device=device)
