"""What only a GPU can say about regfast, in one command and under nine minutes, with no network; regfast need not be installed.

    python bench/gpu.py [--out DIR] [--only tests|sanitize|bench|costs|tune [OP ...]] [--minutes 9]

tests: the contract suite on CUDA, where it is an error that a call waits for the device. sanitize: memcheck and racecheck over a
launch of every kernel. bench: every operation and its peers, and a copy's bandwidth. costs: memory, the host's time, first
calls. tune, if asked for: what bench/tune.py finds for the poolings named.

Every step is a process of its own with a share of the time left, so that one that fails, hangs or spoils its device costs no
other its results. (They would take an estimated 24 minutes: for every row of the benchmark, run the parts one by one.) gpu.json
and gpu.md are written anew after each step; the goals and their verdicts come last. The exit status is 1 if a step failed. On a
CPU everything is a toy, and tests this code alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from contestants import FUNCTIONS, OPERATIONS
from goals import GOALS, HEADER, judge, line
from report import keep, markdown, notes, setting, table
from steps import Step, run_all

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"))


def tests(options: argparse.Namespace) -> Iterator[Step]:
    folder, chosen = ROOT / "tests", ["-m", "not slow"]
    if options.device == "cpu":
        chosen = ["-k", "test_kernels_agree_with_the_reference and 1x1x1x1"]
    elif importlib.util.find_spec("xdist"):
        # Compiling is most of it, and takes one core a process.
        chosen += ["--numprocesses", str(min(8, os.cpu_count() or 1))]
    results = options.out / "tests.xml"
    names = ("test_contract", "test_bad_input", "test_blend", "test_mixup_cross_entropy", "test_rezero")
    files = [*(folder / f"{name}.py" for name in names), f"--junitxml={results}"]
    yield Step("tests", [sys.executable, "-m", "pytest", "-q", *files, *chosen], 120, results)


def sanitize(options: argparse.Namespace) -> Iterator[Step]:
    launches = [sys.executable, ROOT / "bench" / "sanitize.py"]
    if options.device == "cpu":
        yield Step("sanitize-interpreter", launches, 30, environment={"TRITON_INTERPRET": "1"})
        return
    sanitizer = shutil.which("compute-sanitizer", path=SANITIZERS)
    for tool in ("memcheck", "racecheck"):
        step = Step(f"sanitize-{tool}", [sanitizer, "--tool", tool, "--error-exitcode", "99", *launches], 45)
        step.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        step.unable = "Device not supported"
        if sanitizer is None:
            step.status, step.last_lines = "absent", ["compute-sanitizer is not installed"]
        yield step


def bench(options: argparse.Namespace) -> Iterator[Step]:
    """Everyone but the compilers on every case; then the compilers, which take some ten seconds a case, on a few."""
    for operation in options.operations:
        run = [sys.executable, ROOT / "bench" / "run.py", "--only", operation, "--device", options.device]
        everyone, compilers = ["-k", "not compiled"], ["-k", "regfast or compiled", "--quick"]
        if options.device == "cpu":
            toys = ",".join("x".join(map(str, shape)) for shape in OPERATIONS[operation].shapes["toy"])
            everyone += ["--shapes", toys, "--quick"]
        else:
            everyone += ["--dtypes", "bfloat16,float16,float32", "--seconds", "0.5"]
            compilers += ["--dtypes", "bfloat16", "--directions", OPERATIONS[operation].directions[-1]]
        out = options.out / f"bench-{operation}"
        share = 60 * len(OPERATIONS[operation].arguments) if operation in FUNCTIONS else 20
        yield Step(out.name, [*run, *everyone, "--out", out], share, out / "report.json")
        if options.device == "cuda":
            out = options.out / f"bench-{operation}-compiled"
            yield Step(out.name, [*run, *compilers, "--out", out], 50, out / "report.json")


def costs(options: argparse.Namespace) -> Iterator[Step]:
    results = options.out / "costs.json"
    command = [sys.executable, ROOT / "bench" / "costs.py", "--device", options.device, "--out", results, "--only"]
    yield Step("costs", [*command, *(name for name in options.operations if name in FUNCTIONS)], 100, results)


def tune(options: argparse.Namespace) -> Iterator[Step]:
    for operation in options.operations:
        results = options.out / f"tune-{operation}.json"
        command = [sys.executable, ROOT / "bench" / "tune.py", operation, "--out", options.out, "--device", options.device]
        yield Step(results.stem, command, 300, results)


PARTS = {"tests": tests, "sanitize": sanitize, "bench": bench, "costs": costs, "tune": tune}
USUAL = ("tests", "sanitize", "bench", "costs")
# The parts that can be asked for one operation.
BY_OPERATION = ("bench", "costs", "tune")


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, `only` taken apart into the parts and the operations chosen."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="the folder for the reports (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar=("PART", "OP"), help=f"{', '.join(PARTS)}; then {', '.join(OPERATIONS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=9, help="for everything together (default: %(default)s)")
    options = parser.parse_args(argv)
    part, *operations = options.only or ["all"]
    options.parts, options.operations = (part,) if options.only else USUAL, operations or list(OPERATIONS)
    options.out = options.out.resolve()
    if not set(options.parts) <= PARTS.keys():
        parser.error(f"--only: {part!r} is no part: {', '.join(PARTS)}")
    if operations and part not in BY_OPERATION:
        parser.error(f"--only {part} takes no operation")
    known = OPERATIONS if part == "bench" else FUNCTIONS
    if not set(operations) <= set(known):
        parser.error(f"--only {part}: operations are {', '.join(known)}")
    if part == "tune" and not operations:
        parser.error("--only tune: which operation?")
    return options


def rows_of(steps: list[Step], part: str) -> list[Row]:
    """The rows of a part's steps, each with the name of the step that it is from."""
    found = [(step.name, step.read()) for step in steps if step.part == part]
    kept = [(name, results["rows"] if part == "bench" else results) for name, results in found if results]
    return [row | {"run": name} for name, rows in kept for row in rows]


