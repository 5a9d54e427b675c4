"""A Hugging Face Accelerate loop with MixUp on the device, its loss and an anti-aliased model.

python examples/accelerate_recipe.py            # scikit-learn's digits; needs accelerate
accelerate launch examples/accelerate_recipe.py # on all devices, after `accelerate config`
"""

from __future__ import annotations

import data
import models
import torch
from torch.utils.data import DataLoader, TensorDataset

import regfast

try:
    from accelerate import Accelerator
except ImportError as error:
    raise SystemExit(f"this example needs accelerate: pip install accelerate ({error})") from error


def main(epochs: int = 3) -> float:
    """Train, and return the accuracy on the test images after the last epoch."""
    images = data.load("digits")
    mean, std = images.statistics()
    model = models.make("cnn", channels=1, classes=10, width=16, antialias=True)
    train, test = (
        DataLoader(TensorDataset(*split), 64, shuffle=True) for split in (images.train, images.test)
    )
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
    mix, criterion = regfast.MixUp(0.25, mean=mean, std=std), regfast.MixupCrossEntropyLoss()
    accuracy = 0.0
    for epoch in range(epochs):
        model.train(), mix.train()
        for batch in train:
            x, target = mix(*batch)
            with accelerator.autocast():
                loss = criterion(model(x), target)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        model.eval(), mix.eval()
        with torch.no_grad():
            pairs = [accelerator.gather_for_metrics((model(mix(x)).argmax(1), y)) for x, y in test]
        accuracy = torch.cat([found == y for found, y in pairs]).float().mean().item()
        accelerator.print(f"epoch {epoch}: accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    main()
