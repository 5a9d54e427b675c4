"""tools/gpu.py on a CPU: parts run, one in trouble spares the others, and the report is whole."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("tabulate")

from tools import gpu, kernels
from tools.compiled import record

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def outside_of_pytest(monkeypatch):
    """What is run is at the root, without CUDA, and no part of this run of pytest."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu, "CUDA", False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)


def results(out: Path) -> tuple[dict, str]:
    return json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()


def statuses(parts: dict) -> dict[str, str]:
    return {
        title: step["status"] for part in parts.values() for title, step in part["steps"].items()
    }


def check_kernels_and_host(out: Path) -> None:
    parts, report = results(out)
    assert set(statuses(parts).values()) == {"ok"}, report
    assert "A device copy" in report and "rezero gate gelu backward" in report
    for name in ("kernels-compile", "kernels-times", "kernels-counters"):
        kernels = [
            row["kernel"] for row in parts["kernels"]["steps"][name]["rows"] if "kernel" in row
        ]
        dtypes = 1 if name == "kernels-counters" else 2
        assert kernels == ["rezero gate gelu forward", "rezero gate gelu backward"] * dtypes
    assert {"operation", "state", "us", "ratio", "limit"} <= parts["host"]["files"]["host.json"][
        0
    ].keys()
    assert f"torch {torch.__version__}" in report and "| MaxPool2dAA" in report


