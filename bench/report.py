"""What a run leaves behind: one table, the plots, and where and on what it was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import platform
import shutil
import statistics
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

PACKAGES = ("regfast", "torch", "triton", "kornia", "kornia_rs", "timm", "torchvision", "antialiased-cnns", "numpy")
GROUP = ("operation", "input", "format", "dtype", "direction")
COLUMNS = (*GROUP, "contestant", "median ms", "ratio", "of copy")
OURS, OTHERS, INK = "#c2410c", "#94a3b8", "#334155"


def output_of(*command: str) -> str | None:
    """A command's output, or None where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    try:
        from cpuinfo import get_cpu_info

        return get_cpu_info()["brand_raw"]
    except (ImportError, KeyError):
        return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def setting(device: str) -> dict[str, Any]:
    """Where and on what it was measured."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": output_of("git", "describe", "--always", "--dirty", "--exclude=*"),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} threads",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    versions = {package: version_of(package) for package in PACKAGES}
    return {name: value for name, value in (versions | found).items() if value is not None}


def cells(row: Row) -> list[str]:
    call = f"{row['operation']}({', '.join(map(str, row['arguments']))})"
    group = [call, "x".join(map(str, row["shape"])), row["format"], row["dtype"], row["direction"], row["contestant"]]
    if row["absent"] or row["error"]:
        return [*group, "absent" if row["absent"] else "failed", "", ""]
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
    return [*group, f"{row['median_ms']:.3f}", ratio, f"{row['of_copy']:.0%}"]


def table(rows: list[Row]) -> str:
    """The rows in Markdown, aligned, a group's cells in its first line alone."""
    lines, above = [list(COLUMNS)], None
    for row in rows:
        line = cells(row)
        group, above = line[: len(GROUP)] == above, line[: len(GROUP)]
        lines.append([""] * len(GROUP) + line[len(GROUP) :] if group else line)
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    left = len(GROUP) + 1
    rule = ["-" * width if column < left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    lines.insert(1, rule)
    aligned = [[cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def notes(rows: list[Row]) -> str:
    """What the table's columns mean, and who is missing from it and why."""
    baselines = {row["operation"]: row["baseline"] for row in rows if "baseline" in row}
    bandwidths = [row["copy_gb_per_s"] for row in rows if "copy_gb_per_s" in row]
    lines = [f"ratio: to the median of {name}, in the same interleaved pass ({operation})" for operation, name in baselines.items()]
    if bandwidths:
        lines.append(
            "of copy: the bytes that the operation must move, by its time, as a fraction of a device copy's "
            f"{statistics.median(bandwidths):.3g} GB/s"
        )
    for problem in ("absent", "error"):
        seen = Counter((row["operation"], row["contestant"], row[problem]) for row in rows if row[problem])
        lines += [f"{problem}: {name}, {operation}, {count} times: {why}" for (operation, name, why), count in seen.items()]
    return "\n".join(f"- {line}" for line in lines)


def write(rows: list[Row], device: str, out: Path) -> list[Path]:
    """report.json and report.md, and a plot for each operation where matplotlib is installed."""
    found = setting(device)
    files = [out / "report.json", out / "report.md"]
    files[0].write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")
    versions = "\n".join(f"- {name}: {value}" for name, value in found.items())
    files[1].write_text(f"# regfast's benchmark\n\n{table(rows)}\n\n{notes(rows)}\n\n{versions}\n")
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return files
    matplotlib.use("agg")
    drawn = [row for row in rows if "ratio" in row and row["contestant"] != row["baseline"]]
    for operation, group in itertools.groupby(drawn, key=lambda row: row["operation"]):
        files.append(out / f"{operation}.png")
        plot(operation, list(group), found["device"], files[-1])
    return files


def plot(operation: str, rows: list[Row], device: str, file: Path) -> None:
    """Every contestant's time as a multiple of the baseline's, a panel for each format and direction, a row of panels for the rest."""
    from matplotlib import pyplot as plt

    across = list(dict.fromkeys((row["format"], row["direction"]) for row in rows))
    down = list(dict.fromkeys((row["arguments"], row["shape"], row["dtype"]) for row in rows))
    contestants = list(dict.fromkeys(row["contestant"] for row in rows))
    contestants.sort(key=lambda name: statistics.geometric_mean(row["ratio"] for row in rows if row["contestant"] == name))
    size = (2.2 + 2.5 * len(across), 1.5 + (0.55 + 0.24 * len(contestants)) * len(down))
    figure, axes = plt.subplots(len(down), len(across), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    for (arguments, shape, dtype), line in zip(down, axes):
        for (format, direction), panel in zip(across, line):
            key = (arguments, shape, dtype, format, direction)
            dots = [row for row in rows if tuple(row[part] for part in ("arguments", "shape", "dtype", "format", "direction")) == key]
            draw(panel, dots, contestants)
            panel.set_title(f"{format}, {direction}", fontsize=9, color=INK, loc="left")
        line[0].set_ylabel(f"{', '.join(map(str, arguments))}\n{'x'.join(map(str, shape))}\n{dtype}", fontsize=8, color=INK)
    widest = max(row["ratio"] for row in rows)
    axes[0][0].set_xlim(min(0.8, 0.8 * min(row["ratio"] for row in rows)), 1.7 * widest)
    figure.suptitle(f"{operation}: time relative to {rows[0]['baseline']} (left is faster)", fontsize=12, color=INK, x=0.01, ha="left")
    figure.supxlabel(f"times the median of {rows[0]['baseline']}, log scale; {device}", fontsize=8, color=INK)
    figure.savefig(file, dpi=160)
    plt.close(figure)


def draw(panel: Any, rows: list[Row], contestants: list[str]) -> None:
    panel.set_xscale("log")
    panel.axvline(1, color=INK, linewidth=1)
    for row in rows:
        ours = row["contestant"].startswith("regfast")
        place, color = contestants.index(row["contestant"]), OURS if ours else OTHERS
        panel.plot([1, row["ratio"]], [place, place], color=color, linewidth=2 if ours else 1, alpha=0.6, solid_capstyle="butt")
        panel.plot(row["ratio"], place, "o", color=color, markersize=6)
        end = max(row["ratio"], 1)
        panel.annotate(
            f"{row['ratio']:.2g}", (end, place), (7, 0), textcoords="offset points", va="center", fontsize=8, color=OURS if ours else INK
        )
    panel.set_yticks(range(len(contestants)), contestants, fontsize=8)
    for label in panel.get_yticklabels():
        ours = label.get_text().startswith("regfast")
        label.set(color=OURS if ours else INK, fontweight="bold" if ours else "normal")
    panel.set_ylim(len(contestants) - 0.4, -0.6)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("")
    panel.tick_params(length=0, labelsize=8, colors=INK)
    panel.spines[:].set_visible(False)
