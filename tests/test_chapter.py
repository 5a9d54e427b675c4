"""The chapter's comparison at a small size: runs, table, and pictures that show something."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the demo extra is not installed")
pytest.importorskip("rich", reason="the demo extra is not installed")
pytest.importorskip("sklearn", reason="the demo extra is not installed")

import chapter
import figures
import train
from matplotlib.image import imread

from regfast import info

SMALL = (
    "--limit",
    "96",
    "--epochs",
    "2",
    "--width",
    "4",
    "--batch",
    "32",
    "--shift-images",
    "12",
    "--device",
    "cpu",
)
VARIANTS = ("regular", "anti-aliased", "manifold mixup")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("chapter")
    return chapter.main(["--seeds", "2", "--variants", *VARIANTS, "--out", str(out), "--", *SMALL])


def shown(path: Path) -> float:
    """The share of a picture that is neither white nor the grey of its text."""
    image = imread(path)[..., :3]
    return float((np.ptp(image, axis=-1) > 0.05).mean() + (image.mean(-1) < 0.2).mean())


def test_every_figure_is_drawn_and_is_not_blank(written: list[Path]) -> None:
    names = [path.name for path in written]
    assert names == [
        "accuracy.png",
        "accuracy-time.png",
        "consistency.png",
        "shifts.png",
        "beta.png",
        "zebra.png",
        "results.md",
    ]
    for path in written[:-1]:
        assert shown(path) > 0.01, path.name


def test_the_table_has_a_line_a_variant_with_mean_and_spread(written: list[Path]) -> None:
    lines = written[-1].read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:5]] == list(VARIANTS)
    assert all(line.count("±") == 4 and line.endswith("| 2 |") for line in lines[2:5])
    assert (
        lines[-1].startswith("    python examples/chapter.py --seeds 2")
        and "--out OUT -- --limit 96" in lines[-1]
    )
    assert all(f"{package} {version}" in lines[-3] for package, version in info.versions().items())


def test_a_second_call_trains_no_more_and_says_the_same(
    written: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written[-1].read_text()
    monkeypatch.setattr(train.Run, "step", lambda *_: pytest.fail("it trained"))
    out = written[-1].parent
    chapter.main(["--seeds", "2", "--variants", *VARIANTS, "--out", str(out), "--", *SMALL])
    assert written[-1].read_text() == before


def test_out_of_time_it_shows_what_has_finished_and_goes_on(
    written: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One minute for three runs of two epochs, each of 25 seconds: one run and a half."""
    seconds, epoch = [0], train.Run.epoch

    def timed(self):
        seconds[0] += 25
        return epoch(self)

    monkeypatch.setattr(train.Run, "epoch", timed)
    clock = SimpleNamespace(monotonic=lambda: seconds[0], perf_counter=time.perf_counter)
    for module in (train, chapter):
        monkeypatch.setattr(module, "time", clock)
    command = ["--minutes", "1", "--variants", *VARIANTS, "--out", str(tmp_path), "--", *SMALL]
    *drawn, results = chapter.main(command)
    assert len(drawn) == 6 and all(path.exists() for path in drawn)
    text = results.read_text()
    assert (
        "| regular |" in text
        and "| anti-aliased |" not in text
        and "| manifold mixup |" not in text
    )
    assert "\nNot finished, and left out: anti-aliased, seed 0; manifold mixup, seed 0.\n" in text
    assert capsys.readouterr().out.endswith(
        "goes on:\n  anti-aliased, seed 0\n  manifold mixup, seed 0\n"
    )
    text = chapter.main(command)[-1].read_text()
    assert all(f"| {variant} |" in text for variant in VARIANTS) and "Not finished" not in text
    for variant in VARIANTS:
        whole, broken = (
            torch.load(chapter.folder_of(out, variant, 0) / "shifts.pt")
            for out in (written[0].parent, tmp_path)
        )
        assert torch.equal(whole["probability"], broken["probability"])


def test_with_nothing_finished_it_draws_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        chapter.main(
            ["--minutes", "0", "--variants", "regular", "--out", str(tmp_path), "--", *SMALL]
        )
        == []
    )
    assert not list(tmp_path.iterdir())
    assert "regular, seed 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [("--device", "cuda"), ("--", "--device", "cuda")], ids=" ".join
)
def test_cuda_without_a_gpu_is_one_line(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """--device is the training script's option, before the -- and after it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        chapter.main(arguments)
    assert raised.value.code == 2
    assert capsys.readouterr().err == "--device cuda: PyTorch finds no CUDA device\n"


def test_the_variants_are_the_chapter_s_and_the_blog_s() -> None:
    """Each variant is a command line of the training script."""
    assert list(chapter.VARIANTS) == [
        "regular", "anti-aliased", "residual", "ReZero", "ReZero + MixUp", "input mixup",
        "manifold mixup",
    ]  # fmt: skip
    for flags in chapter.VARIANTS.values():
        train.parse(flags)


def test_the_zebra_is_aliased_by_max_pooling_alone(tmp_path: Path) -> None:
    """Stripes stay black and white after a maximum, and become grey after the blur."""
    assert figures.zebra(tmp_path / "zebra.png").exists() and shown(tmp_path / "zebra.png") > 0.1
    stripes = figures.stripes(64)
    pooled, blurred = figures.pooled(stripes, 4).values()
    assert set(pooled.unique().tolist()) == {0.0, 1.0}
    assert ((blurred > 0.1) & (blurred < 0.9)).float().mean() > 0.2
    assert pooled.shape == blurred.shape == (1, 1, 16, 16)


def test_spread_is_over_seeds() -> None:
    assert chapter.spread([0.5], ".1%") == "50.0%"
    assert chapter.spread([0.5, 0.6], ".1%") == f"55.0% ± {torch.tensor([0.5, 0.6]).std():.1%}"
