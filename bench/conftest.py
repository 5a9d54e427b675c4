"""pytest-benchmark's side: groups, the clock on CUDA, and each row's figures in `extra_info`."""

import random
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import distributions
from statistics import median
from timeit import repeat
from typing import Any

import pytest
import timing
import torch

from regfast.info import devices, versions


def group_of(item: pytest.Item) -> str:
    """The item's name without its contestant."""
    return item.name.removesuffix(f"-{item.callspec.params['contestant']}]") + "]"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    options: dict[str, Any] = dict(disable_gc=True)
    if timing.CUDA:
        # In the clock's units, so that the seconds are those that the user asked for.
        max_time = float(config.getoption("benchmark_max_time")) / timing.CALLS
        options |= dict(timer=timing.clock, max_time=max_time)
    for item in items:
        item.add_marker(pytest.mark.benchmark(group=group_of(item), **options))
    # A group's contestants run in an order of their own in every run.
    groups = list(dict.fromkeys(group_of(item) for item in items))
    items.sort(key=lambda item: (groups.index(group_of(item)), random.random()))


@pytest.fixture
def ready(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Callable]:
    """Prepares a contestant's call (the arguments are those of `timing.Call`) for `benchmark`."""
    torch.manual_seed(0)
    info, calls = benchmark.extra_info, []

    def prepare(*arguments: Any, **more: Any) -> Callable:
        call = timing.Call(*arguments, **more)
        # Kept until the end, because a CUDA graph does not keep its inputs.
        calls.append(call)
        run, how = timing.choose(call) if timing.CUDA else (call, "cpu")
        info.update(how=how, baseline=next(iter(request.module.CONTESTANTS)))
        info.update(provenance(request.config))
        if timing.CUDA:
            # The device waits idle for the host.
            info["host_us"] = 1e6 * median(repeat(call, torch.cuda.synchronize, number=1, repeat=5))
            info["eager_us"] = 1e6 * timing.seconds(call.several)
        if how == "eager":
            info["device_us"] = 1e6 * call.device_seconds()
        if timing.CUDA and call.backward:
            info["peak_bytes"] = call.peak_bytes()
        if call.backward and "compiled" not in request.node.callspec.params["contestant"]:
            info["saved_bytes"] = call.saved_bytes()
        return run

    yield prepare
    if benchmark.stats and calls[0].bytes:
        bandwidth = calls[0].bytes / benchmark.stats.stats.median
        info.update(gb_per_s=bandwidth / 1e9, of_copy=bandwidth / timing.copy_bandwidth())


@cache
def provenance(config: pytest.Config) -> dict[str, str]:
    peers = ("kornia", "timm", "torchvision", "antialiased-cnns")
    found = versions() | {one.name: one.version for one in distributions() if one.name in peers}
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
    return {
        "device": list(devices().values())[1 if timing.CUDA else 0],
        "versions": ", ".join(f"{name} {version}" for name, version in found.items()),
        "commit": commit["id"] + (", with uncommitted changes" if commit["dirty"] else ""),
        "check": timing.check() if timing.CUDA else "none on a CPU",
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if timing.CUDA and not terminalreporter.config.option.collectonly:
        terminalreporter.write_line(timing.check())
