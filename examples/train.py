"""Train an image classifier with regfast's regularisers, on one device or, with torchrun, on many.

    python examples/train.py    # scikit-learn's digits, the chapter's small CNN
    python examples/train.py --data cifar10 --root DIR --model resnet --antialias --rezero \\
        --mixup 0.25 --epochs 30
    torchrun --nproc-per-node 4 examples/train.py --data folder --root DIR \\
        --model timm:resnet50 --antialias --amp --channels-last

Images stay bytes on the device; crops, flips, mixing and normalisation happen there. On one CUDA
device the network's steps are CUDA graphs. A killed run, started again with the same arguments,
goes on from the last finished epoch. --out gets metrics.jsonl (one line per epoch), checkpoint.pt,
result.json and, if TensorBoard is installed, its events. By default it is the run's own folder,
named after the data, the model and the flags.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import json
import math
import os
import re
import sys
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import data
import models
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import regfast
from regfast import info

# The chapter shifts images by up to 7 pixels, 8 x 8 shifts in all.
SHIFTS = 8
# The chapter trains many networks on the same images: decode them once.
load = functools.lru_cache(maxsize=1)(data.load)


class Job(NamedTuple):
    """This process within the run's group of processes."""

    rank: int
    world: int
    device: torch.device

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Return the numbers, each added over all processes."""
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values


@contextmanager
def job_of(device: str | None) -> Iterator[Job]:
    """Enter the process group that torchrun describes in variables, or a job of one process."""
    rank, local, world = (
        int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    own = torch.device(device, local) if device == "cuda" else torch.device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if world == 0:
        yield Job(0, 1, own)
        return
    dist.init_process_group(
        "nccl" if own.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=5)
    )
    try:
        yield Job(rank, world, own)
        # If it closes right after a collective, gloo (of torch 2.13) often aborts a process.
        time.sleep(0.5)
    finally:
        dist.destroy_process_group()


class Run:
    """A network in training, and all state that a checkpoint holds."""

    def __init__(self, options: argparse.Namespace, job: Job, images: data.Dataset) -> None:
        self.options, self.job, self.images = options, job, images
        torch.manual_seed(options.seed)
        channels = images.train.x.shape[1]
        kind = dict(width=options.width, rezero=options.rezero, antialias=options.antialias)
        model = models.make(options.model, channels, len(images.classes), **kind)
        memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = model.to(job.device, memory_format=memory_format)
        network: nn.Module = DistributedDataParallel(self.model) if job.world > 1 else self.model
        self.network = torch.compile(network) if options.compile else network
        mean, std = images.statistics()
        self.mix = regfast.MixUp(options.mixup, cutmix_alpha=options.cutmix, mean=mean, std=std)
        self.manifold = (
            regfast.ManifoldMixup(self.network, alpha=options.manifold)
            if options.manifold
            else None
        )
        self.criterion = regfast.MixupCrossEntropyLoss()
        groups = (
            regfast.parameter_groups(self.model)
            if options.rezero
            else [{"params": list(self.model.parameters())}]
        )
        self.batch = options.batch * job.world
        self.steps = max(len(images.train.x) // self.batch, 1)
        # On CUDA "fused" needs a few launches for hundreds of parameters.
        fused = True if job.device.type == "cuda" else None
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=1e-2, fused=fused)
        total = options.epochs * self.steps
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=options.lr, total_steps=total
        )
        self.records: list[dict[str, Any]] = []
        if is_captured(options, job):
            self.capture()

    def capture(self) -> None:
        """Capture the network's training forward and backward as CUDA graphs.

        In evaluation the network runs without graphs.
        """
        count, channels = min(self.batch, len(self.images.train.x)), self.images.train.x.shape[1]
        crop = self.options.crop
        sample = self.as_laid_out(torch.zeros(count, channels, crop, crop, device=self.job.device))
        state = copy.deepcopy(self.model.state_dict())
        with self.autocast():
            torch.cuda.make_graphed_callables(self.model, (sample,))
        # The warm-up runs changed the batch normalisation. Restore it in place, because the graphs
        # hold addresses.
        self.model.load_state_dict(state)
        # The graphs keep the autograd nodes of those runs and their stream. Each backward
        # synchronises with it.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")

    def autocast(self) -> torch.autocast:
        # A graph cannot be captured with the cache of casts. The cache has no use in a network that
        # uses each weight once.
        enabled = self.options.amp
        return torch.autocast(
            self.job.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False
        )

    def epoch(self) -> dict[str, Any]:
        """Run one pass over the training images.

        The seed and the epoch determine all draws except those of the mixing, which has its own
        streams.
        """
        number, start = len(self.records) + 1, time.perf_counter()
        torch.manual_seed(self.options.seed * 1_000_003 + number * 1009 + self.job.rank)
        self.network.train()
        losses = [self.step(*drawn) for drawn in self.draw(number)]
        loss, processes = self.job.sum(torch.stack(losses).mean().item(), 1)
        correct, total = self.evaluate()
        seconds = time.perf_counter() - start
        return {
            "epoch": number,
            "loss": loss / processes,
            "accuracy": correct / total,
            "seconds": seconds,
        }

    def draw(self, number: int) -> Iterator[tuple[Tensor, ...]]:
        """Draw an epoch's images and crops, one per step, and send them to the device in one copy.

        The host waits for each copy.
        """
        # Every process draws the same batches and takes its share of each.
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + number)
        order = torch.randperm(len(self.images.train.x), generator=generator)[
            : self.steps * self.batch
        ]
        side, crop = self.images.train.x.shape[-1], self.options.crop
        drawn = [
            (batch, *data.draw_crops(len(batch), side, crop, generator))
            for batch in order.split(self.batch)
        ]
        own = slice(self.job.rank * self.options.batch, (self.job.rank + 1) * self.options.batch)
        return zip(*(torch.stack(kind)[:, own].to(self.job.device) for kind in zip(*drawn)))

    def step(self, chosen: Tensor, *crops: Tensor) -> Tensor:
        x, y = (t[chosen] for t in self.images.train)
        x = data.cut(x, crops, self.options.crop, self.options.flip)
        with self.autocast():
            if self.manifold is None:
                x, target = self.mix.train()(x, y)
                output = self.network(self.as_laid_out(x))
            else:
                output, target = self.manifold.train()(self.as_laid_out(self.mix.eval()(x)), y)
        loss = self.criterion(output.float(), target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def as_laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.options.channels_last else x

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """Return the number of correct test images and of all; each process runs its share."""
        self.network.eval(), self.mix.eval()
        x, y = (t[self.job.rank :: self.job.world] for t in self.images.test)
        correct = 0.0
        for part, labels in zip(x.split(512), y.split(512)):
            logits = self.model(
                self.as_laid_out(self.mix(data.centre_crop(part, self.options.crop)))
            )
            correct += (logits.argmax(1) == labels).sum().item()
        return self.job.sum(correct, len(x))

    def shift_consistency(self, count: int) -> regfast.metrics.ShiftConsistency:
        """Measure the first `count` test images at 64 shifts."""
        side = self.options.crop + SHIFTS - 1
        whole, labels = self.mix.eval()(
            data.centre_crop(self.images.test.x[:count], side), self.images.test.y[:count]
        )
        return regfast.metrics.shift_consistency(self.model, whole, labels, crop=self.options.crop)

    @property
    def mixers(self) -> list[Any]:
        return [self.mix] if self.manifold is None else [self.mix, self.manifold]

    def save(self) -> None:
        """Write the checkpoint and the metrics, each by one move, so that every file is whole."""
        # Each process draws its own mixtures.
        streams = self.job.gather([mixer.get_extra_state() for mixer in self.mixers])
        if self.job.writes:
            state = {
                "arguments": identity(self.options, self.job),
                "records": self.records,
                "streams": streams,
            }
            for name in ("model", "optimizer", "schedule"):
                state[name] = getattr(self, name).state_dict()
            with replacing(self.options.out / "checkpoint.pt") as part:
                torch.save(state, part)
            with replacing(self.options.out / "metrics.jsonl") as part:
                part.write_text("".join(json.dumps(record) + "\n" for record in self.records))

    def resume(self) -> None:
        """Load the checkpoint, if there is one."""
        path = self.options.out / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.job.device, weights_only=True)
        arguments = identity(self.options, self.job)
        changed = [name for name, value in state["arguments"].items() if arguments[name] != value]
        if changed:
            told = ", ".join(
                f"{name}={state['arguments'][name]}, now {arguments[name]}" for name in changed
            )
            raise ValueError(
                f"{path} is of a run with other arguments ({told}): give them again, or another "
                "--out"
            )
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        for mixer, stream in zip(self.mixers, state["streams"][self.job.rank]):
            mixer.set_extra_state(stream.cpu())
        self.records = state["records"]


def identity(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    """Return the arguments that a run must have in common with its checkpoint."""
    free = ("out", "device", "threads", "root", "eager")
    return {name: value for name, value in vars(options).items() if name not in free} | {
        "processes": job.world
    }


def folder_of(options: argparse.Namespace, job: Job) -> Path:
    """Return the run's own folder, named after each argument that is not the default."""
    source = options.data
    if source == "folder" and options.root:
        # Two folders may have the same name: add a hash of the path.
        path = options.root.resolve()
        source += f"-{path.name}-{zlib.crc32(bytes(path)):08x}"
    parts = [source, options.model]
    usual = identity(parse([]), Job(0, 1, job.device))
    for name, value in identity(options, job).items():
        if name not in ("data", "model") and value != usual[name]:
            parts.append(name if value is True else f"{name}{value}")
    # Replace characters that a file name may not hold, such as a colon, and a flag's underscores.
    return Path("out/train", re.sub(r"[^a-zA-Z0-9.+-]", "-", "-".join(parts)))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file beside `path` to write to; it replaces `path` once it is whole."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error


