"""One picture for each operation: every contestant's time as a multiple of the baseline's."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib
from contest import Case

matplotlib.use("agg")
from matplotlib import pyplot as plt

OURS, OTHERS, INK = "#c2410c", "#94a3b8", "#334155"


def plot(rows: list[dict[str, Any]], device: str, file: Path) -> None:
    """The rows of one operation, its baseline left out: a panel for each case, formats and directions across, the rest down."""
    panels: dict[Case, list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault(Case(*(row[field] for field in Case._fields)), []).append(row)
    across = list(dict.fromkeys((case.format, case.direction) for case in panels))
    down = list(dict.fromkeys(case._replace(format="", direction="") for case in panels))
    contestants = ranked(rows)
    size = (1.6 + 2.5 * len(across), 0.8 + (0.7 + 0.23 * len(contestants)) * len(down))
    grid = dict(squeeze=False, sharex=True, sharey=True, figsize=size, layout="constrained")
    figure, axes = plt.subplots(len(down), len(across), **grid)
    for line, common in zip(axes, down):
        for panel, (format, direction) in zip(line, across):
            draw(panel, panels.get(common._replace(format=format, direction=direction), []), contestants)
            above = f"{common.call}, {common.size}, {common.dtype}\n" if panel is line[0] else ""
            panel.set_title(f"{above}{format}, {direction}", fontsize=9, color=INK, loc="left")
    ratios = [row["ratio"] for row in rows]
    axes[0][0].set_xlim(0.8 * min(1, *ratios), 1.8 * max(1, *ratios))
    baseline = rows[0]["baseline"]
    figure.suptitle(f"Time as a multiple of {baseline}'s: further left is faster", fontsize=12, color=INK, x=0.01, ha="left")
    figure.supxlabel(f"multiple of {baseline}'s median, log scale. {device}", fontsize=8, color=INK, x=0.01, ha="left")
    figure.savefig(file, dpi=160)
    plt.close(figure)


def ranked(rows: list[dict[str, Any]]) -> list[str]:
    """The contestants, the fastest over all cases first."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(row["contestant"], []).append(row["ratio"])
    return sorted(ratios, key=lambda name: statistics.geometric_mean(ratios[name]))


def draw(panel: Any, rows: list[dict[str, Any]], contestants: list[str]) -> None:
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.tick_params(length=0, labelsize=8, labelcolor=INK)
    panel.spines[:].set_visible(False)
    panel.axvline(1, color=INK, linewidth=1)
    for row in rows:
        place, ours = contestants.index(row["contestant"]), row["contestant"].startswith("regfast")
        color = OURS if ours else OTHERS
        panel.plot([1, row["ratio"]], [place, place], color=color, linewidth=2 if ours else 1, alpha=0.6)
        panel.plot(row["ratio"], place, "o", color=color, markersize=6)
        beside = dict(textcoords="offset points", va="center", fontsize=8, color=OURS if ours else INK)
        panel.annotate(f"{row['ratio']:.2f}", (max(row["ratio"], 1), place), (7, 0), **beside)
    panel.set_ylim(len(contestants) - 0.4, -0.6)
    panel.set_yticks(range(len(contestants)), contestants)
    for label in panel.get_yticklabels():
        if label.get_text().startswith("regfast"):
            label.set(color=OURS, fontweight="bold")
