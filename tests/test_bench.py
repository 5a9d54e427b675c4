"""The benchmark: contestants compute the same, and a run leaves the files that it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the bench extra is not installed")
pytest.importorskip("tabulate", reason="the bench extra is not installed")

import bench_blur_pool
import bench_convolution
import bench_manifold_mixup
import bench_max_blur_pool
import bench_mixup
import bench_mixup_cross_entropy
import bench_networks
import bench_rezero
import compare
import timing
from peers import AbsentError, load

import regfast

BENCH = Path(compare.__file__).parent


def outputs_of(
    contestants: dict, arguments: tuple, inputs: tuple, module: Callable | None = None
) -> dict:
    """Return each contestant's outputs and gradients for the same inputs, without compiled ones.

    The arguments are the makers'; `module` makes a contestant's own network, the first argument.
    """
    found = {}
    for name, make in contestants.items():
        if "compiled" in name:
            continue
        own = tuple(t.clone().detach().requires_grad_(t.requires_grad) for t in inputs)
        try:
            networks = [module()] if module else []
            step = make(*networks, *arguments)
        except AbsentError:
            continue
        torch.manual_seed(1)
        y = step(*own)
        leaves = [t for t in own if t.requires_grad] + [
            p for network in networks for p in network.parameters()
        ]
        torch.manual_seed(1)
        found[name] = [
            y.detach(),
            *(torch.autograd.grad(y, leaves, torch.randn_like(y)) if y.requires_grad else ()),
        ]
    assert {"regfast"} < found.keys()
    return found


@pytest.mark.parametrize(
    ("bench", "window"),
    [(bench_blur_pool, (3, 2)), (bench_max_blur_pool, (2, 2, 0)), (bench_max_blur_pool, (3, 2, 1))],
)
def test_poolings_compute_the_same(bench, window) -> None:
    """Except for the baseline, which does not blur, and the border, where modes differ."""
    baseline, *names = bench.CONTESTANTS
    contestants = {name: bench.CONTESTANTS[name] for name in names}
    found = outputs_of(
        contestants, (3, *window), (timing.images((2, 3, 17, 16), "NCHW", "float32").cpu(),)
    )
    assert baseline.startswith("nn.")
    for name, (y, _) in found.items():
        assert y.shape == found["regfast"][0].shape, name
        assert torch.allclose(
            y[..., 1:-1, 1:-1], found["regfast"][0][..., 1:-1, 1:-1], atol=1e-6
        ), name


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Swap random partners in a batch of two, as a flip does, and draw `LAM` for every lam."""
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n).flip(0))
    monkeypatch.setattr(
        regfast.manifold, "beta", lambda alpha, size, generator: torch.full(size, bench_mixup.LAM)
    )
    monkeypatch.setattr("numpy.random.beta", lambda a, b: bench_mixup.LAM)
    try:
        transforms = load("torchvision.transforms.v2")
    except AbsentError:
        return
    monkeypatch.setattr(
        transforms.MixUp, "make_params", lambda self, inputs: dict(lam=bench_mixup.LAM)
    )


@pytest.mark.parametrize("format", ["NCHW", "NHWC"])
@pytest.mark.parametrize("bytes_in", [False, True], ids=["floats", "bytes"])
def test_blends_compute_the_same(bytes_in: bool, format: str, swapped: None) -> None:
    """To rounding, which comes in another order where the images are normalised."""
    shape = (2, 3, 13, 12)
    if bytes_in:
        found = outputs_of(
            bench_mixup.BYTES_CONTESTANTS, (torch.float32,), bench_mixup.draw_bytes(shape, format)
        )
    else:
        inputs = bench_mixup.draw(timing.images(shape, format, "float32"))
        found = outputs_of(bench_mixup.CONTESTANTS, (), inputs)
    assert not torch.allclose(found["regfast"][0], found["regfast"][0].flip(0))
    for name, outputs in found.items():
        for y, expected in zip(outputs, found["regfast"], strict=True):
            assert torch.allclose(y, expected, atol=2e-6), name


