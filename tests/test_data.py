"""The training script's data: every form it reads, in small, and damaged ones, of which it says what is wrong and where."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL.Image", reason="the demo extra is not installed")

import data
from data import DataError, load
from PIL import Image

GENERATOR = np.random.default_rng(0)


def pixels(count: int, side: int = 32) -> np.ndarray:
    return GENERATOR.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def encoded(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def write_parquet(path: Path, images: list[bytes], labels: list, image: str = "img", label: str = "label") -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = pa.array(
        [{"bytes": bytes_, "path": None} for bytes_ in images], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({image: cells, label: pa.array(labels, pa.int64())}), path)


def parquet(root: Path, ten: bool, images: np.ndarray, labels: list[int]) -> None:
    names = {} if ten else {"label": "fine_label"}
    write_parquet(root / "train.parquet", list(map(encoded, images)), labels, **names)
    write_parquet(root / "test-00000-of-00001.parquet", list(map(encoded, images[:2])), labels[:2], "image", **names)


def binary(root: Path, ten: bool, images: np.ndarray, labels: list[int]) -> None:
    def records(images: np.ndarray, labels: list[int]) -> bytes:
        rows = zip(images.transpose(0, 3, 1, 2), labels)
        return b"".join(bytes([label] if ten else [label // 5, label]) + image.tobytes() for image, label in rows)

    for n in range(5 if ten else 1):
        part = slice(n, None, 5) if ten else slice(None)
        (root / (f"data_batch_{n + 1}.bin" if ten else "train.bin")).write_bytes(records(images[part], labels[part]))
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
    assert torch.equal(found.test.x, torch.from_numpy(images[:2]).permute(0, 3, 1, 2)) and found.test.y.tolist() == [3, 1]
    assert len(found.classes) == (10 if ten else 100)
    assert len(load("cifar10" if ten else "cifar100", tmp_path, limit=3).train.x) == 3


def test_torchvision_s_folder_is_read_by_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It checks sums that a small copy has not, so that the sums are taken for right here."""
    from peers import AbsentError
    from peers import load as load_peer

    try:
        datasets = load_peer("torchvision.datasets")
    except AbsentError as absent:
        pytest.skip(f"torchvision: {absent}")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = pixels(6)
    flat = images.transpose(0, 3, 1, 2).reshape(6, -1)
    for n, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": flat[n : n + 1], "labels": [n]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(DataError, match=r"torchvision cannot read cifar10"):
        load("cifar10", tmp_path)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    found = load("cifar10", tmp_path)
    assert torch.equal(found.train.x, torch.from_numpy(images[:5]).permute(0, 3, 1, 2)) and found.test.y.tolist() == [5]


def test_a_folder_of_classes_is_read_and_cut_to_squares(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(count):
                Image.fromarray(pixels(1, 40)[0][:30]).save(tmp_path / split / name / f"{n}.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    found = load("folder", tmp_path, size=16)
    assert found.classes == ["cat", "dog"] and found.name == tmp_path.name
    assert found.train.x.shape == (6, 3, 16, 16) and found.train.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test.x.shape == (2, 3, 16, 16)


def test_the_digits_are_in_the_box() -> None:
    pytest.importorskip("sklearn")
    found = load("digits")
    assert found.train.x.shape == (1438, 1, 32, 32) and found.test.x.shape == (359, 1, 32, 32)
    assert found.train.x.max() == 255 and set(found.train.y.tolist()) == set(range(10))
    mean, std = found.statistics()
    assert 0 < mean[0] < 1 and 0 < std[0] < 1


DAMAGED = {
    "truncated parquet": (lambda root: shorten(root / "train.parquet"), ["train.parquet", "no readable parquet file"]),
    "wrong columns": (
        lambda root: write_parquet(root / "train.parquet", [encoded(pixels(1)[0])], [1], image="picture"),
        ["train.parquet", "no column img or image", "picture, label"],
    ),
    "an unreadable image": (
        lambda root: write_parquet(root / "train.parquet", [encoded(pixels(1)[0]), b"no image"], [1, 2]),
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
    "no test split": (lambda root: (root / "test-00000-of-00001.parquet").unlink(), ["no test*.parquet"]),
}


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("damage,words", DAMAGED.values(), ids=list(DAMAGED))
def test_damaged_parquet_names_the_file_and_the_row(tmp_path: Path, damage: Callable, words: list[str]) -> None:
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
    check_refused("cifar10", tmp_path, ["holds no cifar10", "cifar-10-batches-py", "train*.parquet"])
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
