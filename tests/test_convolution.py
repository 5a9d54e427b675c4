"""The anti-aliased convolutions replace nn.Conv: a convolution at stride 1, then a blur."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import check_signature
from torch import nn

import regfast

MODULES = {
    1: (nn.Conv1d, regfast.Conv1dAA, regfast.BlurPool1d),
    2: (nn.Conv2d, regfast.Conv2dAA, regfast.BlurPool2d),
}
SIDES = {1: (17,), 2: (17, 14)}
# float32 sums of some tens of products of order one, in another order.
ROUNDING = dict(rtol=1e-5, atol=1e-5)
ARGUMENTS = [
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=5, stride=3, padding=2, groups=2, bias=False),
    dict(kernel_size=3, stride=2, padding=1, padding_mode="circular"),
    dict(kernel_size=2, stride=2, dilation=3, padding=2, padding_mode="replicate"),
    dict(kernel_size=1, stride=2, padding=1),
]
ranks = pytest.mark.parametrize("rank", MODULES)


def pair(rank: int, blur: dict, **arguments) -> tuple[nn.Module, nn.Module]:
    """nn.Conv at stride 1, and the anti-aliased one with its weights."""
    plain = MODULES[rank][0](4, 6, **(arguments | {"stride": 1}))
    ours = MODULES[rank][1](4, 6, **arguments, **blur)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return plain, ours


def check_same(found: nn.Module, expected, x: torch.Tensor) -> None:
    """Outputs, and gradients of the input and of the parameters, the weight's first."""
    results = []
    for function, parameters in ((found, list(found.parameters())), expected):
        leaf = x.detach().clone().requires_grad_()
        y = function(leaf)
        torch.manual_seed(1)
        results.append(
            [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], torch.randn_like(y))]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **ROUNDING)


@ranks
def test_the_signature_begins_as_torch_nn_s(rank):
    check_signature(*MODULES[rank][:2])


@ranks
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_the_blur_comes_after_the_convolution(rank, arguments):
    plain, ours = pair(rank, {}, **arguments)
    stride = arguments["stride"]
    blur = MODULES[rank][2](int(1.7 * stride), stride)
    check_same(
        ours, (lambda x: blur(plain(x)), list(plain.parameters())), torch.randn(2, 4, *SIDES[rank])
    )


@ranks
@pytest.mark.parametrize("arguments", ARGUMENTS[:3], ids=str)
def test_an_activation_stands_between_them(rank, arguments):
    options = dict(activation="relu", blur_size=4, blur_filter="hann", blur_padding_mode="zeros")
    plain, ours = pair(rank, options, **arguments)
    blur = MODULES[rank][2](4, arguments["stride"], filter="hann", padding_mode="zeros")
    check_same(
        ours,
        (lambda x: blur(plain(x).relu()), list(plain.parameters())),
        torch.randn(2, 4, *SIDES[rank]),
    )


@ranks
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_or_the_blur_comes_before_the_convolution(rank, arguments):
    plain, ours = pair(rank, {"blur": "before"}, **arguments)
    blur = MODULES[rank][2](int(1.7 * arguments["stride"]), 1)
    strided = MODULES[rank][0](4, 6, **arguments)
    strided.load_state_dict(plain.state_dict())
    check_same(
        ours,
        (lambda x: strided(blur(x)), list(strided.parameters())),
        torch.randn(2, 4, *SIDES[rank]),
    )


