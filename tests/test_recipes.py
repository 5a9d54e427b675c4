"""The timm, Accelerate and Lightning examples train on a toy, and name a missing package."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peers import load

import regfast

NEEDS = {
    "timm_recipe": ("timm", "pip install timm"),
    "accelerate_recipe": ("accelerate", "pip install accelerate"),
    "lightning_module": ("lightning", "pip install 'regfast[lightning]'"),
}


@pytest.mark.parametrize("example", NEEDS)
def test_what_is_missing_is_named(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, remedy = NEEDS[example]
    # A package that is None in sys.modules does not import, whatever is installed.
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, example, raising=False)
    with pytest.raises(SystemExit, match=re.escape(remedy)):
        importlib.import_module(example)


@pytest.fixture
def timm_recipe() -> ModuleType:
    load("timm")
    return importlib.import_module("timm_recipe")


@pytest.mark.slow
def test_timm_s_recipe_learns(timm_recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = timm_recipe.main(["--toy", "--device", "cpu", "--epochs", "3"])
    assert (
        len(accuracies) == 3 and f"epoch 2: accuracy {accuracies[2]:.2%}" in capsys.readouterr().out
    )
    # A random guess is right for a third.
    assert accuracies[2] > 0.5


def test_timm_s_recipe_takes_a_folder(timm_recipe: ModuleType, tmp_path: Path) -> None:
    toy = timm_recipe.Toy()
    for split in ("train", "validation"):
        for i in range(8):
            image, label = toy[i]
            folder = tmp_path / split / toy.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i}.png")
    flags = [
        "--model",
        "resnet18",
        "--size",
        "32",
        "--batch",
        "4",
        "--workers",
        "0",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    (accuracy,) = timm_recipe.main([str(tmp_path), *flags])
    assert accuracy * 8 == round(accuracy * 8)


def test_timm_s_recipe_without_images_is_an_error(
    timm_recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        timm_recipe.main([str(tmp_path)])
    assert "--toy" in capsys.readouterr().err


def test_a_model_that_timm_anti_aliased_keeps_its_function(timm_recipe: ModuleType) -> None:
    torch.manual_seed(0)
    theirs = load("timm").create_model("resnetblur18", num_classes=7).eval()
    ours = timm_recipe.make_model("resnetblur18", 7, pretrained=False).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    expected = theirs(x)
    # The blur sums in another order: float32, relative to the largest logit.
    assert (ours(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert any(
        isinstance(module, (regfast.BlurPool2d, regfast.MaxPool2dAA)) for module in ours.modules()
    )


def test_the_accelerate_recipe_learns(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    pytest.importorskip("sklearn", reason="the demo extra is not installed")
    accuracy = importlib.import_module("accelerate_recipe").main()
    assert accuracy > 0.5 and f"epoch 2: accuracy {accuracy:.2%}" in capsys.readouterr().out
