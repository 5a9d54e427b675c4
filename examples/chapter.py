"""The comparison of the chapter and the blog post: seven ways to train, several seeds, figures.

    python examples/chapter.py    # scikit-learn's digits, minutes
    python examples/chapter.py --seeds 3 -- --data cifar10 --root DIR --epochs 30
    python examples/chapter.py --device cuda --minutes 9 -- --data cifar10 --root DIR \\
        --batch 128 --channels-last --epochs 30

The arguments after -- go to train.py. A run that was killed or out of time, started again, goes on
from the last finished epoch. --out gets a folder per run, and the figures and results.md of the
finished runs.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data
import figures
import torch
import train

RESIDUAL = ("--model", "resnet", "--antialias")
VARIANTS: dict[str, tuple[str, ...]] = {
    "regular": ("--model", "cnn"),
    "anti-aliased": ("--model", "cnn", "--antialias"),
    "residual": RESIDUAL,
    "ReZero": (*RESIDUAL, "--rezero"),
    "ReZero + MixUp": (*RESIDUAL, "--rezero", "--mixup", "0.25"),
    "input mixup": ("--model", "cnn", "--mixup", "1"),
    "manifold mixup": ("--model", "cnn", "--manifold", "2"),
}
# One test image is shown per rank, in the order of how much shifts move the predictions.
RANKS = (0.5, 0.75, 0.95)


def folder_of(out: Path, variant: str, seed: int) -> Path:
    return out / f"{variant.replace(' + ', '-').replace(' ', '-').lower()}-{seed}"


def run(
    out: Path, variants: Sequence[str], seeds: int, arguments: Sequence[str], deadline: float
) -> tuple[dict[str, list[Path]], list[str]]:
    """Train every variant with every seed; the loop over seeds is outermost.

    So each comparison is complete as early as possible. Return the folders of the finished runs, by
    variant, and the names of the others.
    """
    finished: dict[str, list[Path]] = {variant: [] for variant in variants}
    left = []
    for seed in range(seeds):
        for variant in variants:
            folder, name = folder_of(out, variant, seed), f"{variant}, seed {seed}"
            print(name, flush=True)
            flags = (*VARIANTS[variant], "--seed", str(seed), "--out", str(folder))
            if train.main([*arguments, *flags], deadline):
                finished[variant].append(folder)
            else:
                left.append(name)
    return {variant: own for variant, own in finished.items() if own}, left


def read(folders: Sequence[Path]) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Return the epochs and the result of each run."""
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in folders]
    return [
        (list(map(json.loads, line)), json.loads((folder / "result.json").read_text()))
        for line, folder in zip(lines, folders)
    ]


def draw(
    out: Path,
    folders: dict[str, list[Path]],
    left: Sequence[str],
    images: data.Dataset,
    command: str,
) -> list[Path]:
    """Write the figures and the table of the finished runs; the table names the others."""
    runs = {variant: read(own) for variant, own in folders.items()}
    by_epoch, by_time = {}, {}
    for variant, own in runs.items():
        by_epoch[variant] = [
            ([r["epoch"] for r in epochs], [r["accuracy"] for r in epochs]) for epochs, _ in own
        ]
        by_time[variant] = [(elapsed(epochs), [r["accuracy"] for r in epochs]) for epochs, _ in own]
    results = {variant: [result for _, result in own] for variant, own in runs.items()}

    def values(name: str) -> dict[str, list[float]]:
        return {variant: [result[name] for result in own] for variant, own in results.items()}

    where = f"{images.name}, centre crops of {len(images.test.x)} test images"
    deviation = (
        "deviation of the true class's probability over\n"
        "64 shifts, the median image's (less is better)"
    )
    consistency = "pairs of shifts with one prediction,\nof all images (more is better)"
    panels = [
        figures.Measure(deviation, values("deviation")),
        figures.Measure(consistency, values("consistency"), percent=True),
    ]
    written = [
        figures.curves(out / "accuracy.png", f"Accuracy by epoch: {where}", "epoch", by_epoch),
        figures.curves(
            out / "accuracy-time.png", f"Accuracy by time: {where}", "seconds of training", by_time
        ),
        figures.measures(
            out / "consistency.png", "How much a prediction moves with its image", panels
        ),
        shifts(out / "shifts.png", folders, images),
        figures.densities(out / "beta.png"),
        figures.zebra(out / "zebra.png"),
    ]
    with train.replacing(out / "results.md") as part:
        note = f"\nNot finished, and left out: {'; '.join(left)}.\n" if left else ""
        part.write_text(f"{table(results)}{note}\n    {command}\n")
    return [*written, out / "results.md"]