def is_captured(options: argparse.Namespace, job: Job) -> bool:
    """Return whether the network's steps are CUDA graphs.

    A graph repeats one step, and manifold mixup blends in another layer in each.
    """
    return (
        job.device.type == "cuda"
        and job.world == 1
        and not (options.eager or options.compile or options.manifold)
    )


def train(
    options: argparse.Namespace, job: Job, console: Console, deadline: float
) -> dict[str, Any] | None:
    """Train to the end, from the last checkpoint, and write the result; None at the deadline."""
    if job.writes:
        print(f"folder: {options.out}", flush=True)
    result = result_of(options, job)
    if result is None and time.monotonic() < deadline:
        images = load(options.data, options.root, options.size, options.limit).to(job.device)
        if options.crop + SHIFTS - 1 > images.test.x.shape[-1]:
            side = images.test.x.shape[-1]
            raise ValueError(
                f"--crop must leave {SHIFTS - 1} of the images' {side} pixels to shift it by, "
                f"got {options.crop}"
            )
        run = Run(options, job, images)
        options.out.mkdir(parents=True, exist_ok=True)
        run.resume()
        # Save before the first epoch, so that a folder or disk that refuses files fails now.
        run.save()
        go_on(run, console, deadline)
        if job.writes and len(run.records) == options.epochs:
            result = conclude(run)
        # Wait for all processes.
        job.sum(0)
    if job.writes and result:
        line = (
            "accuracy {accuracy:.2%}, deviation over shifts {deviation:.4f}, "
            "consistency {consistency:.2%}"
        )
        console.print(line.format(**result), highlight=False)
    return result


