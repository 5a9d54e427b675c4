"""Everything that only a GPU can say, in one command of seven minutes, without a network.

    python -m tools.gpu [PART ...] [--out DIR] [--minutes 7]

tests: `FILES` without `LEFT_OUT`. kernels: times beside what is foretold, and counters where ncu is
found. host: the host's time of a call. steps: training steps of networks beside their peers, eager
and compiled. sanitize: memcheck and racecheck over a launch of every kernel.

Without a PART those run that DIR has no whole result of, for this commit and device. What fails or
hangs costs no other part its results: DIR/gpu.json and gpu.md are written after each part. The exit
status is 1 if a step failed or was cut. Without CUDA everything is a toy, which tests this code.
Needs pytest, -xdist, -benchmark, hypothesis, tabulate, and timm.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tabulate import tabulate

from regfast.info import devices, versions

from .kernels import COUNTED, COUNTERS, CUDA, PROCESSES, Row, counted

# A step: its name, which begins with its part's, about its seconds on an H200, and its command. In
# it "{seconds}" becomes the time after which it should end by itself.
Step = tuple[str, float, list[Any]]
# Seconds for an interrupted command to write what it has: pytest-xdist waits ten for its processes.
GRACE = 15
table = partial(tabulate, headers="keys", tablefmt="github", floatfmt=".4g")
NOT_RUN = {"status": "cut", "seconds": 0.0, "ending": [], "rows": []}
# What every command begins with. PATH has the profiler and the sanitizer of a usual setup.
ENV = ["env", "PYTHONUNBUFFERED=1", f"PATH={os.getenv('PATH', os.defpath)}:/usr/local/cuda/bin"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "--tb=short"]
KERNELS = [sys.executable, "-m", "tools.kernels"]
FILES = (
    "test_contract.py", "test_blend.py", "test_mixup_cross_entropy.py", "test_rezero.py",
    "test_pooling_kernels.py", "test_network_windows.py", "test_launch.py", "test_seam.py",
    "test_residual.py::test_the_kernels_make_the_same_block",
    "test_mixup.py::test_nothing_waits_for_the_device",
    "test_manifold.py::test_a_generator_of_the_device_is_refused",
    "test_bad_input.py::test_ops_refuse_a_mix_of_devices",
    "test_train.py::test_graphs_train_as_launches_do",
)  # fmt: skip
# Parts of names, of which a CPU tells as much: plain PyTorch, what is refused before a launch, the
# formulas in float64, how operators are registered; and dozens of other windows to compile.
LEFT_OUT = (
    "the_reference_is_", "torch_func", "compiled_graph", "compiled_code_is", "test_bad_input[",
    "test_bad_input_is", "finite_differences", "opcheck", "_drawn_",
)  # fmt: skip
CHOSEN = [*(f"tests/{name}" for name in FILES), "-k", f"not ({' or '.join(LEFT_OUT)})"]


def tests(raw: Path) -> Iterator[Step]:
    # Most of it is compiling: no two processes should compile one kernel.
    chosen = [*CHOSEN, "-m", "not slow", f"--numprocesses={PROCESSES}", "--dist=loadgroup"]
    small = ["tests/test_contract.py", "-k", "agree_with_the_reference and 1x1x1x1"]
    yield "tests", 150, ["OMP_NUM_THREADS=1", *PYTEST, *(chosen if CUDA else small)]


def kernels(raw: Path) -> Iterator[Step]:
    yield "kernels-compile", 20, [*KERNELS, "compile"]
    yield "kernels-times", 20, [*KERNELS, "times"]
    # By estimate 45 launches take 20 s: 8 to begin, and each 0.2 for about 8 replays, before which
    # ncu restores what the kernel writes, at most 0.4 GB.
    options = "--profile-from-start off --clock-control none --csv --page raw --print-units base"
    metrics = ["--kernel-name", f"regex:{COUNTED}", "--metrics", ",".join(COUNTERS.values())]
    profiler = ["ncu", *options.split(), *metrics, "--log-file", raw / "kernels.csv"]
    counters = [*KERNELS, "counters", "--seconds", "{seconds}"]
    yield "kernels-counters", 20, [*profiler, *counters] if CUDA else counters


def host(raw: Path) -> Iterator[Step]:
    options = ["--out", raw / "host.json", "--rounds", 20 if CUDA else 2]
    yield "host", 20, [sys.executable, "-m", "tools.host", *options]


def steps(raw: Path) -> Iterator[Step]:
    which = f"NHWC and forward+backward and {'bfloat16' if CUDA else 'resnet18 and plain'}"
    # A compiler takes a minute, and comes last.
    for name, share, more in (("eager", 55, "not compiled"), ("compiled", 35, "compiled")):
        chosen = ["bench/bench_networks.py", "-k", f"{which} and {more}"]
        options = [f"--benchmark-json={raw}/steps-{name}.json", "--benchmark-max-time=0.5"]
        if CUDA or name == "eager":
            yield f"steps-{name}", share, [*PYTEST, *chosen, *options, "--benchmark-quiet"]


def sanitize(raw: Path) -> Iterator[Step]:
    """PyTorch's own kernels, which draw the data, are not checked."""
    launch = [*KERNELS, "launch", "--toy", "--seconds", "{seconds}"]
    if not CUDA:
        yield "sanitize-interpreter", 60, launch
        return
    # Under the sanitizer Triton would compile for minutes.
    yield "sanitize-compile", 20, [*KERNELS, "compile", "--toy"]
    options = ["--error-exitcode", "99", "--target-processes", "application-only"]
    for name in ("forward", "backward", "order", "finish"):
        options += ["--kernel-name", f"kns=_{name}_kernel"]
    # A tensor is an allocation of its own, so that a read just beyond it is seen.
    environment = ["PYTORCH_NO_CUDA_MEMORY_CACHING=1", "CUDA_MODULE_LOADING=LAZY"]
    for tool in ("memcheck", "racecheck"):
        command = [*environment, "compute-sanitizer", "--tool", tool, *options, *launch]
        yield f"sanitize-{tool}", 20, command