@ranks
@pytest.mark.parametrize("blur", ["after", "before"])
@pytest.mark.parametrize(
    "options", [{}, {"blur_padding_mode": "zeros"}, {"blur_filter": [1.0, 2.0, 1.0]}], ids=str
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_pointwise_convolution_is_the_same_function_both_ways(rank, blur, options, bias):
    """Where the blur would change a bias, the bias is added after it."""
    plain, ours = pair(rank, {"blur": blur, **options}, kernel_size=1, stride=2, bias=bias)
    names = {"blur_padding_mode": "padding_mode", "blur_filter": "filter"}
    after = MODULES[rank][2](3, 2, **{names[name]: value for name, value in options.items()})
    unit = not options or not bias
    expected = (lambda x: after(plain(x))) if blur == "after" or unit else lambda x: plain(after(x))
    check_same(ours, (expected, list(plain.parameters())), torch.randn(2, 4, *SIDES[rank]))


def test_a_pointwise_convolution_has_a_quarter_of_the_arithmetic(monkeypatch):
    sizes = []
    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr(
        regfast.Conv2dAA,
        "_convolve",
        staticmethod(lambda x, *args: (sizes.append(x.shape), convolve(x, *args))[1]),
    )
    regfast.Conv2dAA(4, 6, 1, 2)(torch.randn(1, 4, 16, 16))
    regfast.Conv2dAA(4, 6, 1, 2, activation="relu")(torch.randn(1, 4, 16, 16))
    assert sizes == [(1, 4, 8, 8), (1, 4, 16, 16)]


def test_none_leaves_the_decimation_to_a_later_layer():
    plain, ours = pair(2, {"blur": None}, kernel_size=3, stride=2, padding=1)
    x = torch.randn(2, 4, 9, 8)
    assert torch.equal(ours(x), plain(x))


@ranks
@pytest.mark.parametrize("blur", ["after", "before", None])
def test_with_stride_one_it_is_nn_conv(rank, blur):
    plain, ours = pair(
        rank, {"blur": blur}, kernel_size=3, stride=1, padding="same", padding_mode="reflect"
    )
    x = torch.randn(2, 4, *SIDES[rank])
    assert torch.equal(ours(x), plain(x))


@st.composite
def convolutions(draw):
    rank = draw(st.sampled_from([1, 2, 2]))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    arguments = dict(
        kernel_size=each(1, 4), stride=each(1, 4), padding=each(0, 3), dilation=each(1, 3)
    )
    sizes = [
        draw(st.integers(d * (k - 1) + 1, 20))
        for k, d in zip(arguments["kernel_size"], arguments["dilation"])
    ]
    return rank, arguments, sizes, draw(st.sampled_from(["after", "before"])), draw(st.booleans())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
def test_sizes_are_nn_conv_s(drawn):
    rank, arguments, sizes, blur, unbatched = drawn
    theirs, ours = (
        MODULES[rank][0](2, 3, **arguments),
        MODULES[rank][1](2, 3, **arguments, blur=blur),
    )
    x = torch.randn(2, *sizes) if unbatched else torch.randn(2, 2, *sizes)
    assert ours(x).shape == theirs(x).shape


def test_checkpoints_go_both_ways():
    theirs, ours = nn.Conv2d(4, 6, 3, 2), regfast.Conv2dAA(4, 6, 3, 2)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert isinstance(ours, nn.Conv2d)


def test_factory_arguments_and_formats():
    layer = regfast.Conv2dAA(8, 8, 3, 2, 1, device="meta", dtype=torch.bfloat16)
    assert layer.weight.device.type == "meta" and layer.weight.dtype == torch.bfloat16
    layer = regfast.Conv2dAA(8, 8, 3, 2, 1).to(memory_format=torch.channels_last)
    y = layer(torch.randn(2, 8, 9, 8).contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 8, 9, 8)).dtype == torch.bfloat16


def test_surgery_on_a_layer_is_obeyed():
    layer, x = regfast.Conv2dAA(4, 6, 3, 2, 1), torch.randn(1, 4, 8, 8)
    layer.stride = (1, 1)
    assert layer(x).shape == (1, 6, 8, 8)
    layer.stride = (4, 4)
    assert layer(x).shape == (1, 6, 2, 2)
    # nn.Conv2d takes an integer there too.
    layer = regfast.Conv2dAA(4, 6, 1, 2)
    expected = layer(input=x)
    layer.kernel_size = layer.stride = 1
    layer.stride, layer.padding = 2, 0
    assert torch.equal(layer(x), expected)
    layer.padding = 1
    assert layer(x).shape == (1, 6, 5, 5)
    # Fusing a normalisation does this.
    layer = regfast.Conv2dAA(4, 6, 1, 2, bias=False, blur_padding_mode="zeros")
    layer.bias = nn.Parameter(torch.ones(6))
    torch.testing.assert_close(
        layer(x),
        regfast.BlurPool2d(3, 2, padding_mode="zeros")(nn.Conv2d.forward(no_stride(layer), x)),
    )


