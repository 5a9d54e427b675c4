"""`make bench`, in small: that everybody it names is in its reports, with figures that follow from one another."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the bench extra is not installed")
pytest.importorskip("matplotlib", reason="the bench extra is not installed")

BENCH = Path(__file__).parent.parent / "bench"
CONTESTANTS = {"nn.MaxPool2d", "regfast", "eager composite", "no such library", "no such gradient"}
GROUPS = {(format, direction) for format in ("NCHW", "NHWC") for direction in ("forward", "forward+backward")}

# run.py with two more contestants: one that nobody has, and one that raises while it is being timed.
DRIVER = """
import sys

import torch
from contestants import OPERATIONS
from peers import load
from run import main


def no_such_gradient(case):
    def pool(x):
        if torch.is_grad_enabled():
            raise ArithmeticError("no such gradient")
        return torch.nn.functional.max_pool2d(x, *case.arguments)

    return pool


contestants = OPERATIONS["max_blur_pool"].contestants
contestants["no such library"] = lambda case: load("no_such_library")
contestants["no such gradient"] = no_such_gradient
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run's reports, and what it printed."""
    out = tmp_path_factory.mktemp("bench")
    # Of pytest's variables, those of a pytest-xdist worker would switch pytest-benchmark off.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = os.pathsep.join(filter(None, (str(BENCH), env.get("PYTHONPATH"))))
    toy = ["--device=cpu", "--quick", "--only=max_blur_pool", "--shapes=2x4x13x12", f"--out={out}"]
    few = ["-k", "MaxPool2d or (regfast and not compiled) or eager or such"]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *toy, *few],
        env=env | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=BENCH.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def rows(run: tuple[Path, str]) -> list[dict]:
    return json.loads((run[0] / "report.json").read_text())["rows"]


def test_every_contestant_has_a_row_in_every_group(rows: list[dict]) -> None:
    found = [(row["contestant"], row["format"], row["direction"]) for row in rows]
    assert len(found) == len(set(found))
    assert set(found) == {(name, *group) for name in CONTESTANTS for group in GROUPS}


def test_whoever_cannot_be_timed_is_named_and_the_others_go_on(run: tuple[Path, str], rows: list[dict]) -> None:
    timed = {(row["contestant"], row["direction"]) for row in rows if "median_ms" in row}
    assert timed == {
        (name, direction)
        for name in CONTESTANTS - {"no such library"}
        for direction in ("forward", "forward+backward")
        if (name, direction) != ("no such gradient", "forward+backward")
    }
    assert "absent: no such library, max_blur_pool, 4 times: not installed: No module named 'no_such_library'" in run[1]
    assert "error: no such gradient, max_blur_pool, 2 times: ArithmeticError: no such gradient" in run[1]


def test_figures_follow_from_the_medians(rows: list[dict]) -> None:
    for group in GROUPS:
        timed = [row for row in rows if (row["format"], row["direction"]) == group and "median_ms" in row]
        (baseline,) = (row["median_ms"] for row in timed if row["contestant"] == "nn.MaxPool2d")
        for row in timed:
            assert row["ratio"] == pytest.approx(row["median_ms"] / baseline)
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
            assert row["of_copy"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])


def test_bytes_are_those_of_the_design(rows: list[dict]) -> None:
    x, y = 4 * 2 * 4 * 13 * 12, 4 * 2 * 4 * 6 * 6
    for row in rows:
        if "bytes" in row:
            assert row["bytes"] == (x + y if row["direction"] == "forward" else (x + y) + (x + y + x))


def test_pytest_benchmark_has_the_same_times(run: tuple[Path, str], rows: list[dict]) -> None:
    kept = json.loads((run[0] / "pytest-benchmark.json").read_text())["benchmarks"]
    timed = [row for row in rows if "median_ms" in row]
    assert len(kept) == len(timed)
    for benchmark, row in zip(kept, timed):
        assert benchmark["params"]["contestant"] == row["contestant"]
        assert row["direction"] in benchmark["group"]
        assert benchmark["extra_info"]["ratio"] == row["ratio"]
        assert len(benchmark["stats"]["data"]) == row["rounds"]
        assert 1e3 * statistics.median(benchmark["stats"]["data"]) == pytest.approx(row["median_ms"])


