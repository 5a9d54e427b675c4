"""The demo's two pictures: accuracy by epoch, and what a shift of the image does to the predicted probability."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import demo_data as data
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

COLOURS = ("#d1495b", "#00798c")
INK, MUTED, RULE = "#222222", "#6b6b6b", "#d9d9d9"
SIDE = 8
# Where the shown images stand when all test images are ordered by how much a shift moves the prediction.
RANKS = {"median image": 0.50, "3 of 4 move less": 0.75, "19 of 20 move less": 0.95}
STYLE = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 160,
    "savefig.facecolor": "white",
}


def deviation(probability: Tensor) -> Tensor:
    """Shift consistency: the standard deviation of the true class's probability over an image's crops (the last dimension)."""
    return probability.std(dim=-1, correction=0)


def accuracy(path: Path, curves: Mapping[str, Sequence[float]], images: data.Dataset) -> Path:
    """One line per network, named at its end, where the eye arrives."""
    with _figure(path, (8.6, 4.8), f"Test accuracy by epoch, {images.name}") as figure:
        axes = figure.add_axes((0.085, 0.13, 0.68, 0.66))
        tested = f"Centre crops of the {len(images.test_x)} test images."
        _subtitle(figure, f"{tested} Same initial weights, same training crops, one seed.")
        for (name, curve), colour, move in zip(curves.items(), COLOURS, _label_moves(list(curves.values())), strict=True):
            axes.plot(range(1, len(curve) + 1), curve, color=colour, linewidth=2.2, marker="o", markersize=4)
            end, place = (len(curve), curve[-1]), {"xytext": (10, move), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{name}  {curve[-1]:.1%}", end, color=colour, weight="bold", **place)
        # The first quarter may rise from below the frame: the difference is in the rest.
        settled = [value for curve in curves.values() for value in curve[len(curve) // 4 :]]
        margin = 0.05 * (max(settled) - min(settled)) + 0.005
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        _plain(axes)
    return path


def _label_moves(curves: Sequence[Sequence[float]], apart: float = 9) -> list[float]:
    """Points to move the two end labels by, so that they do not overlap: the higher curve's goes up."""
    first, second = (curve[-1] for curve in curves)
    return [apart, -apart] if first > second else [-apart, apart]


def shifts(path: Path, probabilities: Mapping[str, Tensor], images: data.Dataset) -> Path:
    """The true class's probability at all 64 shifts of three images, one heat map per network; below, all images at once."""
    chosen = _by_rank(probabilities)
    with _figure(path, (9.2, 13), "How the prediction moves when the image does") as figure:
        _subtitle(
            figure,
            "Colour: probability of the true class at 8 x 8 shifts, one pixel apart; ± is its standard deviation.\n"
            "A network that ignored shifts would give an even square. The three images were chosen by rank:\n"
            f"all {len(images.test_x)} test images in the order of their ±, averaged over both networks.",
        )
        grid = figure.subplots(len(chosen), 1 + len(probabilities), gridspec_kw={"wspace": 0.12, "hspace": 0.28})
        figure.subplots_adjust(left=0.05, right=0.86, top=0.86, bottom=0.295)
        for row, (rank, index) in zip(grid, chosen.items(), strict=True):
            _show_image(row[0], images.test_x[index], f"{rank}\ntrue class: {images.classes[int(images.test_y[index])]}")
            for axes, (name, probability), colour in zip(row[1:], probabilities.items(), COLOURS, strict=True):
                mesh = _heat_map(axes, probability[index])
                axes.set_title(f"{name}  ± {deviation(probability[index]):.3f}", color=colour, weight="bold", fontsize=12)
        bar = figure.colorbar(mesh, cax=figure.add_axes((0.89, 0.295, 0.016, 0.565)), format=PercentFormatter(1))
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        _all_images(figure.add_axes((0.1, 0.055, 0.76, 0.175)), probabilities)
    return path


def _all_images(axes: Axes, probabilities: Mapping[str, Tensor]) -> None:
    """Each network's deviations in ascending order, with the median, which is the figure in the table."""
    for (name, probability), colour in zip(probabilities.items(), COLOURS, strict=True):
        # A log scale has no zero, and a network may be as steady as that on an image.
        ascending = deviation(probability).clamp(min=1e-6).sort().values
        median = ascending.median().item()
        axes.plot(np.linspace(0, 1, len(ascending)), ascending.numpy(), color=colour, linewidth=2.2)
        axes.plot(0.5, median, "o", color=colour, label=f"{name}, median ± {median:.4f}")
    axes.set_yscale("log")
    axes.set_title("All test images, from the steadiest to the most shaken", fontsize=12, weight="bold", loc="left")
    axes.set_xlabel("share of the test images")
    axes.set_ylabel("±, log scale")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False, loc="lower right", handletextpad=0.2, labelcolor="linecolor")
    _plain(axes)


def _by_rank(probabilities: Mapping[str, Tensor]) -> dict[str, int]:
    """The images at RANKS. Both networks count alike, so that neither's worst or best cases are picked."""
    order = torch.stack([deviation(p) for p in probabilities.values()]).mean(dim=0).argsort(stable=True)
    return {label: int(order[int(rank * (len(order) - 1))]) for label, rank in RANKS.items()}


def _show_image(axes: Axes, image: Tensor, title: str) -> None:
    """The image, with the first and the last crop outlined."""
    picture = image.permute(1, 2, 0).cpu()
    picture = (picture - picture.min()) / (picture.max() - picture.min()).clamp(min=1e-6)
    axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
    for (y, x), dash in zip((data.SHIFTS[0], data.SHIFTS[-1]), ("-", (0, (3, 2))), strict=True):
        outline = {"fill": False, "color": "#ffb703", "linewidth": 1.6, "linestyle": dash}
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), data.CROP, data.CROP, **outline))
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.set_axis_off()


def _heat_map(axes: Axes, probability: Tensor) -> AxesImage:
    mesh = axes.imshow(probability.reshape(SIDE, SIDE).numpy(), cmap="cividis", vmin=0, vmax=1)
    axes.set_xticks([0, SIDE - 1], ["0", f"{SIDE - 1} px"])
    axes.set_yticks([0, SIDE - 1], ["0", f"{SIDE - 1} px"])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.tick_params(which="both", length=0)


@contextmanager
def _figure(path: Path, size: tuple[float, float], title: str) -> Iterator[Figure]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        figure.text(0.05, 1 - 0.22 / size[1], title, size=16, weight="bold", va="top")
        yield figure
        figure.savefig(path)


def _subtitle(figure: Figure, text: str) -> None:
    figure.text(0.05, 1 - 0.58 / figure.get_figheight(), text, size=10, color=MUTED, va="top", linespacing=1.5)
