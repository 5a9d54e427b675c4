"""The references are the poolings that SciPy computes.

They take every argument, memory format and dtype. Their two composites agree in values and
gradients. As in nn.MaxPool2d, the first of equal maxima takes the gradient, the last NaN wins, and
padding takes none. They differentiate twice, forward-mode and under torch.func; they trace, compile
and export.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import max_window as window
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import regfast.reference.blur_pool as blur_module
import regfast.reference.max_blur_pool as max_module
from regfast._core.geometry import blur_window
from regfast.reference.blur_pool import blur_pool
from regfast.reference.max_blur_pool import max_blur_pool

INF, NAN = math.inf, math.nan
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
# A sum of at most a few hundred float64 products of order one in another order: 1e-12 is thousands
# of roundings.
FLOAT64 = dict(rtol=0, atol=1e-12)
# The same in float32.
FLOAT32 = dict(rtol=0, atol=1e-5)


def by_oracle(x, w):
    y = oracle.max_blur_pool(
        x.numpy(force=True),
        w.kernel_size,
        w.stride,
        w.padding,
        w.dilation,
        w.ceil_mode,
        w.taps,
        w.padding_mode,
    )
    return torch.from_numpy(y)


@pytest.fixture
def composite(request, monkeypatch):
    """Runs a test on each composite: that of small images, and the other."""
    choose(request.param, monkeypatch)


def choose(composite, monkeypatch):
    if composite == "small":
        return
    for module in (max_module, blur_module):
        monkeypatch.setattr(module, "SMALL", 0)
    if composite != "library":
        monkeypatch.setattr(blur_module, "prefers_convolution", lambda x: False)
        monkeypatch.setattr(max_module, "prefers_max_pool", lambda x: False)
    if composite == "compiled":
        monkeypatch.setattr(max_module, "is_compiled", lambda: True)


both_composites = pytest.mark.parametrize(
    "composite", ["small", "library", "slices"], indirect=True
)
all_composites = pytest.mark.parametrize(
    "composite", ["small", "library", "slices", "compiled"], indirect=True
)

# Each line is a shape and the differences from MaxPool2dAA(2).
TABLE = [
    ((8, 8), {}),
    ((9, 7), {}),
    ((1, 2), {"kernel_size": (1, 2)}),
    ((2, 2), {}),
    ((9, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((10, 11), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    ((10, 10), {"kernel_size": 2, "stride": 3, "ceil_mode": True, "padding_mode": "zeros"}),
    ((12, 13), {"kernel_size": 3, "stride": 1}),
    ((12, 13), {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)}),
    ((3, 3), {"kernel_size": 2, "blur_size": 9, "padding_mode": "reflect"}),
    ((2, 3), {"kernel_size": 2, "blur_size": 9, "padding_mode": "reflect"}),
    ((3, 3), {"kernel_size": 2, "blur_size": 9}),
    ((6, 6), {"kernel_size": 2, "blur_size": 4, "padding_mode": "replicate"}),
    ((9, 9), {"kernel_size": 3, "dilation": 2, "padding": 1, "stride": 2}),
    ((9, 5), {"kernel_size": 2, "dilation": (3, 4), "padding": 1, "stride": 1}),
    ((1, 1), {"kernel_size": 2, "dilation": 2, "padding": 1, "stride": 2}),
    (
        (1, 1),
        {
            "kernel_size": 3,
            "padding": 0,
            "stride": 3,
            "ceil_mode": True,
            "padding_mode": "replicate",
        },
    ),
    ((11,), {"kernel_size": 4, "stride": 4, "padding": 2}),
    ((11,), {"kernel_size": 2, "filter": (0.5, -0.25, 1.0, 0.125)}),
    ((5, 6, 7), {"kernel_size": 2}),
    (
        (5, 6, 7),
        {
            "kernel_size": (1, 2, 3),
            "stride": (1, 2, 3),
            "padding": (0, 1, 1),
            "padding_mode": "reflect",
        },
    ),
]


@all_composites
@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("shape, changes", TABLE)
def test_table(shape, changes, differentiated, composite):
    w = window(len(shape), **changes)
    x = torch.randn(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = max_blur_pool(x.requires_grad_(differentiated), w)
    torch.testing.assert_close(y.detach(), by_oracle(x, w), **FLOAT64)


@st.composite
def max_cases(draw):
    """A window with separate arguments per axis, and sizes that nn.MaxPool accepts."""
    rank = draw(st.integers(1, 3))
    axes = st.tuples(*[st.integers(0, 11)] * rank)
    k, s, d, b = (tuple(1 + n % most for n in draw(axes)) for most in (4, 4, 3, 7))
    p = tuple(n % (size // 2 + 1) for n, size in zip(draw(axes), k))
    ceil_mode = draw(st.booleans())
    sizes = []
    for one in zip(k, s, p, d):
        smallest = next(n for n in range(1, 20) if oracle.max_pool_outputs([n], *one, ceil_mode))
        sizes.append(smallest + draw(st.integers(0, 6 if rank < 3 else 3)))
    mode = draw(st.sampled_from(["partial", "replicate", "reflect", "zeros"]))
    w = window(
        rank,
        kernel_size=k,
        stride=s,
        padding=p,
        dilation=d,
        ceil_mode=ceil_mode,
        blur_size=b,
        padding_mode=mode,
    )
    return w, sizes, draw(st.integers(0, 2**16))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(max_cases())
def test_drawn(case):
    w, sizes, seed = case
    x = torch.randn(
        1, 2, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    expected = by_oracle(x, w)
    torch.testing.assert_close(max_blur_pool(x, w), expected, **FLOAT64)
    torch.testing.assert_close(max_blur_pool(x.requires_grad_(), w).detach(), expected, **FLOAT64)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(1, 3).flatmap(
        lambda rank: st.tuples(*[st.tuples(*[st.integers(1, n)] * rank) for n in (6, 4, 7)])
    ),
    st.sampled_from(["same", 0, 1, 3]),
    st.sampled_from(["replicate", "reflect", "zeros"]),
)
def test_drawn_blurs(axes, padding, mode):
    taps, stride, sizes = axes
    if padding != "same":
        sizes = tuple(max(size, b - 2 * padding) for size, b in zip(sizes, taps))
    w = blur_window(len(taps), taps, stride, padding, "binomial", mode)
    x = torch.randn(2, 2, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(oracle.blur_pool(x.numpy(), stride, padding, w.taps, mode))
    torch.testing.assert_close(blur_pool(x, w), expected, **FLOAT64)


def awkward(*shape, dtype=torch.float64):
    """A ReLU's output with plateaus, NaN and -inf: small integers, every eighth element NaN."""
    values = torch.tensor([0, 0, 0, 1, 1, 2, NAN, -INF], dtype=dtype)
    picked = values[
        torch.randint(8, (math.prod(shape),), generator=torch.Generator().manual_seed(1))
    ]
    picked[: picked.numel() // 4] = picked[: picked.numel() // 4].nan_to_num(0, neginf=0)
    picked[-picked.numel() // 4 :] = -INF
    return picked.view(shape).requires_grad_()


def value_and_grad(function, x):
    y = function(x)
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    return y.detach(), torch.autograd.grad(y, x, cotangent)[0]


@pytest.mark.parametrize("composite", ["slices", "compiled"])
@pytest.mark.parametrize("shape, changes", TABLE)
def test_composites_agree(shape, changes, composite, monkeypatch):
    w, x = window(len(shape), **changes), awkward(4, 3, *shape)
    library = value_and_grad(lambda x: max_blur_pool(x, w), x)
    choose(composite, monkeypatch)
    torch.testing.assert_close(
        value_and_grad(lambda x: max_blur_pool(x, w), x), library, equal_nan=True, **FLOAT64
    )
    assert not library[1].isnan().any()
    with torch.no_grad():
        torch.testing.assert_close(max_blur_pool(x, w), library[0], equal_nan=True, **FLOAT64)


@all_composites
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, changes",
    [
        ((9, 10), {}),
        ((9, 10), {"padding": 1}),
        ((9, 10), {"kernel_size": (3, 2), "padding": (1, 1)}),
        ((9, 10), {"kernel_size": 3, "padding": 1, "dilation": 2}),
        ((17,), {"kernel_size": 4, "padding": 2}),
        ((5, 4, 6), {"kernel_size": 2, "padding": 1}),
    ],
)
def test_ties_are_those_of_max_pooling(shape, changes, dtype, composite):
    x = awkward(4, 8, *shape, dtype=dtype)
    w = window(len(shape), stride=1, **changes)
    pool = MAX_POOLS[len(shape)](w.kernel_size, 1, w.padding, w.dilation)
    # Stride 1 has no blur, so values are equal to the bit. Gradients differ by the order of k^rank
    # terms; bfloat16 rounds numbers below ten to 2^-8.
    tolerance = FLOAT64 if dtype == torch.float64 else dict(rtol=2**-6, atol=2**-4)
    (y, grad), (expected, expected_grad) = (
        value_and_grad(lambda x: max_blur_pool(x, w), x),
        value_and_grad(pool, x),
    )
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(grad, expected_grad, **tolerance)


@all_composites
@pytest.mark.parametrize(
    "changes, taken",
    [
        ({"kernel_size": 2}, [1, 1, 1, 0]),
        ({"kernel_size": 3}, [1, 1, 0, 0]),
        ({"kernel_size": 3, "padding": 1}, [2, 1, 1, 0]),
    ],
)
def test_of_nothing_but_minus_infinity_the_first_takes_the_gradient(changes, taken, composite):
    # A blur of three taps reads windows beyond the padding, in the last case by more than max
    # pooling's own padding.
    w = window(1, stride=1, blur_size=(3,), filter=((0.0, 1.0, 0.0),), **changes)
    x = torch.full((1, 1, 4), -INF, requires_grad=True)
    y = max_blur_pool(x, w)
    y.backward(torch.ones_like(y))
    assert x.grad.flatten().tolist() == taken


@all_composites
@pytest.mark.parametrize("differentiated", [False, True])
def test_window_without_a_sample(differentiated, composite):
    w = window(1, kernel_size=2, stride=1, padding=1, dilation=3)
    x = torch.tensor([[[5.0, 7.0]]], requires_grad=differentiated)
    y = max_blur_pool(x, w)
    assert y.flatten().tolist() == [-INF]
    if differentiated:
        y.sum().backward()
        assert x.grad.flatten().tolist() == [0, 0]


@all_composites
@pytest.mark.parametrize("mode", ["partial", "replicate", "reflect"])
def test_constant_image_stays_constant(mode, composite):
    for changes in (
        {},
        {"kernel_size": 3, "padding": 1, "stride": 2, "ceil_mode": True},
        {"blur_size": 9},
    ):
        y = max_blur_pool(torch.full((1, 2, 5, 6), 3.0), window(2, padding_mode=mode, **changes))
        assert torch.equal(y, torch.full_like(y, 3.0))


def in_format(x, channels_last):
    if not channels_last:
        return x
    if x.ndim == 3:
        return in_format(x.unsqueeze(2), True).squeeze(2)
    return x.contiguous(
        memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    )


@all_composites
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_memory_format_and_dtype_are_kept(rank, dtype, composite):
    cases = (
        {},
        {"stride": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"padding_mode": "reflect", "blur_size": 17},
    )
    for channels_last in (False, True):
        x = in_format(torch.randn(2, 4, *[7] * rank).to(dtype), channels_last)
        for changes in cases:
            for differentiated in (False, True):
                y = max_blur_pool(x.requires_grad_(differentiated), window(rank, **changes))
                assert y.dtype == dtype
                assert in_format(y, channels_last).stride() == y.stride()
        y = blur_pool(x, blur_window(rank, 4, 2, "same", "binomial", "reflect"))
        assert y.dtype == dtype
        assert in_format(y, channels_last).stride() == y.stride()


def test_the_memory_format_is_kept_where_padding_loses_it(monkeypatch):
    """Padding does this on CUDA for few channels."""
    pad = torch.nn.functional.pad
    monkeypatch.setattr(
        torch.nn.functional, "pad", lambda *args, **options: pad(*args, **options).contiguous()
    )
    choose("slices", monkeypatch)
    x = in_format(torch.randn(2, 3, 7, 8), True)
    for changes in (
        {},
        {"kernel_size": 3, "padding": 1, "ceil_mode": True},
        {"padding_mode": "reflect"},
        {"kernel_size": 3, "stride": 1},
    ):
        for differentiated in (False, True):
            y = max_blur_pool(x.requires_grad_(differentiated), window(**changes))
            assert in_format(y, True).stride() == y.stride() != y.contiguous().stride()
    assert blur_pool(x, blur_window(2, 3, 2, "same", "binomial", "reflect")).stride(1) == 1


def test_small_images_are_pooled_as_others_are(monkeypatch):
    """Both formats, and slices of a batch, which stays unchanged; with gradients."""
    for changes in (
        {},
        {"kernel_size": 3, "stride": 2, "padding": 1, "activation": "relu"},
        {"kernel_size": (1, 3), "stride": (2, 3)},
    ):
        w = window(**changes)
        for channels_last in (False, True):
            batch = in_format(torch.randn(4, 8, 9, 11), channels_last)
            x, before = batch[1:3], batch.clone()
            found = [max_blur_pool(x, w), *value_and_gradient(x, w)]
            with monkeypatch.context() as patched:
                choose("library", patched)
                expected = [max_blur_pool(x, w), *value_and_gradient(x, w)]
            assert torch.equal(batch, before)
            assert [t.stride() for t in found] == [t.stride() for t in expected]
            torch.testing.assert_close(found, expected, **FLOAT32)


def test_the_result_is_a_tensor_of_its_own():
    for shape, w in (
        ((1, 2, 6, 6), window(kernel_size=1)),
        ((1, 2, 6), window(1, kernel_size=1)),
        ((1, 2, 4, 4, 4), window(3, kernel_size=1)),
    ):
        x = torch.randn(shape)
        y = max_blur_pool(x, w)
        assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()
    w = blur_window(2, 1, 1, "same", "binomial", "reflect")
    x = torch.randn(1, 2, 6, 6)
    assert blur_pool(x, w).data_ptr() != x.data_ptr()


def value_and_gradient(x, w):
    x = x.detach().requires_grad_()
    y = max_blur_pool(x, w)
    return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


@both_composites
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype, composite):
    x = torch.randn(2, 3, 12, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    for w in (window(), window(kernel_size=3, stride=3, padding=1)):
        assert torch.equal(max_blur_pool(x, w), max_blur_pool(x.float(), w).to(dtype))


# Half a unit in the last place, and a hundredth of it for the float32 sum that is rounded.
ONCE = {torch.float16: 1.01 * 2.0**-11, torch.bfloat16: 1.01 * 2.0**-8}


@all_composites
@pytest.mark.parametrize("dtype", ONCE, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {
            "kernel_size": 3,
            "stride": 2,
            "padding": 1,
            "padding_mode": "replicate",
            "activation": "relu",
        },
        {"dilation": 2, "padding": 1},
    ],
    ids=str,
)
def test_a_gradient_in_half_precision_rounds_once(changes, dtype, composite):
    """The sum over windows and taps is not rounded before its end, at the border either."""
    w, x = window(**changes), torch.randn(2, 3, 12, 11).to(dtype)
    wide, grad = x.double().requires_grad_(), torch.randn(max_blur_pool(x, w).shape).to(dtype)
    (expected,) = torch.autograd.grad(max_blur_pool(wide, w), wide, grad.double())
    (found,) = torch.autograd.grad(max_blur_pool(x.requires_grad_(), w), x, grad)
    assert found.dtype == dtype
    # atol: float32's own error of terms of order one that cancel.
    torch.testing.assert_close(found.double(), expected, rtol=ONCE[dtype], atol=1e-6)


