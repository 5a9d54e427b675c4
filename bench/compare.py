"""One table of the benchmark: every contestant's time, and its ratio to its problem's baseline.

    python bench/compare.py [--passes 5] [--out out/bench] [pytest's arguments...]

It runs `pytest bench` several times, so that a machine's slow minutes do not fall on one
contestant, and writes report.md and report.json.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from tabulate import tabulate

# The columns of the table: a figure of a row, its unit as a divisor, and its format.
COLUMNS = {
    "time, us": ("seconds", 1e-6, ".1f"),
    "ratio": ("ratio", 1, ".2f"),
    "of copy": ("of_copy", 1, ".0%"),
    "host, us": ("host_us", 1, ".1f"),
    "eager, us": ("eager_us", 1, ".1f"),
    "device, us": ("device_us", 1, ".1f"),
    "peak, MiB": ("peak_bytes", 2**20, ".2f"),
    "saved, MiB": ("saved_bytes", 2**20, ".2f"),
}
NOTES = """\
- Times and ratios to the baseline are medians of those of the passes.
- how: "graph" times the device, by CUDA graphs; "eager" a call that cannot be captured, with its
  host, where "device" is the time in its kernels; "cpu" a call.
- of copy: the least bytes that the operation moves, by its time, as a share of a copy's bandwidth.
- host: the host's time of a call. eager: a call as a user sees it, without a graph.
- peak: the most memory that a forward and backward take beside output and gradients.
  saved: what autograd keeps between them, beside inputs, parameters and output."""

Row = dict[str, Any]


def rows_of(passes: list[list[Row]]) -> list[Row]:
    """A row for each contestant of each problem, of what pytest-benchmark recorded in each pass."""
    found: dict[tuple[str, str], list[Row]] = {}
    for benchmarks in passes:
        times = {(b["group"], b["params"]["contestant"]): b["stats"]["median"] for b in benchmarks}
        for (problem, contestant), benchmark in zip(times, benchmarks):
            row = {"problem": problem, "contestant": contestant, **benchmark["extra_info"]}
            row["seconds"] = times[problem, contestant]
            if baseline := times.get((problem, row["baseline"])):
                row["ratio"] = row["seconds"] / baseline
            found.setdefault((problem, contestant), []).append(row)
    problems = list(dict.fromkeys(problem for problem, _ in found))
    rows = [middle(each) for each in found.values()]
    return sorted(rows, key=lambda row: (problems.index(row["problem"]), row["seconds"]))


def middle(each: list[Row]) -> Row:
    """One row of those of several passes, with the medians of their figures."""
    row = dict(each[0])
    for name, value in each[0].items():
        if isinstance(value, (int, float)):
            row[name] = median(one[name] for one in each if name in one)
    return row


def report(rows: list[Row], passes: list[list[Row]], missing: Counter[str]) -> str:
    """The table in Markdown, and below it what is missing from it and where it was measured."""
    lines = []
    for row in rows:
        line = {name: row[name] for name in ("problem", "contestant", "how")}
        for title, (figure, unit, form) in COLUMNS.items():
            line |= {title: format(row[figure] / unit, form)} if figure in row else {}
        lines.append(line)
    align = dict(colalign=["left"] * 3, stralign="right", disable_numparse=True)
    notes = [NOTES, *(f"- {line} (in {count} passes)" for line, count in missing.items())]
    infos = [benchmark["extra_info"] for benchmarks in passes for benchmark in benchmarks]
    for name in ("device", "versions", "commit", "check"):
        notes += [f"- {name}: {value}" for value in dict.fromkeys(info[name] for info in infos)]
    table = tabulate(lines, "keys", "pipe", **align)
    return f"# regfast's benchmark, {len(passes)} passes\n\n{table}\n\n" + "\n".join(notes) + "\n"


def main(argv: list[str]) -> int:
    """pytest's status: 0, 1 where a contestant failed, or more where nothing was timed."""
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    options, arguments = parser.parse_known_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    # The path is for where no file is among the arguments; the width, lest pytest cut its lines.
    command = [sys.executable, "-m", "pytest", "-o", "testpaths=bench", "-qra", *arguments]
    wide, passes, missing, status = os.environ | {"COLUMNS": "200"}, [], Counter(), 0
    for i in range(1, options.passes + 1):
        file = options.out / f"pass{i}.json"
        file.unlink(missing_ok=True)
        own = ["--benchmark-quiet", f"--benchmark-json={file}"]
        done = subprocess.run([*command, *own], env=wide, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        status = max(status, done.returncode)
        if not file.exists():
            return max(status, 1)
        lines = done.stdout.splitlines()
        missing.update(line for line in lines if line.startswith(("SKIPPED", "FAILED", "ERROR")))
        passes.append(json.loads(file.read_text())["benchmarks"])
    text = report(rows_of(passes), passes, missing)
    (options.out / "report.md").write_text(text)
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