def elapsed(epochs: Sequence[dict[str, Any]]) -> list[float]:
    total, times = 0.0, []
    for record in epochs:
        total += record["seconds"]
        times.append(total)
    return times


def shifts(path: Path, folders: dict[str, list[Path]], images: data.Dataset) -> Path:
    """Show one image per rank, by how much shifts move the mean variant's predictions."""
    kept = {
        variant: torch.load(own[0] / "shifts.pt")["probability"] for variant, own in folders.items()
    }
    order = (
        torch.stack([probability.std(1, correction=0) for probability in kept.values()])
        .mean(0)
        .argsort(stable=True)
    )
    chosen = order[[int(rank * (len(order) - 1)) for rank in RANKS]]
    names = [str(images.classes[int(label)]) for label in images.test.y[chosen]]
    title = "The probability of the true class as the image moves by up to seven pixels"
    return figures.shifts(
        path,
        title,
        {variant: p[chosen] for variant, p in kept.items()},
        images.test.x[chosen],
        names,
    )


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the mean and spread over seeds, in Markdown."""
    lines = [
        "| | accuracy | deviation over shifts | consistency | seconds | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for variant, own in results.items():
        forms = {"accuracy": ".2%", "deviation": ".4f", "consistency": ".2%", "seconds": ".0f"}
        cells = [spread([result[key] for result in own], form) for key, form in forms.items()]
        lines.append(f"| {variant} | {' | '.join(cells)} | {len(own)} |")
    one = next(iter(results.values()))[0]
    device = f"{one['device']}, threads: {one['threads']}" if one["threads"] else one["device"]
    versions = ", ".join(f"{package} {version}" for package, version in one["versions"].items())
    lines += ["", f"± is the standard deviation over seeds. {device}; {versions}; {one['date']}."]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def command_of(arguments: Sequence[str]) -> str:
    """Return the command of this run, with stand-ins for the folders of data and results."""
    given, hidden = list(arguments), {"--root": "DIR", "--out": "OUT"}
    for option, stand_in in hidden.items():
        if option in given[:-1]:
            given[given.index(option) + 1] = stand_in
    return "python examples/chapter.py " + shlex.join(given)


def main(arguments: Sequence[str]) -> list[Path]:
    own, rest = list(arguments), []
    if "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds",
        type=train.positive,
        default=1,
        help="runs of each variant (default: %(default)s)",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=", ".join(VARIANTS),
    )
    parser.add_argument("--device", help="passed to train.py")
    help = "begin no epoch after this time; the same command goes on (default: no limit)"
    parser.add_argument("--minutes", type=train.amount, default=math.inf, help=help)
    parser.add_argument(
        "--out", type=Path, default=Path("out/chapter"), help="(default: %(default)s)"
    )
    options = parser.parse_args(own)
    if options.device:
        rest = [*rest, "--device", options.device]
    chosen, deadline = train.parse(rest), time.monotonic() + 60 * options.minutes
    folders, left = run(options.out, options.variants, options.seeds, rest, deadline)
    written = []
    if folders:
        images = train.load(chosen.data, chosen.root, chosen.size, chosen.limit)
        written = draw(options.out, folders, left, images, command_of(arguments))
        print("written:", *written, sep="\n  ")
    if left:
        print("not finished, the same command goes on:", *left, sep="\n  ")
    return written


if __name__ == "__main__":
    main(sys.argv[1:])
