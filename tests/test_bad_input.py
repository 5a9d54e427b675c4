"""Bad input raises ValueError or TypeError before anything is written.

The message names the value and what is allowed.
"""

from __future__ import annotations

import pytest
import torch

import regfast
from regfast import functional as F
from regfast.ops.schema import flatten

IMAGE = torch.randn(1, 2, 8, 8)
POOL, BLUR = regfast.MaxPool2dAA, regfast.BlurPool2d

# The call, the error, and what its message names: the value, and what is allowed.
ARGUMENTS = [
    (lambda: POOL(0), ValueError, ["kernel_size", "0", "at least 1"]),
    (lambda: POOL(2.5), TypeError, ["kernel_size", "2.5", "integer"]),
    (lambda: POOL(True), TypeError, ["kernel_size", "True", "integer"]),
    (lambda: POOL("2"), TypeError, ["kernel_size", "'2'", "integer"]),
    (lambda: POOL((2, 2, 2)), ValueError, ["kernel_size", "(2, 2, 2)", "2"]),
    (lambda: POOL(2, 1.7), TypeError, ["1.7", "ratio="]),
    (lambda: POOL(2, 0), ValueError, ["stride", "0", "at least 1"]),
    (lambda: POOL(2, padding=-1), ValueError, ["padding", "-1", "at least 0"]),
    (lambda: POOL(3, padding=2), ValueError, ["padding", "2", "half", "kernel_size=3"]),
    (lambda: POOL(2, dilation=0), ValueError, ["dilation", "0", "at least 1"]),
    (lambda: POOL(2, return_indices=True), ValueError, ["return_indices", "False", "weighted sum"]),
    (lambda: POOL(2, ceil_mode=1), TypeError, ["ceil_mode", "1", "True or False"]),
    (lambda: POOL(2, ratio=0), ValueError, ["ratio", "0", "positive"]),
    (lambda: POOL(2, ratio=float("nan")), ValueError, ["ratio", "nan", "finite"]),
    (lambda: POOL(2, ratio="big"), TypeError, ["ratio", "'big'", "number"]),
    (lambda: POOL(2, ratio=(1, 2, 3)), ValueError, ["ratio", "(1, 2, 3)", "2"]),
    (lambda: POOL(2, blur_size=0), ValueError, ["blur_size", "0", "at least 1"]),
    (lambda: POOL(2, filter="sinc7"), ValueError, ["filter", "'sinc7'", "binomial", "get_window"]),
    (lambda: POOL(2, filter=[]), TypeError, ["filter", "[]", "taps"]),
    (lambda: POOL(2, filter=[1.0, float("inf")]), ValueError, ["taps", "inf", "finite"]),
    (lambda: POOL(2, filter=[1, -2, 1]), ValueError, ["taps", "[1, -2, 1]", "sum"]),
    (lambda: POOL(2, filter=[0, 0]), ValueError, ["taps", "[0, 0]", "sum"]),
    (lambda: POOL(2, filter=["binomial"] * 3), ValueError, ["filter", "binomial", "2"]),
    (lambda: POOL(2, filter=[1, 2, 1], blur_size=5), ValueError, ["[1, 2, 1]", "3", "5"]),
    (lambda: POOL(2, filter=3), TypeError, ["filter", "3", "name"]),
    (
        lambda: POOL(2, padding_mode="circular"),
        ValueError,
        ["padding_mode", "'circular'", "'partial'", "'zeros'"],
    ),
    (lambda: POOL(2, activation="gelu"), ValueError, ["activation", "'gelu'", "None", "'relu'"]),
    (lambda: BLUR(3, activation=torch.relu), ValueError, ["activation", "relu", "None", "'relu'"]),
    (lambda: BLUR(0), ValueError, ["kernel_size", "0", "at least 1"]),
    (lambda: BLUR(64), ValueError, ["kernel_size", "64", "31", "no number of channels"]),
    (lambda: BLUR(64, 3, 2), ValueError, ["kernel_size", "64", "31", "no number of channels"]),
    (
        lambda: F.blur_pool2d(IMAGE, (3, 32)),
        ValueError,
        ["kernel_size", "(3, 32)", "31", "no number of channels"],
    ),
    (lambda: BLUR(3, padding="valid"), ValueError, ["padding", "'valid'", "'same'"]),
    (lambda: BLUR(3, padding=-1), ValueError, ["padding", "-1", "at least 0"]),
    (
        lambda: BLUR(3, padding_mode="partial"),
        ValueError,
        ["padding_mode", "'partial'", "'reflect'", "'zeros'"],
    ),
    (lambda: BLUR(3, filter=[1, 4, 6, 4, 1]), ValueError, ["5", "3"]),
    (lambda: regfast.BlurLayer(D=4), ValueError, ["D", "4", "1, 2 or 3"]),
    (lambda: regfast.filters.binomial(0), ValueError, ["size", "0", "at least 1"]),
    (lambda: regfast.filters.binomial(2.0), TypeError, ["size", "2.0", "integer"]),
    (
        lambda: regfast.backend("cuda").__enter__(),
        ValueError,
        ["'cuda'", "'auto'", "'reference'", "'triton'"],
    ),
]


