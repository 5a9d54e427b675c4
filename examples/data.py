"""Labelled images as bytes, in memory: scikit-learn's digits, CIFAR-10, CIFAR-100 or a folder.

Nothing is downloaded. An unreadable file is an error that names the file, and the row in it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from libraries import load as load_library
from torch import Tensor
from torch.nn import functional as F

SIZE = 32
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class DataError(ValueError):
    """A fault in the data; the message says where it is."""


class Split(NamedTuple):
    """Images (N, C, H, W), uint8, and their labels (N,), int64."""

    x: Tensor
    y: Tensor


class Dataset(NamedTuple):
    """A training set, a test set and the names of their classes."""

    name: str
    classes: Sequence[str]
    train: Split
    test: Split

    def to(self, device: torch.device) -> Dataset:
        train, test = (
            Split(split.x.to(device), split.y.to(device)) for split in (self.train, self.test)
        )
        return self._replace(train=train, test=test)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Return each channel's mean and deviation over the training images, scaled to [0, 1]."""
        x = self.train.x.float() / 255
        std, mean = torch.std_mean(x, dim=(0, 2, 3))
        return mean.tolist(), std.clamp(min=1e-3).tolist()


def load(
    name: str, root: Path | None = None, size: int = SIZE, limit: int | None = None
) -> Dataset:
    """Load a data set by name, the first `limit` images of each split.

    It is "digits"; or "cifar10", "cifar100" or "folder", from the folder `root`.
    """
    if name == "digits":
        data = _digits(size)
    elif root is None:
        raise DataError(
            f"--data {name} needs --root, the folder that it lies in: nothing is downloaded"
        )
    elif not root.is_dir():
        raise DataError(f"--root {root}: there is no such folder")
    else:
        data = _folder(root, size) if name == "folder" else _cifar(name, root)
    train, test = (
        Split(split.x[:limit].contiguous(), split.y[:limit]) for split in (data.train, data.test)
    )
    return data._replace(train=train, test=test)


def _digits(size: int) -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    x = (
        F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        .round()
        .to(torch.uint8)
    )
    y = torch.from_numpy(digits.target).long()
    # The set is ordered by writer, so no writer of the last images is in the training set.
    held_out = len(x) // 5
    return Dataset(
        "digits",
        "0123456789",
        Split(x[:-held_out], y[:-held_out]),
        Split(x[-held_out:], y[-held_out:]),
    )


def _cifar(name: str, root: Path) -> Dataset:
    """Load CIFAR from any of its forms in `root`."""
    ten = name == "cifar10"
    forms: list[tuple[str, Callable[[Path], tuple[Split, Split]]]] = [
        ("cifar-10-batches-py" if ten else "cifar-100-python", lambda _: _torchvision(name, root)),
        ("data_batch_1.bin" if ten else "train.bin", lambda _: _binary(root, ten)),
        (
            "cifar-10-batches-bin" if ten else "cifar-100-binary",
            lambda folder: _binary(folder, ten),
        ),
        ("train*.parquet", lambda _: (_parquet(root, "train", ten), _parquet(root, "test", ten))),
        (
            "plain_text" if ten else "cifar100",
            lambda folder: (_parquet(folder, "train", ten), _parquet(folder, "test", ten)),
        ),
    ]
    for pattern, read in forms:
        found = sorted(root.glob(pattern))
        if found:
            train, test = read(found[0])
            return Dataset(name, CIFAR10 if ten else tuple(map(str, range(100))), train, test)
    names = sorted(path.name for path in root.iterdir())
    held = ", ".join([*names[:8], "..."] if len(names) > 8 else names) or "nothing"
    raise DataError(
        f"{root} holds no {name}: none of {', '.join(pattern for pattern, _ in forms)}, but {held}"
    )


def _torchvision(name: str, root: Path) -> tuple[Split, Split]:
    try:
        datasets = load_library("torchvision").datasets
    except ImportError as error:
        raise DataError(f"{root}: torchvision reads this form of {name}: {error}") from error
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    splits = []
    for train in (True, False):
        try:
            split = kind(str(root), train=train, download=False)
        except Exception as error:
            raise DataError(f"{root}: torchvision cannot read {name}: {error}") from error
        splits.append(
            Split(torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets))
        )
    return splits[0], splits[1]


def _binary(folder: Path, ten: bool) -> tuple[Split, Split]:
    """Load the binary release, with records of a label and 3 x 32 x 32 bytes.

    CIFAR-100 has a coarse label before the fine one.
    """
    train = [f"data_batch_{n}.bin" for n in range(1, 6)] if ten else ["train.bin"]
    test = ["test_batch.bin" if ten else "test.bin"]
    labels = 1 if ten else 2
    splits = []
    for names in (train, test):
        records = []
        for path in (folder / name for name in names):
            if not path.exists():
                raise DataError(f"{path} is missing")
            raw = np.fromfile(path, np.uint8)
            if not len(raw) or len(raw) % (labels + 3072):
                raise DataError(
                    f"{path} has {len(raw)} bytes, which is no number of records of "
                    f"{labels + 3072}: it is cut off"
                )
            table = raw.reshape(-1, labels + 3072)
            for row, number in enumerate(table[:, labels - 1].tolist()):
                _check_label(f"{path}, record {row}", number, ten)
            records.append(table)
        whole = torch.from_numpy(np.concatenate(records))
        splits.append(Split(whole[:, labels:].reshape(-1, 3, 32, 32), whole[:, labels - 1].long()))
    return splits[0], splits[1]


