"""Peers agree where they define the same function: the filter and the border of a blur."""

from __future__ import annotations

import pytest
import torch
from peers import load

import regfast

# float32 sums of nine products of order one, in another order.
ROUNDING = dict(rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 4, 15, 18)], ids=str)
@pytest.mark.parametrize("size", [3, 5])
def test_kornia_pads_the_maxima_with_zeros(shape, size):
    kornia = pytest.importorskip("kornia")
    x = torch.randn(shape)
    theirs = kornia.filters.MaxBlurPool2D(size, stride=2, max_pool_size=2)(x)
    # kornia pads the 1-smaller map of an even window by (size - 1)//2, and so has as many outputs
    # as BlurPool of that map.
    maxima = torch.nn.functional.max_pool2d(x, 2, 1)
    torch.testing.assert_close(
        regfast.BlurPool2d(size, 2, (size - 1) // 2, padding_mode="zeros")(maxima),
        theirs,
        **ROUNDING,
    )
    ours = regfast.MaxPool2dAA(2, blur_size=size, padding_mode="zeros")(x)
    torch.testing.assert_close(ours, theirs[..., : ours.shape[-2], : ours.shape[-1]], **ROUNDING)


@pytest.mark.parametrize("side", [16, 17])
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_antialiased_cnns_reflects(side, size):
    antialiased_cnns = pytest.importorskip("antialiased_cnns")
    x = torch.randn(2, 3, side, side + 2)
    theirs = antialiased_cnns.BlurPool(3, filt_size=size, stride=2)
    torch.testing.assert_close(
        regfast.BlurPool2d(size, 2, padding_mode="reflect")(x), theirs(x), **ROUNDING
    )
    maxima = torch.nn.functional.max_pool2d(x, 2, 1)
    ours = regfast.MaxPool2dAA(2, blur_size=size, padding_mode="reflect")(x)
    torch.testing.assert_close(ours, theirs(maxima), **ROUNDING)


def test_timm_takes_the_class_as_its_aa_layer():
    """timm silently falls back to an average for a class that it cannot call."""
    timm = load("timm")
    model = timm.create_model("resnet18", aa_layer=regfast.BlurPool2d, num_classes=3)
    blurs = [module for module in model.modules() if isinstance(module, regfast.BlurPool2d)]
    assert len(blurs) >= 3
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