@pytest.mark.parametrize(
    "call,error,words", ARGUMENTS, ids=[" ".join(words) for _, _, words in ARGUMENTS]
)
def test_arguments(call, error, words):
    with pytest.raises(error) as raised:
        call()
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize("pool", [F.max_blur_pool2d, F.blur_pool2d])
@pytest.mark.parametrize(
    "x,error,words",
    [
        ([[1.0]], TypeError, ["list", "Tensor"]),
        (IMAGE.int(), TypeError, ["torch.int32", "floating-point"]),
        (IMAGE > 0, TypeError, ["torch.bool", "floating-point"]),
        (IMAGE.to(torch.complex64), TypeError, ["torch.complex64", "floating-point"]),
        (IMAGE[0, 0], ValueError, ["(8, 8)", "3-d or 4-d"]),
        (IMAGE[None], ValueError, ["(1, 1, 2, 8, 8)", "3-d or 4-d"]),
        (IMAGE[:, :0], ValueError, ["(1, 0, 8, 8)", "only the batch"]),
        (IMAGE[..., :0], ValueError, ["(1, 2, 8, 0)", "only the batch"]),
        (IMAGE[:0, :0], ValueError, ["(0, 0, 8, 8)", "only the batch"]),
    ],
    ids=lambda value: str(value.shape) if isinstance(value, torch.Tensor) else None,
)
def test_images(path, pool, x, error, words):
    with regfast.backend(path), pytest.raises(error) as raised:
        pool(x)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_an_image_too_small_for_the_window(path):
    with regfast.backend(path):
        with pytest.raises(ValueError, match=r"max_blur_pool2d.*\(0, 4\).*at least 1"):
            F.max_blur_pool2d(IMAGE[..., :1, :])
        with pytest.raises(ValueError, match=r"blur_pool2d.*\(0, 0\).*at least 1"):
            F.blur_pool2d(IMAGE[..., :2, :2], 5, 1, 1)
        with pytest.raises(ValueError, match=r"blur_pool1d.*\(1, 2, 8\) would be \(0,\)"):
            F.blur_pool1d(IMAGE[:, :, 0], 9, padding=0)


@pytest.mark.parametrize(
    "wrong", [torch.randn(1, 2, 3, 3), torch.randn(1, 2, 4, 4).double(), torch.randn(2, 4, 4)]
)
def test_ops_refuse_a_gradient_of_another_image(wrong, device):
    """autograd never sends one; a direct call of the op may, and a kernel would read beyond it."""
    pool, blur = (flatten(module._window) for module in (POOL(2), BLUR(3)))
    x, wrong = IMAGE.to(device), wrong.to(device)
    with pytest.raises(ValueError, match=r"grad must have .*\(1, 2, 4, 4\).*got"):
        torch.ops.regfast.max_blur_pool_backward(wrong, x, *pool)
    activated = flatten(BLUR(3, activation="relu")._window)
    with pytest.raises(ValueError, match="activation must be None, got 'relu'"):
        torch.ops.regfast.blur_pool_backward(
            torch.randn(1, 2, 4, 4, device=device), list(x.shape), list(x.stride()), *activated
        )
    if wrong.dtype == x.dtype:
        with pytest.raises(ValueError, match=r"grad must have .*\(1, 2, 4, 4\).*got"):
            torch.ops.regfast.blur_pool_backward(wrong, list(x.shape), list(x.stride()), *blur)