def run(title: str, command: list[Any], limit: float, out: Path) -> Row:
    """Runs a step for at most `limit` seconds. Its rows are the JSON that it printed."""
    start, log = time.monotonic(), out / f"{title}.log"
    seconds = f"{max(limit - GRACE / 2, 1):.0f}"
    words = [str(word).replace("{seconds}", seconds) for word in (*ENV, *command)]
    with log.open("w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True)
    try:
        # env's own exit status where it finds no such program is 127.
        status = {0: "ok", 127: "absent"}.get(process.wait(limit), "failed")
    except subprocess.TimeoutExpired:
        status = "cut"
        # pytest then writes what it has. Interrupted themselves, its workers would not answer it.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        # And the processes that it left behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # A last line without an end may be cut.
    lines = log.read_text(errors="replace").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.startswith('{"') and line.endswith("\n")]
    ending = "".join(line for line in lines if not line.startswith('{"')).splitlines()[-60:]
    return {"status": status, "seconds": time.monotonic() - start, "ending": ending, "rows": rows}


def show_kernels(part: Row) -> Iterator[str]:
    (first, *times), cells = part["steps"]["kernels-times"]["rows"], {}
    for row in times:
        name = row["kernel"]
        cells.setdefault(name, {"": name})[row["tensors"]] = cell(row, first["copy"])
    yield f"A device copy of 1 GiB moves {first['copy'] / 1e12:.2f} TB/s (read + written)."
    yield "The share of it that the least bytes take (microseconds; foretold; their ratio):"
    yield table(cells.values())
    rows = part["steps"]["kernels-counters"]["rows"]
    yield table(counted(rows, part["files"].get("kernels.csv", ""), first["copy"]))