def no_stride(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer)
    layer.stride = (1, 1)
    return layer


def test_modules_copy_pickle_and_print():
    layer, x = (
        regfast.Conv2dAA(4, 6, 3, 2, 1, blur_size=4, blur_filter="hann", activation="relu"),
        torch.randn(1, 4, 9, 8),
    )
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(copied) == repr(layer)
        assert torch.equal(copied(x), layer(x))
    assert "stride=(2, 2)" in repr(
        layer
    ) and "blur='after', blur_size=4, blur_filter='hann'" in repr(layer)


@pytest.mark.parametrize("blur", ["after", "before"])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_layers_compile_export_and_trace(blur, kernel_size):
    torch._dynamo.reset()
    layer, x = regfast.Conv2dAA(4, 6, kernel_size, 2, blur=blur), torch.randn(2, 4, 9, 8)
    expected = layer(x)
    exported = torch.export.export(layer, (x,)).module()
    for traced in (
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        exported,
        torch.fx.symbolic_trace(layer),
    ):
        torch.testing.assert_close(traced(x), expected, **ROUNDING)


@pytest.mark.parametrize("activation_layer", [nn.ReLU, nn.Hardswish, None])
@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, None])
def test_the_chapter_s_order(activation_layer, norm_layer):
    """Convolution at stride 1, normalisation, activation, blur; parameters as torchvision's."""
    stage = regfast.ConvNormActAA(
        4, 6, 5, 2, norm_layer=norm_layer, activation_layer=activation_layer, dilation=2
    )
    names = [
        "0.weight",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ]
    assert list(stage.state_dict()) == (names if norm_layer else ["0.weight", "0.bias"])
    x = torch.randn(2, 4, 17, 16)
    expected = stage[0](x)
    assert stage[0].stride == (1, 1) and expected.shape == (2, 6, 17, 16)
    expected = stage[1](expected) if norm_layer else expected
    expected = activation_layer()(expected) if activation_layer else expected
    torch.testing.assert_close(stage(x), regfast.BlurPool2d(3, 2)(expected), **ROUNDING)
    assert len(stage) == 2 + bool(norm_layer) + (activation_layer is nn.Hardswish)


def test_an_activation_with_a_hook_is_called():
    activation, called = nn.ReLU(), []
    activation.register_forward_hook(lambda *_: called.append(True))
    stage, x = (
        regfast.ConvNormActAA(4, 6, activation_layer=lambda: activation),
        torch.randn(2, 4, 9, 8),
    )
    assert stage(x).shape == (2, 6, 5, 4) and called and stage[2] is activation


def test_the_chapter_s_order_with_stride_one_has_no_blur():
    stage = regfast.ConvNormActAA(4, 6, stride=1, device="meta", dtype=torch.float64)
    assert [type(layer) for layer in stage] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert {p.dtype for p in stage.parameters()} == {torch.float64} and {
        p.device.type for p in stage.parameters()
    } == {"meta"}
    stage = regfast.ConvNormActAA(
        4, 6, activation_layer=nn.PReLU, device="meta", dtype=torch.float64
    )
    assert (stage[2].weight.dtype, stage[2].weight.device.type) == (torch.float64, "meta")


@pytest.mark.parametrize(
    "arguments,error,words",
    [
        (dict(blur="behind"), ValueError, ["blur", "'behind'", "'after'", "'before'"]),
        (dict(blur="before", activation="relu"), ValueError, ["activation", "'relu'", "None"]),
        (dict(activation="gelu"), ValueError, ["activation", "'gelu'", "'relu'"]),
        (dict(blur_size=0), ValueError, ["blur_size", "0", "at least 1"]),
        (dict(blur_filter="sinc7"), ValueError, ["filter", "'sinc7'", "binomial"]),
        (dict(blur_padding_mode="partial"), ValueError, ["padding_mode", "'partial'", "'reflect'"]),
        (dict(padding="same"), ValueError, ["padding='same'", "strided"]),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error) as raised:
        regfast.Conv2dAA(4, 6, 3, 2, **arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)
