"""Train the same small CNN with nn.MaxPool2d and with regfast.MaxPool2dAA, and show what the change of one name does.

Both networks start from the same weights and see the same crops in the same order. The data are scikit-learn's digits,
or with --data CIFAR-10.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import demo_data as data
import demo_plots as plots
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import regfast

POOLINGS: dict[str, Callable[[int], nn.Module]] = {"nn.MaxPool2d": nn.MaxPool2d, "MaxPool2dAA": regfast.MaxPool2dAA}
CLASSES = 10
BATCH = 64
POOLED = (BATCH, 16, data.CROP, data.CROP)


class Result(NamedTuple):
    """What one network did: its accuracy on the centre crops after each epoch, and in the end the probability that it
    gives to the true class, and whether that class is its prediction, for every test image (row) and crop (column)."""

    accuracy_by_epoch: list[float]
    probability: Tensor
    correct: Tensor


def make_network(channels: int, pooling: Callable[[int], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (16, 32, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), pooling(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (data.CROP // 8) ** 2, CLASSES))


def make_networks(channels: int, seed: int, device: torch.device) -> dict[str, nn.Sequential]:
    """One network per pooling, all with the weights of the first; its checkpoint must load strictly into the others."""
    torch.manual_seed(seed)
    networks = {name: make_network(channels, pooling).to(device) for name, pooling in POOLINGS.items()}
    checkpoint = networks["nn.MaxPool2d"].state_dict()
    for network in networks.values():
        network.load_state_dict(checkpoint, strict=True)
    return networks


def train(network: nn.Module, images: data.Dataset, epochs: int, seed: int, advance: Callable[[], None]) -> Result:
    """Train on random crops; `advance` is called after each step."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * steps_per_epoch(images)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    accuracy = []
    for _ in range(epochs):
        network.train()
        for batch in torch.randperm(len(images.train_x), generator=generator).split(BATCH):
            logits = network(data.random_crops(images.train_x[batch], generator))
            optimizer.zero_grad()
            F.cross_entropy(logits, images.train_y[batch]).backward()
            optimizer.step()
            schedule.step()
            advance()
        centre = (data.SIZE - data.CROP) // 2
        _, correct = evaluate(network, images, [(centre, centre)])
        accuracy.append(correct.float().mean().item())
    return Result(accuracy, *evaluate(network, images, data.SHIFTS))


def steps_per_epoch(images: data.Dataset) -> int:
    return -(-len(images.train_x) // BATCH)


@torch.no_grad()
def evaluate(network: nn.Module, images: data.Dataset, shifts: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The true class's probability, and whether it is the largest, for every test image and shift."""
    network.eval()
    probability, correct = [], []
    for y, x in shifts:
        logits = torch.cat([network(data.crop(batch, y, x)) for batch in images.test_x.split(512)])
        probability.append(logits.softmax(dim=1).gather(1, images.test_y[:, None]))
        correct.append(logits.argmax(dim=1, keepdim=True) == images.test_y[:, None])
    return torch.cat(probability, dim=1).cpu(), torch.cat(correct, dim=1).cpu()


def pooling_times(device: torch.device, rounds: int = 60, warm_up: int = 10) -> dict[str, float]:
    """Median milliseconds, forward and backward, of the network's first (largest) pooling; the contestants take turns."""
    x = torch.randn(POOLED, device=device).relu().requires_grad_()
    layers = {name: pooling(2) for name, pooling in POOLINGS.items()}
    gradient = torch.randn_like(layers["nn.MaxPool2d"](x))
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(rounds + warm_up):
        for name, layer in layers.items():
            synchronize(device)
            start = time.perf_counter()
            torch.autograd.grad(layer(x), x, gradient)
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * torch.tensor(t[warm_up:]).median().item() for name, t in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report(console: Console, results: dict[str, Result], times: dict[str, float], images: data.Dataset) -> None:
    device = images.train_x.device
    where = f"{torch.get_num_threads()} CPU thread(s)" if device.type == "cpu" else str(device)
    table = Table(title=f"{images.name}: {len(images.train_x)} training and {len(images.test_x)} test images, one seed")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    rows: list[tuple[str, list[str]]] = [
        ("test accuracy, centre crop", [f"{r.accuracy_by_epoch[-1]:.1%}" for r in results.values()]),
        ("test accuracy, all 64 crops", [f"{r.correct.float().mean():.1%}" for r in results.values()]),
        ("images right in all 64 crops", [f"{r.correct.all(dim=1).float().mean():.1%}" for r in results.values()]),
        ("shift consistency (lower is better)", [f"{plots.deviation(r.probability).median():.4f}" for r in results.values()]),
        ("one pooling, forward + backward", [f"{times[name]:.2f} ms" for name in results]),
    ]
    for label, cells in rows:
        table.add_row(label, *cells)
    console.print(table)
    console.print(
        "Shift consistency: the standard deviation of the true class's probability over an image's 64 crops, "
        f"median over the test images. Pooling time: the median over turns, {' x '.join(map(str, POOLED))}, on {where}.",
        style="dim",
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=positive, default=20, help="passes over the training images")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's train.parquet and test.parquet; else the digits")
    parser.add_argument("--images", type=positive, help="use only the first so many images of each split")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the order of the images and their crops")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    # One by default: networks this small gain little from more, and results do not depend on the machine's core count.
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plots")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(arguments: Sequence[str] | None = None) -> dict[str, Result]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console()
    images = data.load(options.data, options.images).to(options.device)
    networks = make_networks(images.train_x.shape[1], options.seed, options.device)
    tensors = len(networks["MaxPool2dAA"].state_dict())
    console.print(f"nn.MaxPool2d's checkpoint loads strictly into MaxPool2dAA's network: {tensors} tensors")

    results = {}
    name_column = TextColumn("{task.description:>14}")
    with Progress(name_column, BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as progress:
        tasks = {name: progress.add_task(name, total=options.epochs * steps_per_epoch(images)) for name in networks}
        for name, network in networks.items():
            results[name] = train(network, images, options.epochs, options.seed, partial(progress.advance, tasks[name]))

    report(console, results, pooling_times(options.device), images)
    options.out.mkdir(parents=True, exist_ok=True)
    for path in (
        plots.accuracy(options.out / "accuracy.png", {name: r.accuracy_by_epoch for name, r in results.items()}, images),
        plots.shifts(options.out / "shifts.png", {name: r.probability for name, r in results.items()}, images),
    ):
        console.print(f"saved {path}", highlight=False, soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
