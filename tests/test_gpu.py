"""bench/gpu.py on a CPU: each part runs, one in trouble costs no other its results, and goals are judged right."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="the bench extra is not installed")

from contestants import FUNCTIONS, OPERATIONS
from goals import GOALS, Goal, cases, cost, cost_ratio, judge, of_copy, own, times_faster
from gpu import parse

BENCH = Path(__file__).parent.parent / "bench"

WHOLE = """
import sys

import gpu

sys.exit(gpu.main(sys.argv[1:]))
"""

ONE_OPERATION = """
import sys

import gpu

gpu.OPERATIONS = {{"{0}": gpu.OPERATIONS["{0}"]}}
sys.exit(gpu.main(sys.argv[1:]))
"""

# gpu.py with other steps: a program that nobody has, one that waits for ever as its child does, which holds a lock, one that this
# machine is unable to run, one that fails after its first row, and one that ends well.
IN_TROUBLE = '''
import sys

import gpu
from gpu import Step

CHILD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(600)
"""
PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]); time.sleep(600)"
ROW = '[{"cost": "host time", "operation": "o", "case": "c", "contestant": "regfast", "value": 1.5, "unit": "us"}]'
WRITER = "import sys; open(sys.argv[1], 'w').write(sys.argv[2]); sys.exit(3)"


def python(name, code, *arguments, share=1000, **others):
    return Step(name, [sys.executable, "-c", code, *arguments], share, **others)


def steps(options):
    costs = options.out / "costs.json"
    yield Step("tests", ["no-such-program"], 1)
    yield python("sanitize-hanging", PARENT, CHILD, options.out / "lock", share=90)
    yield python("sanitize-unable", "raise SystemExit('Device not supported')", unable="Device not supported")
    yield python("costs", WRITER, costs, ROW, results=costs)
    yield python("tune-well", "print('done')")