@pytest.mark.parametrize(
    "shape,window",
    [
        ((1, 2, 4, 4, 4), regfast.MaxPool3dAA(2)._window),
        ((1, 2, 8, 8), POOL(2, dilation=2)._window),
    ],
    ids=["volumes", "dilation"],
)
def test_the_pooling_s_ops_refuse_windows_that_no_one_kernel_computes(shape, window, device):
    """autograd and compilers see a composition of windows that the kernels do compute."""
    x = torch.randn(shape, device=device)
    with regfast.backend("reference"):
        y = regfast.ops.max_blur_pool.max_blur_pool(x, window)
    with pytest.raises(ValueError, match="signals and images without dilation, got Window"):
        torch.ops.regfast.max_blur_pool(x, *flatten(window))
    with pytest.raises(ValueError, match="signals and images without dilation, got Window"):
        torch.ops.regfast.max_blur_pool_backward(torch.ones_like(y), x, *flatten(window))


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(index=torch.zeros(2, dtype=torch.int64)), ["index", "(4,)", "(2,)"]),
        (dict(lam=torch.rand(3)), ["lam", "(4,)", "(3,)"]),
        (dict(box=torch.zeros(3, 4, dtype=torch.int64)), ["box", "(4, 4)", "(3, 4)"]),
        (dict(scale=torch.rand(3)), ["scale", "(2,)", "(3,)"]),
        (dict(out=torch.empty(3, 2, 5, 5)), ["out", "(4, 2, 5, 5)", "(3, 2, 5, 5)"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_blend_s_ops_refuse_what_a_kernel_would_read_beyond(changes, words, device):
    x = torch.randn(4, 2, 5, 5)
    given = (
        dict(index=torch.arange(4), lam=torch.rand(4), box=None, scale=None, shift=None) | changes
    )
    given = {name: None if value is None else value.to(device) for name, value in given.items()}
    out = given.pop("out", torch.empty_like(x, device=device))
    with pytest.raises(ValueError) as raised:
        torch.ops.regfast.mixup_out(x.to(device), *given.values(), out)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="two kinds of device are needed")
def test_ops_refuse_a_mix_of_devices():
    pool = flatten(POOL(2)._window)
    with pytest.raises(ValueError, match="device"):
        torch.ops.regfast.max_blur_pool_backward(torch.randn(1, 2, 4, 4), IMAGE.cuda(), *pool)


def test_triton_where_it_cannot_run_names_the_reason():
    with regfast.backend("triton"):
        with pytest.raises(RuntimeError, match="meta, not cuda"):
            F.max_blur_pool2d(IMAGE.to("meta"))
        with pytest.raises(RuntimeError, match="functorch"):
            torch.func.grad(lambda x: F.max_blur_pool2d(x).sum())(
                IMAGE.cuda() if torch.cuda.is_available() else IMAGE
            )


def test_a_backend_lasts_as_long_as_its_block():
    from regfast._core.dispatch import _chosen

    before = _chosen.backend
    with pytest.raises(KeyError), regfast.backend("reference"):
        raise KeyError
    assert _chosen.backend == before


def test_the_kernels_refuse_what_they_cannot_count():
    from regfast.kernels import max_blur_pool as kernels

    signal = torch.empty(1, 1, 2**30, dtype=torch.float16, device="meta")
    window = regfast.MaxPool1dAA(2)._window
    with pytest.raises(ValueError, match=r"below 2\^30, got \(1073741824,\)"):
        kernels.max_blur_pool(signal, window)
    with pytest.raises(ValueError, match="reference"):
        kernels.max_blur_pool_backward(signal[..., ::2], signal, window)
