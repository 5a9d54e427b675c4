"""tools/gpu.py on a CPU: parts run, one in trouble costs no other its results, and the report says what was found."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tabulate")

from tools import gpu, kernels
from tools.steps import Step

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def outside_of_pytest(monkeypatch):
    """What is run is at the root, and no part of this run of pytest."""
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)


def results(out: Path) -> tuple[dict, str]:
    return json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()


def statuses(parts: dict) -> dict[str, str]:
    return {step["name"]: step["status"] for part in parts.values() for step in part["steps"]}


def check_kernels_and_host(out: Path) -> None:
    parts, report = results(out)
    assert set(statuses(parts).values()) == {"ok", "absent"}, report
    assert "A device copy" in report and "rezero gate gelu backward" in report
    assert [row["direction"] for row in parts["kernels"]["files"]["kernels-times.jsonl"][1:]] == [
        "forward",
        "backward",
    ]
    assert {"operation", "state", "us", "ratio", "limit"} <= parts["host"]["files"]["host.json"][
        0
    ].keys()
    assert torch.__version__ in report.split("## Where")[1]


def test_parts_that_are_named_leave_what_they_found(tmp_path):
    assert gpu.run_parts(["kernels", "host"], "cpu", tmp_path, 7) == 0
    check_kernels_and_host(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_without_a_name_all_usual_parts_run(tmp_path):
    assert gpu.main(["--device=cpu", f"--out={tmp_path}"]) == 0
    check_kernels_and_host(tmp_path)
    parts, report = results(tmp_path)
    assert list(parts) == ["tests", "kernels", "host", "steps", "sanitize"]
    assert "1 passed" in report and '"number": 1, "of": 1' in report
    assert "| resnet18 | plain " in re.sub(" +", " ", report)


CHILD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(600)
"""
PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]); time.sleep(600)"
WRITER = """
import sys
with open(sys.argv[1], "w") as file:
    file.write('{"copy": 4e12}\\n{"operation": "rezero", "case": "gate relu", "dir')
sys.exit(3)
"""


def python(name: str, code: str, *arguments: str | Path, share: float = 1, **others) -> Step:
    return Step(name, [sys.executable, "-c", code, *arguments], share, **others)


def test_a_part_in_trouble_costs_no_other_its_results(tmp_path, monkeypatch):
    """One waits for ever, as its child does, which holds a lock. One ends within a row of its file."""

    def tests(cpu: bool, raw: Path) -> Iterator[Step]:
        yield Step("tests", [None, "--version"], 100)
        yield python("tests-hanging", PARENT, CHILD, tmp_path / "lock", share=8)

    def kernels(cpu: bool, raw: Path) -> Iterator[Step]:
        yield python("kernels-times", WRITER, raw / "kernels-times.jsonl", share=4)

    def sanitize(cpu: bool, raw: Path) -> Iterator[Step]:
        yield python(
            "sanitize-unable", "raise SystemExit('Device not supported')", unable="not supported"
        )
        yield python("sanitize-ends-in-time", "import sys; print(sys.argv[1])", "{seconds}")
        yield python("sanitize-well", "print('done')", share=10)

    monkeypatch.setattr(gpu, "PARTS", {part.__name__: part for part in (tests, kernels, sanitize)})
    assert gpu.run_parts([], "cpu", tmp_path, minutes=0.6) == 1
    parts, report = results(tmp_path)
    assert statuses(parts) == {
        "tests": "absent",
        "tests-hanging": "cut",
        "kernels-times": "failed",
        "sanitize-unable": "absent",
        "sanitize-ends-in-time": "ok",
        "sanitize-well": "ok",
    }
    assert parts["kernels"]["files"]["kernels-times.jsonl"] == [{"copy": 4e12}]
    assert "moves 4.00 TB/s" in report and "sanitize-well, ok:\n\n```\ndone\n```" in report
    (left,) = parts["sanitize"]["steps"][1]["ending"]
    assert 1 <= int(left) < 60
    # What a step started is stopped with it.
    assert parts["tests"]["steps"][1]["ending"][0] == "locked"
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_is_whole_does_not_run_again_unless_it_is_named(tmp_path, monkeypatch):
    ran, commit = [], ["one"]

    def run_all(steps, minutes, log, environment):
        for step in steps:
            ran.append(step.name)
            yield {"name": step.name, "status": step.command[0], "seconds": 1.0, "ending": ["end"]}

    def part_of(name: str, *ends: str):
        def part(cpu: bool, raw: Path) -> list[Step]:
            return [Step(f"{name}-{number}", [end], 1) for number, end in enumerate(ends)]

        return part

    def setting(device: str) -> dict[str, str]:
        return {"commit": commit[0], "device": device, "date": "now"}

    parts = {
        "tests": part_of("tests", "failed"),
        "host": part_of("host", "ok", "absent"),
        "tune": part_of("tune", "ok"),
    }
    monkeypatch.setattr(gpu, "PARTS", {"kernels": part_of("kernels", "ok", "cut")} | parts)
    monkeypatch.setattr(gpu, "run_all", run_all)
    monkeypatch.setattr(gpu, "setting", setting)

    def run(*names: str) -> list[str]:
        del ran[:]
        gpu.run_parts(list(names), "cpu", tmp_path, 1)
        return list(ran)

    assert run("host") == ["host-0", "host-1"]
    assert run() == ["kernels-0", "kernels-1", "tests-0"]
    assert run() == ["kernels-0", "kernels-1"]
    assert run("tests", "tune") == ["tests-0", "tune-0"]
    found, report = results(tmp_path)
    assert list(found) == ["kernels", "tests", "host", "tune"]
    assert all(f"## {name}" in report for name in found)
    commit[0] = "another"
    assert len(run()) == 5


