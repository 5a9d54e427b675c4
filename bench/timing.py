"""What the benchmark's files share: parameters, tensors, and how a call is timed.

On the CPU `benchmark` times a call. On CUDA it times the device alone, because the host is slower
than a small kernel: `CALLS` calls are captured in one CUDA graph, and `benchmark` times a replay.
A call that cannot be captured, because it synchronizes or copies from the host, is timed with its
host, `CALLS` at a time. A call is a forward without gradients, or a forward and a backward: on CUDA
a backward alone is the difference.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import cycle, islice, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peers import AbsentError

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = ("bfloat16", "float32") if CUDA else ("float32",)
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DIRECTIONS = ("forward", "forward+backward")
AXES = pytest.mark.parametrize(
    ("format", "dtype", "direction"), list(product(FORMATS, DTYPES, DIRECTIONS))
)
# On CUDA a batch is several times any L2.
IMAGES = [(256, 64, 112, 112), (256, 256, 28, 28)] if CUDA else [(8, 64, 112, 112)]
CALLS = 20

Inputs = tuple[Tensor, ...]
Step = Callable[..., Tensor]
Run = Callable[[], Any]


def size(value: tuple[int, ...] | str) -> str:
    """The id of a shape: 8x64x112x112."""
    return value if isinstance(value, str) else "x".join(map(str, value))


def images(shape: tuple[int, ...], format: str, dtype: str) -> Tensor:
    """Normal numbers that require a gradient."""
    x = torch.randn(shape, device=DEVICE, dtype=getattr(torch, dtype))
    return (x if x.ndim == 2 else x.contiguous(memory_format=FORMATS[format])).requires_grad_()


def compiled(make: Callable[..., Step], absent: str = "") -> Callable[..., Step]:
    """The contestant compiled for one size, or absent where there is a reason."""

    def made(*arguments: Any) -> Step:
        if absent:
            raise AbsentError(absent)
        # Dynamo gives up silently on a function that it has compiled eight times.
        torch.compiler.reset()
        return torch.compile(make(*arguments), dynamic=False)

    return made


def compiled_network(make: Callable[..., Step]) -> Callable[..., Step]:
    return compiled(make, "" if CUDA else "a network takes minutes to compile for a CPU")


def input_sets(nbytes: int, l2_bytes: int) -> int:
    """How many sets of inputs, each of `nbytes` bytes, are together larger than the L2."""
    return min(CALLS, max(2, l2_bytes // max(nbytes, 1) + 1))


class Call:
    """A contestant's call in one direction, on one of several sets of inputs.

    `floor` takes the inputs and the output: the least bytes that a forward and a backward move.
    `parameters` are differentiated too, as are those of a step that is a module.
    """

    def __init__(
        self,
        step: Step,
        draw: Callable[[], Inputs],
        direction: str,
        floor: Callable[[Inputs, Tensor], tuple[int, int]] = lambda inputs, y: (0, 0),
        parameters: Iterable[Tensor] = (),
    ) -> None:
        inputs = draw()
        self.step, self.sets, self.backward = step, [inputs], direction != "forward"
        if CUDA:
            l2_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
            count = input_sets(sum(tensor.nbytes for tensor in inputs), l2_bytes)
            self.sets += [draw() for _ in range(count - 1)]
        if isinstance(step, nn.Module):
            parameters = step.to(DEVICE, inputs[0].dtype).train(self.backward).parameters()
        self.parameters = list(parameters)
        with torch.set_grad_enabled(self.backward):
            y = step(*inputs)
        self.grad, self.output_bytes = torch.randn_like(y), y.nbytes
        forward, backward = floor(inputs, y)
        self.bytes = forward + backward * self.backward

    def __call__(self, inputs: Inputs) -> Any:
        with torch.set_grad_enabled(self.backward):
            y = self.step(*inputs)
            if not self.backward:
                return y
            leaves = [tensor for tensor in inputs if tensor.requires_grad] + self.parameters
            return torch.autograd.grad(y, leaves, self.grad)

    def batch(self) -> None:
        for inputs in islice(cycle(self.sets), CALLS):
            self(inputs)

    def saved_bytes(self) -> int:
        """What autograd keeps after a forward, beside the inputs, the parameters and the output."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = self.step(*self.sets[0])
        known = (*self.sets[0], *self.parameters, y)
        storages = {tensor.untyped_storage().data_ptr() for tensor in known}
        return sum(nbytes for storage, nbytes in kept.items() if storage not in storages)

    def peak_bytes(self) -> int:
        """The most that a forward and backward ask of the device, beside output and gradients."""
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        gradients = self(self.sets[0])
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        return peak - self.output_bytes - sum(gradient.nbytes for gradient in gradients)

    def host_seconds(self) -> float:
        """What a call takes the host, for which the device waits idle."""
        times = []
        for inputs in islice(cycle(self.sets), CALLS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self(inputs)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def device_seconds(self) -> float:
        """The device's time in a call's kernels and copies, by the profiler."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.batch()
            torch.cuda.synchronize()
        device = torch.autograd.DeviceType.CUDA
        events = [event for event in profile.key_averages() if event.device_type == device]
        return 1e-6 * sum(event.self_device_time_total for event in events) / CALLS


def device_timer() -> float:
    """The clock on CUDA, in units of `CALLS` seconds.

    Between two readings there are always `CALLS` calls, a graph's or a batch's: so every time,
    pytest-benchmark's too, is a call's in seconds.
    """
    torch.cuda.synchronize()
    return time.perf_counter() / CALLS


def median_seconds(run: Run, timer: Callable[[], float]) -> float:
    times = []
    for _ in range(7):
        start = timer()
        run()
        times.append(timer() - start)
    return statistics.median(times)


def capture(batch: Run) -> Run:
    """A replay of `batch` by the device alone. Raises RuntimeError if `batch` needs the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        batch()
        # A capture that fails can leave PyTorch's generator unusable: so what would make it fail
        # is looked for before.
        torch.cuda.set_sync_debug_mode("error")
        try:
            batch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        batch()
    graph.replay()
    return graph.replay


def choose(call: Call, capture: Callable[[Run], Run] = capture) -> tuple[Run, str]:
    """What `benchmark` is to time on CUDA, and how: "graph" or "eager"."""
    try:
        return capture(call.batch), "graph"
    except RuntimeError:
        return call.batch, "eager"


@cache
def copy_bandwidth() -> float:
    """The bytes a second that a copy reads and writes, of 1 GiB on CUDA, once a session."""
    source = torch.rand(2**28 if CUDA else 2**25, device=DEVICE)
    copy = partial(torch.empty_like(source).copy_, source)
    run, timer = (
        (capture(lambda: [copy() for _ in range(CALLS)]), device_timer)
        if CUDA
        else (copy, time.perf_counter)
    )
    return 2 * source.nbytes / median_seconds(run, timer)


@cache
def check() -> dict[str, float | bool]:
    """Whether this session's times on CUDA can be trusted, and the figures that say so.

    A graph's copy of 1 GiB takes half a millisecond or more, so it must agree with CUDA events
    around an eager one, to 3%. An empty kernel must take a graph less than 5 us.
    """
    import triton

    @triton.jit
    def empty(_x):
        pass

    source = torch.rand(2**28, device=DEVICE)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The first copy keeps the device busy while the host launches the second.
        target.copy_(source)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    by_events = 2 * source.nbytes / statistics.median(times)
    empties = capture(lambda: [empty[(1,)](source) for _ in range(CALLS)])
    empty_seconds = median_seconds(empties, device_timer)
    return {
        "copy_gb_per_s": copy_bandwidth() / 1e9,
        "copy_gb_per_s_by_events": by_events / 1e9,
        "empty_kernel_us": 1e6 * empty_seconds,
        "trusted": abs(copy_bandwidth() / by_events - 1) < 0.03 and empty_seconds < 5e-6,
    }
