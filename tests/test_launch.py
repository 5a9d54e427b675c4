"""A launch by a compiled kernel's handle is the launch that Triton makes.

Without a GPU a driver of our own records the launches: Triton compiles for sm_90 and gives them to
the driver. It runs in another process, because this one may use the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import OPERATIONS, Operation

import regfast
import regfast.ops
from regfast.functional import blur_pool1d, mixup, mixup_cross_entropy, rezero

pytest.importorskip("triton")

from tools import host

DRIVER = Path(__file__).parent / "noting_driver.py"


def notes(*checks: str, **environment: str) -> dict:
    """The results that noting_driver.py prints."""
    env = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    } | environment
    done = subprocess.run(
        [sys.executable, DRIVER, *checks], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def noted() -> dict:
    return notes("arguments", "hooks", "switches", "misaligned", "streams", "threads", "fork")


def test_a_handle_is_given_what_tritons_launcher_gives_its_kernel(noted):
    """Grid, stream, function, metadata, hooks and arguments, for each kernel of each operation."""
    assert len(noted["arguments"]) >= 11
    for kernel, found in noted["arguments"].items():
        assert found["ways"] == ["triton", "handle", "handle"], kernel
        assert found["same"], kernel


def test_launch_hooks_see_repeated_launches(noted):
    assert noted["hooks"] == {
        "ways": ["triton", "handle", "handle"],
        "seen": ["_forward_kernel"] * 2,
    }


def test_a_switch_that_changes_compilation_takes_the_ordinary_way(noted):
    """Triton's debugging, a profiler's hooks, a kernel's own hooks; then the handle again."""
    assert set(noted["switches"]) == {"debug", "instrumentation_mode", "pre_run_hook"}
    assert noted["switches"].pop("pre_run_hook")[:2] == ["triton", "handle"]
    # The switch on, then off; and for a new launch: on, off, off.
    assert all(
        ways == ["triton", "handle", "triton", "triton", "handle"]
        for ways in noted["switches"].values()
    )


def test_addresses_that_are_no_multiples_of_16_take_the_ordinary_way(noted):
    assert noted["misaligned"] == ["triton", "triton", "triton"]


def test_a_handle_launches_on_the_current_stream(noted):
    assert noted["streams"] == [7, 8, 7]


def test_threads_and_forked_processes_launch_as_the_first_does(noted):
    assert noted["threads"] and noted["fork"]


def test_the_environment_has_triton_make_every_launch():
    assert set(notes("ways", REGFAST_LAUNCH="triton")["ways"]) == {"triton"}


