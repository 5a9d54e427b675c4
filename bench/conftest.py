"""pytest-benchmark's side: groups, the clock on CUDA, and each row's figures in `extra_info`."""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch

import timing
from regfast.info import devices, versions
from timing import CUDA

PEERS = ("kornia", "timm", "torchvision", "antialiased-cnns", "mosaicml")
# What the report is to say of the contestants without a time: [group, contestant, reason].
MISSING: dict[str, list[list[str]]] = {"absent": [], "errors": []}


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "draw the order of the contestants within each group"
    parser.getgroup("benchmark").addoption("--shuffle", type=int, metavar="SEED", help=text)


def group_of(item: pytest.Item) -> str:
    """The item's name without its contestant."""
    return item.name.removesuffix(f"-{item.callspec.params['contestant']}]") + "]"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    groups = [group_of(item) for item in items]
    for item, group in zip(items, groups):
        options = dict(group=group, disable_gc=True)
        if CUDA:
            # In the timer's units, so that the seconds are those that the user asked for.
            max_time = float(config.getoption("benchmark_max_time")) / timing.CALLS
            options |= dict(timer=timing.device_timer, max_time=max_time)
        item.add_marker(pytest.mark.benchmark(**options))
    if config.getoption("shuffle") is not None:
        random.Random(config.getoption("shuffle")).shuffle(items)
        items.sort(key=lambda item: groups.index(group_of(item)))


@pytest.fixture
def ready(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., timing.Run]]:
    """Prepares a contestant's call (the arguments are those of `timing.Call`) for `benchmark`."""
    torch.manual_seed(0)
    info = benchmark.extra_info

    def prepare(*arguments: Any, **more: Any) -> timing.Run:
        call = timing.Call(*arguments, **more)
        run, how = timing.choose(call) if CUDA else (partial(call, call.sets[0]), "cpu")
        (contestants,) = (
            mark.args[1]
            for mark in request.node.iter_markers("parametrize")
            if mark.args[0] == "contestant"
        )
        info.update(provenance(request.config), how=how, baseline=next(iter(contestants)))
        info.update(figures(call, how, request.node.callspec.params["contestant"]))
        return run

    yield prepare
    if benchmark.stats and info.get("bytes"):
        bandwidth = info["bytes"] / benchmark.stats.stats.median
        info.update(gb_per_s=bandwidth / 1e9, of_copy=bandwidth / timing.copy_bandwidth())


def figures(call: timing.Call, how: str, contestant: str) -> dict[str, float]:
    found: dict[str, float] = {"bytes": call.bytes} if call.bytes else {}
    if CUDA:
        found["host_us"] = 1e6 * call.host_seconds()
        found["eager_us"] = 1e6 * timing.median_seconds(call.batch, timing.device_timer)
    if how == "eager":
        found["device_us"] = 1e6 * call.device_seconds()
    if call.backward and CUDA:
        found["peak_bytes"] = call.peak_bytes()
    if call.backward and "compiled" not in contestant:
        found["saved_bytes"] = call.saved_bytes()
    return found


@cache
def provenance(config: pytest.Config) -> dict[str, str]:
    found = {name: versions()[name] for name in ("torch", "triton", "regfast")}
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)["id"]
    device = list(devices().values())[1 if CUDA else 0]
    return {"device": device, "commit": commit} | found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if report.failed or report.skipped:
        lines = call.excinfo.exconly().removeprefix("peers.AbsentError: ").splitlines()
        row = [group_of(item), item.callspec.params["contestant"], lines[0]]
        MISSING["absent" if report.skipped else "errors"].append(row)
    return report


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    output_json.update(MISSING)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    found = {package.name: package.version for package in importlib.metadata.distributions()}
    machine_info["versions"] = versions() | {name: found[name] for name in PEERS if name in found}
    machine_info["device"] = provenance(config)["device"]
    if CUDA:
        machine_info["check"] = timing.check()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if CUDA and not terminalreporter.config.option.collectonly:
        found = timing.check()
        trusted = "" if found["trusted"] else "NOT TRUSTED: "
        terminalreporter.write_line(f"{trusted}{found}")
