"""MixUp or manifold mixup, and the mixed loss, in a LightningModule.

python examples/lightning_module.py    # scikit-learn's digits; needs the extra regfast[lightning]
"""

from __future__ import annotations

from typing import Any

import data
import models
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import regfast

try:
    from lightning import LightningModule, Trainer
except ImportError as error:
    raise SystemExit(
        f"this example needs Lightning: pip install 'regfast[lightning]' ({error})"
    ) from error


class MixedClassifier(LightningModule):
    """Any classifier, trained on mixed batches of bytes.

    Validation batches are normalised like the training batches, but not mixed.

    Args:
        model: returns logits, (B, classes).
        mean, std: of the images' channels, scaled to [0, 1].
        alpha: of MixUp; with `manifold`, of manifold mixup.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mean: list[float],
        std: list[float],
        alpha: float = 0.25,
        manifold: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.mix = regfast.MixUp(0.0 if manifold else alpha, mean=mean, std=std)
        self.mixed = regfast.ManifoldMixup(model, alpha=alpha) if manifold else None
        self.criterion = regfast.MixupCrossEntropyLoss()

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        x, target = self.mix(*batch)
        if self.mixed is None:
            output = self.model(x)
        else:
            # self.mix has alpha 0 here and only normalises. ManifoldMixup mixes in a layer.
            output, target = self.mixed(x, batch[1])
        loss = self.criterion(output, target)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _index: int) -> None:
        # In evaluation mode self.mix only normalises. Lightning sets the mode of all submodules.
        x, y = self.mix(*batch)
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3)


def main(**trainer: Any) -> dict[str, Tensor]:
    images = data.load("digits")
    mean, std = images.statistics()
    model = MixedClassifier(models.make("cnn", 1, 10, width=16, antialias=True), mean, std)
    train, test = (TensorDataset(*split) for split in (images.train, images.test))
    runner = Trainer(**({"max_epochs": 3} | trainer))
    runner.fit(
        model, DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=64)
    )
    return runner.callback_metrics


if __name__ == "__main__":
    print(main())
