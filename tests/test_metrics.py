"""Shift consistency, on models with known answers."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from regfast import BlurPool2d
from regfast.metrics import shift_consistency

# float32 probabilities of logits of order one.
ROUNDING = dict(rtol=1e-5, atol=1e-6)


class Corner(nn.Module):
    """Two logits: an image's first pixel, and zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixel = x[:, 0, 0, 0]
        return torch.stack([pixel, torch.zeros_like(pixel)], dim=1)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("labelled", [True, False])
def test_against_a_model_that_looks_at_one_pixel(batch_size, labelled):
    """Each shift's logit is the pixel at the corner of its crop."""
    images = torch.randn(6, 2, 7, 9)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    found = shift_consistency(
        Corner(),
        images,
        labels if labelled else None,
        crop=(4, 5),
        batch_size=batch_size,
        progress=False,
    )
    pixels = images[:, 0, :4, :5].reshape(6, 20).double()
    prediction = (pixels < 0).long()
    followed = labels if labelled else (images[:, 0, 1, 2] < 0).long()
    probability = torch.where(followed[:, None] == 0, pixels, -pixels).sigmoid()
    torch.testing.assert_close(found.probability, probability.float(), **ROUNDING)
    assert torch.equal(found.prediction, prediction)
    assert found.deviation == pytest.approx(
        probability.std(1, correction=0).quantile(0.5).item(), rel=1e-5
    )
    pairs = [(row[:, None] == row[None, :]).double().mean().item() for row in prediction]
    assert found.consistency == pytest.approx(sum(pairs) / 6, rel=1e-6)


def test_it_is_every_crop_shown_by_itself():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    images, labels = torch.randn(3, 3, 10, 11), torch.tensor([1, 0, 4])
    found = shift_consistency(model, images, labels, crop=8, progress=False)
    model.eval()
    with torch.no_grad():
        for n in range(3):
            for place, (y, x) in enumerate((y, x) for y in range(3) for x in range(4)):
                logits = model(images[n : n + 1, :, y : y + 8, x : x + 8])[0]
                torch.testing.assert_close(
                    found.probability[n, place], logits.softmax(0)[labels[n]], **ROUNDING
                )
                assert found.prediction[n, place] == logits.argmax()


def test_a_model_that_sees_no_shift_is_perfect():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    nn.init.zeros_(model[1].weight)
    found = shift_consistency(model, torch.randn(4, 3, 5, 5), crop=2, progress=False)
    assert found.deviation < 1e-7 and found.consistency == 1.0
    assert found.probability.shape == found.prediction.shape == (4, 16)


def test_one_shift_is_no_shift():
    found = shift_consistency(Corner(), torch.randn(2, 1, 4, 4), crop=4, progress=False)
    assert (found.deviation, found.consistency) == (0.0, 1.0)


def test_the_model_s_modes_are_kept_even_by_an_error():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    model[1].eval()
    shift_consistency(model, torch.randn(2, 1, 3, 3), crop=2, progress=False)
    with pytest.raises(RuntimeError):
        shift_consistency(model, torch.randn(2, 1, 4, 4), crop=3, progress=False)
    assert [module.training for module in (model, *model)] == [True, True, False, True]


def test_half_precision_and_the_progress_bar(capsys, monkeypatch):
    """Probabilities are float32. Without rich there is no progress bar and no error."""
    pytest.importorskip("rich")
    model, images = (
        nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).bfloat16(),
        torch.randn(2, 1, 3, 3).bfloat16(),
    )
    first = shift_consistency(model, images, crop=2)
    assert "shifts" in capsys.readouterr().out and first.probability.dtype == torch.float32
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    second = shift_consistency(model, images, crop=2)
    assert torch.equal(first.probability, second.probability) and not capsys.readouterr().out


@pytest.mark.parametrize(
    "model,images,arguments,error,words",
    [
        (len, torch.randn(2, 1, 4, 4), dict(crop=2), TypeError, ["model", "builtin"]),
        (Corner(), [1], dict(crop=2), TypeError, ["images", "list"]),
        (Corner(), torch.randn(1, 4, 4), dict(crop=2), ValueError, ["images", "(1, 4, 4)"]),
        (Corner(), torch.randn(0, 1, 4, 4), dict(crop=2), ValueError, ["images", "(0, 1, 4, 4)"]),
        (Corner(), torch.randn(2, 1, 4, 4), dict(crop=5), ValueError, ["crop", "5", "(4, 4)"]),
        (Corner(), torch.randn(2, 1, 4, 4), dict(crop=0), ValueError, ["crop", "0", "at least 1"]),
        (
            Corner(),
            torch.randn(2, 1, 4, 4),
            dict(crop=2, batch_size=0),
            ValueError,
            ["batch_size", "0"],
        ),
        (
            Corner(),
            torch.randn(2, 1, 4, 4),
            dict(crop=2, labels=torch.zeros(3).long()),
            ValueError,
            ["labels", "(2,)", "(3,)"],
        ),
        (
            Corner(),
            torch.randn(2, 1, 4, 4),
            dict(crop=2, labels=torch.zeros(2)),
            TypeError,
            ["labels", "torch.float32"],
        ),
        (
            Corner(),
            torch.randn(2, 1, 4, 4),
            dict(crop=2, labels=torch.tensor([0, 2])),
            ValueError,
            ["labels", "[0, 2)", "2"],
        ),
        (
            Corner(),
            torch.randn(2, 1, 4, 4),
            dict(crop=2, batch_size=(4, 4)),
            ValueError,
            ["batch_size", "(4, 4)"],
        ),
        (
            nn.Identity(),
            torch.randn(2, 1, 4, 4),
            dict(crop=2),
            ValueError,
            ["logits", "(2, 1, 2, 2)"],
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(4, 0)),
            torch.randn(2, 1, 4, 4),
            dict(crop=2),
            ValueError,
            ["logits", "classes", "(2, 0)"],
        ),
    ],
    ids=lambda value: (
        " ".join(value) if isinstance(value, list) and isinstance(value[0], str) else ""
    ),
)
def test_bad_input(model, images, arguments, error, words):
    with pytest.raises(error) as raised:
        shift_consistency(model, images, progress=False, **arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_a_blur_makes_a_network_more_consistent():
    """Every other column is white: stride 2 sees all white or all black, depending on the shift."""
    stripes = torch.zeros(1, 1, 13, 13)
    stripes[..., ::2] = 1.0

    def deviation(pool: nn.Module) -> float:
        head = nn.Linear(16, 2)
        nn.init.constant_(head.weight[:1], 1 / 16)
        nn.init.constant_(head.weight[1:], 0.0)
        nn.init.constant_(head.bias, 0.0)
        return shift_consistency(
            nn.Sequential(pool, nn.Flatten(), head), stripes, crop=8, progress=False
        ).deviation

    assert deviation(nn.AvgPool2d(1, 2)) > 0.1 > 10 * deviation(BlurPool2d(3, 2))


def test_the_result_prints_on_one_line():
    images, labels = torch.rand(2, 3, 12, 12), torch.tensor([0, 1])
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    found = shift_consistency(model, images, labels, crop=8, progress=False)
    scores = f"deviation={found.deviation:.4f}, consistency={found.consistency:.4f}"
    shifts = found.probability.shape[1]
    assert repr(found) == f"ShiftConsistency({scores}, 2 images at {shifts} shifts)"