def test_reports_are_there(run: tuple[Path, str]) -> None:
    out, printed = run
    written = (out / "report.md").read_text()
    for name in CONTESTANTS:
        assert f"| {name} " in printed
        assert f"| {name} " in written
    assert (out / "max_blur_pool.png").read_bytes().startswith(b"\x89PNG")
    assert {"date", "device", "torch"} <= json.loads((out / "report.json").read_text()).keys()


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.syspath_prepend(BENCH)
    from contestants import OPERATIONS

    return OPERATIONS


def outputs_of(operations: dict, case: tuple, but: tuple[str, ...] = ()) -> dict[str, list[torch.Tensor]]:
    """What each contestant gives for the same inputs, and the gradients of what it is differentiated by; `but` some."""
    from contest import Case, leaves
    from peers import AbsentError

    case = Case(*case)
    row, found = operations[case.operation], {}
    inputs = row.inputs(case, torch.device("cpu"))
    for name, make in row.contestants.items():
        if name in but or "compiled" in name:
            continue
        own = tuple(t.clone().detach().requires_grad_(t.requires_grad) for t in inputs)
        try:
            step = make(case)
        except AbsentError:
            continue
        if isinstance(step, torch.nn.Module):
            step = step.to(case.torch_dtype)
        y = step(*own)
        torch.manual_seed(1)
        gradients = torch.autograd.grad(y, leaves(step, own), torch.randn_like(y)) if y.requires_grad else ()
        found[name] = [y.detach(), *gradients]
    assert {"regfast"} < found.keys()
    return found


@pytest.mark.parametrize("operation", ["max_blur_pool", "blur_pool"])
def test_poolings_compute_the_same(operation: str, operations: dict) -> None:
    """But for the baseline, which does not blur, and for the border, where each has its own mode."""
    for arguments in operations[operation].arguments:
        baseline = next(iter(operations[operation].contestants))
        found = outputs_of(operations, (operation, arguments, (2, 3, 17, 16), "NCHW", "float32", "forward"), but=(baseline,))
        for name, (y, _) in found.items():
            assert y.shape == found["regfast"][0].shape, name
            assert torch.allclose(y[..., 1:-1, 1:-1], found["regfast"][0][..., 1:-1, 1:-1], atol=1e-6), name


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever pairs a batch of two at random swaps them, as a flip and a roll do; and ManifoldMixup draws the others' lam."""
    monkeypatch.syspath_prepend(BENCH)
    import mixings

    from regfast import manifold

    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n).flip(0))
    monkeypatch.setattr(manifold, "beta", lambda alpha, size, generator: torch.full(size, mixings.LAM))


@pytest.mark.parametrize("format", ["NCHW", "NHWC"])
@pytest.mark.parametrize("operation", ["mixup", "mixup_uint8"])
def test_blends_compute_the_same(operation: str, format: str, operations: dict, swapped: None) -> None:
    """To rounding, which comes in another order where the images are normalised."""
    found = outputs_of(operations, (operation, (), (2, 3, 13, 12), format, "float32", "forward"))
    assert not torch.allclose(found["regfast"][0], found["regfast"][0].flip(0))
    for name, outputs in found.items():
        assert len(outputs) == len(found["regfast"]), name
        for y, expected in zip(outputs, found["regfast"]):
            assert torch.allclose(y, expected, atol=2e-6), name