def test_what_is_no_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["bench"])
    assert (
        "PART is one of tests, kernels, host, steps, sanitize, tune, got bench"
        in capsys.readouterr().err
    )


def test_the_tests_for_a_gpu_are_there():
    """Those that only a GPU can run are kept; what is left out has a name that a test has."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", *gpu.chosen()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sources = [(ROOT / "tests" / name.split("::")[0]).read_text() for name in gpu.FILES]
    names = re.findall(r"^def (test_\w+)\(", "\n".join(sources), flags=re.M)
    for pattern in " or ".join(gpu.LEFT_OUT).split(" or "):
        assert any(pattern.rstrip("[") in name for name in names), pattern
    counts = dict(re.findall(r"^tests/(test_\w+\.py): (\d+)$", done.stdout, flags=re.M))
    assert {name.split("::")[0] for name in gpu.FILES} == counts.keys()
    assert 600 < sum(map(int, counts.values())) < 1000
    only_cuda = re.compile(r"skipif\(not torch\.cuda.*\n(?:@.*\n)*def (test_\w+)")
    for path in (ROOT / "tests").glob("test_*.py"):
        for name in only_cuda.findall(path.read_text()):
            in_files = path.name in gpu.FILES or f"{path.name}::{name}" in gpu.FILES
            assert in_files and not any(
                p in name for p in " or ".join(gpu.LEFT_OUT).split(" or ")
            ), name


@pytest.mark.slow
def test_the_tests_of_a_sample_have_one_process():
    pytest.importorskip("xdist")
    chosen = [
        "tests/test_contract.py",
        "-k",
        "(scipy or two_backward) and rezero",
        "-v",
        "--numprocesses=2",
        "--dist=loadgroup",
    ]
    done = subprocess.run([sys.executable, "-m", "pytest", *chosen], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.findall(r"^\[(gw\d)\] .* PASSED .*\[(rezero-.*)\] *$", done.stdout, flags=re.M)
    processes = {
        sample: {process for process, other in passed if other == sample} for _, sample in passed
    }
    assert len(processes) < len(passed) and {len(found) for found in processes.values()} == {1}
    assert len({process for process, _ in passed}) == 2


@pytest.mark.parametrize("toy", [False, True], ids=["timed", "toys"])
def test_every_problem_has_its_calls(toy, monkeypatch):
    """On tensors without data; and what is timed has a row in the table of compiled kernels."""
    monkeypatch.setattr(kernels, "CUDA", True)
    monkeypatch.setattr(kernels, "DEVICE", "meta")
    rows = [row for job in kernels.jobs(toy) for row, _ in job.calls(toy)]
    assert {row["dtype"] for row in rows} == {"bf16", "fp32"}
    assert {row["operation"] for row in rows} == set(kernels.TIMED)
    if not toy:
        assert all(10 < row["foretold_us"] < 1000 and row["per_element"] > 1 for row in rows)


def row(direction: str, case: str = "2d k=2", **more) -> dict:
    key = {
        "operation": "max_blur_pool",
        "direction": direction,
        "case": case,
        "format": "channels last",
        "dtype": "bf16",
    }
    return (
        key
        | {"elements": 205520896, "floor": 512 * 10**6, "per_element": 7.4, "foretold_us": 126.0}
        | more
    )


# ncu's raw page: its own messages, a line of names, one of units, and a line a launch.
NAMES = ["ID", "Process ID", "Kernel Name", "Context", "Block Size", *kernels.COUNTERS.values()]
UNITS = [
    "",
    "",
    "",
    "",
    "",
    "ns",
    "%",
    "%",
    "%",
    "%",
    "register/thread",
    "inst",
    *["inst"] * len(kernels.REASONS),
]
STALLS = ["15.4", "0.1", "0.8", "0.5", "0", "0.2", "0.3", "n/a", "0.1"]
LAUNCHES = [
    [
        "0",
        "77",
        "_forward_kernel",
        "1",
        "(128, 1, 1)",
        "139,264",
        "79.12",
        "88.5",
        "66",
        "29.4",
        "64",
        "51,380,224",
        *STALLS,
    ],
    [
        "1",
        "77",
        "_backward_kernel",
        "1",
        "(128, 1, 1)",
        "256,000",
        "47.1",
        "59",
        "56",
        "24",
        "108",
        "128,450,560",
        *STALLS,
    ],
]
RAW = "\n".join(
    [
        "==PROF== Connected to process 77",
        *(",".join(f'"{word}"' for word in line) for line in [NAMES, UNITS, *LAUNCHES]),
    ]
)


def test_the_kernels_tables_are_of_times_and_counters():
    times = [
        row("forward", us=160.0),
        row("forward", us=250.0) | {"format": "contiguous", "dtype": "fp32"},
        row("backward", error="out of shared memory"),
    ]
    files = {
        "kernels-times.jsonl": [{"copy": 4e12}, *times],
        "kernels-counters.jsonl": [row("forward"), row("backward")],
        "kernels-counters.csv": RAW,
    }
    text = re.sub(" +", " ", "\n".join(gpu.show_kernels(files)))
    # 512 MB in 160 us are 3.2 TB/s, of 4.
    assert (
        "| max_blur_pool 2d k=2 forward | 0.80 (160; 126; 1.27) | 0.51 (250; 126; 1.98) |" in text
    )
    assert "| max_blur_pool 2d k=2 backward | out of shared memory |" in text
    assert (
        "| max_blur_pool 2d k=2 forward NHWC bf16 | 139.3 | 0.9191 | 79.12 | 88.5 | 66 | 29.4 | 64 | 8 | 7.4 "
        "| long_scoreboard:15.4 wait:0.8 |" in text
    )
    assert (
        "| max_blur_pool 2d k=2 backward NHWC bf16 | 256 | 0.5 | 47.1 | 59 | 56 | 24 | 108 | 20 |"
        in text
    )


def test_a_launch_of_another_kernel_is_not_taken_for_the_row_s():
    with pytest.raises(ValueError, match="_forward_kernel was counted where"):
        kernels.counted([row("backward"), row("forward")], RAW)
    # A run that was cut has fewer launches, or none.
    assert (
        len(kernels.counted([row("forward"), row("backward")], "\n".join(RAW.splitlines()[:-1])))
        == 1
    )
    assert kernels.counted([row("forward")], "==ERROR== no") == []


def test_the_table_of_networks_is_of_pytest_benchmark_s_json():
    figures = {"how": "graph", "eager_us": 31000.0, "host_us": 29000.0, "peak_bytes": 2.0**32}
    benchmark = {
        "params": {"name": "resnet50", "contestant": "regfast"},
        "stats": {"median": 0.0296},
        "extra_info": figures,
    }
    files = {"steps-resnet50.json": {"benchmarks": [benchmark]}, "steps-compiled.json": {}}
    text = re.sub(" +", " ", "\n".join(gpu.show_steps(files)))
    assert "| resnet50 | regfast | 29.6 | graph | 31 | 29 | 4 |" in text
