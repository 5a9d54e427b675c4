"""Every example in a public docstring runs, and prints the output that it shows."""

from __future__ import annotations

import doctest
import inspect
from typing import Any

import pytest
import torch
from peers import load
from torch import nn

import regfast

MODULES = [regfast, regfast.functional, regfast.filters, regfast.metrics]
DOCUMENTED = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if ">>>" in (inspect.getdoc(getattr(module, name)) or "")
}
NEEDS_ONE = [
    "BlurPool2d",
    "Conv2dAA",
    "ManifoldMixup",
    "MaxPool2dAA",
    "MixUp",
    "MixupCollator",
    "MixupLoss",
    "warm_up",
]


class Quiet(doctest.OutputChecker):
    """Accepts any output of an example that shows none."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def peers(text: str) -> dict[str, Any]:
    """The libraries that an example names; timm without its download of weights."""
    found: dict[str, Any] = {}
    if "torchvision" in text:
        found["torchvision"] = load("torchvision")
    if "timm" in text:
        timm = load("timm")
        found["timm"] = type(
            "timm", (), {"create_model": lambda name, pretrained: timm.create_model(name)}
        )
    return found


def test_the_classes_of_a_training_script_have_an_example() -> None:
    assert {f"regfast.{name}" for name in NEEDS_ONE} <= DOCUMENTED.keys()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_run(name: str) -> None:
    text = inspect.getdoc(DOCUMENTED[name]) or ""
    # Names that an example uses without defining them: a classifier and its images.
    block = regfast.ResidualBlock(4, 4)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 8), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )
    given = dict(model=model, images=torch.rand(1, 3, 240, 240), labels=torch.randint(10, (1,)))
    names = dict(regfast=regfast, torch=torch, nn=nn) | given | peers(text)
    example = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert example.examples
    failures: list[str] = []
    doctest.DocTestRunner(Quiet()).run(example, out=failures.append)
    assert not failures, "".join(failures)
