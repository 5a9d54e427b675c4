"""The training script's data: small copies of every format that it reads, and damaged ones.

An error says what is wrong and where.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

pytest.importorskip("PIL.Image", reason="the demo extra is not installed")

import data
import libraries
from data import DataError, load
from PIL import Image

GENERATOR = np.random.default_rng(0)


def pixels(count: int, side: int = 32) -> np.ndarray:
    return GENERATOR.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def encoded(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def write_parquet(
    path: Path, images: list[bytes], labels: list, image: str = "img", label: str = "label"
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = pa.array(
        [{"bytes": bytes_, "path": None} for bytes_ in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({image: cells, label: pa.array(labels, pa.int64())}), path)


def parquet(root: Path, ten: bool, images: np.ndarray, labels: list[int]) -> None:
    names = {} if ten else {"label": "fine_label"}
    write_parquet(root / "train.parquet", list(map(encoded, images)), labels, **names)
    write_parquet(
        root / "test-00000-of-00001.parquet",
        list(map(encoded, images[:2])),
        labels[:2],
        "image",
        **names,
    )


def binary(root: Path, ten: bool, images: np.ndarray, labels: list[int]) -> None:
    def records(images: np.ndarray, labels: list[int]) -> bytes:
        rows = zip(images.transpose(0, 3, 1, 2), labels)
        return b"".join(
            bytes([label] if ten else [label // 5, label]) + image.tobytes()
            for image, label in rows
        )

    for n in range(5 if ten else 1):
        part = slice(n, None, 5) if ten else slice(None)
        (root / (f"data_batch_{n + 1}.bin" if ten else "train.bin")).write_bytes(
            records(images[part], labels[part])
        )
    (root / ("test_batch.bin" if ten else "test.bin")).write_bytes(records(images[:2], labels[:2]))


@pytest.mark.parametrize("ten", [True, False], ids=["cifar10", "cifar100"])
@pytest.mark.parametrize("form", [parquet, binary])
def test_cifar_is_read_in_whichever_form_it_lies(tmp_path: Path, ten: bool, form: Callable) -> None:
    images, labels = pixels(10), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    form(tmp_path, ten, images, labels)
    found = load("cifar10" if ten else "cifar100", tmp_path)
    assert found.train.x.dtype == torch.uint8 and found.train.y.dtype == torch.int64
    order = [0, 5, 1, 6, 2, 7, 3, 8, 4, 9] if ten and form is binary else list(range(10))
    assert torch.equal(found.train.x, torch.from_numpy(images[order]).permute(0, 3, 1, 2))
    assert found.train.y.tolist() == [labels[i] for i in order]
    assert torch.equal(
        found.test.x, torch.from_numpy(images[:2]).permute(0, 3, 1, 2)
    ) and found.test.y.tolist() == [3, 1]
    assert len(found.classes) == (10 if ten else 100)
    assert len(load("cifar10" if ten else "cifar100", tmp_path, limit=3).train.x) == 3


def torchvision_datasets() -> ModuleType:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    return libraries.load("torchvision").datasets


def test_torchvision_s_folder_is_read_by_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small copy has other checksums, so torchvision's check is disabled."""
    datasets = torchvision_datasets()
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = pixels(6)
    flat = images.transpose(0, 3, 1, 2).reshape(6, -1)
    for n, name in enumerate(
        [
            "data_batch_1",
            "data_batch_2",
            "data_batch_3",
            "data_batch_4",
            "data_batch_5",
            "test_batch",
        ]
    ):
        (folder / name).write_bytes(pickle.dumps({"data": flat[n : n + 1], "labels": [n]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(DataError, match=r"torchvision cannot read cifar10"):
        load("cifar10", tmp_path)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    found = load("cifar10", tmp_path)
    assert torch.equal(
        found.train.x, torch.from_numpy(images[:5]).permute(0, 3, 1, 2)
    ) and found.test.y.tolist() == [5]


def test_a_folder_of_classes_is_read_and_cut_to_squares(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(count):
                Image.fromarray(pixels(1, 40)[0][:30]).save(tmp_path / split / name / f"{n}.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    found = load("folder", tmp_path, size=16)
    assert found.classes == ["cat", "dog"] and found.name == tmp_path.name
    assert found.train.x.shape == (6, 3, 16, 16) and found.train.y.tolist() == [0, 1, 0, 1, 0, 1]
    assert found.test.x.shape == (2, 3, 16, 16)


def write_folder(root: Path, images: dict[str, int]) -> None:
    """Write the given number of images into each folder, each of one colour, all different."""
    colour = 0
    for name, count in images.items():
        (root / name).mkdir(parents=True)
        for n in range(count):
            colour += 1
            Image.new("RGB", (8, 8), (colour, 2 * colour, 3 * colour)).save(
                root / name / f"{n}.png"
            )


def test_a_folder_is_read_as_torchvision_reads_it(tmp_path: Path) -> None:
    """Nested folders, links and upper-case suffixes are read; files beside the classes are not."""
    folders = (
        "train/cat",
        "train/cat/b",
        "train/cat-b",
        "train/dog/old",
        "test/cat",
        "test/cat-b",
        "test/dog",
        "more",
    )
    write_folder(tmp_path, dict.fromkeys(folders, 2))
    (tmp_path / "train" / "dog" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "train" / "dog" / "old" / "0.png").rename(tmp_path / "train" / "dog" / "0.PNG")
    Image.new("L", (8, 8), 200).save(tmp_path / "train" / "dog" / "grey.pgm")
    Image.new("L", (8, 8), 100).save(tmp_path / "train" / "beside.png")
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    found = load("folder", tmp_path, size=8)
    for split, name in ((found.train, "train"), (found.test, "test")):
        theirs = torchvision_datasets().ImageFolder(tmp_path / name)
        assert list(found.classes) == theirs.classes
        expected = sorted((label, *image.getpixel((0, 0))) for image, label in theirs)
        assert (
            sorted((label, *x[:, 0, 0].tolist()) for x, label in zip(split.x, split.y.tolist()))
            == expected
        )


def test_what_is_hidden_is_no_class_and_no_image(tmp_path: Path) -> None:
    write_folder(tmp_path, dict.fromkeys(("train/cat", "train/dog", "test/cat", "test/dog"), 2))
    for folder in ("train/.ipynb_checkpoints", "test/.git", "train/cat/.thumbnails"):
        write_folder(tmp_path, {folder: 1})
    # macOS leaves these beside a copied file.
    (tmp_path / "train" / "dog" / "._0.png").write_bytes(b"no image")
    found = load("folder", tmp_path, size=8)
    assert found.classes == ["cat", "dog"]
    assert found.train.y.bincount().tolist() == found.test.y.bincount().tolist() == [2, 2]


@pytest.mark.parametrize("split,name", [("train", "dog"), ("test", "cat")])
def test_a_class_without_images_is_named(tmp_path: Path, split: str, name: str) -> None:
    folders = dict.fromkeys(("train/cat", "train/dog", "test/cat", "test/dog"), 1)
    write_folder(tmp_path, folders | {f"{split}/{name}": 0})
    check_refused("folder", tmp_path, [str(tmp_path / split / name), "has no images"])
    (tmp_path / split / name / ".hidden.png").write_bytes(encoded(pixels(1)[0]))
    check_refused("folder", tmp_path, [str(tmp_path / split / name), "has no images"])
    # A test set may not lack a class.
    if split == "test":
        (tmp_path / split / name / ".hidden.png").unlink()
        (tmp_path / split / name).rmdir()
        check_refused("folder", tmp_path, [str(tmp_path / split / name), "has no images"])


def test_the_first_images_of_a_folder_are_of_every_class(tmp_path: Path) -> None:
    """A limit keeps these images, and the shifts are measured on them."""
    write_folder(
        tmp_path,
        {f"{split}/{name}": 5 for split in ("train", "test") for name in ("cat", "dog", "eel")},
    )
    found = load("folder", tmp_path, limit=6)
    assert found.train.y.bincount().tolist() == found.test.y.bincount().tolist() == [2, 2, 2]


def png(pixels: np.ndarray) -> bytes:
    """16 bits per channel, grey (H, W) or RGB (H, W, 3), which PIL reads and does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        map(chunk, (b"IHDR", b"IDAT", b"IEND"), (header, zlib.compress(rows), b""))
    )


def saved(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def read_as_folder(root: Path, content: bytes, suffix: str) -> np.ndarray:
    for split in ("train", "test"):
        (root / split / "cat").mkdir(parents=True)
        (root / split / "cat" / f"0.{suffix}").write_bytes(content)
    return load("folder", root, size=8).train.x[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_wide_greys_are_scaled_to_bytes(tmp_path: Path, suffix: str) -> None:
    grey = GENERATOR.integers(0, 65536, (8, 8), dtype=np.uint16)
    content = png(grey) if suffix == "png" else saved(grey, {"tif": "TIFF", "pgm": "PPM"}[suffix])
    read = read_as_folder(tmp_path, content, suffix)
    assert (read == (grey // 256)[..., None]).all() and 64 < read.mean() < 192


def test_wide_colours_are_scaled_to_bytes(tmp_path: Path) -> None:
    colours = GENERATOR.integers(0, 65536, (8, 8, 3), dtype=np.uint16)
    assert (read_as_folder(tmp_path, png(colours), "png") == colours // 256).all()


@pytest.mark.parametrize(
    "dtype,words", [(np.int32, "32-bit integers"), (np.float32, "32-bit floats")]
)
def test_pixels_of_an_unknown_range_are_refused(tmp_path: Path, dtype: type, words: str) -> None:
    with pytest.raises(
        DataError, match=rf"0\.tif: this is no readable image: its pixels are {words}"
    ):
        read_as_folder(tmp_path, saved(np.full((8, 8), 1000, dtype), "TIFF"), "tif")


@pytest.mark.parametrize("ten", [True, False], ids=["cifar10 for cifar100", "cifar100 for cifar10"])
@pytest.mark.parametrize("form", [parquet, binary])
def test_one_cifar_is_not_taken_for_the_other(tmp_path: Path, ten: bool, form: Callable) -> None:
    form(tmp_path, ten, pixels(10), list(range(10)))
    if form is parquet:
        words = [
            "train.parquet has no column",
            "fine_label, but img, label" if ten else "label, but img, fine_label",
        ]
    else:
        words = ["none of", "but data_batch_1.bin" if ten else "but test.bin, train.bin"]
    check_refused("cifar100" if ten else "cifar10", tmp_path, words)


@pytest.mark.parametrize(
    "ten,words", [(True, "class below 10, got 10"), (False, "class below 100, got 100")]
)
def test_a_label_of_no_class_is_refused_in_the_binaries_too(
    tmp_path: Path, ten: bool, words: str
) -> None:
    binary(tmp_path, ten, pixels(10), [*range(9), 10 if ten else 100])
    check_refused(
        "cifar10" if ten else "cifar100",
        tmp_path,
        ["data_batch_5.bin, record 1" if ten else "train.bin, record 9", words],
    )


def test_the_digits_are_in_the_box() -> None:
    pytest.importorskip("sklearn")
    found = load("digits")
    assert found.train.x.shape == (1438, 1, 32, 32) and found.test.x.shape == (359, 1, 32, 32)
    assert found.train.x.max() == 255 and set(found.train.y.tolist()) == set(range(10))
    mean, std = found.statistics()
    assert 0 < mean[0] < 1 and 0 < std[0] < 1


DAMAGED = {
    "truncated parquet": (
        lambda root: shorten(root / "train.parquet"),
        ["train.parquet", "no readable parquet file"],
    ),
    "wrong columns": (
        lambda root: write_parquet(
            root / "train.parquet", [encoded(pixels(1)[0])], [1], image="picture"
        ),
        ["train.parquet", "no column img or image", "picture, label"],
    ),
    "an unreadable image": (
        lambda root: write_parquet(
            root / "train.parquet", [encoded(pixels(1)[0]), b"no image"], [1, 2]
        ),
        ["train.parquet, row 1", "no readable image"],
    ),
    "a truncated image": (
        lambda root: write_parquet(root / "train.parquet", [encoded(pixels(1)[0])[:200]], [1]),
        ["train.parquet, row 0", "no readable image"],
    ),
    "another size": (
        lambda root: write_parquet(root / "train.parquet", [encoded(pixels(1, 28)[0])], [1]),
        ["train.parquet, row 0", "32x32 pixels, got 28x28"],
    ),
    "no class": (
        lambda root: write_parquet(root / "train.parquet", [encoded(pixels(1)[0])], [10]),
        ["train.parquet, row 0", "class below 10, got 10"],
    ),
    "no label": (
        lambda root: write_parquet(root / "train.parquet", [encoded(pixels(1)[0])], [None]),
        ["train.parquet, row 0", "got None"],
    ),
    "no test split": (
        lambda root: (root / "test-00000-of-00001.parquet").unlink(),
        ["no test*.parquet"],
    ),
}


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("damage,words", DAMAGED.values(), ids=list(DAMAGED))
def test_damaged_parquet_names_the_file_and_the_row(
    tmp_path: Path, damage: Callable, words: list[str]
) -> None:
    parquet(tmp_path, True, pixels(3), [1, 2, 3])
    damage(tmp_path)
    check_refused("cifar10", tmp_path, words)


def check_refused(name: str, root: Path | None, words: list[str]) -> None:
    with pytest.raises(DataError) as raised:
        load(name, root)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_damaged_binaries_and_folders_are_named(tmp_path: Path) -> None:
    check_refused("cifar10", None, ["--root", "nothing is downloaded"])
    check_refused("cifar10", tmp_path / "none", ["no such folder"])
    check_refused(
        "cifar10", tmp_path, ["holds no cifar10", "cifar-10-batches-py", "train*.parquet"]
    )
    binary(tmp_path, True, pixels(10), list(range(10)))
    shorten(tmp_path / "data_batch_3.bin")
    check_refused("cifar10", tmp_path, ["data_batch_3.bin", "cut off"])
    (tmp_path / "data_batch_3.bin").unlink()
    check_refused("cifar10", tmp_path, ["data_batch_3.bin is missing"])
    check_refused("folder", tmp_path, ["train is missing"])
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "dog").mkdir(parents=True)
    check_refused("folder", tmp_path, ["classes", "dog"])
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "cat")
    check_refused("folder", tmp_path, ["has no images"])
    (tmp_path / "train" / "cat" / "a.png").write_bytes(b"no image")
    check_refused("folder", tmp_path, ["a.png", "no readable image"])


@pytest.mark.parametrize("flip", [False, True])
def test_random_crops_are_crops(flip: bool) -> None:
    images = torch.arange(40 * 2 * 16 * 16).view(40, 2, 16, 16)
    drawn = data.draw_crops(40, 16, 12, torch.Generator().manual_seed(0))
    crops = data.cut(images, drawn, 12, flip)
    assert crops.shape == (40, 2, 12, 12)
    mirrored = 0
    for image, crop, top, left, mirror in zip(images, crops, *drawn):
        expected = image[:, top : top + 12, left : left + 12]
        mirrored += bool(flip and mirror)
        assert torch.equal(crop, expected.flip(-1) if flip and mirror else expected)
    assert (0 < mirrored < 40) == flip
    assert torch.equal(data.centre_crop(images, 12), images[..., 2:14, 2:14])