def _parquet(folder: Path, split: str, ten: bool) -> Split:
    """Load Hugging Face's columns: `img` or `image`, and `label` (CIFAR-100: `fine_label`).

    An image is encoded, as bytes or as a struct with `bytes`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted(folder.glob(f"{split}*.parquet"))
    if not paths:
        raise DataError(f"{folder} has no {split}*.parquet")
    images: list[np.ndarray] = []
    labels: list[int] = []
    for path in paths:
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is no readable parquet file: {error}") from error
        image = _column(path, table.column_names, ("img", "image"))
        label = _column(path, table.column_names, ("label" if ten else "fine_label",))
        for row, (cell, number) in enumerate(
            zip(table[image].to_pylist(), table[label].to_pylist())
        ):
            images.append(
                _decode(
                    f"{path}, row {row}",
                    cell["bytes"] if isinstance(cell, dict) else cell,
                    SIZE,
                    exact=True,
                )
            )
            _check_label(f"{path}, row {row}", number, ten)
            labels.append(number)
    return Split(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels))


def _check_label(where: str, number: Any, ten: bool) -> None:
    classes = 10 if ten else 100
    if not isinstance(number, int) or not 0 <= number < classes:
        raise DataError(f"{where}: the label must be a class below {classes}, got {number!r}")


def _column(path: Path, columns: Sequence[str], names: Sequence[str]) -> str:
    for name in names:
        if name in columns:
            return name
    raise DataError(f"{path} has no column {' or '.join(names)}, but {', '.join(columns)}")


def _folder(root: Path, size: int) -> Dataset:
    """Load root/train/CLASS/*.png and root/test (or val)/CLASS/*.png, cut to squares of `size`."""
    train, test = (
        root / "train",
        next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test"),
    )
    for folder in (train, test):
        if not folder.is_dir():
            raise DataError(
                f"{folder} is missing: images lie in {root}/train/CLASS and {root}/test/CLASS"
            )
    classes = _classes(train)
    unknown = [name for name in _classes(test) if name not in classes]
    if not classes:
        raise DataError(f"{train} has no folders of classes")
    if unknown:
        raise DataError(f"{test} has classes that {train} lacks: {', '.join(unknown)}")
    return Dataset(
        root.name, classes, *(_read_folder(folder, classes, size) for folder in (train, test))
    )


def _classes(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _read_folder(folder: Path, classes: Sequence[str], size: int) -> Split:
    found = []
    for label, name in enumerate(classes):
        paths = list(_images(folder / name))
        if not paths:
            raise DataError(f"{folder / name} has no images ({', '.join(IMAGE_SUFFIXES)})")
        found += [(turn, label, path) for turn, path in enumerate(paths)]
    # Sort by the turn, so that a limit keeps images of every class.
    found.sort()
    images = [_decode(str(path), path.read_bytes(), size, exact=False) for _, _, path in found]
    return Split(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
        torch.tensor([label for _, label, _ in found]),
    )


def _images(folder: Path) -> Iterator[Path]:
    """Yield the images of a class and of its subfolders, without hidden ones."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                yield Path(parent, name)


def _decode(where: str, encoded: Any, size: int, exact: bool) -> np.ndarray:
    """Decode an image to (size, size, 3) bytes."""
    from PIL import Image, ImageOps

    try:
        image = _in_bytes(Image.open(io.BytesIO(encoded))).convert("RGB")
    except Exception as error:
        raise DataError(f"{where}: this is no readable image: {error}") from error
    if exact and image.size != (size, size):
        raise DataError(
            f"{where}: the image must have {size}x{size} pixels, got "
            f"{image.size[0]}x{image.size[1]}"
        )
    return np.asarray(ImageOps.fit(image, (size, size)))


def _in_bytes(image: Any) -> Any:
    """Reduce a PIL image of wide greys to 8 bits; PIL's own conversion would clip them to white."""
    from PIL import Image

    # PIL opens 16-bit PNM files, and other formats with 32 bits, as "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Keep the high byte, as PIL does for 16-bit colours.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise ValueError(f"its pixels are 32-bit {kind} of unknown range")
    return image


def draw_crops(count: int, side: int, crop: int, generator: torch.Generator) -> list[Tensor]:
    """Draw on the host each image's first row and column, and whether to mirror it."""
    first = torch.randint(0, side - crop + 1, (2, count), generator=generator)
    return [*first, torch.rand(count, generator=generator) < 0.5]


def cut(images: Tensor, drawn: Sequence[Tensor], crop: int, flip: bool) -> Tensor:
    """Cut the drawn crop from each image."""
    top, left, mirrored = (d.to(images.device).unsqueeze(1) for d in drawn)
    offset = torch.arange(crop, device=images.device)
    rows, columns = (
        top + offset,
        left + (torch.where(mirrored, crop - 1 - offset, offset) if flip else offset),
    )
    sample = torch.arange(len(images), device=images.device)
    # Indexed dimensions must be neighbours to stay in place, so move the channels last.
    crops = images.permute(0, 2, 3, 1)[sample[:, None, None], rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2).contiguous()


def centre_crop(images: Tensor, crop: int) -> Tensor:
    first = (images.shape[-1] - crop) // 2
    return images[..., first : first + crop, first : first + crop]
