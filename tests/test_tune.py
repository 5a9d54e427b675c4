"""bench/tune.py, in small: every candidate is compiled, what spills is never launched, and the figures are of what ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"

# tune.py on the pooling whose backward is the largest of the benchmark's. The processes that compile import the main module
# anew, so that this has to be a file.
DRIVER = """
import os
import runpy
import sys

if __name__ == "__main__":
    # As tune.py does where there is no GPU, and before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"
    from contestants import OPERATIONS

    OPERATIONS["max_blur_pool"].arguments[:] = [(3, 2, 1)]
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(BENCH), str(BENCH.parent), os.environ.get("PYTHONPATH"))))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *command], env=env, cwd=BENCH.parent, capture_output=True, text=True)


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The one class of a sweep over two cuts, one of which spills for sm_90."""
    out = tmp_path_factory.mktemp("tune")
    driver = out / "driver.py"
    driver.write_text(DRIVER)
    chosen = ["--formats=NHWC", "--directions=backward", "--dtypes=bfloat16", f"--out={out}"]
    cuts = ["--try", "columns=2,8", "vector=4", "unroll=1", "rows=4", "num_warps=4"]
    done = run(driver, BENCH / "tune.py", "max_blur_pool", *chosen, *cuts)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((out / "tune-max_blur_pool.json").read_text())["rows"]
    assert row["best"] in done.stdout and row["best"] in (out / "tune-max_blur_pool.md").read_text()
    return row


def test_what_spills_is_not_launched(row: dict) -> None:
    few, many = sorted(row["candidates"], key=lambda each: each["registers"])
    assert few["launched"] and few["spills"] == 0 and few["median_ms"] > 0
    assert not many["launched"] and many["spills"] > 0 and "median_ms" not in many


def test_the_best_is_of_what_ran_and_the_pinned_cut_is_beside_it(row: dict) -> None:
    from regfast.kernels.cuts import CUTS

    # Of 16-bit numbers with innermost channels.
    cut = CUTS["backward"][1]
    others = f"held={cut.held},unroll=1,rows=4,num_warps=4,programs={cut.programs}"
    assert row["best"] == f"columns=2,vector=4,{others}"
    assert row["median_ms"] > 0 and row["pinned_ms"] > 0
    columns = "/".join(map(str, cut.columns))
    assert row["pinned"].startswith(f"columns={columns},vector={cut.vector},held={cut.held},unroll={cut.unroll},")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["mixup"], "invalid choice: 'mixup'"),
        (["blur_pool", "--try", "depth=4"], "'depth' is not one of columns, vector, unroll, rows, num_warps"),
        (["blur_pool", "--try", "rows"], "'rows' is not of the form rows=8,16"),
    ],
)
def test_what_is_not_there_is_named(arguments: list[str], complaint: str) -> None:
    done = run(BENCH / "tune.py", *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
