"""The pooling kernels at every row and column size and layout, and on non-finite gradients."""

from __future__ import annotations

import math

import pytest
import torch
from samples import OPERATIONS, Operation, Sample, as_format, max_window
from test_contract import FLOAT32, FLOAT64, UNIT, reference
from torch import Tensor

import regfast

POOL, BLUR = OPERATIONS[:2]
KINDS = {
    "pool 2 2 0": (POOL, {}),
    "pool 3 2 1": (POOL, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "blur 3": (BLUR, {}),
}
WIDTHS = [*range(1, 31), 56]
DTYPES = [torch.float32, torch.float16]


def gradient(
    operation: Operation, sample: Sample, x: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The output and the gradient of x."""
    x = x.detach().requires_grad_()
    y = operation(x, sample)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


def check(operation: Operation, sample: Sample, x: Tensor) -> None:
    """Compare an output and a gradient with the float64 reference's on the same data."""
    exact = x.double()
    grad = torch.randn(reference(operation, sample, exact).shape, device=x.device).to(x.dtype)
    found = gradient(operation, sample, x, grad)
    with regfast.backend("reference"):
        expected = gradient(operation, sample, exact, grad.double())
    # float16 rounds once; where terms cancel, float32's own error remains.
    tolerance = FLOAT32 if x.dtype == torch.float32 else dict(rtol=UNIT[x.dtype], atol=1e-6)
    for a, b in zip(found, expected):
        assert a.dtype == x.dtype
        torch.testing.assert_close(a.double(), b, **tolerance)


def sizes():
    """Every kind, width and dtype; a sixth of them in the core suite."""
    for place, (name, (operation, arguments)) in enumerate(KINDS.items()):
        for number, dtype in enumerate(DTYPES):
            for width in WIDTHS:
                if name == "pool 2 2 0" and width == 1:
                    # A row of one has no window.
                    continue
                marks = () if (width + place + 3 * number) % 6 == 0 else pytest.mark.slow
                yield pytest.param(
                    operation, arguments, width, dtype, id=f"{name}-{width}-{dtype}", marks=marks
                )


@pytest.mark.parametrize("operation,arguments,width,dtype", sizes())
def test_every_width(operation, arguments, width, dtype, device, kernels, poisoned):
    """More images than a program's 128 lanes of four or eight columns; two or three rows."""
    groups = -(-width // (4 if dtype == torch.float32 else 8))
    sample = Sample((2, -(-70 // groups), 2 + width % 2, width), arguments)
    check(operation, sample, sample.input(dtype, device))


# One row has no window of (2, 2, 0). 37 rows take several programs, and the last has fewer.
HEIGHTS = [
    (name, height)
    for name in KINDS
    for height in (1, 2, 3, 37)
    if (name, height) != ("pool 2 2 0", 1)
]


@pytest.mark.parametrize("name,height", HEIGHTS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_heights(name, height, dtype, device, kernels, poisoned):
    operation, arguments = KINDS[name]
    sample = Sample((1, 2, height, 9), arguments)
    check(operation, sample, sample.input(dtype, device))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "way",
    [
        "offset 1",
        "offset 2",
        "offset 4",
        "every other row",
        "every other column",
        "every other channel",
        "expanded",
        "transposed",
    ],
)
@pytest.mark.parametrize(
    "channels_last",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["contiguous", "channels_last"],
)
def test_image_layouts(name, way, channels_last, device, kernels, poisoned):
    """float16 has the longest vectors: addresses and strides align to 2, 4 and 8 bytes only."""
    operation, arguments = KINDS[name]
    sample = Sample((2, 8, 4, 16), arguments)
    x = sample.input(torch.float16, device, channels_last)
    if way.startswith("offset"):
        offset = int(way.split()[1])
        storage = torch.empty(x.numel() + offset, dtype=x.dtype, device=device)
        x = storage.as_strided(x.shape, x.stride(), offset).copy_(x)
    elif way.startswith("every other"):
        dim = ["channel", "row", "column"].index(way.split()[-1]) + 1
        wide = as_format(torch.cat([x, x.flip(0)], dim), channels_last)
        x = wide[(slice(None),) * dim + (slice(None, None, 2),)]
    elif way == "expanded":
        x = x[:1, :, :1].expand(x.shape)
    else:
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    check(operation, sample, x)


MODES = [
    *((POOL, {"padding_mode": mode}) for mode in ("partial", "replicate", "reflect", "zeros")),
    *(
        (POOL, {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": mode})
        for mode in ("partial", "reflect", "zeros")
    ),
    (POOL, {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    (POOL, {"blur_size": 5}),
    (POOL, {"blur_size": 6, "padding_mode": "replicate"}),
    (POOL, {"kernel_size": 5, "stride": 1}),
    *((BLUR, {"padding_mode": mode}) for mode in ("reflect", "replicate", "zeros")),
    *(
        (BLUR, {"kernel_size": 5, "stride": 1, "padding_mode": mode})
        for mode in ("reflect", "replicate", "zeros")
    ),
    (BLUR, {"kernel_size": 4, "padding": 0}),
    (BLUR, {"activation": "relu"}),
]


@pytest.mark.parametrize(
    "operation,arguments", MODES, ids=[f"{o} {Sample((), a)}" for o, a in MODES]
)
def test_a_gradient_that_is_not_finite_stays_where_its_output_reads(
    operation, arguments, device, kernels
):
    """Infinity, then NaN, at each output in turn, one per image. (All taps are positive.)"""
    shape = (1, 1, 7, 6)
    y = reference(
        operation, Sample(shape, arguments), torch.zeros(shape, dtype=torch.float64, device=device)
    )
    count = y.numel()
    sample = Sample((2 * count, *shape[1:]), arguments)
    x = sample.input(device=device)
    places = (
        torch.eye(count, dtype=torch.bool, device=device).repeat(2, 1).view(2 * count, *y.shape[1:])
    )
    values = torch.tensor([math.inf] * count + [math.nan] * count, device=device).view(-1, 1, 1, 1)
    grad = torch.randn(places.shape, device=device)
    _, found = gradient(operation, sample, x, torch.where(places, values, grad))
    with regfast.backend("reference"):
        _, reached = gradient(operation, sample, x.double(), places.double())
        _, others = gradient(operation, sample, x.double(), grad.double().masked_fill(places, 0))
    expected = torch.where(reached > 0, values, others)
    assert expected.isfinite().any() and not (reached < 0).any()
    torch.testing.assert_close(found.double(), expected, equal_nan=True, **FLOAT32)


def test_float64_at_an_odd_width(device, kernels, poisoned):
    sample = Sample((2, 3, 5, 13), {"kernel_size": 3, "stride": 2, "padding": 1})
    x = sample.input(torch.float64, device)
    grad = torch.randn_like(reference(POOL, sample, x))
    found = gradient(POOL, sample, x, grad)
    with regfast.backend("reference"):
        expected = gradient(POOL, sample, x, grad)
    torch.testing.assert_close(found, expected, **FLOAT64)


@pytest.mark.parametrize("channels_last, widest", [(False, 8), (True, 4)])
def test_vectors_are_as_wide_as_addresses_are_aligned(channels_last: bool, widest: int):
    """By the misalignment to 16 bytes; the interpreter's values do not show it."""
    from regfast.kernels import cuts, max_blur_pool

    window = max_window()
    x, y = (
        as_format(torch.empty(2, 8, n, n, dtype=torch.float16, device="meta"), channels_last)
        for n in (64, 32)
    )
    layouts = (cuts.layout_of(x),), cuts.layout_of(y)
    for misaligned, elements in ((0, 8), (8, 4), (12, 2), (2, 1), (14, 1)):
        launch = cuts.prepare(
            max_blur_pool._forward_kernel, "forward", window, *layouts, x, misaligned
        )
        access = launch.options["ACCESS"]
        assert (access.vector if channels_last else access.columns) == min(elements, widest)
