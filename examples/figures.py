"""The chapter's figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy import stats
from torch import Tensor, nn

import regfast

COLOURS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#6a4c93", "#52796f", "#8d5a34")
INK, MUTED, RULE = "#222222", "#6b6b6b", "#d9d9d9"
STYLE = {
    "font.size": 11, "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": RULE,
    "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.spines.top": False, "axes.spines.right": False,
    "savefig.dpi": 160, "savefig.facecolor": "white",
}  # fmt: skip

# A curve (x, y) per seed, by variant.
Curves = Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]


def curves(path: Path, title: str, xlabel: str, lines: Curves) -> Path:
    """Plot the accuracy of each variant: the mean over seeds, and their range behind it."""
    with _figure(path, (9.2, 5.2), title) as figure:
        axes = figure.add_axes((0.085, 0.13, 0.62, 0.71))
        settled = []
        for (name, seeds), colour in zip(lines.items(), _colours()):
            x = np.mean([x for x, _ in seeds], axis=0)
            y = np.array([y for _, y in seeds])
            axes.plot(
                x, y.mean(0), color=colour, linewidth=2.2, label=f"{name}  {y[:, -1].mean():.1%}"
            )
            axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.18, linewidth=0)
            settled += [y[:, y.shape[1] // 4 :].min(), y.max()]
        # The first quarter may rise from below the frame: the variants differ in the rest.
        margin = 0.05 * (max(settled) - min(settled)) + 0.005
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(
            frameon=False,
            loc="center left",
            bbox_to_anchor=(1.02, 0.5),
            labelcolor="linecolor",
            handlelength=0,
        )
        _plain(axes)
    return path


class Measure(NamedTuple):
    """A number of each variant, one value per seed."""

    label: str
    values: Mapping[str, Sequence[float]]
    percent: bool = False


def measures(path: Path, title: str, panels: Sequence[Measure]) -> Path:
    """Plot numbers of each variant, side by side: a dot per seed, and a bar at their mean."""
    variants = list(panels[0].values)
    with _figure(path, (2.4 + 4.2 * len(panels), 0.5 * len(variants) + 1.9), title) as figure:
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        figure.subplots_adjust(
            left=0.17,
            right=0.97,
            top=1 - 0.75 / figure.get_figheight(),
            bottom=0.85 / figure.get_figheight(),
        )
        for axes, panel in zip(grid, panels):
            for place, (variant, colour) in enumerate(zip(variants, _colours())):
                seeds = panel.values[variant]
                axes.plot(
                    seeds,
                    [place] * len(seeds),
                    "o",
                    color=colour,
                    markersize=7,
                    alpha=0.6,
                    markeredgewidth=0,
                )
                axes.plot(
                    np.mean(seeds), place, "|", color=colour, markersize=20, markeredgewidth=3
                )
            axes.set_xlabel(panel.label)
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            if panel.percent:
                axes.xaxis.set_major_formatter(PercentFormatter(1))
            _plain(axes)
        grid[0].set_yticks(range(len(variants)), variants)
        grid[0].set_ylim(len(variants) - 0.5, -0.5)
    return path


def shifts(
    path: Path,
    title: str,
    probabilities: Mapping[str, Tensor],
    images: Tensor,
    names: Sequence[str],
) -> Path:
    """Draw the true class's probability at every shift of a few images, one heat map per variant.

    `probabilities` holds (images, shifts) tensors.
    """
    columns = 1 + len(probabilities)
    with _figure(path, (2.1 * columns, 2.2 * len(images) + 0.9), title) as figure:
        grid = figure.subplots(
            len(images), columns, squeeze=False, gridspec_kw={"wspace": 0.12, "hspace": 0.28}
        )
        figure.subplots_adjust(
            left=0.03, right=0.97, top=1 - 1.0 / figure.get_figheight(), bottom=0.02
        )
        for row, image, label in zip(range(len(images)), images, names):
            grid[row, 0].imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
            grid[row, 0].set_title(label, fontsize=11, loc="left")
            for axes, (name, probability), colour in zip(
                grid[row, 1:], probabilities.items(), _colours()
            ):
                side = round(probability.shape[1] ** 0.5)
                axes.imshow(
                    probability[row].view(side, side).numpy(), cmap="cividis", vmin=0, vmax=1
                )
                axes.set_title(
                    f"{name}\n± {probability[row].std(correction=0):.3f}",
                    color=colour,
                    fontsize=10,
                )
        for axes in grid.flat:
            axes.set_axis_off()
    return path


def densities(path: Path, alphas: Sequence[float] = (0.1, 0.25, 1.0, 2.0)) -> Path:
    """Plot Beta(alpha, alpha), the distribution of MixUp's lam."""
    with _figure(path, (7.6, 4.4), r"How much of each: Beta($\alpha$, $\alpha$)") as figure:
        axes = figure.add_axes((0.09, 0.14, 0.86, 0.68))
        lam = np.linspace(0.005, 0.995, 400)
        for alpha, colour in zip(alphas, _colours()):
            axes.plot(
                lam,
                stats.beta(alpha, alpha).pdf(lam),
                color=colour,
                linewidth=2.2,
                label=rf"$\alpha$ = {alpha:g}",
            )
        axes.set_ylim(0, 4)
        axes.set_xlabel(r"$\lambda$, the share of an image itself; its partner has the rest")
        axes.set_ylabel("density")
        axes.legend(frameon=False, labelcolor="linecolor")
        _plain(axes)
    return path


def stripes(side: int) -> Tensor:
    """Return black and white stripes that grow ever finer, (1, 1, side, side)."""
    across, down = torch.meshgrid(
        torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="xy"
    )
    phase = 4 * across + 9 * across**2 + 5 * down
    return torch.sin(2 * torch.pi * phase * side / 256).gt(0).float()[None, None]


def pooled(image: Tensor, factor: int) -> dict[str, Tensor]:
    layers = {
        f"nn.MaxPool2d({factor})": nn.MaxPool2d(factor),
        f"MaxPool2dAA({factor})": regfast.MaxPool2dAA(factor),
    }
    return {name: layer(image) for name, layer in layers.items()}


def zebra(path: Path, side: int = 256, factor: int = 4) -> Path:
    """Draw stripes pooled by nn.MaxPool2d and by MaxPool2dAA, side by side."""
    image = stripes(side)
    with _figure(path, (9.6, 4.0), f"Stripes pooled {factor} times: aliased, and not") as figure:
        grid = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.02, right=0.98, top=0.78, bottom=0.02, wspace=0.06)
        for axes, (name, shown) in zip(
            grid, [("the stripes", image), *pooled(image, factor).items()]
        ):
            axes.imshow(shown[0, 0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(name, fontsize=11, loc="left")
            axes.set_axis_off()
    return path


def _colours() -> Iterator[str]:
    while True:
        yield from COLOURS


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(which="both", length=0)


@contextmanager
def _figure(path: Path, size: tuple[float, float], title: str) -> Iterator[Figure]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        figure.text(0.03, 1 - 0.2 / size[1], title, size=15, weight="bold", va="top")
        yield figure
        figure.savefig(path)
