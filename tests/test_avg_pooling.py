"""The anti-aliased average poolings replace nn.AvgPool, and are a blur followed by nn.AvgPool."""

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
    1: (nn.AvgPool1d, regfast.AvgPool1dAA, regfast.BlurPool1d),
    2: (nn.AvgPool2d, regfast.AvgPool2dAA, regfast.BlurPool2d),
    3: (nn.AvgPool3d, regfast.AvgPool3dAA, regfast.BlurPool3d),
}
SIDES = {1: (17,), 2: (17, 14), 3: (7, 8, 9)}
# Averages of some tens of numbers of order one in float32, in another order.
ROUNDING = dict(rtol=1e-5, atol=1e-6)
ranks = pytest.mark.parametrize("rank", MODULES)


@ranks
def test_the_signature_begins_as_torch_nn_s(rank):
    check_signature(*MODULES[rank][:2])


@ranks
@pytest.mark.parametrize(
    "arguments",
    [
        dict(kernel_size=2),
        dict(kernel_size=3, stride=2),
        dict(kernel_size=3, stride=2, padding=1),
        dict(kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
        dict(kernel_size=2, stride=3, ceil_mode=True),
        dict(kernel_size=4),
    ],
    ids=str,
)
def test_it_is_a_blur_and_then_torch_nn_s(rank, arguments):
    """A single pass, where possible, applies the blur's border to the image too."""
    average, ours, blur = MODULES[rank]
    stride = arguments.get("stride", arguments["kernel_size"])
    for options in ({}, {"padding_mode": "zeros", "blur_size": 2, "filter": [0.5, 0.25]}):
        size = options.get("blur_size", int(1.7 * stride))
        before = blur(
            size,
            1,
            filter=options.get("filter", "binomial"),
            padding_mode=options.get("padding_mode", "reflect"),
        )
        x = torch.randn(2, 3, *SIDES[rank], requires_grad=True)
        found, expected = ours(**arguments, **options)(x), average(**arguments)(before(x))
        torch.testing.assert_close(found, expected, **ROUNDING)
        grad = torch.randn_like(found)
        torch.testing.assert_close(
            *(torch.autograd.grad(y, x, grad)[0] for y in (found, expected)), **ROUNDING
        )


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_divisor_is_that_of_the_sums(rank, padding):
    ours, x = MODULES[rank][1], torch.randn(2, 3, *SIDES[rank])
    plain, divided = (ours(3, 2, padding, divisor_override=divisor)(x) for divisor in (3**rank, 5))
    torch.testing.assert_close(divided, plain * 3**rank / 5, **ROUNDING)
    torch.testing.assert_close(plain, ours(3, 2, padding)(x), **ROUNDING)


def test_a_constant_image_stays_constant():
    x = torch.full((1, 2, 9, 8), 3.0)
    for arguments in ((2,), (3, 2), (4,)):
        torch.testing.assert_close(regfast.AvgPool2dAA(*arguments)(x), nn.AvgPool2d(*arguments)(x))


def test_one_pass_reads_what_a_kernel_of_few_taps_can():
    """Two by two at stride two is the blur (1, 3, 3, 1)/8; 4 at stride 4 would have 9 taps."""
    assert regfast.AvgPool2dAA(2)._window.taps == ((0.125, 0.375, 0.375, 0.125),) * 2
    assert regfast.AvgPool2dAA(2)._window.stride == (2, 2)
    assert regfast.AvgPool2dAA(4)._window.stride == (1, 1)


@ranks
def test_with_stride_one_it_is_torch_nn_s(rank):
    average, ours, _ = MODULES[rank]
    x = torch.randn(2, 3, *SIDES[rank])
    assert torch.equal(ours(3, 1, 1)(x), average(3, 1, 1)(x))


@ranks
@pytest.mark.parametrize("padding", [0, 1])
def test_with_stride_one_a_blur_size_per_axis_blurs(rank, padding):
    """As in max pooling, a blur_size per axis blurs the image at stride 1, too."""
    average, ours, blur = MODULES[rank]
    x = torch.randn(2, 3, *SIDES[rank])
    found = ours(2, 1, padding, blur_size=(3,) * rank)(x)
    torch.testing.assert_close(found, average(2, 1, padding)(blur(3, 1)(x)), **ROUNDING)


@st.composite
def averages(draw):
    rank = draw(st.sampled_from([1, 2, 2, 3]))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    kernel = each(1, 4)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    sizes = [draw(st.integers(max(k, 2), 12 if rank < 3 else 6)) for k in kernel]
    return (
        rank,
        (kernel, each(1, 4), padding, draw(st.booleans()), draw(st.booleans())),
        sizes,
        draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(averages())
def test_sizes_are_torch_nn_s(drawn):
    rank, arguments, sizes, unbatched = drawn
    theirs, ours = (module(*arguments) for module in MODULES[rank][:2])
    x = torch.randn(2, *sizes) if unbatched else torch.randn(2, 2, *sizes)
    assert ours(x).shape == theirs(x).shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("padding", [0, 1])
def test_dtype_and_memory_format_stay(dtype, padding):
    x = torch.randn(2, 8, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    y = regfast.AvgPool2dAA(3, 2, padding)(x)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)


def test_surgery_copies_pickles_and_repr():
    layer, x = regfast.AvgPool2dAA(2), torch.randn(1, 2, 9, 8)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(copied) == repr(layer) and torch.equal(copied(x), layer(x))
    assert list(layer.state_dict()) == []
    layer.ceil_mode = True
    assert layer(x).shape == (1, 2, 5, 4)
    layer.stride = 1
    layer.ceil_mode = False
    assert torch.equal(layer(x), nn.AvgPool2d(2, 1)(x))
    layer.stride = None
    assert torch.equal(layer(input=x), regfast.AvgPool2dAA(2)(x))


@pytest.mark.parametrize("padding", [0, 1])
def test_layers_compile_export_and_trace(padding):
    torch._dynamo.reset()
    layer, x = regfast.AvgPool2dAA(3, 2, padding), torch.randn(2, 4, 9, 8)
    exported = torch.export.export(layer, (x,)).module()
    for traced in (
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        exported,
        torch.fx.symbolic_trace(layer),
    ):
        torch.testing.assert_close(traced(x), layer(x), **ROUNDING)


@pytest.mark.parametrize(
    "arguments,error,words",
    [
        (dict(kernel_size=0), ValueError, ["kernel_size", "0", "at least 1"]),
        (dict(kernel_size=2.5), TypeError, ["kernel_size", "2.5", "integer"]),
        (dict(kernel_size=3, padding=2), ValueError, ["padding", "2", "half", "kernel_size"]),
        (dict(kernel_size=2, ceil_mode=1), TypeError, ["ceil_mode", "1", "True or False"]),
        (
            dict(kernel_size=2, count_include_pad=None),
            TypeError,
            ["count_include_pad", "None", "True or False"],
        ),
        (dict(kernel_size=2, divisor_override=0), ValueError, ["divisor_override", "0"]),
        (
            dict(kernel_size=2, divisor_override=2.0),
            TypeError,
            ["divisor_override", "2.0", "integer"],
        ),
        (
            dict(kernel_size=2, padding_mode="partial"),
            ValueError,
            ["padding_mode", "'partial'", "'reflect'"],
        ),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error) as raised:
        regfast.AvgPool2dAA(**arguments)
    assert all(word in str(raised.value) for word in words), str(raised.value)