@pytest.mark.parametrize(
    ("shape", "format"), [((6, 10), "NC"), ((2, 5, 4, 3), "NCHW"), ((2, 5, 4, 3), "NHWC")]
)
def test_losses_compute_the_same(shape: tuple[int, ...], format: str) -> None:
    contestants = dict(bench_mixup_cross_entropy.CONTESTANTS)
    if len(shape) > 2:
        del contestants["timm, soft targets"]
    found = outputs_of(contestants, (), bench_mixup_cross_entropy.draw(shape, format, "float32"))
    for name, (loss, gradient) in found.items():
        assert torch.allclose(loss, found["regfast"][0], atol=1e-6), name
        assert torch.allclose(gradient, found["regfast"][1], atol=1e-6), name


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_residuals_compute_the_same(activation: str) -> None:
    inputs = bench_rezero.draw((2, 3, 13, 12), "NHWC", "float32")
    found = outputs_of(bench_rezero.CONTESTANTS, (activation,), inputs)
    for name, outputs in found.items():
        for y, expected in zip(outputs, found["regfast"], strict=True):
            assert torch.allclose(y, expected, rtol=1e-5, atol=1e-4), name


@pytest.mark.parametrize("window", [(6, 3, 2, 1), (6, 1, 2, 0)], ids=str)
def test_convolutions_compute_the_same(window: tuple) -> None:
    """timm's, which blurs after as ours does; the plain one has the same size."""
    x, found = torch.randn(2, 4, 13, 12, dtype=torch.float64), {}
    for name in ("nn.Conv2d", "regfast", "timm"):
        layer = bench_convolution.CONTESTANTS[name](4, *window).double()
        (weight,) = (p for p in layer.parameters() if p.ndim == 4)
        torch.nn.init.constant_(weight, 0.25)
        found[name] = layer(x)
    assert torch.allclose(found["regfast"], found["timm"])
    assert found["nn.Conv2d"].shape == found["regfast"].shape


def test_networks_are_those_they_are_named_after() -> None:
    """timm's blurs and ours compute the same, and converted networks keep the weights."""
    x, found, weights = torch.randn(2, 3, 32, 32, dtype=torch.float64), {}, {}
    for name in ("plain", "regfast", "regfast before", "timm", "timm with regfast's blur"):
        torch.manual_seed(0)
        network = bench_networks.CONTESTANTS[name]("resnet18").double().eval()
        with torch.no_grad():
            found[name], weights[name] = network(x), dict(network.named_parameters())
    assert torch.allclose(found["timm"], found["timm with regfast's blur"])
    assert not torch.allclose(found["plain"], found["regfast"])
    for name in ("regfast", "regfast before", "timm"):
        assert all(
            torch.equal(weights[name][key], value) for key, value in weights["plain"].items()
        )


def test_training_steps_compute_the_same(swapped: None) -> None:
    """In float64, because batch normalisation of the last few pixels magnifies rounding errors.

    Some contestants round lam and the labels to float32.
    """

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return bench_manifold_mixup.resnet18("NCHW", "float64")

    inputs = bench_manifold_mixup.draw((2, 3, 64, 64), "NCHW", "float64")
    found = outputs_of(bench_manifold_mixup.CONTESTANTS, (), inputs, network)
    for name, (loss, *gradients) in found.items():
        assert torch.allclose(loss, found["regfast"][0], rtol=1e-5), name
        for gradient, expected in zip(gradients, found["regfast"][1:], strict=True):
            assert torch.allclose(
                gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max()
            ), name


def test_every_operation_has_its_file() -> None:
    assert {f"bench_{name}.py" for name in regfast.ops.OPERATIONS} <= {
        file.name for file in BENCH.glob("bench_*.py")
    }


def test_bytes_are_those_that_must_move() -> None:
    x, y, layer = 4 * 2 * 4 * 13 * 12, 4 * 2 * 4 * 6 * 6, regfast.MaxPool2dAA(2)

    def draw() -> tuple:
        return (timing.images((2, 4, 13, 12), "NCHW", "float32"),)

    for rereads, forward, backward in (
        (None, 0, 0),
        (False, x + y, y + x),
        (True, x + y, x + y + x),
    ):
        assert timing.Call(layer, draw, "forward", rereads).bytes == forward
        assert timing.Call(layer, draw, "forward+backward", rereads).bytes == forward + backward


def test_what_autograd_keeps_is_counted() -> None:
    """Of exp(x) * weight: the exponential, and not the input, the parameter or the output."""
    weight = torch.nn.Parameter(torch.tensor(2.0))
    call = timing.Call(
        lambda x: x.exp() * weight,
        lambda: (timing.images((3, 5), "NC", "float32"),),
        "forward+backward",
        parameters=[weight],
    )
    assert call.saved_bytes() == 4 * 3 * 5
    assert [tuple(gradient.shape) for gradient in call()] == [(3, 5), ()]


