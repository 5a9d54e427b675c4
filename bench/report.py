"""What a run leaves behind: one table, and where and on what it was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contest import Case

from regfast.info import processor

Row = dict[str, Any]

PACKAGES = ("regfast", "torch", "triton", "kornia", "kornia_rs", "timm", "torchvision", "antialiased-cnns", "mosaicml", "numpy")
GROUP = ("operation", "input", "format", "dtype", "direction")
COLUMNS = (*GROUP, "contestant", "median ms", "ratio", "of copy")


def output_of(*command: str) -> str | None:
    """A command's output, or None where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else None


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def setting(device: str) -> dict[str, Any]:
    """Where and on what it is measured, to be asked before the timing adds to the load."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output_of("git", "describe", "--always", "--dirty", "--exclude=*"),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} threads",
        "load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores as it began",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    versions = {package: version_of(package) for package in PACKAGES}
    return {name: value for name, value in (versions | found).items() if value is not None}


def cells(row: Row) -> list[str]:
    case = Case(*(row[field] for field in Case._fields))
    group = [case.call, case.size, case.format, case.dtype, case.direction, row["contestant"]]
    if row["absent"] or row["error"]:
        return [*group, "absent" if row["absent"] else "failed", "", ""]
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
    of_copy = f"{row['of_copy']:.0%}" if "of_copy" in row else ""
    return [*group, f"{row['median_ms']:.3f}", ratio, of_copy]


def table(rows: list[Row]) -> str:
    """The rows in Markdown, aligned, a group's cells in its first line alone."""
    lines, above = [list(COLUMNS)], None
    for row in rows:
        line = cells(row)
        group, above = line[: len(GROUP)] == above, line[: len(GROUP)]
        lines.append([""] * len(GROUP) + line[len(GROUP) :] if group else line)
    return markdown(lines, right=COLUMNS[len(GROUP) + 1 :])


def markdown(lines: list[list[str]], right: Sequence[str] = ()) -> str:
    """A table in Markdown, its cells aligned: the header first, and which of its columns are aligned at the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    columns = [(width, name in right) for width, name in zip(widths, lines[0])]
    rule = ["-" * (width - 1) + ":" if at_right else "-" * width for width, at_right in columns]
    aligned = [
        [cell.rjust(width) if at_right else cell.ljust(width) for cell, (width, at_right) in zip(line, columns)]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def notes(rows: list[Row]) -> str:
    """What the table's columns mean, and who is missing from it and why."""
    baselines = {row["operation"]: row["baseline"] for row in rows if "baseline" in row}
    bandwidths = [row["copy_gb_per_s"] for row in rows if "copy_gb_per_s" in row]
    lines = [f"ratio, {operation}: to the median of {name} in the same interleaved pass" for operation, name in baselines.items()]
    if bandwidths:
        lines.append(
            "of copy: the bytes that the operation must move, by its time, as a fraction of a device copy's "
            f"{statistics.median(bandwidths):.3g} GB/s; more than 100% where a cache holds the input, as a CPU's may"
        )
    for problem in ("absent", "error"):
        seen = Counter((row["operation"], row["contestant"], row[problem]) for row in rows if row[problem])
        lines += [f"{problem}: {name}, {operation}, {count} times: {why}" for (operation, name, why), count in seen.items()]
    return "\n".join(f"- {line}" for line in lines)


def keep(file: Path, results: Any, indent: int | None = None) -> None:
    """Writes JSON so that whoever reads the file, whenever this process is killed, finds all of one version or of another."""
    whole = file.with_suffix(".part")
    whole.write_text(json.dumps(results, indent=indent) + "\n")
    whole.replace(file)


def write(rows: list[Row], found: dict[str, Any], out: Path) -> list[Path]:
    """report.json and report.md, and a plot for each operation where matplotlib is installed."""
    files = [out / "report.json", out / "report.md"]
    keep(files[0], found | {"rows": rows}, indent=1)
    versions = "\n".join(f"- {name}: {value}" for name, value in found.items())
    files[1].write_text(f"# regfast's benchmark\n\n{table(rows)}\n\n{notes(rows)}\n\n{versions}\n")
    try:
        from plots import plot
    except ImportError as error:
        print(f"no plots: {error}")
        return files
    rivals = [row for row in rows if "ratio" in row and row["contestant"] != row["baseline"]]
    for operation in dict.fromkeys(row["operation"] for row in rivals):
        files.append(out / f"{operation}.png")
        plot([row for row in rivals if row["operation"] == operation], found["device"], files[-1])
    return files