def write(steps: list[Step], options: argparse.Namespace, found: dict[str, Any]) -> str:
    """gpu.json and gpu.md, of what is known by now. Returns the summary, in which the latter ends."""
    timed, paid = rows_of(steps, "bench"), rows_of(steps, "costs")
    # Toys on a CPU say nothing about a goal.
    verdicts = [judge(goal, timed + paid if options.device == "cuda" else []) for goal in GOALS]
    goals = [line(verdict, options.device) for verdict in verdicts]
    parts = {step.part: [described(other) for other in steps if other.part == step.part] for step in steps}
    tuned = {step.name: step.read() for step in steps if step.part == "tune"}
    results = {"rows": timed, "costs": paid, "tune": tuned, "goals": [dict(zip(HEADER, goal)) for goal in goals]}
    keep(options.out / "gpu.json", found | {"parts": parts} | results, indent=1)
    text = summary(steps, timed, paid, goals)
    report = ["# regfast's GPU report", bullets(found), *details(steps, timed, paid), "## Summary", text]
    (options.out / "gpu.md").write_text("\n\n".join(report) + "\n")
    return text


def described(step: Step) -> dict[str, Any]:
    known = {name: getattr(step, name) for name in ("name", "status", "seconds", "limit", "last_lines")}
    return known | ({"counts": step.read()} if step.part == "tests" else {})


def details(steps: list[Step], timed: list[Row], paid: list[Row]) -> Iterator[str]:
    """The sections of gpu.md before the summary: how the steps in trouble ended, then every figure."""
    for step in steps:
        if step.troubled:
            yield "\n".join([f"## {step.name}: {step.status}\n\n```", *step.last_lines, "```"])
    if timed:
        yield f"## bench\n\n{table(timed)}\n\n{notes(timed)}"
    if paid:
        yield f"## costs\n\n{cost_table(paid)}"
    for step in steps:
        text = step.results.with_suffix(".md") if step.part == "tune" and step.results else None
        if text and text.exists():
            yield f"## {step.name}\n\n{text.read_text().strip()}"


def cost_table(rows: list[Row]) -> str:
    header = ["cost", "operation", "case", "contestant", "value", "unit"]
    lines = []
    for row in rows:
        value = f"{row['value']:.4g}" if "value" in row else "absent" if "absent" in row else "failed"
        lines.append([*(str(row[name]) for name in header[:4]), value, problem(row) or row["unit"]])
    return markdown([header, *lines], right=["value"])


def problem(row: Row) -> str:
    """Why a row has no figure; nothing where it has one."""
    return row.get("absent") or row.get("error") or ""


def summary(steps: list[Step], timed: list[Row], paid: list[Row], goals: list[list[str]]) -> str:
    """A short table of the steps and one of the goals, the bandwidth that the goals are fractions of, and who has no figures."""
    header = ["step", "status", "seconds", "in short"]
    lines = [[step.name, step.status, f"{step.seconds:.0f}", in_short(step)] for step in steps]
    sections = [markdown([header, *lines], right=["seconds"])]
    bandwidths = [row["copy_gb_per_s"] for row in timed if "copy_gb_per_s" in row]
    if bandwidths:
        sections.append(f"A device copy reads and writes {statistics.median(bandwidths):.4g} GB/s.")
    problems = dict.fromkeys(f"{row['contestant']}: {problem(row)}"[:120] for row in timed + paid if problem(row))
    if problems:
        # All of them are in the sections before.
        sections.append(bullets(dict.fromkeys(list(problems)[:10])))
    sections.append(markdown([HEADER, *goals], right=HEADER[1:3]))
    return "\n\n".join(sections)


def bullets(lines: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}" if value is None else f"- {name}: {value}" for name, value in lines.items())


def in_short(step: Step) -> str:
    """How many rows a step gave, or how its log ends."""
    rows = rows_of([step], step.part) if step.part in ("bench", "costs") else []
    ending = (step.last_lines or [""])[-1].strip(" =").replace("|", "/")[:100]
    return f"{len(rows)} rows" if rows else ending


def environment(device: str) -> dict[str, str]:
    """The steps find regfast and the samples of its tests; and no GPU, if they are to use none."""
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    return found | {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else found


def main(argv: list[str]) -> int:
    options = parse(argv)
    # A shell's background jobs ignore interrupts, and would hand that on to the steps, which are stopped by one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {"kind": options.device} | setting(options.device)
    steps = [step for part in options.parts for step in PARTS[part](options)]
    for step in run_all(steps, options.minutes, options.out, environment(options.device)):
        print(f"{step.name}: {step.status}, {step.seconds:.0f} s of {step.limit:.0f}", flush=True)
        write(steps, options, found)
    print(f"\n{write(steps, options, found)}\n\nwritten: {options.out / 'gpu.json'} {options.out / 'gpu.md'}")
    return int(any(step.troubled for step in steps))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