@pytest.mark.parametrize(("l2_bytes", "sets"), [(0, 1), (3 * 15 * 4, 7), (2**20, timing.CALLS)])
def test_calls_go_through_inputs_of_twice_the_l2(
    l2_bytes: int, sets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "L2_BYTES", l2_bytes)
    seen = []
    call = timing.Call(lambda x: seen.append(x) or x, lambda: (torch.ones(3, 5),), "forward")
    call.several()
    assert len({x.data_ptr() for x in seen}) == sets


def test_what_cannot_be_captured_is_timed_with_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(call: Callable) -> Callable:
        raise RuntimeError("operation not permitted when stream is capturing")

    call = timing.Call(torch.relu, lambda: (torch.ones(2),), "forward")
    monkeypatch.setattr(timing, "capture", refuses)
    assert timing.choose(call) == (call.several, "eager")
    monkeypatch.setattr(timing, "capture", lambda call: print)
    assert timing.choose(call) == (print, "graph")


def run(*command: str | Path, status: int = 0) -> str:
    """Run a command as a user does: an xdist worker's variables switch pytest-benchmark off."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = os.pathsep.join(
        filter(None, (str(BENCH), str(BENCH.parent / "examples"), env.get("PYTHONPATH")))
    )
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=env | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=BENCH.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_a_file_runs_with_the_options_of_pytest_benchmark(tmp_path: Path) -> None:
    file, few = (
        "bench/bench_mixup_cross_entropy.py",
        ["-k", "(two-term or regfast) and not compiled"],
    )
    short = [
        "--benchmark-max-time=0.01",
        "--benchmark-min-rounds=2",
        f"--benchmark-storage={tmp_path}",
    ]
    run(
        "-m",
        "pytest",
        file,
        *few,
        *short,
        "--benchmark-autosave",
        f"--benchmark-json={tmp_path / 'now.json'}",
    )
    recorded = json.loads((tmp_path / "now.json").read_text())
    # In an order of its own within a group.
    groups = [
        f"test_mixup_cross_entropy[(1024, 1000)-NC-float32-{direction}]"
        for direction in timing.DIRECTIONS
    ]
    assert [b["group"] for b in recorded["benchmarks"]] == [
        groups[0],
        groups[0],
        groups[1],
        groups[1],
    ]
    for benchmark in recorded["benchmarks"]:
        info, seconds = benchmark["extra_info"], benchmark["stats"]["median"]
        assert all(f"{name} " in info["versions"] for name in ("torch", "triton", "regfast"))
        assert {"device", "commit", "check", "of_copy"} <= info.keys()
        assert (info["how"], info["baseline"]) == ("cpu", "two-term loss")
        forward = 4 * 1024 * 1000 + 2 * 8 * 1024 + 4 + 4
        moved = (
            forward
            if benchmark["params"]["direction"] == "forward"
            else 2 * forward + 4 * 1024 * 1000
        )
        assert info["gb_per_s"] == pytest.approx(1e-9 * moved / seconds)
        assert ("saved_bytes" in info) == (benchmark["params"]["direction"] != "forward")
        assert len(benchmark["stats"]["data"]) >= 2
    printed = run(
        "-m",
        "pytest",
        file,
        *few,
        *short,
        "--benchmark-compare",
        "--benchmark-group-by=param:direction",
    )
    assert "benchmark 'direction=forward': 4 tests" in printed
    assert "(0001_" in printed and "(NOW)" in printed


# A file of a new operation, with a contestant that is absent and one that raises while it is timed.
TOY = """
import pytest
import torch
from peers import load
from timing import DIRECTIONS, images


def no_such_gradient(x):
    if torch.is_grad_enabled():
        raise ArithmeticError("no such gradient")
    return x.relu()


CONTESTANTS = {
    "nn.ReLU": torch.nn.ReLU,
    "regfast": lambda: lambda x: x.relu(),
    "no such library": lambda: load("no_such_library"),
    "no such gradient": lambda: no_such_gradient,
}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_toy(benchmark, ready, direction, contestant):
    step = CONTESTANTS[contestant]()
    benchmark(ready(step, lambda: (images((3, 5), "NC", "float32"),), direction))
