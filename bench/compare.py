"""One table of the benchmark: every contestant's time, and its ratio to its problem's baseline.

    python bench/compare.py [--passes 5] [--out out/bench] [pytest's arguments...]
    python bench/compare.py --from A.json B.json ... [--out DIR]

It runs `pytest bench` several times, each in its own process and with its own order of the
contestants, so that a machine's slow minutes do not fall on one of them. `--from` reads what
`pytest bench --benchmark-json=A.json` left. It writes report.md and report.json.
"""

from __future__ import annotations

import argparse
import json
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
    "device, us": ("device_us", 1, ".1f"),
    "host, us": ("host_us", 1, ".1f"),
    "eager, us": ("eager_us", 1, ".1f"),
    "saved, MiB": ("saved_bytes", 2**20, ".2f"),
    "peak, MiB": ("peak_bytes", 2**20, ".2f"),
}
NOTES = """\
- The first row of a problem is its baseline, then come the fastest. A time is the median of the
  passes' medians, a ratio the median of the passes' ratios.
- how: "graph" is the device's time of a call in a CUDA graph; "eager" is a call with its host,
  because it cannot be captured, and "device" is the time in its kernels; "cpu" is a call.
- of copy: the bytes that the operation must move, by its time, as a share of a copy's bandwidth.
  It exceeds 100% where a cache holds the input.
- host: the host's time of a call. eager: a call as a user sees it, without a graph.
- saved: what autograd keeps beside inputs, parameters and output. peak: the most memory that a
  forward and backward take beside output and gradients."""


def rows_of(passes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each contestant of each problem, with its figures' medians over the passes."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for recorded in passes:
        times = {(b["group"], b["params"]["contestant"]): b for b in recorded["benchmarks"]}
        for (group, contestant), benchmark in times.items():
            info, seconds = benchmark["extra_info"], benchmark["stats"]["median"]
            row = {**info, "seconds": seconds}
            if (group, info["baseline"]) in times:
                row["ratio"] = seconds / times[group, info["baseline"]]["stats"]["median"]
            found.setdefault((group, contestant), []).append(row)
    rows = []
    for (group, contestant), each in found.items():
        row = {"problem": group, "contestant": contestant, **each[0], "passes": len(each)}
        for name in each[0]:
            if isinstance(each[0][name], (int, float)):
                row[name] = median(one[name] for one in each if name in one)
        rows.append(row)
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    rows.sort(key=lambda row: row["seconds"])
    rows.sort(
        key=lambda row: (problems.index(row["problem"]), row["contestant"] != row["baseline"])
    )
    return rows


def report(rows: list[dict[str, Any]], passes: list[dict[str, Any]]) -> str:
    """The table in Markdown, and below it what is missing from it and where it was measured."""
    columns = {title: row for title, row in COLUMNS.items() if any(row[0] in one for one in rows)}
    lines, above = [], None
    for row in rows:
        cells = [
            format(row[figure] / unit, form) if figure in row else ""
            for figure, unit, form in columns.values()
        ]
        problem, above = "" if row["problem"] == above else row["problem"], row["problem"]
        lines.append([problem, row["contestant"], row["how"], *cells])
    align = ["left"] * 3 + ["right"] * len(columns)
    headers = ["problem", "contestant", "how", *columns]
    table = tabulate(lines, headers, "pipe", colalign=align, disable_numparse=True)
    notes = [NOTES]
    for kind in ("absent", "errors"):
        seen = Counter(
            (group.split("[")[0], contestant, reason)
            for recorded in passes
            for group, contestant, reason in recorded[kind]
        )
        notes += [f"- {kind}: {', '.join(key)} ({count} times)" for key, count in seen.items()]
    for machine in dict.fromkeys(json.dumps(recorded["machine_info"]) for recorded in passes):
        found = json.loads(machine)
        check = found.get("check", {"trusted": True})
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        notes += [f"- device: {found['device']}", f"- versions: {versions}"]
        notes += [] if check["trusted"] else [f"- NOT TRUSTED: {check}"]
    commit = passes[0]["commit_info"]
    changed = ", with uncommitted changes" if commit["dirty"] else ""
    dates = f"{passes[0]['datetime'][:16]} to {passes[-1]['datetime'][:16]} UTC"
    notes += [f"- commit: {commit['id']}{changed}", f"- passes: {len(passes)}, {dates}"]
    return f"# regfast's benchmark\n\n{table}\n\n" + "\n".join(notes) + "\n"


def run(passes: int, out: Path, arguments: list[str]) -> list[Path]:
    """The files that the passes leave, one after the other."""
    bench = Path(__file__).parent
    chosen = [argument for argument in arguments if Path(argument.split("::")[0]).is_file()]
    command = [sys.executable, "-m", "pytest", *([] if chosen else [str(bench)]), *arguments]
    files = [out / f"pass{i}.json" for i in range(1, passes + 1)]
    for i, file in enumerate(files, 1):
        file.unlink(missing_ok=True)
        own = ["--shuffle", str(i), f"--benchmark-json={file}", "--benchmark-quiet", "-q"]
        subprocess.run([*command, *own])
    return files


def main(argv: list[str]) -> int:
    """0, or 1 where a contestant of regfast failed or a pass timed nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--from", dest="files", type=Path, nargs="+", metavar="JSON")
    options, arguments = parser.parse_known_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    files = options.files or run(options.passes, options.out, arguments)
    passes = [json.loads(file.read_text()) for file in files if file.exists()]
    if not passes:
        print("nothing was timed")
        return 1
    rows = rows_of(passes)
    text = report(rows, passes)
    (options.out / "report.md").write_text(text)
    (options.out / "report.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)
    failed = any(row[1].startswith("regfast") for one in passes for row in one["errors"])
    return int(failed or len(passes) < len(files))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