def cell(row: Row, copy: float) -> str:
    if "error" in row:
        return row["error"]
    us, foretold = row["us"], row.get("foretold_us", math.nan)
    return f"{1e6 * row['floor'] / us / copy:.2f} ({us:.0f}; {foretold:.0f}; {us / foretold:.2f})"


def show_steps(part: Row) -> Iterator[str]:
    figures = ("eager", "eager_us", 1e3), ("host", "host_us", 1e3), ("GiB", "peak_bytes", 2**30)
    yield "Milliseconds of a step by CUDA graphs (or as timed says), eager, and of its host."
    yield table(
        {name: row["params"][name] for name in ("name", "contestant")}
        | {"ms": 1e3 * row["stats"]["median"], "timed": row["extra_info"]["how"]}
        | {title: row["extra_info"].get(key, math.nan) / unit for title, key, unit in figures}
        for file in part["files"].values()
        for row in (file or {"benchmarks": []})["benchmarks"]
    )


PARTS = {part.__name__: part for part in (tests, kernels, host, steps, sanitize)}
SHOWN = {"kernels": show_kernels, "steps": show_steps}


def report(parts: Row) -> Iterator[str]:
    """The paragraphs of gpu.md: all steps, what each part found, and the last lines of others."""
    yield "# What a GPU said"
    steps = [step for part in parts.values() for step in part["steps"].items()]
    yield table({"step": t, "status": s["status"], "seconds": s["seconds"]} for t, s in steps)
    for name, part in parts.items():
        yield f"## {name}"
        yield ", ".join(f"{key} {value}" for key, value in part["setting"].items())
        try:
            yield from SHOWN[name](part) if name in SHOWN else ()
        except (LookupError, ValueError) as error:
            yield f"Its results are not whole: {error!r}"
        for title, step in part["steps"].items():
            if step["ending"]:
                yield "\n".join(["```", title, *step["ending"], "```"])


def setting() -> Row:
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return {"commit": commit, "device": list(devices().values())[CUDA]} | versions()


def run_parts(names: list[str], out: Path, minutes: float) -> int:
    """Runs the parts, by default those that are not whole. Returns 1 if a step was in trouble."""
    out.mkdir(parents=True, exist_ok=True)
    kept, where, deadline = out / "gpu.json", setting(), time.monotonic() + 60 * minutes - GRACE
    parts = json.loads(kept.read_text()) if kept.exists() else {}
    whole = [n for n, part in parts.items() if part["setting"] == where and part["whole"]]
    names, trouble = names or [name for name in PARTS if name not in whole], False
    with TemporaryDirectory() as folder:
        raw = Path(folder)
        planned = {name: list(PARTS[name](raw)) for name in names}
        left = sum(share for steps in planned.values() for _, share, _ in steps)
        for name, steps in planned.items():
            part = {"setting": where, "whole": True, "steps": {}, "files": {}}
            for title, share, command in steps:
                limit, left = (deadline - time.monotonic()) * share / left, left - share
                step = run(title, command, limit, out) if limit >= 1 else NOT_RUN
                print(f"{title}: {step['status']}, {step['seconds']:.0f} s", flush=True)
                part["steps"][title] = step
                part["whole"] &= step["status"] != "cut"
                trouble |= step["status"] in ("cut", "failed")
            for path in raw.glob(f"{name}*"):
                text = path.read_text()
                parse = json.loads if text and path.suffix == ".json" else str
                part["files"][path.name] = parse(text)
            parts = {n: (parts | {name: part})[n] for n in PARTS if n in parts or n == name}
            kept.write_text(json.dumps(parts, indent=1))
            (out / "gpu.md").write_text("\n\n".join(filter(None, report(parts))) + "\n")
    return int(trouble)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=7, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if not set(options.parts) <= set(PARTS):
        parser.error(f"PART is one of {', '.join(PARTS)}, got {' '.join(options.parts)}")
    return run_parts(options.parts, options.out, options.minutes)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
