"""The blog post's ResNet-18 with manifold mixup, from torchvision's ResNet-18 and ManifoldMixup.

`python examples/resnet18mm.py` trains it for a few steps on random images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import regfast


class Resnet18MM(nn.Module):
    """A ResNet-18 of five blocks, with a mix at the input of one of them.

    The blocks are the stem (k = 0: its input is the images), layer1, layer2, layer3, and layer4
    with the head. The post's class ran the blocks before k twice, drew from NumPy's global state,
    and lost the flattening before `fc`.

    Args:
        num_classes: the number of classes.
        alpha: lam is drawn from Beta(alpha, alpha).
        **kwargs: further arguments of torchvision.models.resnet18, such as `weights`.
    """

    def __init__(self, num_classes: int = 10, alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__()
        from torchvision.models import resnet18

        self.manifold = regfast.ManifoldMixup(
            resnet18(num_classes=num_classes, **kwargs), alpha=alpha
        )

    def forward(self, x: Tensor, mixup: bool = False) -> tuple[Tensor, Tensor | None, float | None]:
        """Return (output, index, lam) for images (B, 3, H, W).

        The loss is lam * loss(output, y) + (1 - lam) * loss(output, y[index]). Without mixup, index
        and lam are None.
        """
        if not mixup:
            return self.manifold.model(x), None, None
        # The labels are the samples' numbers, so the partners' labels are the index.
        output, target = self.manifold(x, torch.arange(len(x), device=x.device))
        return output, target.b, self.last_lam

    def train(self, mode: bool = True) -> Resnet18MM:
        super().train(mode)
        # The argument `mixup` decides whether to mix, not the mode.
        self.manifold.training = True
        return self

    @property
    def last_k(self) -> int | None:
        return self.manifold.last_k

    @property
    def last_lam(self) -> float | None:
        return self.manifold.last_lam


def main() -> None:
    torch.manual_seed(0)
    model = Resnet18MM()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    for step in range(10):
        output, index, lam = model(x, mixup=True)
        loss = regfast.mixup_criterion(nn.CrossEntropyLoss(), output, y, y[index], lam)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(
            f"step {step}: loss {loss:.3f}, mixed before block {model.last_k} with lam "
            f"{model.last_lam:.2f}"
        )


if __name__ == "__main__":
    main()