def test_parts_that_are_named_leave_what_they_found(tmp_path):
    assert gpu.run_parts(["kernels", "host"], tmp_path, 7) == 0
    check_kernels_and_host(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_without_a_name_all_parts_run(tmp_path):
    assert gpu.main([f"--out={tmp_path}"]) == 0
    check_kernels_and_host(tmp_path)
    parts, report = results(tmp_path)
    assert list(parts) == ["tests", "kernels", "host", "steps", "sanitize"]
    assert (
        "1 passed" in report
        and len(parts["sanitize"]["steps"]["sanitize-interpreter"]["rows"]) == 4
    )
    assert "| resnet18 | plain " in re.sub(" +", " ", report)


CHILD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
time.sleep(600)
"""
WRITER = """
print('{"copy": 4e12}')
print('{"kernel": "rezero gate relu forward", "tens', end="")
raise SystemExit(3)
"""


def python(title: str, share: float, code: str, *arguments: str | Path) -> gpu.Step:
    return title, share, [sys.executable, "-c", code, *arguments]


def test_a_part_in_trouble_costs_no_other_its_results(tmp_path, monkeypatch):
    """One waits for ever, as its child does, which holds a lock. One ends within a row of JSON."""

    def tests(raw: Path) -> Iterator[gpu.Step]:
        yield "tests", 5, ["no-such-program", "--version"]
        yield python("tests-hanging", 8, PARENT, CHILD, tmp_path / "lock")

    def kernels(raw: Path) -> Iterator[gpu.Step]:
        yield python("kernels-times", 4, WRITER)

    def sanitize(raw: Path) -> Iterator[gpu.Step]:
        yield python("sanitize-ends-in-time", 1, "import sys; print(sys.argv[1])", "{seconds}")
        yield python("sanitize-well", 10, "print('done')")

    monkeypatch.setattr(gpu, "PARTS", {part.__name__: part for part in (tests, kernels, sanitize)})
    assert gpu.run_parts([], tmp_path, minutes=0.6) == 1
    parts, report = results(tmp_path)
    assert statuses(parts) == {
        "tests": "absent",
        "tests-hanging": "cut",
        "kernels-times": "failed",
        "sanitize-ends-in-time": "ok",
        "sanitize-well": "ok",
    }
    assert parts["kernels"]["steps"]["kernels-times"]["rows"] == [{"copy": 4e12}]
    assert "Its results are not whole: KeyError('kernels-counters')" in report
    assert "moves 4.00 TB/s" in report and "```\nsanitize-well\ndone\n```" in report
    (left,) = parts["sanitize"]["steps"]["sanitize-ends-in-time"]["ending"]
    assert 1 <= int(left) < 60
    # What a step started is stopped with it.
    assert parts["tests"]["steps"]["tests-hanging"]["ending"][0] == "locked"
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_is_whole_does_not_run_again_unless_it_is_named(tmp_path, monkeypatch):
    ran, commit = [], ["one"]

    def run(title: str, command: list, limit: float, out: Path) -> dict:
        ran.append(title)
        return gpu.NOT_RUN | {"status": command[0], "ending": ["end"]}

    def part_of(name: str, *ends: str):
        return lambda raw: [(f"{name}-{number}", 1, [end]) for number, end in enumerate(ends)]

    parts = {"kernels": ("ok", "cut"), "tests": ("failed",), "host": ("ok", "absent")}
    monkeypatch.setattr(gpu, "PARTS", {name: part_of(name, *ends) for name, ends in parts.items()})
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "setting", lambda: {"commit": commit[0]})

    def run_parts(*names: str, minutes: float = 1) -> list[str]:
        del ran[:]
        gpu.run_parts(list(names), tmp_path, minutes)
        return list(ran)

    # Without time nothing runs, and nothing is whole.
    assert run_parts("host", minutes=0) == []
    assert run_parts("host") == ["host-0", "host-1"]
    assert run_parts() == ["kernels-0", "kernels-1", "tests-0"]
    assert run_parts() == ["kernels-0", "kernels-1"]
    assert run_parts("tests") == ["tests-0"]
    found, report = results(tmp_path)
    assert list(found) == ["kernels", "tests", "host"]
    assert all(f"## {name}" in report for name in found)
    commit[0] = "another"
    assert len(run_parts()) == 5


def test_what_is_no_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["bench"])
    assert (
        "PART is one of tests, kernels, host, steps, sanitize, got bench" in capsys.readouterr().err
    )


def test_the_tests_for_a_gpu_are_there():
    """Those that only a GPU can run are kept; what is left out has a name that a test has."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-qq",
        "-m",
        "not slow",
        *gpu.CHOSEN,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sources = [(ROOT / "tests" / name.split("::")[0]).read_text() for name in gpu.FILES]
    names = re.findall(r"^def (test_\w+)\(", "\n".join(sources), flags=re.M)
    for pattern in gpu.LEFT_OUT:
        assert any(pattern.rstrip("[") in name for name in names), pattern
    counts = dict(re.findall(r"^tests/(test_\w+\.py): (\d+)$", done.stdout, flags=re.M))
    assert {name.split("::")[0] for name in gpu.FILES} == counts.keys()
    assert 600 < sum(map(int, counts.values())) < 1000
    only_cuda = re.compile(r"skipif\(not torch\.cuda.*\n(?:@.*\n)*def (test_\w+)")
    for path in (ROOT / "tests").glob("test_*.py"):
        for name in only_cuda.findall(path.read_text()):
            in_files = path.name in gpu.FILES or f"{path.name}::{name}" in gpu.FILES
            assert in_files and not any(p in name for p in gpu.LEFT_OUT), name


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
def test_every_job_has_a_call_of_one_counted_kernel(toy, monkeypatch):
    """On tensors without data; and what is timed has a row in the table of compiled kernels."""
    monkeypatch.setattr(kernels, "CUDA", True)
    monkeypatch.setattr(kernels, "DEVICE", "meta")
    made = [
        kernels.row_of(job, lambda call: {"launches": record(call)}, toy)
        for job in kernels.jobs(toy)
    ]
    assert [row for row in made if "error" in row] == []
    assert {row["tensors"] for row in made} == {
        f"{a} {b}" for a in ("NCHW", "NHWC") for b in ("bf16", "fp32")
    }
    assert {row["kernel"].split()[0] for row in made} == {
        "max_blur_pool",
        "blur_pool",
        "mixup",
        "mixup_cross_entropy",
        "rezero",
    }
    if not toy:
        assert all(10 < row["foretold_us"] < 1000 and row["per_element"] > 1 for row in made)
        names = {
            row["kernel"]: [launch.kernel.__name__ for launch in row["launches"]] for row in made
        }
        # ncu's rows are joined with these by their order.
        assert all(
            [f"_{kernel.split()[-1]}_kernel"]
            == [n for n in names[kernel] if re.search(kernels.COUNTED, n)]
            for kernel in names
        )
        assert names["mixup images backward"] == ["_order_kernel", "_backward_kernel"]
        assert names["mixup_cross_entropy rows forward"] == ["_forward_kernel", "_finish_kernel"]
        assert names["rezero gate relu backward"] == ["_backward_kernel", "_finish_kernel"]


def test_the_tensors_of_a_call_are_freed_before_the_next(monkeypatch):
    alive = []

    def use(call) -> dict:
        assert [reference for reference in alive if reference() is not None] == []
        alive.append(weakref.ref(call))
        return {}

    monkeypatch.setattr(kernels, "CUDA", True)
    monkeypatch.setattr(kernels, "DEVICE", "meta")
    monkeypatch.setitem(kernels.USES, "launch", use)
    rows = list(kernels.rows_of("launch", toy=False))
    assert len(rows) == len(alive) and not any("error" in row for row in rows)


def row(direction: str, tensors: str = "NHWC bf16", **more) -> dict:
    known = {"elements": 205520896, "floor": 512 * 10**6, "per_element": 7.4, "foretold_us": 126.0}
    return {"kernel": f"max_blur_pool 2d k=2 {direction}", "tensors": tensors} | known | more


# ncu's raw page: its own messages, a line of names, one of units, and a line per launch. A call may
# launch a second kernel.
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
STALLS = ["15.4", "0.8", "0.5", "n/a"]
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
        "_finish_kernel",
        "1",
        "(256, 1, 1)",
        "2,048",
        "1",
        "2",
        "3",
        "4",
        "32",
        "64",
        *STALLS,
    ],
    [
        "2",
        "77",
        "_order_kernel",
        "1",
        "(128, 1, 1)",
        "3,072",
        "1",
        "2",
        "3",
        "4",
        "32",
        "64",
        *STALLS,
    ],
    [
        "3",
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
    [
        "4",
        "77",
        "_finish_kernel",
        "1",
        "(128, 1, 1)",
        "2,048",
        "1",
        "2",
        "3",
        "4",
        "32",
        "64",
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
        row("forward", "NCHW fp32", us=250.0),
        row("backward", error="out of shared memory"),
    ]
    counters = [row("forward", error="not launched"), row("forward"), row("backward")]
    steps = {
        "kernels-times": {"rows": [{"copy": 4e12}, *times]},
        "kernels-counters": {"rows": counters},
    }
    text = re.sub(
        " +", " ", "\n".join(gpu.show_kernels({"steps": steps, "files": {"kernels.csv": RAW}}))
    )
    # 512 MB in 160 us are 3.2 TB/s, of 4.
    assert (
        "| max_blur_pool 2d k=2 forward | 0.80 (160; 126; 1.27) | 0.51 (250; 126; 1.98) |" in text
    )
    assert "| max_blur_pool 2d k=2 backward | out of shared memory |" in text
    assert (
        "| max_blur_pool 2d k=2 forward NHWC bf16 | 139.3 | 0.9191 | 79.12 | 88.5 | 66 | 29.4 "
        "| 64 | 8 | 7.4 "
        "| long_scoreboard:15.4 wait:0.8 |" in text
    )
    assert (
        "| max_blur_pool 2d k=2 backward NHWC bf16 | 256 | 0.5 | 47.1 | 59 | 56 | 24 | 108 | 20 |"
        in text
    )


def test_a_launch_of_another_kernel_is_not_taken_for_the_row_s():
    with pytest.raises(ValueError, match="_forward_kernel was counted where"):
        kernels.counted([row("backward"), row("forward")], RAW, 4e12)
    # A run that was cut has fewer launches, or none.
    assert (
        len(
            kernels.counted(
                [row("forward"), row("backward")], "\n".join(RAW.splitlines()[:-2]), 4e12
            )
        )
        == 1
    )
    assert kernels.counted([row("forward")], "==ERROR== no", 4e12) == []


def test_the_table_of_networks_is_of_pytest_benchmark_s_json():
    figures = {"how": "graph", "eager_us": 31000.0, "host_us": 29000.0, "peak_bytes": 2.0**32}
    benchmark = {
        "params": {"name": "resnet50", "contestant": "regfast"},
        "stats": {"median": 0.0296},
        "extra_info": figures,
    }
    files = {"steps-eager.json": {"benchmarks": [benchmark]}, "steps-compiled.json": ""}
    text = re.sub(" +", " ", "\n".join(gpu.show_steps({"files": files})))
    assert "| resnet50 | regfast | 29.6 | graph | 31 | 29 | 4 |" in text