def go_on(run: Run, console: Console, deadline: float) -> None:
    """Run the remaining epochs; none begins after the deadline."""
    board = tensorboard(run.options.out, len(run.records) + 1) if run.job.writes else None
    while len(run.records) < run.options.epochs and time.monotonic() < deadline:
        record = run.epoch()
        run.records.append(record)
        if board:
            for name in ("loss", "accuracy"):
                board.add_scalar(name, record[name], record["epoch"])
            board.flush()
        run.save()
        if run.job.writes:
            line = "epoch {epoch:>3}  loss {loss:.4f}  accuracy {accuracy:.2%}  {seconds:.1f} s"
            console.print(line.format(**record), highlight=False)
    if board:
        board.close()


def conclude(run: Run) -> dict[str, Any]:
    """Measure the trained network and write its files, the result last."""
    options, job = run.options, run.job
    images = min(options.shift_images, len(run.images.test.x))
    # Without a terminal there is no progress bar.
    print(f"measuring {images} test images at {SHIFTS**2} shifts each", flush=True)
    shifts = run.shift_consistency(images)
    result = {
        "accuracy": run.records[-1]["accuracy"],
        "deviation": shifts.deviation,
        "consistency": shifts.consistency,
        "seconds": sum(record["seconds"] for record in run.records),
        "arguments": identity(options, job),
        "versions": info.versions(),
        "device": info.devices()[job.device],
        "threads": options.threads if job.device.type == "cpu" else None,
        "date": datetime.date.today().isoformat(),
    }
    with replacing(options.out / "shifts.pt") as part:
        torch.save({"probability": shifts.probability, "prediction": shifts.prediction}, part)
    with replacing(options.out / "result.json") as part:
        part.write_text(json.dumps(result, indent=1) + "\n")
    return result