@both_composites
@pytest.mark.parametrize("dtype", ONCE, ids=str)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "zeros"])
def test_a_blur_s_gradient_in_half_precision_rounds_once(mode, dtype, composite):
    w, x = blur_window(2, 5, 2, "same", "binomial", mode), torch.randn(2, 3, 6, 7).to(dtype)
    wide, grad = x.double().requires_grad_(), torch.randn(blur_pool(x, w).shape).to(dtype)
    (expected,) = torch.autograd.grad(blur_pool(wide, w), wide, grad.double())
    (found,) = torch.autograd.grad(blur_pool(x.requires_grad_(), w), x, grad)
    torch.testing.assert_close(found.double(), expected, rtol=ONCE[dtype], atol=1e-6)


@all_composites
def test_gradients_that_cancel_do_not_overflow(composite):
    """6e4 + 6e4 - 6e4, at an element that every window holds; 12e4 is beyond float16."""
    x = torch.zeros(1, 1, 3, 3, dtype=torch.float16)
    x[..., 1, 1] = 1
    # Stride 1 without a blur: each window's gradient arrives whole.
    w, grad = window(kernel_size=3, stride=1, padding=1), torch.zeros_like(x)
    grad[0, 0, 0, 0], grad[0, 0, 0, 1], grad[0, 0, 0, 2] = 6e4, 6e4, -6e4
    x.requires_grad_()
    (found,) = torch.autograd.grad(max_blur_pool(x, w), x, grad)
    assert found[..., 1, 1].item() == torch.tensor(6e4).half().item() and found.count_nonzero() == 1


