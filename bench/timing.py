"""What the benchmark's files share: parameters, tensors, and how a call is timed.

A call is a forward without gradients, or a forward and a backward. On the CPU `benchmark` times it.
On CUDA, where the host is slower than a small kernel, it times the device alone: the replay of a
graph of `CALLS` calls. A call that cannot be captured, because it synchronizes or copies from the
host, is timed with its host, `CALLS` at a time.
"""

import gc
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import cycle, product
from statistics import median
from timeit import default_timer, repeat
from typing import Any

import pytest
import torch
from torch import Tensor, nn

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
L2_BYTES = torch.cuda.get_device_properties(DEVICE).L2_cache_size if CUDA else 0
DTYPES = ("bfloat16", "float32") if CUDA else ("float32",)
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DIRECTIONS = ("forward", "forward+backward")
AXES = pytest.mark.parametrize("format,dtype,direction", [*product(FORMATS, DTYPES, DIRECTIONS)])
# On CUDA a batch is larger than any L2.
IMAGES = [(256, 64, 112, 112), (256, 256, 28, 28)] if CUDA else [(8, 64, 112, 112)]
# They share what a graph's launch adds, which the time of an empty kernel shows.
CALLS = 10


def images(shape: tuple[int, ...], format: str, dtype: str) -> Tensor:
    """Normal numbers that require a gradient."""
    x = torch.randn(shape, device=DEVICE, dtype=getattr(torch, dtype))
    return (x if x.ndim == 2 else x.contiguous(memory_format=FORMATS[format])).requires_grad_()


def compiled(contestants: dict[str, Callable], *names: str) -> dict[str, Callable]:
    """These contestants compiled, each for one size."""

    def make(name: str, *arguments: Any) -> Callable:
        # Dynamo gives up silently on a function that it has compiled eight times.
        torch.compiler.reset()
        return torch.compile(contestants[name](*arguments), dynamic=False)

    return {f"{name} compiled": partial(make, name) for name in names}


class Call:
    """A contestant's call in one direction, on the next of several sets of inputs.

    `rereads` says whether the backward must read the inputs again, where the bytes that must move
    are known. `parameters` are differentiated too, as are those of a step that is a module.
    """

    def __init__(
        self,
        step: Callable,
        draw: Callable[[], tuple[Tensor, ...]],
        direction: str,
        rereads: bool | None = None,
        parameters: Iterable[Tensor] = (),
    ) -> None:
        inputs = draw()
        nbytes = sum(tensor.nbytes for tensor in inputs)
        # Together they are larger than twice the L2, so that no call finds its inputs there.
        sets = min(CALLS, 2 * L2_BYTES // nbytes + 1)
        self.sets = cycle([inputs, *(draw() for _ in range(sets - 1))])
        self.step, self.backward = step, direction != "forward"
        if isinstance(step, nn.Module):
            parameters = step.to(DEVICE, inputs[0].dtype).train(self.backward).parameters()
        self.parameters = list(parameters)
        with torch.set_grad_enabled(self.backward):
            y = step(*inputs)
        self.grad = torch.randn_like(y)
        gradients = sum(tensor.nbytes for tensor in inputs if tensor.requires_grad)
        again = (nbytes * bool(rereads) + gradients + y.nbytes) * self.backward
        self.bytes = 0 if rereads is None else nbytes + y.nbytes + again

    def __call__(self) -> Any:
        inputs = next(self.sets)
        with torch.set_grad_enabled(self.backward):
            y = self.step(*inputs)
            if not self.backward:
                return y
            leaves = [leaf for leaf in (*inputs, *self.parameters) if leaf.requires_grad]
            return torch.autograd.grad(y, leaves, self.grad)

    def several(self) -> None:
        for _ in range(CALLS):
            self()

    def saved_bytes(self) -> int:
        """What autograd keeps after a forward, beside the inputs, the parameters and the output."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        inputs = next(self.sets)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = self.step(*inputs)
        for tensor in (*inputs, *self.parameters, y):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        return sum(kept.values())

    def peak_bytes(self) -> int:
        """The most that a forward and backward ask of the device, beside output and gradients."""
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        gradients = self()
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        return peak - sum(tensor.nbytes for tensor in (self.grad, *gradients))

    def device_seconds(self) -> float:
        """The device's time in a call's kernels and copies, by the profiler."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.several()
            torch.cuda.synchronize()
        events = [event for event in profile.key_averages() if event.device_type.name == "CUDA"]
        return 1e-6 * sum(event.self_device_time_total for event in events) / CALLS


def clock() -> float:
    """The clock on CUDA, in units of `CALLS` seconds: between two readings there are always
    `CALLS` calls, so every time, pytest-benchmark's too, is a call's in seconds.
    """
    torch.cuda.synchronize()
    return default_timer() / CALLS


def seconds(run: Callable) -> float:
    """A call's time on CUDA, of a `run` that makes `CALLS`."""
    return median(repeat(run, timer=clock, number=1, repeat=3))


def capture(call: Callable) -> Callable:
    """A replay of `CALLS` calls by the device alone. Raises RuntimeError if one needs the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        # A capture that fails can leave PyTorch's generator unusable: so what would make it fail
        # is looked for before.
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            call()
    graph.replay()
    return graph.replay


def choose(call: Call) -> tuple[Callable, str]:
    """What `benchmark` is to time on CUDA, and how: "graph" or "eager"."""
    try:
        return capture(call), "graph"
    except RuntimeError:
        return call.several, "eager"


@cache
def copy_bandwidth() -> float:
    """The bytes a second that a copy reads and writes, of 1 GiB on CUDA, once a session."""
    source = torch.rand(2**28 if CUDA else 2**25, device=DEVICE)
    copy = partial(torch.empty_like(source).copy_, source)
    return 2 * source.nbytes / (seconds(capture(copy)) if CUDA else median(repeat(copy, number=1)))


@cache
def check() -> str:
    """Whether this session's times on CUDA can be trusted: by a graph a copy of 1 GiB must take
    what CUDA events say, to 3%, and an empty kernel less than 5 us.
    """
    import triton

    @triton.jit
    def empty(_x):
        pass

    source = torch.rand(2**28, device=DEVICE)
    copy = partial(torch.empty_like(source).copy_, source)
    by_graph = copy_bandwidth() / 1e9
    by_events = 2 * source.nbytes / triton.testing.do_bench(copy, return_mode="median") / 1e6
    empty_us = 1e6 * seconds(capture(lambda: empty[(1,)](source)))
    trusted = abs(by_graph / by_events - 1) < 0.03 and empty_us < 5
    return (
        f"{'trusted' if trusted else 'NOT TRUSTED'}; a copy of 1 GiB moves {by_graph:.0f} GB/s by "
        f"a graph and {by_events:.0f} by events, an empty kernel takes {empty_us:.2f} us"
    )
