"""The modules replace torch.nn's: signature, shapes, formats, state_dict, repr, model surgery."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from samples import check_signature
from scipy import stats
from torch import nn

import regfast

MODULES = {
    1: (nn.MaxPool1d, regfast.MaxPool1dAA),
    2: (nn.MaxPool2d, regfast.MaxPool2dAA),
    3: (nn.MaxPool3d, regfast.MaxPool3dAA),
}
SIDES = {1: (9,), 2: (9, 8), 3: (5, 6, 7)}
ranks = pytest.mark.parametrize("rank", MODULES)


def cnn(pool):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), pool, nn.Flatten(), nn.LazyLinear(4)
    )


@ranks
def test_the_signature_begins_as_torch_nn_s(rank):
    check_signature(*MODULES[rank][:2])


@ranks
@pytest.mark.parametrize(
    "arguments", [(2,), (3, 2, 1), (2, 2, 0, 2), (3, 2, 1, 1, False, True)], ids=str
)
@pytest.mark.parametrize("batch", [(), (2,), (0,)], ids=["unbatched", "batched", "empty"])
def test_shapes_are_torch_nn_s(rank, arguments, batch):
    theirs, ours = (module(*arguments) for module in MODULES[rank])
    x = torch.randn(*batch, 3, *SIDES[rank], requires_grad=True)
    y = ours(x)
    assert y.shape == theirs(x).shape
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@ranks
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_memory_formats_are_torch_nn_s(rank, dtype, batch, channels, ceil_mode):
    """channels_last in, channels_last out; torch's choice where sizes of 1 leave it open."""
    theirs, ours = (module(3, 3, 1, ceil_mode=ceil_mode) for module in MODULES[rank])
    x = torch.randn(batch, *SIDES[rank], channels).to(dtype).movedim(-1, 1)
    for image in (x, x.contiguous(), x[..., 1:]):
        # nn.MaxPool1d keeps a format only under autograd.
        expected = theirs(image.detach().requires_grad_())
        for y in (ours(image), ours(image.detach().requires_grad_())):
            check_layout(y, expected)


def check_layout(y, expected):
    assert y.dtype == expected.dtype
    # The stride of a dimension of size 1 has no effect, and PyTorch's own poolings differ there.
    strides, expected_strides = (
        [s for n, s in zip(t.shape, t.stride()) if n > 1] for t in (y, expected)
    )
    assert strides == expected_strides


@ranks
def test_without_decimation_it_is_max_pooling(rank):
    theirs, ours = (module(3, 1, 1) for module in MODULES[rank])
    x = torch.randn(2, 3, *SIDES[rank])
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize("padding_mode", ["partial", "replicate", "reflect"])
def test_a_constant_image_stays_constant_to_the_last_corner(padding_mode):
    for side in range(2, 9):
        y = regfast.MaxPool2dAA(2, padding_mode=padding_mode)(torch.full((1, 1, side, side), 3.0))
        torch.testing.assert_close(y, torch.full_like(y, 3.0), rtol=0, atol=0)


def test_a_checkpoint_of_max_pooling_loads_strictly():
    before, after = cnn(nn.MaxPool2d(2)), cnn(regfast.MaxPool2dAA(2))
    x = torch.randn(2, 3, 12, 12)
    before(x), after(x)
    assert after.load_state_dict(before.state_dict(), strict=True)
    assert not list(regfast.MaxPool2dAA(2).parameters()) and not regfast.MaxPool2dAA(2).state_dict()


def test_repr_shows_the_arguments():
    assert repr(regfast.MaxPool2dAA(3, 2, 1)) == (
        "MaxPool2dAA(kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False, ratio=1.7, "
        "filter='binomial', padding_mode='partial')"
    )
    assert repr(regfast.BlurPool2d()) == (
        "BlurPool2d(kernel_size=3, stride=2, padding='same', filter='binomial', "
        "padding_mode='reflect')"
    )