def test_autocast_changes_nothing():
    x, w = torch.randn(2, 3, 12, 11), window()
    expected = max_blur_pool(x, w), blur_pool(x, blur_window(2, 3, 2, "same", "binomial", "zeros"))
    with torch.autocast("cpu", torch.bfloat16):
        got = max_blur_pool(x, w), blur_pool(x, blur_window(2, 3, 2, "same", "binomial", "zeros"))
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@all_composites
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_empty_batch(rank, composite):
    for changes in ({}, {"kernel_size": 3, "stride": 2, "padding": 1}):
        x = torch.zeros(0, 3, *[6] * rank, requires_grad=True)
        y = max_blur_pool(x, window(rank, **changes))
        assert y.shape == (0, 3, *[3] * rank)
        y.sum().backward()
        assert x.grad.shape == x.shape


POOLINGS = {
    "own padding": lambda x: max_blur_pool(x, window()),
    "explicit padding": lambda x: max_blur_pool(x, window(kernel_size=3, stride=2, padding=1)),
    "inner map": lambda x: max_blur_pool(
        x, window(kernel_size=3, padding=1, padding_mode="reflect")
    ),
    "dilated": lambda x: max_blur_pool(x, window(dilation=2, padding=1)),
    "blur": lambda x: blur_pool(x, blur_window(2, 4, 2, "same", "binomial", "reflect")),
}


