"""Everything that only a GPU can say, in one command of seven minutes, without a network.

    python -m tools.gpu [PART ...] [--out DIR] [--minutes 7] [--device cpu|cuda]

tests: `FILES` without `LEFT_OUT`. kernels: times beside what is foretold, and counters where ncu is
found. host: the host's time of a call. steps: training steps of networks beside their peers, eager
and compiled. sanitize: memcheck and racecheck over a launch of every kernel. tune, only if it is
named: the best cuts of the poolings.

Without a PART those run that DIR has no whole result of, for this commit and device. What fails or
hangs costs no other part its results. DIR/gpu.json and gpu.md are written anew after each step, of
all parts that DIR has: several calls give one report, and gpu.json alone need be kept between them.
The exit status is 1 if a step failed or was cut. With --device cpu everything is a toy, which tests
this code. Needs pytest, -xdist, -benchmark, hypothesis, tabulate, and timm for the networks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tabulate import tabulate

from regfast.info import devices, versions

from .kernels import COUNTERS, PROCESSES, counted
from .steps import Step, run_all

Row = dict[str, Any]
PYTHON = [sys.executable, "-m"]
PYTEST = [*PYTHON, "pytest", "-q", "--tb=short"]
FILES = (
    "test_contract.py", "test_blend.py", "test_mixup_cross_entropy.py", "test_rezero.py",
    "test_pooling_kernels.py", "test_network_windows.py", "test_launch.py", "test_seam.py",
    "test_residual.py::test_the_kernels_make_the_same_block",
    "test_mixup.py::test_nothing_waits_for_the_device",
    "test_manifold.py::test_a_generator_of_the_device_is_refused",
    "test_bad_input.py::test_ops_refuse_a_mix_of_devices",
    "test_train.py::test_graphs_train_as_launches_do",
)  # fmt: skip
# Parts of names, and why a CPU tells as much.
LEFT_OUT = {
    "the_reference_is_ or torch_func or compiled_graph or compiled_code_is": "plain PyTorch",
    "test_bad_input[ or test_bad_input_is": "refused before a launch",
    "finite_differences": "the formulas, in float64",
    "opcheck": "how operators are registered",
    "_drawn_": "other windows, and dozens of kernels to compile",
}


def chosen() -> list[str]:
    """pytest's arguments for the tests that are for a GPU."""
    left_out = f"not ({' or '.join(LEFT_OUT)})"
    return [*(f"tests/{name}" for name in FILES), "-k", left_out, "-m", "not slow"]


def tests(cpu: bool, raw: Path) -> Iterator[Step]:
    # Most of it is compiling: no two processes should compile one kernel.
    spread = [f"--numprocesses={PROCESSES}", "--dist=loadgroup"]
    small = ["tests/test_contract.py", "-k", "agree_with_the_reference and 1x1x1x1"]
    command = [*PYTEST, *(small if cpu else chosen() + spread)]
    yield Step("tests", command, 130, {"OMP_NUM_THREADS": "1"})


def kernels(cpu: bool, raw: Path) -> Iterator[Step]:
    command = [*PYTHON, "tools.kernels"]
    if not cpu:
        yield Step("kernels-compile", [*command, "compile"], 25)
    yield Step("kernels-times", [*command, "times", "--out", raw / "kernels-times.jsonl"], 25)
    options = "--profile-from-start off --clock-control none --csv --page raw --print-units base"
    options += " --kernel-name regex:_(forward|backward)_kernel --log-file"
    profiler = [None if cpu else found("ncu"), *options.split(), raw / "kernels-counters.csv"]
    profiler += ["--metrics", ",".join(COUNTERS.values())]
    counters = ["counters", "--out", raw / "kernels-counters.jsonl", "--seconds", "{seconds}"]
    unable = "ERR_NVGPUCTRPERM|Failed to initialize the profiler"
    yield Step("kernels-counters", [*profiler, *command, *counters], 40, unable=unable)


def host(cpu: bool, raw: Path) -> Iterator[Step]:
    command = [*PYTHON, "tools.host", "--out", raw / "host.json", "--rounds", "2" if cpu else "20"]
    yield Step("host", command, 20)


