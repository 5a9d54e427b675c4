"""After `warm_up` no image size compiles anything: what a kernel is specialised on has been met."""

from __future__ import annotations

import random

import pytest
import torch
from samples import as_format
from torch import nn

import regfast
from regfast.kernels.launch import Launch

NAMES = {"_forward_kernel", "_backward_kernel"}


@pytest.fixture
def met(monkeypatch):
    """What has been compiled for, as the launches say: none is made."""
    met: set = set()

    def note(launch: Launch, *args: object) -> None:
        # Tensors count by their dtype and alignment, integers by their width; options are constants.
        given = [
            (a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, torch.Tensor) else a >= 2**31 for a in (*args, *launch.numbers)
        ]
        met.add((launch.kernel.__name__, repr(given), repr(launch.options)))

    monkeypatch.setattr(Launch, "__call__", note)
    with regfast.backend("triton"):
        yield met


LAYERS = [
    regfast.MaxPool2dAA(2),
    regfast.MaxPool2dAA(3, 2, 1),
    regfast.MaxPool2dAA(3, 2),
    regfast.MaxPool2dAA(3, 3),
    regfast.BlurPool2d(3),
    regfast.BlurPool2d(3, activation="relu"),
    regfast.BlurPool2d(3, stride=1),
    regfast.BlurPool2d(7, stride=1, padding=0),
    regfast.MaxPool1dAA(2),
    regfast.MaxPool3dAA(2),
]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_no_size_compiles_what_warm_up_has_not(layer, met, device):
    regfast.warm_up(nn.Sequential(layer, nn.ReLU()), device=device, dtypes=[torch.bfloat16])
    known, draw = set(met), random.Random(0)
    assert {name for name, *_ in known} == NAMES
    for _ in range(60):
        sizes = [draw.randint(8, 70) for _ in range(layer.rank - 1)]
        width = draw.choice([56, 28, 14, *range(65, 120)])
        shape = (draw.randint(1, 3), draw.randint(2, 40), *sizes, width)
        x = as_format(torch.empty(shape, dtype=torch.bfloat16, device=device), draw.random() < 0.5).requires_grad_()
        y = layer(x)
        torch.autograd.grad(y, x, torch.empty_like(y))
        assert met == known, shape


def test_what_is_not_asked_for_is_not_compiled(met, device):
    layer = regfast.MaxPool2dAA(2)
    regfast.warm_up(layer, device=device, memory_formats=[torch.channels_last], backward=False)
    assert {name for name, *_ in met} == {"_forward_kernel"}
    assert all("channels_last=True" in options for *_, options in met)
    # By alignment: channels by 4, 2 and 1.
    assert len(met) == 3


def test_a_model_is_left_as_it_was(device):
    model = nn.Sequential(nn.Conv2d(1, 1, 1), regfast.MaxPool2dAA(2)).eval()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.random.get_rng_state()
    regfast.warm_up(model, device="cpu", memory_formats=[torch.contiguous_format])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