def result_of(options: argparse.Namespace, job: Job) -> dict[str, Any] | None:
    """Return the result that a finished run with these arguments has written, or None."""
    path = options.out / "result.json"
    result = json.loads(path.read_text()) if path.exists() else None
    return result if result and result["arguments"] == identity(options, job) else None


def tensorboard(out: Path, epoch: int) -> Any:
    """Return a writer of TensorBoard's files from `epoch` on, or None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # A run killed between its events and its checkpoint repeats the epoch: drop its first events.
    return SummaryWriter(str(out / "tensorboard"), purge_step=epoch)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=("digits", "cifar10", "cifar100", "folder"), default="digits")
    add("--root", type=Path, help="folder of the data")
    add(
        "--size",
        type=positive,
        default=data.SIZE,
        help="side of a folder's images, in pixels (default: %(default)s)",
    )
    add(
        "--crop",
        type=positive,
        default=24,
        help="side of the network's input, in pixels (default: %(default)s)",
    )
    add("--limit", type=positive, help="use only this number of first images of each split")
    add(
        "--model",
        default="cnn",
        help="cnn, resnet, timm:NAME or torchvision:NAME (default: %(default)s)",
    )
    add(
        "--width",
        type=positive,
        default=32,
        help="channels of the first convolution of cnn and resnet (default: %(default)s)",
    )
    add("--antialias", action="store_true", help="regfast.antialias(model)")
    add("--rezero", action="store_true", help="gates in the residual blocks of --model resnet")
    add("--mixup", type=amount, default=0.0, metavar="ALPHA", help="MixUp of the images")
    add(
        "--cutmix",
        type=amount,
        default=0.0,
        metavar="ALPHA",
        help="CutMix of the images; with --mixup, each every other time",
    )
    add(
        "--manifold",
        type=amount,
        default=0.0,
        metavar="ALPHA",
        help="manifold mixup, in place of the images' mixing",
    )
    add("--flip", action="store_true", help="mirror every other image in training")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--eager", action="store_true", help="no CUDA graphs: launch every kernel of every step")
    add("--amp", action="store_true", help="automatic mixed precision, in bfloat16")
    add("--channels-last", action="store_true", help="channels_last memory format")
    add("--epochs", type=positive, default=20, help="(default: %(default)s)")
    add(
        "--batch",
        type=positive,
        default=64,
        help="images per step and process (default: %(default)s)",
    )
    add("--lr", type=float, default=3e-3, help="the greatest learning rate (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda", "mps"), help="default: cuda where there is one")
    # One thread by default: small networks gain little from more, and then results do not depend on
    # the machine's core count.
    add("--threads", type=positive, default=1, help="CPU threads (default: %(default)s)")
    add(
        "--shift-images",
        type=positive,
        default=512,
        help="test images to shift after training (default: %(default)s)",
    )
    add("--out", type=Path, help="(default: out/train/DATA-MODEL-FLAGS)")
    options = parser.parse_args(arguments)
    if options.manifold and (options.mixup or options.cutmix):
        parser.error("--manifold also mixes the images: leave out --mixup and --cutmix")
    if options.device and not torch.get_device_module(options.device).is_available():
        parser.exit(
            2, f"--device {options.device}: PyTorch finds no {options.device.upper()} device\n"
        )
    return options


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def amount(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0, got {number}")
    return number


def main(
    arguments: Sequence[str] | None = None, deadline: float = math.inf
) -> dict[str, Any] | None:
    """Train as the command line says; a job of one process begins no epoch after the deadline.

    Args:
        arguments: the command line; if None, sys.argv's.
        deadline: in seconds, on time.monotonic()'s clock.

    Returns:
        The result; None if epochs are left for another call, or this process does not write.
    """
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    with job_of(options.device) as job:
        options.out = options.out or folder_of(options, job)
        try:
            return train(options, job, Console(), deadline)
        except (ValueError, ImportError) as error:
            # The command line asks for something unavailable: use argparse's status.
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        except OSError as error:
            raise SystemExit(f"error: {error}") from error
        except RuntimeError as error:
            if job.world == 1:
                raise
            reason = f"another process of this job died ({str(error).strip().splitlines()[0]})"
            raise SystemExit(
                f"process {job.rank}: {reason}; start the job again to go on"
            ) from error


if __name__ == "__main__":
    main(sys.argv[1:])