"""


def test_absent_and_failing_contestants_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    """In a report of two passes."""
    file = tmp_path / "bench_toy.py"
    file.write_text(TOY)
    short = [
        "--benchmark-max-time=0.001",
        "--benchmark-min-rounds=1",
        "-p",
        "conftest",
        f"--rootdir={tmp_path}",
    ]
    printed = run(BENCH / "compare.py", "--passes=2", f"--out={tmp_path}", file, *short, status=1)
    report = (tmp_path / "report.md").read_text()
    assert printed.endswith(report + "\n")
    timed = ["nn.ReLU", "regfast", "no such gradient"]
    assert sorted((problem, contestant) for problem, contestant, *_ in table(report)[2:]) == sorted(
        [("test_toy[forward]", name) for name in timed]
        + [("test_toy[forward+backward]", name) for name in timed[:2]]
    )
    assert "no_such_library does not import: No module named 'no_such_library'" in report
    assert (
        "test_toy[forward+backward-no such gradient] - "
        "ArithmeticError: no such gradient (in 2 passes)" in report
    )


def test_a_run_that_times_nothing_has_no_report(tmp_path: Path) -> None:
    file = tmp_path / "bench_toy.py"
    file.write_text(TOY)
    (tmp_path / "pass1.json").write_text("of an earlier run")
    run(
        BENCH / "compare.py",
        f"--out={tmp_path}",
        file,
        "-k",
        "no_such_test",
        status=pytest.ExitCode.NO_TESTS_COLLECTED,
    )
    assert [path.name for path in tmp_path.glob("*.json")] == []


def table(report: str) -> list[list[str]]:
    """The cells of its lines."""
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.splitlines()
        if line.startswith("|")
    ]


def recorded(seconds: dict[str, float], **more: object) -> list[dict]:
    """What pytest-benchmark's file has of one problem with these medians."""
    info = {
        "how": "cpu",
        "baseline": "plain",
        "saved_bytes": 2**20,
        "device": "abacus",
        "versions": "torch 9",
    }
    info |= {"commit": "c0ffee", "check": "none on a CPU"} | more
    return [
        {
            "group": "test_toy[forward]",
            "params": {"contestant": name},
            "extra_info": info | {"of_copy": 0.25 / median},
            "stats": {"median": median},
        }
        for name, median in seconds.items()
    ]


def test_a_report_has_medians_of_passes_and_of_their_ratios() -> None:
    """The ratios are 1/1, 6/2 and 4/4, whose median is not the medians' ratio, 4/2."""
    passes = [
        recorded({"regfast": 1.0, "plain": 1.0, "slow": 9.0}),
        recorded({"plain": 2.0, "slow": 8.0, "regfast": 6.0}),
        recorded({"slow": 7.0, "regfast": 4.0, "plain": 4.0}),
    ]
    rows = compare.rows_of(passes)
    assert [(row["contestant"], row["seconds"], row["ratio"], row["of_copy"]) for row in rows] == [
        ("plain", 2.0, 1.0, 0.125),
        ("regfast", 4.0, 1.0, 0.0625),
        ("slow", 8.0, 4.0, 0.25 / 8.0),
    ]
    printed = compare.report(rows, passes, Counter())
    assert printed.startswith("# regfast's benchmark, 3 passes\n")
    cells = table(printed)
    assert cells[0] == [
        "problem",
        "contestant",
        "how",
        "time, us",
        "ratio",
        "of copy",
        "saved, MiB",
    ]
    assert cells[2] == ["test_toy[forward]", "plain", "cpu", "2000000.0", "1.00", "12%", "1.00"]
    for note in ("device: abacus", "versions: torch 9", "commit: c0ffee", "check: none on a CPU"):
        assert printed.count(f"- {note}\n") == 1


def test_a_report_says_of_any_pass_that_it_is_not_trusted_and_needs_no_baseline() -> None:
    passes = [
        recorded({"regfast": 1.0}, check="trusted; 1"),
        recorded({"regfast": 1.0}, check="NOT TRUSTED; 2"),
    ]
    rows = compare.rows_of(passes)
    printed = compare.report(rows, passes, Counter())
    assert "- check: trusted; 1\n- check: NOT TRUSTED; 2\n" in printed
    assert "ratio" not in rows[0]
