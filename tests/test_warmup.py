"""After `warm_up` no image size compiles anything: every specialisation has been compiled."""

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
    """The specialisations of the launches; nothing is launched."""
    met: set = set()

    def note(launch: Launch, *args: object) -> None:
        # A specialisation has tensors' dtype and alignment, integers' width, and options as
        # constants.
        given = [
            (a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, torch.Tensor) else a >= 2**31
            for a in (*args, *launch.numbers)
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
def test_no_size_compiles_anything_after_warm_up(layer, met, device):
    regfast.warm_up(nn.Sequential(layer, nn.ReLU()), device=device, dtypes=[torch.bfloat16])
    known, draw = set(met), random.Random(0)
    assert {name for name, *_ in known} == NAMES
    for _ in range(60):
        sizes = [draw.randint(8, 70) for _ in range(layer.rank - 1)]
        width = draw.choice([56, 28, 14, *range(65, 120)])
        shape = (draw.randint(1, 3), draw.randint(2, 40), *sizes, width)
        x = as_format(
            torch.empty(shape, dtype=torch.bfloat16, device=device), draw.random() < 0.5
        ).requires_grad_()
        y = layer(x)
        torch.autograd.grad(y, x, torch.empty_like(y))
        assert met == known, shape


def test_what_is_not_asked_for_is_not_compiled(met, device):
    layer = regfast.MaxPool2dAA(2)
    regfast.warm_up(
        layer,
        device=device,
        dtypes=[torch.float32],
        memory_formats=[torch.channels_last],
        backward=False,
    )
    assert {name for name, *_ in met} == {"_forward_kernel"}
    assert all("channels_last=True" in options for *_, options in met)
    # By alignment: channels that are multiples of 4, 2 and 1.
    assert len(met) == 3


def dtypes_of(met):
    return {
        dtype
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if str(dtype) in str(met)
    }


@pytest.mark.parametrize(
    "own", [torch.float16, torch.bfloat16, torch.float32, torch.float64, None], ids=str
)
def test_the_model_says_device_and_dtypes(own, met, device):
    """A float32 model also runs under autocast; a model without parameters may be part of one."""
    pooling = regfast.MaxPool2dAA(2)
    if own is None:
        model = pooling
    else:
        model = nn.Sequential(nn.Embedding(1, 1), nn.Conv2d(1, 1, 1), pooling).to(device, own)
    regfast.warm_up(model, memory_formats=[torch.contiguous_format], widths=[])
    expected = {torch.float32, torch.bfloat16} if own in (torch.float32, None) else {own}
    assert dtypes_of(met) == expected
    met.clear()
    regfast.warm_up(
        model, dtypes=[torch.float16], memory_formats=[torch.contiguous_format], widths=[]
    )
    assert dtypes_of(met) == {torch.float16}


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_nothing_runs_where_no_kernel_does(where, monkeypatch):
    monkeypatch.setattr("regfast.warmup.max_blur_pool", None)
    regfast.warm_up(nn.Sequential(nn.Conv2d(1, 1, 1), regfast.MaxPool2dAA(2)).to(where))
    with regfast.backend("triton"), pytest.raises(TypeError, match="not callable"):
        # The stand-in would have been called: on a CPU a named backend runs kernels in the
        # interpreter.
        regfast.warm_up(regfast.MaxPool2dAA(2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
        regfast.warm_up(regfast.MaxPool2dAA(2), device="cuda")


def test_a_model_is_left_as_it_was(met, device):
    model = nn.Sequential(nn.Conv2d(1, 1, 1), regfast.MaxPool2dAA(2)).eval().to(device)
    before, state = (
        {name: value.clone() for name, value in model.state_dict().items()},
        torch.random.get_rng_state(),
    )
    regfast.warm_up(model, memory_formats=[torch.contiguous_format])
    assert met
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