gpu.PARTS = {"all": steps}
gpu.USUAL = ("all",)
sys.exit(gpu.main(sys.argv[1:]))
'''


def run(driver: str, out: Path, *arguments: str) -> tuple[int, str, dict]:
    """The exit status, what was printed, and gpu.json."""
    # Of pytest's variables, those of a pytest-xdist worker would switch pytest-benchmark off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(BENCH), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", driver, "--device=cpu", f"--out={out}", *arguments]
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True)
    assert (out / "gpu.json").exists(), done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr, json.loads((out / "gpu.json").read_text())


def check_everything(status: int, printed: str, kept: dict, out: Path, operations: set[str]) -> None:
    """That each part ended well and left its figures."""
    assert status == 0, printed
    assert set(kept["parts"]) == {"tests", "sanitize", "bench", "costs"}
    assert all(step["status"] == "ok" for steps in kept["parts"].values() for step in steps)
    (tests,) = kept["parts"]["tests"]
    assert tests["counts"]["tests"] > 0 and tests["counts"]["failures"] == 0
    assert {row["operation"] for row in kept["rows"] if "median_ms" in row} == operations
    assert {row["operation"] for row in kept["costs"]} == operations & set(FUNCTIONS)
    assert {"saved beside x", "host time of a call", "first forward", "first backward"} <= {row["cost"] for row in kept["costs"]}
    assert {goal["met?"] for goal in kept["goals"]} == {"not measured (cpu)"}
    written = (out / "gpu.md").read_text()
    assert "## costs" in written and "| regfast " in written
    summary = written.split("## Summary")[1]
    # Whoever runs it elsewhere may see the last 12,000 characters of what is printed.
    assert summary.strip() in printed and len(summary) < 8000


@pytest.mark.parametrize("operation", ["blur_pool", pytest.param("mixup", marks=pytest.mark.slow)])
def test_all_parts_leave_their_figures(tmp_path: Path, operation: str) -> None:
    check_everything(*run(ONE_OPERATION.format(operation), tmp_path), tmp_path, {operation})


@pytest.mark.slow
def test_all_parts_leave_their_figures_of_every_operation(tmp_path: Path) -> None:
    check_everything(*run(WHOLE, tmp_path), tmp_path, set(OPERATIONS))


def test_a_part_in_trouble_costs_no_other_its_results(tmp_path: Path) -> None:
    status, printed, kept = run(IN_TROUBLE, tmp_path, "--minutes=2")
    assert status == 1
    found = {step["name"]: step for steps in kept["parts"].values() for step in steps}
    assert {name: step["status"] for name, step in found.items()} == {
        "tests": "failed",
        "sanitize-hanging": "timed out",
        "sanitize-unable": "absent",
        "costs": "failed",
        "tune-well": "ok",
    }
    assert "no-such-program" in found["tests"]["last_lines"][-1]
    assert found["tune-well"]["last_lines"] == ["done"]
    assert [row["value"] for row in kept["costs"]] == [1.5]
    # What a step started is stopped with it: nobody holds the lock.
    assert "locked" in (tmp_path / "sanitize-hanging.log").read_text()
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    written = (tmp_path / "gpu.md").read_text()
    assert "## tests: failed" in written and "## sanitize-hanging: timed out" in written
    assert "sanitize-hanging: timed out" in printed


def test_only_chooses_a_part_and_its_operations() -> None:
    assert parse([]).parts == ("tests", "sanitize", "bench", "costs")
    assert parse(["--only", "bench"]).operations == list(OPERATIONS)
    chosen = parse(["--only", "bench", "blur_pool"])
    assert (chosen.parts, chosen.operations) == (("bench",), ["blur_pool"])


@pytest.mark.parametrize(
    "only", [["nothing"], ["bench", "nothing"], ["costs", "mixup_step"], ["tests", "blur_pool"], ["tune"]], ids=" ".join
)
def test_only_refuses_what_is_not_there(only: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--only", *only])
    assert "error: --only" in capsys.readouterr().err


def row(contestant: str, dtype: str = "bfloat16", format: str = "NCHW", direction: str = "forward+backward", **figures) -> dict:
    """A row of the benchmark as it is read from JSON: the second arguments, the first shape."""
    shape = [256, 64, 112, 112]
    case = dict(operation="max_blur_pool", arguments=[3, 2, 1], shape=shape, format=format, dtype=dtype, direction=direction)
    return case | {"contestant": contestant, "absent": None, "error": None, "run": "bench-max_blur_pool"} | figures


def everywhere(**figures: float) -> list[dict]:
    """regfast's rows in each of the cases of max_blur_pool's forward, all alike."""
    return [
        row("regfast", dtype, format, "forward") | {"arguments": arguments, "shape": shape} | figures
        for arguments in ([2, 2, 0], [3, 2, 1])
        for shape in ([256, 64, 112, 112], [256, 256, 28, 28])
        for format in ("NCHW", "NHWC")
        for dtype in ("bfloat16", "float32")
    ]


def test_a_goal_is_met_where_the_worst_case_is_good_enough() -> None:
    goal, rows = of_copy("max_blur_pool", "forward", 0.9), everywhere(of_copy=0.97)
    assert judge(goal, rows).met == "yes"
    rows[5]["of_copy"] = 0.9
    verdict = judge(goal, rows)
    assert (verdict.met, verdict.worst, verdict.measured, verdict.cases) == ("yes", 0.9, 16, 16)
    rows[6]["of_copy"] = 0.85
    verdict = judge(goal, rows)
    assert (verdict.met, verdict.worst) == ("no", 0.85)
    assert verdict.case == "max_blur_pool(2, 2, 0) 256x256x28x28 NHWC bfloat16 forward"


def test_a_goal_with_a_case_missing_is_not_met() -> None:
    goal, rows = of_copy("max_blur_pool", "forward", 0.9), everywhere(of_copy=0.97)
    assert judge(goal, rows[1:]).met == "incomplete"
    assert judge(goal, [r | {"of_copy": 0.5} for r in rows[1:]]).met == "no"
    assert judge(goal, []).met == "not measured"


def test_the_worst_of_what_must_be_small_is_the_largest() -> None:
    goal = Goal("", own("max_blur_pool", "forward+backward", ["bfloat16"], "ratio", max), 0.8, True, "{:.2f}")
    verdict = judge(goal, [row("regfast", ratio=0.75), row("regfast", format="NHWC", ratio=0.9)])
    assert (verdict.met, verdict.worst, verdict.measured, verdict.cases) == ("no", 0.9, 2, 8)


def test_rivals_are_compared_within_a_pass() -> None:
    rows = [row("regfast", median_ms=1.0), row("kornia", median_ms=5.0), row("timm", median_ms=4.5)]
    rows += [row("composer", absent="not installed"), row("regfast", run="another", median_ms=2.0)]
    figures = times_faster("max_blur_pool", ("kornia", "timm", "composer"), ["bfloat16"])(rows)
    case = "max_blur_pool(3, 2, 1) 256x64x112x112 NCHW bfloat16 forward+backward"
    assert {name: figure for name, figure in figures.items() if figure is not None} == {
        f"kornia, {case}": 5.0,
        f"timm, {case}": 4.5,
    }
    assert f"composer, {case}" not in figures
    verdict = judge(Goal("", times_faster("max_blur_pool", ("kornia", "timm"), ["bfloat16"]), 5, False, "{:.2f}"), rows)
    assert (verdict.met, verdict.case) == ("no", f"timm, {case}")
    assert set(times_faster("max_blur_pool", ["timm"], ["bfloat16"], direction="forward")(rows).values()) == {None}


def test_costs_are_regfast_s_own_or_a_ratio() -> None:
    common = {"cost": "host time of a call", "operation": "blur_pool", "case": "c"}
    rows = [common | {"contestant": "regfast", "value": 30.0}, common | {"contestant": "F.max_pool2d", "value": 10.0}]
    assert cost("host time of a call", ["blur_pool", "max_blur_pool"])(rows) == {"c": 30.0, "max_blur_pool": None}
    ratio = cost_ratio("host time of a call", ["blur_pool"], over="regfast", under="F.max_pool2d")
    assert ratio(rows) == {"c": 3.0}
    assert ratio(rows[:1]) == {"c": None}
    assert judge(Goal("", ratio, 2, True, "{:.2f}"), rows).met == "no"


def test_goals_ask_for_the_cases_that_are_timed() -> None:
    """Rows of logits have one format, images two; and a step is timed in one direction."""
    found = [str(case) for case in cases("mixup_cross_entropy", "backward", ["bfloat16"])]
    assert found == [
        "mixup_cross_entropy() 65536x1000 NC bfloat16 backward",
        "mixup_cross_entropy() 4096x32000 NC bfloat16 backward",
        "mixup_cross_entropy() 32x21x512x512 NCHW bfloat16 backward",
        "mixup_cross_entropy() 32x21x512x512 NHWC bfloat16 backward",
    ]
    timed = [re.search(r"(\w+)\(.*\) \S+ \S+ \S+ (\S+)$", case) for goal in GOALS for case in goal.figures([])]
    for operation, direction in {found.groups() for found in timed if found}:
        assert direction in OPERATIONS[operation].directions, operation
    assert {found[1] for found in timed if found} == set(OPERATIONS)


def test_every_goal_can_be_judged_without_a_row() -> None:
    assert {judge(goal, []).met for goal in GOALS} == {"not measured"}
    assert len({goal.name for goal in GOALS}) == len(GOALS)
