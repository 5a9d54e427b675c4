"""The example's LightningModule trains; skipped without lightning."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("lightning") is None:
    pytest.skip("lightning is not installed", allow_module_level=True)
pytest.importorskip("sklearn", reason="the demo extra is not installed")

from peers import AbsentError, load

try:
    # It imports torchvision, which `load` may have to prepare.
    load("torchvision")
except AbsentError as absent:
    pytest.skip(f"torchvision: {absent}", allow_module_level=True)

import data
import lightning_module
import models
from torch.utils.data import DataLoader, TensorDataset

QUIET = dict(
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)


@pytest.mark.parametrize("manifold", [False, True])
def test_a_lightning_module_trains_on_mixed_batches(manifold: bool) -> None:
    images = data.load("digits", limit=128)
    model = lightning_module.MixedClassifier(
        models.make("cnn", 1, 10, width=4), *images.statistics(), manifold=manifold
    )
    before = [p.detach().clone() for p in model.model.parameters()]
    trainer = lightning_module.Trainer(max_epochs=2, **QUIET)
    trainer.fit(
        model,
        *(
            DataLoader(TensorDataset(*split), batch_size=32)
            for split in (images.train, images.test)
        ),
    )
    metrics = trainer.callback_metrics
    assert 0 < metrics["train_loss"] < 10 and 0 <= metrics["accuracy"] <= 1
    assert all(not torch.equal(a, b) for a, b in zip(before, model.model.parameters()))


def test_the_example_learns() -> None:
    assert lightning_module.main(**QUIET)["accuracy"] > 0.5