def steps(cpu: bool, raw: Path) -> Iterator[Step]:
    # A compiler takes a minute, and comes last.
    shares = {"resnet18": 35} if cpu else {"resnet50": 35, "resnet18": 20, "compiled": 35}
    for name, share in shares.items():
        which = name if name == "compiled" else f"{name} and not compiled"
        which += f" and NHWC and forward+backward and {'plain' if cpu else 'bfloat16'}"
        results = [f"--benchmark-json={raw / f'steps-{name}.json'}", "--benchmark-max-time=0.5"]
        command = [*PYTEST, "bench/bench_networks.py", "-k", which, *results]
        yield Step(f"steps-{name}", command, share)


def sanitize(cpu: bool, raw: Path) -> Iterator[Step]:
    """Under the sanitizer Triton would compile for minutes: its cache is filled before. PyTorch's
    own kernels, which draw the data, are not checked.
    """
    launch = [*PYTHON, "tools.kernels", "launch", "--toy", "--seconds", "{seconds}"]
    if cpu:
        yield Step("sanitize-interpreter", launch, 60)
        return
    yield Step("sanitize-compile", [*PYTHON, "tools.kernels", "compile", "--toy"], 25)
    options = ["--error-exitcode", "99", "--target-processes", "application-only"]
    for name in ("forward", "backward", "order", "finish"):
        options += ["--kernel-name", f"kns=_{name}_kernel"]
    # A tensor is an allocation of its own, so that a read just beyond it is seen.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}
    for tool in ("memcheck", "racecheck"):
        command = [found("compute-sanitizer"), "--tool", tool, *options, *launch]
        yield Step(f"sanitize-{tool}", command, 30, environment, "Device not supported")


def tune(cpu: bool, raw: Path) -> Iterator[Step]:
    device = ["--device", "cpu" if cpu else "cuda", "--out", raw / "sweep"]
    for operation in ("max_blur_pool", "blur_pool"):
        yield Step(f"tune-{operation}", [*PYTHON, "tools.tune", operation, *device], 200)


def found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/cuda/bin")