@both_composites
@pytest.mark.parametrize("pooling", POOLINGS)
def test_derivatives(pooling, composite):
    function = POOLINGS[pooling]
    # All elements differ by more than gradcheck's step, so that no argmax changes.
    x = (
        torch.randperm(20, generator=torch.Generator().manual_seed(0))
        .double()
        .view(1, 1, 4, 5)
        .requires_grad_()
    )
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: function(x).square(), x)


@both_composites
@pytest.mark.parametrize("pooling", POOLINGS)
def test_functional_transforms(pooling, composite):
    function = POOLINGS[pooling]
    x = torch.randint(3, (2, 3, 7, 8), generator=torch.Generator().manual_seed(0)).double()
    tangent = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    y, grad = value_and_grad(lambda x: function(x).square(), x.clone().requires_grad_())
    each = torch.func.vmap(lambda x: function(x[None])[0])
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(each(x).square(), y, **FLOAT64)
    for f in (function, each):
        loss = lambda x, f=f: (f(x).square() * cotangent).sum()  # noqa: E731
        torch.testing.assert_close(torch.func.grad(loss)(x), grad, **FLOAT64)
        slope = torch.func.jvp(loss, (x,), (tangent,))[1]
        torch.testing.assert_close(slope, (grad * tangent).sum(), **FLOAT64)


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_meta_and_symbolic_sizes(pooling, differentiated):
    function = POOLINGS[pooling]
    x = torch.randn(2, 3, 9, 10)
    assert function(x.to("meta").requires_grad_(differentiated)).shape == function(x).shape
    expected = function(x).shape
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = mode.from_tensor(x)
        assert any(isinstance(size, torch.SymInt) for size in fake.shape)
        assert tuple(map(int, function(fake.requires_grad_(differentiated)).shape)) == expected


