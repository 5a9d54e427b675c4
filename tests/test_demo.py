"""`make demo`, in small: what it promises about its two networks, its data and its files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the demo extra is not installed")
pytest.importorskip("rich", reason="the demo extra is not installed")
pytest.importorskip("sklearn", reason="the demo extra is not installed")

import demo
import demo_data as data

PNG = b"\x89PNG"
SMALL = ("--epochs", "1", "--images", "96", "--device", "cpu")


def test_demo_runs_and_repeats_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (demo.main([*SMALL, "--out", str(tmp_path / name)]) for name in ("a", "b"))
    for name, result in first.items():
        assert len(result.accuracy_by_epoch) == 1
        assert result.probability.shape == result.correct.shape == (96, 64)
        assert torch.equal(result.probability, second[name].probability)
    for plot in ("accuracy.png", "shifts.png"):
        assert (tmp_path / "a" / plot).read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    for words in ("nn.MaxPool2d", "MaxPool2dAA", "test accuracy", "shift consistency", "ms", "accuracy.png", "shifts.png"):
        assert words in printed


def test_both_networks_start_from_the_same_weights() -> None:
    networks = demo.make_networks(channels=3, seed=0, device=torch.device("cpu"))
    plain, smooth = (networks[name].state_dict() for name in ("nn.MaxPool2d", "MaxPool2dAA"))
    assert plain.keys() == smooth.keys()
    assert all(torch.equal(plain[key], smooth[key]) for key in plain)
    other = demo.make_networks(channels=3, seed=1, device=torch.device("cpu"))["nn.MaxPool2d"].state_dict()
    assert not torch.equal(plain["0.weight"], other["0.weight"])


def test_random_crops_are_crops() -> None:
    images = torch.arange(5 * 2 * 32 * 32.0).reshape(5, 2, 32, 32)
    crops = data.random_crops(images, torch.Generator().manual_seed(0))
    assert crops.shape == (5, 2, 24, 24)
    for image, got in zip(images, crops, strict=True):
        row, column = divmod(int(got[0, 0, 0]) % 1024, 32)
        assert torch.equal(got, image[:, row : row + 24, column : column + 24])


def write_parquet(path: Path, pixels: torch.Tensor, labels: list[int]) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    rows = []
    for picture in pixels:
        buffer = io.BytesIO()
        image.fromarray(picture.numpy()).save(buffer, "png")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    img = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"img": img, "label": pa.array(labels, pa.int64())}), path)


def test_parquet_images_are_read_and_standardised(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_parquet(tmp_path / "train.parquet", pixels, [3, 1, 4, 1, 5, 9])
    write_parquet(tmp_path / "test.parquet", pixels[:3], [2, 6, 5])

    read = data.load(tmp_path, limit=4)

    expected = pixels[:4].permute(0, 3, 1, 2) / 255
    std, mean = torch.std_mean(expected, dim=(0, 2, 3), keepdim=True)
    torch.testing.assert_close(read.train_x, (expected - mean) / std)
    assert read.train_y.tolist() == [3, 1, 4, 1]
    assert read.test_y.tolist() == [2, 6, 5]


def test_parquet_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", torch.zeros(1, 28, 28, 3, dtype=torch.uint8), [0])
    with pytest.raises(ValueError, match="32x32 pixels, got 28x28"):
        data.load(tmp_path, limit=None)


@pytest.mark.parametrize("option", ["--epochs", "--images"])
def test_counts_must_be_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.parse([option, "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err
