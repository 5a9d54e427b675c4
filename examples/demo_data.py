"""Labelled images of 32x32 pixels and their 24x24 crops: scikit-learn's digits, or CIFAR-10 from parquet files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SIZE, CROP = 32, 24
# 8 x 8 crops, one pixel apart.
SHIFTS = [(y, x) for y in range(8) for x in range(8)]
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Dataset(NamedTuple):
    """Images (N, C, 32, 32), standardised by the training set's mean and deviation, and their labels."""

    name: str
    classes: Sequence[str]
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device) -> Dataset:
        return Dataset(self.name, self.classes, *(tensor.to(device) for tensor in self[2:]))


def load(path: Path | None, limit: int | None) -> Dataset:
    """The embedded digits, or CIFAR-10 from the folder `path`; of each split, the first `limit` images."""
    splits = _digits() if path is None else [_parquet(path / f"{split}.parquet") for split in ("train", "test")]
    (train_x, train_y), (test_x, test_y) = [(x[:limit], y[:limit]) for x, y in splits]
    std, mean = torch.std_mean(train_x, dim=(0, 2, 3), keepdim=True)
    kind = ("digits", "0123456789") if path is None else ("CIFAR-10", CIFAR_CLASSES)
    return Dataset(*kind, (train_x - mean) / std, train_y, (test_x - mean) / std, test_y)


def _digits() -> list[tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    y = torch.from_numpy(digits.target).long()
    # The set is ordered by writer, so the last images are in hands that training has not seen.
    held_out = len(x) // 5
    return [(x[:-held_out], y[:-held_out]), (x[-held_out:], y[-held_out:])]


def _parquet(path: Path) -> tuple[Tensor, Tensor]:
    """Images and labels from the columns of Hugging Face's `cifar10`: `img`, a struct with encoded `bytes`, and `label`."""
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(path, columns=["img", "label"])
    images = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["img"].to_pylist()]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    if x.shape[2:] != (SIZE, SIZE):
        raise ValueError(f"the images in {path} must be {SIZE}x{SIZE} pixels, got {x.shape[2]}x{x.shape[3]}")
    return x.contiguous(), torch.tensor(table["label"].to_pylist())


def random_crops(images: Tensor, generator: torch.Generator) -> Tensor:
    """One crop of each image, its place drawn anew."""
    places = torch.randint(0, SIZE - CROP + 1, (2, len(images), 1), generator=generator)
    rows, columns = (places + torch.arange(CROP)).to(images.device)
    sample = torch.arange(len(images), device=images.device)
    # The channels last, because the indexed dimensions must be neighbours to stay where they are.
    crops = images.permute(0, 2, 3, 1)[sample[:, None, None], rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2).contiguous()


def crop(images: Tensor, y: int, x: int) -> Tensor:
    return images[:, :, y : y + CROP, x : x + CROP]