@pytest.mark.parametrize(
    "pooling, dynamic",
    [
        ("own padding", False),
        ("explicit padding", True),
        ("inner map", False),
        ("dilated", False),
        ("blur", True),
    ],
)
def test_compiles_without_a_break(pooling, dynamic):
    torch._dynamo.reset()
    function = POOLINGS[pooling]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 3, 9, 10), (4, 3, 8, 7))[: 1 + dynamic]:
        x = torch.randn(shape).relu().requires_grad_()
        torch.testing.assert_close(
            value_and_grad(compiled, x), value_and_grad(function, x), **FLOAT32
        )
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), function(x), **FLOAT32)


def test_inductor_keeps_ties_and_nan():
    torch._dynamo.reset()
    w = window()
    compiled = torch.compile(lambda x: max_blur_pool(x, w), fullgraph=True)
    x = awkward(4, 3, 9, 10, dtype=torch.float32)
    expected = value_and_grad(lambda x: max_blur_pool(x, w), x)
    torch.testing.assert_close(value_and_grad(compiled, x), expected, equal_nan=True, **FLOAT32)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_exports_with_any_size(pooling, strict):
    class Net(nn.Module):
        def forward(self, x):
            return POOLINGS[pooling](x)

    size = dict(min=6, max=512)
    sizes = {
        0: torch.export.Dim("n"),
        2: torch.export.Dim("h", **size),
        3: torch.export.Dim("w", **size),
    }
    program = torch.export.export(
        Net(), (torch.randn(2, 3, 9, 10),), dynamic_shapes={"x": sizes}, strict=strict
    )
    for shape in ((3, 3, 8, 7), (1, 3, 30, 31)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), POOLINGS[pooling](x), **FLOAT32)