def read(path: Path) -> Any:
    """What a step left in a file; of rows of JSON, a line each, those that are whole."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
    return json.loads(text or "{}") if path.suffix == ".json" else text


def table(rows: Iterable[Row]) -> str:
    shown = [
        {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    ]
    return tabulate(shown, "keys", "github", disable_numparse=True)


def show_host(files: Row) -> Iterator[str]:
    yield table(files["host.json"])


def show_kernels(files: Row) -> Iterator[str]:
    first, *times = files["kernels-times.jsonl"]
    copy, cells = first["copy"], {}
    for row in times:
        cells.setdefault(name_of(row), {"": name_of(row)})[column_of(row)] = cell(row, copy)
    yield f"A device copy of 1 GiB moves {copy / 1e12:.2f} TB/s (read + written)."
    yield "The share of it that the least bytes take (microseconds; foretold; their ratio):"
    yield table(cells.values())
    rows = counted(files.get("kernels-counters.jsonl", []), files.get("kernels-counters.csv", ""))
    names = ("DRAM %", "L2 %", "issue %", "occupancy %", "registers", "instructions an element")
    yield table(
        {"kernel": f"{name_of(row)} {column_of(row)}", "us": row["us"]}
        | {"of copy": 1e6 * row["floor"] / row["us"] / copy}
        | {name: row[name] for name in names}
        | {"foretold": row["per_element"]}
        | {"stalls (cycles an issue)": " ".join(f"{name}:{n:.1f}" for n, name in row["stalls"])}
        for row in rows
    )


def name_of(row: Row) -> str:
    return f"{row['operation']} {row['case']} {row['direction']}"


def column_of(row: Row) -> str:
    return f"{'NHWC' if row['format'] == 'channels last' else 'NCHW'} {row['dtype']}"


def cell(row: Row, copy: float) -> str:
    if "error" in row or "foretold_us" not in row:
        return row.get("error") or f"{row['us']:.0f} us"
    share, ratio = 1e6 * row["floor"] / row["us"] / copy, row["us"] / row["foretold_us"]
    return f"{share:.2f} ({row['us']:.0f}; {row['foretold_us']:.0f}; {ratio:.2f})"


def show_steps(files: Row) -> Iterator[str]:
    rows = [row for file in files.values() for row in file.get("benchmarks", [])]
    yield table(
        {name: row["params"][name] for name in ("name", "contestant")}
        | {"ms": 1e3 * row["stats"]["median"], "timed": row["extra_info"]["how"]}
        | {"eager ms": row["extra_info"].get("eager_us", math.nan) / 1e3}
        | {"host ms": row["extra_info"].get("host_us", math.nan) / 1e3}
        | {"peak GiB": row["extra_info"].get("peak_bytes", math.nan) / 2**30}
        for row in rows
    )


PARTS = {part.__name__: part for part in (tests, kernels, host, steps, sanitize, tune)}
SHOWN = {"kernels": show_kernels, "host": show_host, "steps": show_steps}


def setting(device: str) -> Row:
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    name = list(devices().values())[1 if device == "cuda" else 0]
    date = datetime.now(timezone.utc).isoformat(" ", "minutes")
    return {"commit": commit, "device": f"{device}: {name}", "date": date} | versions()


def is_whole(part: Row | None, where: Row) -> bool:
    """Whether all steps of a part ended by themselves, for this commit and on this device."""
    if part is None or any(part["setting"][key] != where[key] for key in ("commit", "device")):
        return False
    return part["of"] == len([step for step in part["steps"] if step["status"] != "cut"])


def report(parts: Row) -> Iterator[str]:
    """The paragraphs of gpu.md: all steps, what each part found, and where."""
    yield "# What a GPU said"
    yield table(
        {name: step[name] for name in ("name", "status", "seconds")}
        | {"last line": "".join(step["ending"][-1:]).strip(" =").replace("|", "/")[:90]}
        for part in parts.values()
        for step in part["steps"]
    )
    for name, part in parts.items():
        yield f"## {name}"
        try:
            yield from SHOWN[name](part["files"]) if name in SHOWN else ()
        except (LookupError, ValueError) as error:
            yield f"Its files are not whole: {error!r}"
        for step in part["steps"]:
            # The other parts say in their output what they found.
            if step["ending"] and (step["status"] != "ok" or name not in SHOWN):
                ending = step["ending"][-5 if step["status"] == "ok" else 0 :]
                yield "\n".join([f"{step['name']}, {step['status']}:", "", "```", *ending, "```"])
    yield "## Where"
    yield table({"part": name} | part["setting"] for name, part in parts.items())


def main(arguments: list[str]) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=7, help="default: %(default)s")
    kinds = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--device", choices=kinds, default=kinds[0])
    options = parser.parse_args(arguments)
    if not set(options.parts) <= set(PARTS):
        parser.error(f"PART is one of {', '.join(PARTS)}, got {' '.join(options.parts)}")
    # A shell's background jobs ignore interrupts, and would hand that on to the steps.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return run_parts(options.parts, options.device, options.out, options.minutes)


def run_parts(names: list[str], device: str, out: Path, minutes: float) -> int:
    """Runs the parts, by default those that are not whole. Returns 1 if a step was in trouble."""
    out.mkdir(parents=True, exist_ok=True)
    kept, where = out / "gpu.json", setting(device)
    parts = json.loads(kept.read_text()) if kept.exists() else {}
    usual = [name for name in PARTS if name != "tune" and not is_whole(parts.get(name), where)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with TemporaryDirectory() as folder:
        raw, ended = Path(folder), []
        planned = {name: list(PARTS[name](device == "cpu", raw)) for name in names or usual}
        to_run = [step for steps_of in planned.values() for step in steps_of]
        for step in run_all(to_run, minutes, out / "gpu.log", environment):
            print(f"{step['name']}: {step['status']}, {step['seconds']:.0f} s", flush=True)
            ended.append(step)
            name = step["name"].split("-")[0]
            parts[name] = {
                "setting": where,
                "of": len(planned[name]),
                "steps": [other for other in ended if other["name"].split("-")[0] == name],
                "files": {path.name: read(path) for path in sorted(raw.glob(f"{name}*"))},
            }
            parts = {name: parts[name] for name in PARTS if name in parts}
            kept.write_text(json.dumps(parts, indent=1))
            (out / "gpu.md").write_text("\n\n".join(filter(None, report(parts))) + "\n")
    return int(any(step["status"] in ("failed", "cut") for step in ended))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
