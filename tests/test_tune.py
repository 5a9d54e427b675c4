"""tools/tune.py in small: what spills is never launched, and the best cut is one that ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tools.tune", *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The row of a sweep over two cuts of the largest backward. One of them spills for sm_90."""
    out = tmp_path_factory.mktemp("tune")
    chosen = ["--format", "channels_last", "--direction", "backward", "--dtype", "bf16"]
    fields = ["columns=2,8", "vector=4", "unroll=1", "rows=16", "num_warps=4"]
    done = run("2d (3, 2, 1)", *chosen, "--try", *fields, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((out / "tune.json").read_text())
    assert row["best"] in done.stdout and row["best"] in (out / "tune.md").read_text()
    return row


def test_what_spills_is_not_launched(row: dict) -> None:
    few, many = sorted(row["candidates"], key=lambda each: each["registers"])
    assert few["launched"] and few["spills"] == 0 and few["median_ms"] > 0
    assert not many["launched"] and many["spills"] > 0 and many["median_ms"] is None


def test_the_best_is_of_what_ran_and_the_pinned_cut_is_beside_it(row: dict) -> None:
    from regfast.kernels.cuts import CUTS, Cut

    assert row["best"] == str(Cut((2,), 4, 0, 1, 16, 4))
    # The cut for 16-bit numbers with innermost channels.
    assert row["pinned"] == str(CUTS["backward"][1])
    assert row["median_ms"] > 0 and row["pinned_ms"] > 0


def test_a_sweep_without_a_candidate_that_fits_is_named(tmp_path: Path) -> None:
    fields = ["columns=8", "vector=8", "unroll=1", "rows=16", "num_warps=4"]
    chosen = ["--format", "channels_last", "--direction", "forward", "--dtype", "bf16"]
    done = run("2d", *chosen, "--try", *fields, "--out", str(tmp_path))
    assert done.returncode == 1
    assert (
        "blur_pool forward 2d channels last bf16 sm_90: no candidate is without spills"
        in done.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["images"], "invalid choice: 'images'"),
        (["2d", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["2d", "--try", "depth=4"], "'depth=4' is not as rows=8,16"),
        (["2d", "--try", "rows"], "'rows' is not as rows=8,16: rows, columns, vector, unroll, num"),
        (["1d", "--format", "channels_last"], "no case of ['1d'] has a format of"),
    ],
)
def test_what_is_not_there_is_named(arguments: list[str], complaint: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