@pytest.mark.parametrize(("shape", "format"), [((6, 10), "NC"), ((2, 5, 4, 3), "NCHW"), ((2, 5, 4, 3), "NHWC")])
def test_losses_compute_the_same(shape: tuple[int, ...], format: str, operations: dict) -> None:
    found = outputs_of(operations, ("mixup_cross_entropy", (), shape, format, "float32", "forward"))
    for name, (loss, gradient) in found.items():
        assert torch.allclose(loss, found["regfast"][0], atol=1e-6), name
        assert torch.allclose(gradient, found["regfast"][1], atol=1e-6), name


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_residuals_compute_the_same(activation: str, operations: dict) -> None:
    found = outputs_of(operations, ("rezero", (activation,), (2, 3, 13, 12), "NHWC", "float32", "forward"))
    for name, outputs in found.items():
        for y, expected in zip(outputs, found["regfast"], strict=True):
            assert torch.allclose(y, expected, rtol=1e-5, atol=1e-4), name


@pytest.mark.parametrize("arguments", [(6, 3, 2, 1), (6, 1, 2, 0)], ids=str)
def test_convolutions_compute_the_same(arguments: tuple, operations: dict) -> None:
    """timm's, which blurs after as ours does; the plain one has the same size."""
    case = ("convolution", arguments, (2, 4, 13, 12), "NCHW", "float64", "forward")
    torch.manual_seed(0)
    from contest import Case

    x, found = torch.randn(2, 4, 13, 12, dtype=torch.float64), {}
    for name in ("nn.Conv2d", "regfast", "timm"):
        layer = operations["convolution"].contestants[name](Case(*case)).double()
        (weight,) = (p for p in layer.parameters() if p.ndim == 4)
        torch.nn.init.constant_(weight, 0.25)
        found[name] = layer(x)
    assert torch.allclose(found["regfast"], found["timm"])
    assert found["nn.Conv2d"].shape == found["regfast"].shape


def test_networks_are_those_they_are_named_after(operations: dict) -> None:
    """timm's blurs and ours in their place compute the same; what is converted, and the plain one, have the same weights."""
    from contest import Case

    case = Case("resnet18", (), (2, 3, 32, 32), "NCHW", "float64", "forward")
    x, found, weights = torch.randn(2, 3, 32, 32, dtype=torch.float64), {}, {}
    for name in ("plain", "regfast", "regfast before", "timm", "timm with regfast's blur"):
        network = operations["resnet18"].contestants[name](case).double()
        with torch.no_grad():
            found[name], weights[name] = network(x), dict(network.named_parameters())
        assert not network.network.training
        network(x).sum().backward()
        assert network.network.training
    assert torch.allclose(found["timm"], found["timm with regfast's blur"])
    assert not torch.allclose(found["plain"], found["regfast"])
    for name in ("regfast", "regfast before", "timm"):
        assert all(torch.equal(weights[name][key], value) for key, value in weights["plain"].items())


@pytest.mark.parametrize("operation", ["manifold_mixup", "mixup_step"])
def test_training_steps_compute_the_same(operation: str, operations: dict, swapped: None) -> None:
    """In float64, because batch normalisation of the few pixels that are left at the end magnifies what rounding does.

    lam and the labels are rounded to float32 by some.
    """
    (arguments,) = operations[operation].arguments
    found = outputs_of(operations, (operation, arguments, (2, 3, 64, 64), "NCHW", "float64", "forward"))
    for name, (loss, *gradients) in found.items():
        assert torch.allclose(loss, found["regfast"][0], rtol=1e-5), name
        for gradient, expected in zip(gradients, found["regfast"][1:], strict=True):
            assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max()), name


def test_a_step_has_no_floor() -> None:
    """Its row has a time and a ratio, and no fraction of a bandwidth."""
    from contest import Case
    from measure import COPY, Pass
    from report import cells

    case = Case("mixup_step", (), (4, 3, 32, 32), "NCHW", "float32", "forward+backward")
    timed = {"seeds' code": [2.0], "regfast": [1.0], COPY: [1.0]}
    row = Pass(case, "seeds' code", timed, {}, {}, 0, 10**9).row("regfast")
    assert row["ratio"] == 0.5 and not {"of_copy", "bytes", "gb_per_s"} & row.keys()
    assert cells(row)[-3:] == ["1000.000", "0.50", ""]


def test_every_operation_has_its_file(operations: dict) -> None:
    assert {file.stem.removeprefix("bench_") for file in BENCH.glob("bench_*.py")} == operations.keys()