def test_a_misspelt_choice_of_the_launch_is_named():
    env = os.environ | {"REGFAST_LAUNCH": "cuda"}
    done = subprocess.run(
        [sys.executable, "-c", "import regfast.kernels.launch"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert "ValueError: REGFAST_LAUNCH must be 'handle' or 'triton', got 'cuda'" in done.stderr


def test_launches_that_are_kept_are_bounded_in_number(kernels, device, monkeypatch):
    from regfast.kernels import launch

    monkeypatch.setattr(launch, "LIMIT", 3)
    for size in range(4, 12):
        blur_pool1d(torch.zeros(1, 1, size, device=device))
        assert len(launch.LAUNCHES) <= 3


def test_the_samples_are_of_all_operations():
    assert tuple(operation.name for operation in OPERATIONS) == regfast.ops.OPERATIONS


@pytest.fixture
def launched(device, monkeypatch):
    """Records launches. On a CPU nothing is launched: the interpreter calls PyTorch's operators."""
    from regfast.kernels.launch import Launch

    made, make = [], Launch.__call__

    def noted(self, *args):
        made.append(self.kernel.__name__)
        make(self, *args)

    monkeypatch.setattr(Launch, "__call__", noted)
    with host.as_on_cuda():
        yield made


def operators(call: Callable[[], Any]) -> set[str]:
    """PyTorch's operators in a call, without views and uninitialised tensors."""
    with torch.profiler.profile() as profile:
        call()
    names = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
    return {
        name
        for name in names
        if not name.startswith(("aten::empty", "aten::new_empty", "aten::detach", "aten::view"))
    }


def calls_of(
    operation: Operation, device: str
) -> tuple[list[torch.Tensor], Callable[[], torch.Tensor]]:
    """The differentiated tensors, and the call; rezero has all three."""
    sample = operation.group("main")[0]
    x = sample.input(device=device).requires_grad_()
    if operation.name == "rezero":
        stream, alpha = (
            torch.randn_like(x).requires_grad_(),
            torch.ones(1, device=device).requires_grad_(),
        )
        return [x, stream, alpha], lambda: rezero(stream, x, alpha)
    if operation.name == "mixup_cross_entropy":
        a, b = torch.randint(sample.shape[1], (2, sample.shape[0]), device=device)
        weight = torch.rand(sample.shape[1], device=device)
        return [x], lambda: mixup_cross_entropy(x, (a, b, 0.3), weight, label_smoothing=0.1)
    arguments = operation.arguments(sample, x.device)
    return [x], lambda: operation.function(x, **arguments)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_a_call_is_one_launch(operation: Operation, device, launched):
    """One launch per forward and backward, without PyTorch operators.

    Two launches: a reduced loss, mixup's index, a gate's gradient.
    """
    leaves, call = calls_of(operation, device)
    grad = torch.randn_like(call())
    torch.autograd.grad(call(), leaves, grad)
    del launched[:]
    assert operators(call) == set()
    forward = len(launched)
    y = call()
    del launched[:]
    assert operators(lambda: torch.autograd.grad(y, leaves, grad)) == set()
    expected = {"mixup": (1, 2), "mixup_cross_entropy": (2, 1), "rezero": (1, 2)}.get(
        operation.name, (1, 1)
    )
    assert (forward, len(launched)) == expected


@pytest.mark.parametrize("number", [0.3, 1], ids=str)
def test_a_number_is_an_argument_of_the_kernel(number, device, launched):
    x, index = torch.randn(4, 3, 5, 5, device=device), torch.tensor([1, 0, 3, 2], device=device)
    mixup(x, index, number), rezero(x, x, number)
    assert operators(lambda: (mixup(x, index, number), rezero(x, x, number))) == set()


def test_a_module_s_mean_and_deviation_are_made_once(device, launched):
    mix = regfast.MixUp(0.2, mean=(0.4, 0.5, 0.6), std=0.25).eval()
    x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, device=device)
    mix(x)
    del launched[:]
    # (An unmixed batch is blended with itself; its index counts the samples.)
    assert operators(lambda: mix(x)) <= {"aten::arange", "aten::resize_"}
    assert launched == ["_forward_kernel"]


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA device is needed")


@cuda
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_both_ways_give_the_same_bits_on_a_gpu(operation, kernels):
    """The first call of each sample launches through Triton, the second through the handle."""
    from regfast.kernels.launch import LAUNCHES

    for sample in operation.group("core"):
        LAUNCHES.clear()
        x = sample.input(device="cuda").requires_grad_()
        first, second = (operation(x, sample) for _ in range(2))
        assert torch.equal(first, second)
        grad = torch.randn_like(first)
        gradients = [torch.autograd.grad(y, x, grad)[0] for y in (first, second)]
        assert torch.equal(*gradients)


@cuda
def test_a_stream_of_its_own_and_a_graph_take_the_launches_on_a_gpu():
    x = torch.randn(64, 8, 32, 32, device="cuda")
    pool = regfast.MaxPool2dAA(3, 2, 1)
    expected = pool(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        pool(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = pool(x)
    torch.cuda.synchronize()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert not torch.equal(y, expected) and torch.equal(y, pool(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two CUDA devices are needed")
def test_a_launch_is_made_where_its_tensors_are():
    pool = regfast.MaxPool2dAA(2)
    x = torch.randn(2, 3, 8, 8)
    with regfast.backend("reference"):
        expected = pool(x)
    for index in (1, 0, 1):
        torch.testing.assert_close(pool(x.to(f"cuda:{index}")).cpu(), expected)
        assert torch.cuda.current_device() == 0
