"""timm's model, data and optimiser with regfast's MixUp, loss and anti-aliasing.

    python examples/timm_recipe.py --toy    # made-up images, a minute on a CPU
    python examples/timm_recipe.py DIR --model resnet50
    python examples/timm_recipe.py DIR --model resnetblur50 --pretrained

Images are DIR/train/CLASS/*.jpg and DIR/validation/CLASS/*.jpg. They reach the device as bytes;
normalisation, MixUp and CutMix are one pass there. A model that timm has anti-aliased keeps its
function and its weights (`regfast.fuse`). Any other model is anti-aliased (`regfast.antialias`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from libraries import load
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import regfast

try:
    timm = load("timm")
    for name in ("data", "layers", "optim", "scheduler"):
        load(f"timm.{name}")
except ImportError as error:
    raise SystemExit(f"this example needs timm and torchvision: {error}") from error


class Toy(Dataset[tuple[Any, int]]):
    """64 images of noise around a colour; the colour is the class."""

    transform: Callable[[Any], Any] | None = None
    classes = ("red", "green", "blue")

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        label = index % len(self.classes)
        pixels = torch.randint(128, (64, 64, 3), generator=torch.Generator().manual_seed(index))
        pixels[..., label] += 127
        image = Image.fromarray(pixels.to(torch.uint8).numpy())
        return (image if self.transform is None else self.transform(image)), label


def make_model(name: str, classes: int, pretrained: bool) -> nn.Module:
    model = timm.create_model(name, num_classes=classes, pretrained=pretrained)
    blurred = any(isinstance(module, timm.layers.BlurPool2d) for module in model.modules())
    return regfast.fuse(model) if blurred else regfast.antialias(model)


def make_loader(
    data: Any, training: bool, options: argparse.Namespace, config: dict[str, Any]
) -> DataLoader[Any]:
    names = ("input_size", "interpolation", "crop_pct")
    prefetcher = timm.data.create_loader(
        data,
        batch_size=options.batch,
        is_training=training,
        num_workers=options.workers,
        device=torch.device(options.device),
        pin_memory=options.device == "cuda",
        **{name: config[name] for name in names},
    )
    # timm's prefetcher would normalise. The loader inside it yields bytes, which MixUp normalises.
    return prefetcher.loader


def train(options: argparse.Namespace) -> list[float]:
    """Train, print the accuracy after every epoch, and return the accuracies."""
    device = torch.device(options.device)
    if options.toy:
        train_data, test_data, classes = Toy(), Toy(), len(Toy.classes)
    else:
        train_data, test_data = (
            timm.data.create_dataset("", options.root, split) for split in ("train", "validation")
        )
        classes = len(train_data.reader.class_to_idx)
    model = make_model(options.model, classes, options.pretrained).to(
        device, memory_format=torch.channels_last
    )
    size = {"input_size": (3, options.size, options.size)} if options.size else {}
    config = timm.data.resolve_data_config(size, model=model)
    train_loader = make_loader(train_data, True, options, config)
    test_loader = make_loader(test_data, False, options, config)
    mix = regfast.MixUp(
        options.mixup, cutmix_alpha=options.cutmix, mean=config["mean"], std=config["std"]
    )
    criterion = regfast.MixupCrossEntropyLoss(label_smoothing=0.1)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=options.lr, weight_decay=0.05)
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=options.epochs)

    def logits(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return model(x.contiguous(memory_format=torch.channels_last))

    accuracies = []
    for epoch in range(options.epochs):
        model.train(), mix.train()
        for x, y in train_loader:
            x, target = mix(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
            loss = criterion(logits(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step(epoch + 1)
        model.eval(), mix.eval()
        with torch.no_grad():
            right = [logits(mix(x.to(device))).argmax(1).eq(y.to(device)) for x, y in test_loader]
        accuracies.append(torch.cat(right).float().mean().item())
        print(f"epoch {epoch}: accuracy {accuracies[-1]:.2%}")
    return accuracies


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("root", type=Path, nargs="?", help="a folder with train/CLASS/* and validation/CLASS/*")
    add(
        "--toy", action="store_true", help="made-up images and a small model in place of the folder"
    )
    add("--model", help="a timm model (default: resnet50, or resnet18 with --toy)")
    add("--pretrained", action="store_true", help="start from timm's weights")
    add(
        "--size",
        type=int,
        help="side of the images, in pixels (default: the model's, or 32 with --toy)",
    )
    add("--epochs", type=int, default=5, help="(default: %(default)s)")
    add("--batch", type=int, default=128, help="(default: %(default)s; 16 with --toy)")
    add("--lr", type=float, default=1e-3, help="(default: %(default)s)")
    add("--mixup", type=float, default=0.2, metavar="ALPHA", help="(default: %(default)s)")
    add("--cutmix", type=float, default=1.0, metavar="ALPHA", help="(default: %(default)s)")
    add(
        "--workers",
        type=int,
        default=4,
        help="loader processes (default: %(default)s; 0 with --toy)",
    )
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.toy:
        options.size, options.batch, options.workers = options.size or 32, 16, 0
    elif options.root is None or not (options.root / "train").is_dir():
        parser.error(
            f"a folder with train/ and validation/ is needed, or --toy, got {options.root}"
        )
    options.model = options.model or ("resnet18" if options.toy else "resnet50")
    return train(options)


if __name__ == "__main__":
    main()