@pytest.mark.parametrize(
    "module",
    [regfast.MaxPool2dAA(3, 2, 1, filter="hann"), regfast.BlurPool3d(5), regfast.BlurLayer(D=1)],
    ids=repr,
)
def test_modules_copy_and_pickle(module):
    x = torch.randn(2, 3, *SIDES[module.rank])
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(copied) == repr(module)
        torch.testing.assert_close(copied(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("layer", [regfast.MaxPool2dAA(2), regfast.BlurPool2d()], ids=repr)
def test_the_argument_of_a_call_is_named_as_torch_nn_s(layer):
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(layer(input=x), layer(x))


def test_surgery_on_a_layer_is_obeyed():
    """torchvision's SSD sets ceil_mode on pooling layers, segmentation models set stride."""
    layer, x = regfast.MaxPool2dAA(3, 2), torch.randn(1, 1, 10, 10)
    layer.ceil_mode = True
    assert layer(x).shape == nn.MaxPool2d(3, 2, ceil_mode=True)(x).shape
    layer.stride = 1
    torch.testing.assert_close(layer(x), nn.MaxPool2d(3, 1)(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="padding"):
        layer.padding = 2


@pytest.mark.parametrize(
    "layer",
    [
        regfast.MaxPool2dAA(2),
        regfast.AvgPool2dAA(2),
        regfast.BlurPool2d(),
        regfast.Conv2dAA(2, 2, 3, 2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("value", [0, "2"])
def test_what_is_refused_leaves_a_layer_as_it_was(layer, value):
    before, x = repr(layer), torch.randn(1, 2, 9, 9)
    y = layer(x)
    with pytest.raises((ValueError, TypeError), match=f"got {value!r}"):
        layer.stride = value
    assert repr(layer) == before
    assert torch.equal(copy.deepcopy(layer)(x), y)


def test_the_blur_answers_to_the_stride():
    """b = int(1.7 s), never less than s, 1 where s is 1; blur_size overrides: a tuple literally."""

    def sizes(**arguments):
        return [len(taps) for taps in regfast.MaxPool2dAA(2, **arguments)._window.taps]

    assert sizes() == [3, 3]
    assert sizes(stride=(1, 4)) == [1, 6]
    assert sizes(stride=3, ratio=0.1) == [3, 3]
    assert sizes(stride=2, ratio=(1, 2.5)) == [2, 5]
    assert sizes(stride=(1, 2), blur_size=5) == [1, 5]
    assert sizes(stride=(1, 2), blur_size=(4, 5)) == [4, 5]
    assert sizes(stride=(1, 2), filter=[1.0, 2.0, 1.0]) == [1, 3]


def test_the_blur_s_sizes():
    x = torch.randn(2, 3, 9, 8)
    assert regfast.BlurPool2d(5)(x).shape == (2, 3, 5, 4)
    assert regfast.BlurPool2d(4, 3)(x).shape == (2, 3, 3, 3)
    assert regfast.BlurPool2d(3, 2, 0)(x).shape == (2, 3, 4, 3)
    assert regfast.BlurPool2d(3, (2, 1), (1, 2))(x).shape == (2, 3, 5, 10)
    assert regfast.BlurPool2d(3)(x[0]).shape == (3, 5, 4)


def test_the_book_s_blur_layer():
    """kernel_size=5, stride=2, D=2, padded "same" on every axis whatever the image's sides."""
    x = torch.randn(2, 3, 9, 16)
    torch.testing.assert_close(regfast.BlurLayer()(x), regfast.BlurPool2d(5, 2)(x), rtol=0, atol=0)
    assert regfast.BlurLayer(3, 4, D=1)(x[0]).shape == (3, 9, 4)
    assert regfast.BlurLayer(D=3)(x[None]).shape == (1, 2, 2, 5, 8)


def test_timm_s_calling_convention():
    layer = regfast.BlurPool2d(channels=64, stride=2, device="cpu", dtype=torch.bfloat16)
    assert layer(torch.randn(1, 64, 8, 8)).shape == (1, 64, 4, 4)
    for other in (regfast.BlurPool1d, regfast.BlurPool3d):
        with pytest.raises(TypeError, match="channels"):
            other(channels=64)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 64])
def test_binomial_taps(size):
    expected = stats.binom.pmf(np.arange(size), size - 1, 0.5)
    # SciPy computes its pmf from logarithms, and has their error.
    np.testing.assert_allclose(regfast.filters.binomial(size), expected, rtol=1e-12)
    assert math.fsum(regfast.filters.binomial(size)) == 1.0


def test_filters_by_name_and_by_value():
    def taps(filter, size=3):
        return regfast.BlurPool1d(size, filter=filter)._window.taps[0]

    assert taps("hann") == pytest.approx((0.25, 0.5, 0.25))
    assert taps("triang") == pytest.approx((0.25, 0.5, 0.25))
    assert taps("hamming") == pytest.approx((0.08 / 1.16, 1 / 1.16, 0.08 / 1.16))
    assert taps("boxcar") == pytest.approx((1 / 3,) * 3)
    assert sum(taps(("kaiser", 4.0), 6)) == pytest.approx(1)
    for given in ([1, 2, 3], (1.0, 2.0, 3.0), np.array([1, 2, 3]), torch.tensor([1.0, 2.0, 3.0])):
        assert taps(given) == pytest.approx((1 / 6, 2 / 6, 3 / 6))


def test_taps_given_as_numbers_have_unit_gain():
    ones = torch.ones(1, 2, 8, 8)
    for layer in (
        regfast.MaxPool2dAA(2, filter=[1, 3, 3, 1]),
        regfast.MaxPool2dAA(2, filter=([1, 2, 1], np.array([1, 3, 3, 1]))),
        regfast.AvgPool2dAA(2, filter=[1, 3, 3, 1]),
        regfast.BlurPool2d(4, filter=(1, 3, 3, 1)),
        regfast.Conv2dAA(2, 2, 1, 2, bias=False, blur_filter=[1, 3, 3, 1]),
    ):
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
        y = layer(ones)
        torch.testing.assert_close(y, torch.ones_like(y))
    expected = regfast.BlurPool2d(4)(ones.cumsum(-1))
    torch.testing.assert_close(
        regfast.BlurPool2d(4, filter=[1, 3, 3, 1])(ones.cumsum(-1)), expected
    )


def test_numpy_s_numbers_and_arrays_are_taken():
    x = torch.randn(1, 2, 8, 8)
    two, three, one = np.array([2, 2]), np.int64(3), np.array(1)
    given = (
        regfast.MaxPool2dAA(three, two, one, ratio=np.float32(1.7)),
        regfast.MaxPool2dAA(3, 2, 1),
    )
    assert torch.equal(given[0](x), given[1](x))
    assert repr(given[0]).startswith("MaxPool2dAA(kernel_size=3, stride=[2, 2], padding=1,")
    blurs = (
        regfast.BlurPool2d(three, two, one, filter=np.array([1, 2, 1])),
        regfast.BlurPool2d(3, 2, 1),
    )
    assert torch.equal(blurs[0](x), blurs[1](x))
    average = regfast.AvgPool2dAA(three, two, one, divisor_override=np.int64(4))
    assert torch.equal(average(x), regfast.AvgPool2dAA(3, 2, 1, divisor_override=4)(x))
    assert regfast.functional.max_blur_pool2d(x, np.array([2, 2]), blur_size=np.int64(5)).shape == (
        1,
        2,
        4,
        4,
    )
    assert regfast.filters.binomial(np.int64(3)) == (0.25, 0.5, 0.25)
    assert regfast.functional.rezero(x, x, np.array(0.5), "identity").equal(1.5 * x)


@pytest.mark.parametrize(
    "layer", [regfast.MaxPool2dAA(1), regfast.AvgPool2dAA(1), regfast.BlurPool2d(1, 1)], ids=repr
)
def test_an_identity_leaves_its_input_to_what_comes_after(layer):
    x = -torch.ones(1, 2, 4, 4)
    assert nn.Sequential(layer, nn.ReLU(inplace=True))(x).eq(0).all() and x.eq(-1).all()


ACTIVATED = [
    (regfast.MaxPool1dAA, (2, 9), (3, 2, 1)), (regfast.MaxPool2dAA, (2, 9, 8), (2,)),
    (regfast.MaxPool3dAA, (2, 5, 6, 7), (2,)),
    (regfast.BlurPool1d, (2, 9), ()), (regfast.BlurPool2d, (2, 9, 8), (4, 3)),
    (regfast.BlurPool3d, (2, 5, 6, 7), ()),
]  # fmt: skip


@pytest.mark.parametrize(
    "module,shape,arguments", ACTIVATED, ids=lambda value: getattr(value, "__name__", "")
)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf], ids=str)
def test_an_activation_is_that_of_a_relu_before(module, shape, arguments, value):
    """At zero and at NaN the gradient is a ReLU's too, and x is unchanged."""
    x = torch.randn(2, *shape).mul(2).round() / 2
    if value is not None:
        x[torch.rand_like(x) < 0.1] = value
    kept, x = x.clone(), x.requires_grad_()
    found, expected = module(*arguments, activation="relu")(x), module(*arguments)(x.relu())
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    grad = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, x, grad)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        torch.testing.assert_close(
            module(*arguments, activation="relu")(x), expected, rtol=1e-6, atol=1e-6, equal_nan=True
        )
    torch.testing.assert_close(x, kept, rtol=0, atol=0, equal_nan=True)
    assert repr(module(*arguments, activation="relu")).endswith("activation='relu')")


@pytest.mark.parametrize(
    "module",
    [regfast.MaxPool1dAA(2), regfast.MaxPool2dAA(3, 2, 1), regfast.BlurPool2d(activation="relu")],
)
def test_fx_traces_a_layer_as_one_call(module):
    traced = torch.fx.symbolic_trace(nn.Sequential(module))
    names = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
    assert names == ["Window", "max_blur_pool" if "Max" in repr(module) else "blur_pool"]
    x = torch.randn(2, 3, *SIDES[module.rank])
    torch.testing.assert_close(traced(x), module(x), rtol=0, atol=0)


def test_autocast_leaves_the_dtype_alone():
    x = torch.randn(1, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for layer in (regfast.MaxPool2dAA(2), regfast.BlurPool2d()):
            y = layer(x)
            assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0)


def test_meta_tensors_have_shapes():
    assert regfast.MaxPool2dAA(2)(torch.empty(2, 3, 9, 8, device="meta")).shape == (2, 3, 4, 4)
    assert regfast.BlurPool2d()(torch.empty(2, 3, 9, 8, device="meta")).shape == (2, 3, 5, 4)
