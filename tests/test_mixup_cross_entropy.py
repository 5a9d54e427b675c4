"""The contract of mixup_cross_entropy.

1. It is lam*F.cross_entropy(z, a) + (1 - lam)*F.cross_entropy(z, b), by PyTorch's cross entropy on
   float64 logits: values and gradients, every argument, infinities and NaN included. A plain Tensor
   of labels gives F.cross_entropy itself.
2. A kernel equals the reference, on any strides of logits and gradients, in every dtype. It writes
   every element, and the same bits each time. A label outside the classes makes the loss NaN.
3. It is differentiable twice and forward-mode, by logits, lam and weights, and traceable: opcheck,
   torch.func, torch.compile.
4. Bad input is refused before anything is computed.

A test of a kernel fails if no kernel was launched.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from samples import as_format, no_synchronisation
from torch import Tensor

import regfast
from regfast.ops.mixup_cross_entropy import mixup_cross_entropy

# A tile's rows beyond the batch are -inf, and NumPy, the interpreter's backend, warns of the
# results.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

# Sums of some thousand terms of order one in another order: some units in the last place.
FLOAT64 = dict(rtol=1e-12, atol=1e-12)
FLOAT32 = dict(rtol=1e-5, atol=1e-5)
UNIT = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

REDUCTIONS = ("mean", "sum", "none")
# Aligned classes, unaligned classes, few classes; rows innermost, with and without vectors; a
# signal, an image, a volume.
SHAPES = [(6, 16), (5, 70), (5, 7), (3, 1), (2, 6, 4, 2), (2, 5, 9), (2, 3, 2, 2, 3)]
# Each has more than one block of classes, with classes innermost or rows innermost.
WIDE = [(2, 5000), (1, 100, 4), (1, 300, 3)]


class Case(NamedTuple):
    """Random arguments, with a 0-d or a per-sample lam, with or without weights and smoothing."""

    z: Tensor
    a: Tensor
    b: Tensor
    lam: Tensor
    options: dict

    def __call__(self, z: Tensor | None = None, **options) -> Tensor:
        with no_synchronisation():
            return mixup_cross_entropy(
                self.z if z is None else z, (self.a, self.b, self.lam), **self.options, **options
            )


def case(shape, reduction="mean", full=True, device="cpu", dtype=torch.float32) -> Case:
    """`full`: per-sample lam, weights, label smoothing, and an ignored row in each target."""
    rows = (shape[0], *shape[2:])
    a, b = torch.randint(shape[1], rows), torch.randint(shape[1], rows)
    lam, options = torch.rand(()), dict(reduction=reduction)
    if full:
        a.view(-1)[0], b.view(-1)[-1] = -100, -100
        lam = torch.rand(shape[0])
        options |= dict(
            weight=(torch.rand(2 * shape[1]) + 0.1).to(device)[::2], label_smoothing=0.1
        )
    z = 3 * torch.randn(shape)
    return Case(z.to(device, dtype), a.to(device), b.to(device), lam.to(device), options)


def two_terms(z, a, b, lam, reduction="mean", **options):
    """The specification; a per-sample lam weights each row.

    Each mean's denominator is the cross entropy's own: the sum of the class weights.
    """
    losses, weights = [], []
    weight = options.get("weight")
    for labels, share in ((a, lam), (b, 1 - lam)):
        share = (
            share.view(-1, *(1,) * (labels.ndim - 1))
            if isinstance(share, Tensor) and share.ndim
            else share
        )
        loss = F.cross_entropy(z, labels, reduction="none", **options)
        counted = labels != options.get("ignore_index", -100)
        of_label = (
            counted.to(z.dtype)
            if weight is None
            else torch.where(counted, weight[labels.where(counted, 0)], 0)
        )
        losses.append(share * loss)
        weights.append(of_label.sum())
    if reduction == "none":
        return losses[0] + losses[1]
    if reduction == "sum":
        return losses[0].sum() + losses[1].sum()
    return losses[0].sum() / weights[0] + losses[1].sum() / weights[1]


def exactly(c: Case, grad=None):
    """The two-term sum, the gradient sent back, and that of z, in float64 on the same data."""
    z = c.z.detach().double().requires_grad_()
    options = {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in c.options.items()
    }
    loss = two_terms(z, c.a.long(), c.b.long(), c.lam.double(), **options)
    grad = torch.randn_like(loss) if grad is None else grad
    return loss.detach(), grad, torch.autograd.grad(loss, z, grad)[0]


def check(c: Case, rtol: float, atol: float, grad=None) -> Tensor:
    """Compare value and gradient to the two-term sum; returns the gradient."""
    expected, grad, expected_dz = exactly(c, grad)
    z = c.z.detach().requires_grad_()
    loss = c(z)
    with no_synchronisation():
        (dz,) = torch.autograd.grad(loss, z, grad.to(loss.dtype))
    assert loss.dtype == c.z.dtype and loss.shape == expected.shape
    assert dz.dtype == z.dtype
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=atol, equal_nan=True)
    torch.testing.assert_close(dz.double(), expected_dz, rtol=rtol, atol=atol, equal_nan=True)
    return dz


@pytest.fixture(params=["reference", "kernels"])
def path(request):
    """Runs a test on both paths."""
    if request.param == "kernels":
        request.getfixturevalue("kernels")
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_reference_is_two_cross_entropies(shape, reduction):
    rows = (shape[0], *shape[2:])
    lams = [0.3, torch.tensor(0.8), torch.rand(shape[0])]
    for lam, weight, smoothing, ignore_index in itertools.product(
        lams, [None, torch.rand(shape[1])], [0.0, 0.2], [-100, 0]
    ):
        a, b = torch.randint(shape[1], rows), torch.randint(shape[1], rows)
        a.view(-1)[1] = ignore_index
        options = dict(
            weight=weight, label_smoothing=smoothing, ignore_index=ignore_index, reduction=reduction
        )
        for dtype, tolerance in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
            z = torch.randn(shape, dtype=dtype, requires_grad=True)
            wide = dict(options, weight=None if weight is None else weight.double())
            expected = two_terms(
                z.double(), a, b, lam.double() if isinstance(lam, Tensor) else lam, **wide
            )
            loss, grad = mixup_cross_entropy(z, (a, b, lam), **options), torch.randn_like(expected)
            gradients = (torch.autograd.grad(y, z, grad.to(y.dtype))[0] for y in (loss, expected))
            torch.testing.assert_close(loss.double(), expected, equal_nan=True, **tolerance)
            torch.testing.assert_close(*gradients, equal_nan=True, **tolerance)


def test_the_two_terms_are_pytorchs_mean():
    """`two_terms` writes the mean out; this compares it to PyTorch's own."""
    c = case((6, 5, 3))
    c.options["weight"] = c.options["weight"].double()
    z, lam = c.z.double(), 0.3
    expected = lam * F.cross_entropy(z, c.a, **c.options) + (1 - lam) * F.cross_entropy(
        z, c.b, **c.options
    )
    torch.testing.assert_close(two_terms(z, c.a, c.b, lam, **c.options), expected, **FLOAT64)
    torch.testing.assert_close(
        mixup_cross_entropy(z, (c.a, c.b, lam), **c.options), expected, **FLOAT64
    )


@pytest.mark.parametrize("shape", [*SHAPES, *WIDE], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kernels_are_two_cross_entropies(shape, reduction, device, kernels, poisoned):
    check(case(shape, reduction, device=device), **FLOAT32)
    check(case(shape, reduction, full=False, device=device), **FLOAT32)


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 4), (2, 5000)], ids=str)
def test_kernels_compute_float64_in_float64(shape, device, kernels):
    check(case(shape, device=device, dtype=torch.float64), **FLOAT64)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("shape", [(6, 16), (5, 70), (2, 6, 4, 2)], ids=str)
def test_half_precision_is_rounded_once(shape, dtype, path, device):
    # The interpreter truncates to bfloat16, hence a whole unit. atol: float32's error where terms
    # of order one cancel.
    c = case(shape, "none", device=device if path == "kernels" else "cpu", dtype=dtype)
    grad = torch.randn(c.a.shape, device=c.z.device).to(dtype).double()
    check(c, rtol=UNIT[dtype], atol=1e-6, grad=grad)


def strided(z: Tensor) -> dict[str, Tensor]:
    """(N, C, H, W) logits in many layouts."""
    wide = z.repeat_interleave(2, -1)
    return {
        "channels last": as_format(z, True),
        "channels last, sliced": as_format(wide, True)[..., ::2],
        "sliced": wide[..., ::2],
        "cropped": F.pad(z, (1, 1, 1, 1))[..., 1:-1, 1:-1],
        "transposed": z.transpose(-1, -2).contiguous().transpose(-1, -2),
        "classes sliced": z.repeat_interleave(2, 1)[:, ::2],
        "batch expanded": z[:1].expand_as(z),
        "classes expanded": z[:, :1].expand_as(z),
        "channels last, cropped": as_format(F.pad(z, (1, 1, 1, 1)), True)[..., 1:-1, 1:-1],
        "misaligned": torch.cat([z.new_zeros(1), z.flatten()])[1:].view_as(z),
        "batch innermost": z.movedim(0, -1).contiguous().movedim(-1, 0),
    }


@pytest.mark.parametrize("layout", strided(torch.zeros(2, 4, 2, 4)))
def test_any_strides_come_in(layout, device, kernels, poisoned):
    c = case((3, 8, 2, 4), "none", device=device)
    z = strided(c.z)[layout]
    assert check(c._replace(z=z), **FLOAT32).stride() == torch.empty_like(z).stride()


@pytest.mark.parametrize("shape", [(3, 70), (2, 3, 7)], ids=str)
def test_a_run_that_ends_within_a_vector(shape, device, kernels, poisoned):
    """Strides are multiples of the vector width; the run of classes, or of rows, is not."""
    c = case(shape, "none", device=device)
    storage = torch.full((*shape[:-1], 72 if len(shape) == 2 else 8), math.nan, device=device)
    check(c._replace(z=storage[..., : shape[-1]].copy_(c.z)), **FLOAT32)


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 21, 24, 33, 63])
def test_rows_that_align_no_vector(classes, device, kernels, poisoned):
    """Classes innermost, an odd number or not; part of a tile of rows, and several tiles.

    All are read as runs, in vectors of any width that divides the run's length.
    """
    for positions in ((1, 3), (2, 64), (11, 13)):
        c = case((2, classes, *positions), "none", device=device)
        z = c.z.movedim(1, -1).contiguous().movedim(-1, 1)
        assert check(c._replace(z=z), **FLOAT32).stride() == z.stride()
    if classes > 1 and classes % 4:
        assert {launch.options["TILE"].along for launch in prepared()} == {"run"}


def prepared():
    """The launches of a test, except those that only add up partial sums."""
    from regfast.kernels.launch import LAUNCHES, Launch

    found = (
        launch
        for kept in LAUNCHES.values()
        for launch in (kept if isinstance(kept, tuple) else (kept,))
    )
    return [launch for launch in found if isinstance(launch, Launch) and "TILE" in launch.options]


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_runs_at_any_address(dtype, offset, device, kernels, poisoned):
    c = case((2, 21, 4, 8), "none", device=device, dtype=dtype)
    storage = torch.zeros(c.z.numel() + offset, dtype=dtype, device=device)
    z = storage[offset:].view(2, 4, 8, 21).movedim(-1, 1).copy_(c.z)
    grad = torch.randn(c.a.shape, device=device).to(dtype).double()
    check(c._replace(z=z), rtol=UNIT[dtype], atol=1e-6, grad=grad)
    assert {launch.options["TILE"].align for launch in prepared()} >= {offset}


def test_a_cropped_volume_and_labels_of_any_strides(device, kernels, poisoned):
    c = case((2, 3, 2, 3, 4), "none", device=device)
    a, b = c.a.transpose(-1, -2).contiguous().transpose(-1, -2), c.b.int()[:1].expand_as(c.b)
    check(c._replace(z=F.pad(c.z, (1, 1, 1, 1, 1, 1))[..., 1:-1, 1:-1, 1:-1], a=a, b=b), **FLOAT32)
    z = c.z.transpose(-1, -3).contiguous().transpose(-1, -3)
    assert (
        check(c._replace(z=z, a=a, b=b, lam=torch.rand(4, device=device)[::2]), **FLOAT32).stride()
        == z.stride()
    )


@pytest.mark.parametrize("dim", range(4))
def test_offsets_past_two_to_the_31(dim, device, kernels):
    """Logits 2^30 apart along one dimension, where int32 offsets would wrap.

    The storage between them is not touched.
    """
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of device memory")
    c = case((3, 3, 3, 4), "none", device=device, dtype=torch.float16)
    stride = [36, 12, 4, 1]
    stride[dim] = 2**30
    storage = torch.empty((c.z.shape[dim] - 1) * 2**30 + 1024, dtype=torch.float16, device=device)
    z = storage.as_strided(c.z.shape, stride).copy_(c.z)
    grad = torch.randn(c.a.shape, device=device, dtype=torch.float16)
    (loss, dz), (expected, expected_dz) = (
        (loss := c(leaf.requires_grad_()), torch.autograd.grad(loss, leaf, grad)[0])
        for leaf in (z, c.z)
    )
    assert torch.equal(loss, expected) and torch.equal(dz, expected_dz)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_other_integers(dtype, path, device):
    c = case((4, 9, 2), device=device if path == "kernels" else "cpu")
    a, b = (labels.clamp(min=0).to(dtype) for labels in (c.a, c.b))
    a[0], c.options["ignore_index"] = (
        255 if dtype == torch.uint8 else 7,
        255 if dtype == torch.uint8 else 7,
    )
    z = c.z.requires_grad_()
    found, expected = (
        mixup_cross_entropy(z, (x, y, 0.4), **c.options) for x, y in ((a, b), (a.long(), b.long()))
    )
    torch.testing.assert_close(found, expected)


def test_an_expanded_gradient(device, kernels):
    """.sum().backward() sends a gradient of stride 0; a per-row gradient need not be contiguous."""
    c = case((3, 6, 4), "none", device=device)
    for grad in (torch.ones(1, 1).expand(3, 4), torch.randn(4, 3).t(), torch.randn(3, 8)[:, ::2]):
        check(c, **FLOAT32, grad=grad.double().to(device))


def special_rows() -> Tensor:
    """Rows of eight classes with infinities and NaN at the labels, at other classes, at all."""
    z = torch.randn(10, 8)
    z[0, 2], z[1, 5], z[2, 2], z[3, 5], z[4, 2], z[5, 5] = (
        (-math.inf,) * 2 + (math.inf,) * 2 + (math.nan,) * 2
    )
    z[6], z[7], z[8, :4], z[9, 1:] = -math.inf, math.inf, -math.inf, -math.inf
    return z


@pytest.mark.parametrize("ignored", [False, True], ids=["counted", "ignored"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("layout", ["classes inner", "rows inner", "a run"])
def test_infinities_and_nan_are_pytorchs(ignored, smoothing, layout, path, device):
    where = device if path == "kernels" else "cpu"
    z = special_rows().to(where)
    label = -100 if ignored else 2
    a, b = torch.full((10,), label, device=where), torch.full((10,), 6, device=where)
    if layout == "rows inner":
        z, a, b = z.t()[None], a[None], b[None]
    elif layout == "a run":
        z = torch.cat([z[0, :1], z.flatten()])[1:].view_as(z)
    c = Case(
        z, a, b, torch.tensor(0.25, device=where), dict(reduction="none", label_smoothing=smoothing)
    )
    check(c, **FLOAT32)
    check(c._replace(b=a), **FLOAT32)


def test_a_block_of_minus_infinity_before_others(device, kernels):
    """The first block of classes has no finite maximum."""
    c = case((2, 5000), "none", device=device)
    c.z[0, :4200] = -math.inf
    c.z[1, 100:] = -math.inf
    c.a[:], c.b[:] = torch.tensor([4999, 3]), torch.tensor([4500, 7])
    check(c, **FLOAT32)


def test_huge_logits_keep_their_differences(path, device):
    """The maximum is subtracted first. The logits' own float32 rounding is on both sides."""
    c = case((4, 16), "none", device=device if path == "kernels" else "cpu")
    for offset in (1e4, -1e4):
        check(c._replace(z=c.z + offset), **FLOAT32)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_rows_ignored(reduction, smoothing, path, device):
    c = case((3, 8), reduction, full=False, device=device if path == "kernels" else "cpu")
    c.options["label_smoothing"] = smoothing
    check(c._replace(a=c.a.fill_(-100)), **FLOAT32)
    loss = mixup_cross_entropy(c.z, (c.a, c.a, 0.5), **c.options)
    assert loss.isnan() if reduction == "mean" else not loss.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_empty_batch(reduction, path, device):
    where = device if path == "kernels" else "cpu"
    if path == "kernels" and reduction == "none":
        case((2, 3), device=where)()  # An empty loss launches nothing.
    z, labels = (
        torch.randn(0, 5, device=where, requires_grad=True),
        torch.zeros(0, dtype=torch.long, device=where),
    )
    loss = mixup_cross_entropy(z, (labels, labels, 0.5), reduction=reduction)
    torch.testing.assert_close(
        loss, F.cross_entropy(z, labels, reduction=reduction), equal_nan=True
    )
    assert torch.autograd.grad(loss.sum(), z)[0].shape == (0, 5)


@pytest.mark.parametrize("shape", [(2, 200_000), (1, 200_000, 2)], ids=str)
def test_two_hundred_thousand_classes(shape, device, kernels):
    # float32 sums of this many terms have some more units of error.
    check(case(shape, device=device), rtol=1e-4, atol=1e-6)


def test_two_runs_give_the_same_bits(device, kernels):
    c = case((300, 6, 3), device=device)
    z = c.z.requires_grad_()
    runs = [(loss := c(z), torch.autograd.grad(loss, z)[0]) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs))


def test_more_tiles_than_programs(device, kernels, monkeypatch):
    """A program with several tiles, and one with fewer than the others."""
    from regfast.kernels import mixup_cross_entropy as module

    monkeypatch.setattr(module, "PROGRAMS", 2)
    check(case((5, 1100), device=device), **FLOAT32)
    check(case((600, 3), device=device), **FLOAT32)
    # More rows than a program takes at once.
    check(case((70, 600), device=device), **FLOAT32)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label", [-1, 7, 2**40], ids=str)
def test_on_the_device_a_label_that_is_no_class_gives_nan(label, reduction, device, kernels):
    """The host does not read labels on CUDA; the kernels read nothing beyond the logits."""
    c = case((3, 7), reduction, full=False, device=device)
    c.a[1] = label
    arguments = (c.z, c.a, c.b, c.lam, None, -100, reduction, 0.0)
    loss, statistics = torch.ops.regfast.mixup_cross_entropy(*arguments, torch.float32)
    backward = torch.ops.regfast.mixup_cross_entropy_backward
    dz = backward(torch.ones_like(loss), *arguments[:5], statistics, *arguments[5:])
    assert loss[1].isnan() if reduction == "none" else loss.isnan()
    assert dz[1].isnan().all()
    if reduction == "none":
        assert loss[[0, 2]].isfinite().all() and dz[[0, 2]].isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 2), (6,)], ids=str)
def test_a_plain_tensor_gives_pytorchs_cross_entropy(shape, reduction):
    z = torch.randn(shape, requires_grad=True)
    labels = torch.randint(3, shape[:1] + shape[2:] if len(shape) > 1 else ())
    options = dict(
        reduction=reduction, label_smoothing=0.1, weight=torch.rand(shape[min(len(shape) - 1, 1)])
    )
    for target in (labels, torch.rand(shape)):
        found, expected = (
            mixup_cross_entropy(z, target, **options),
            F.cross_entropy(z, target, **options),
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_row_without_a_batch(reduction, path, device):
    where = device if path == "kernels" else "cpu"
    z = torch.randn(6, dtype=torch.float64, device=where, requires_grad=True)
    a, b = torch.tensor(2, device=where), torch.tensor(5, device=where)
    found = mixup_cross_entropy(z, (a, b, 0.3), reduction=reduction)
    expected = two_terms(z[None], a[None], b[None], 0.3, reduction=reduction).squeeze()
    assert found.shape == ()
    torch.testing.assert_close(found, expected, **FLOAT64)
    torch.testing.assert_close(
        torch.autograd.grad(found, z), torch.autograd.grad(expected, z), **FLOAT64
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("per_row", [False, True])
def test_labels_that_are_probabilities(reduction, per_row):
    z = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    a, b = torch.randn(2, 4, 5, 3, dtype=torch.float64).softmax(2)
    lam = torch.rand(4, dtype=torch.float64) if per_row else 0.3
    found = mixup_cross_entropy(z, (a, b, lam), label_smoothing=0.1, reduction=reduction)
    share = lam[:, None] if per_row else lam
    terms = (F.cross_entropy(z, target, label_smoothing=0.1, reduction="none") for target in (a, b))
    rows = share * next(terms) + (1 - share) * next(terms)
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / 12}[reduction]
    torch.testing.assert_close(found, expected, **FLOAT64)


def test_indices_are_one_hot_probabilities():
    z, a, b, lam = torch.randn(6, 5), torch.randint(5, (6,)), torch.randint(5, (6,)), torch.rand(6)
    hot = mixup_cross_entropy(
        z, (F.one_hot(a, 5).float(), F.one_hot(b, 5).float(), lam), label_smoothing=0.1
    )
    torch.testing.assert_close(mixup_cross_entropy(z, (a, b, lam), label_smoothing=0.1), hot)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_under_autocast_the_dtype_is_pytorchs(dtype, path, device):
    where = device if path == "kernels" else "cpu"
    c = case((4, 8), full=False, device=where, dtype=dtype)
    z = c.z.requires_grad_()
    with torch.autocast(where, torch.bfloat16):
        loss, expected = c(z), F.cross_entropy(z, c.a)
    assert loss.dtype == expected.dtype
    assert torch.autograd.grad(loss, z)[0].dtype == dtype
    # float32 logits under autocast have float32 sums, not bfloat16.
    torch.testing.assert_close(loss.double(), exactly(c)[0], **FLOAT32)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_by_finite_differences(shape, reduction, path, device):
    """First and second order, reverse and forward."""
    c = case(shape, reduction, device=device if path == "kernels" else "cpu", dtype=torch.float64)
    c = c._replace(lam=c.lam.double(), options=dict(c.options, weight=c.options["weight"].double()))
    z = c.z.requires_grad_()
    assert torch.autograd.gradcheck(c, (z,), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(
        c, (z,), fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_lam_and_weights_may_be_differentiated(reduction):
    c = case((4, 5, 2), reduction, dtype=torch.float64)
    lam, weight = c.lam.double().requires_grad_(), c.options.pop("weight").double().requires_grad_()

    def function(z, lam, weight):
        return mixup_cross_entropy(z, (c.a, c.b, lam), weight, **c.options)

    assert torch.autograd.gradcheck(
        function, (c.z.requires_grad_(), lam, weight), check_forward_ad=True
    )


@pytest.mark.parametrize("name", ["lam", "weight"])
def test_what_no_kernel_differentiates_by_is_named(name):
    c = case((4, 5))
    differentiated = {"lam": c.lam, "weight": c.options["weight"]}[name].requires_grad_()
    with regfast.backend("triton"), pytest.raises(RuntimeError, match=f"{name} is differentiated"):
        c()
    assert torch.autograd.grad(c(), differentiated)[0].isfinite().all()


def test_transforms_of_torch_func_take_the_reference():
    z, a, b, lam = (
        torch.randn(3, 4, 5),
        torch.randint(5, (3, 4)),
        torch.randint(5, (3, 4)),
        torch.rand(3),
    )

    def function(z, a, b, lam):
        return mixup_cross_entropy(z, (a, b, lam), label_smoothing=0.1)

    losses = torch.func.vmap(function)(z, a, b, lam)
    gradients = torch.func.vmap(torch.func.grad(function))(z, a, b, lam)
    _, tangents = torch.func.jvp(lambda z: function(z, a[0], b[0], lam[0]), (z[0],), (z[1],))
    for i in range(3):
        leaf = z[i].clone().requires_grad_()
        expected = two_terms(leaf, a[i], b[i], lam[i], label_smoothing=0.1)
        torch.testing.assert_close(losses[i], expected)
        (dz,) = torch.autograd.grad(expected, leaf)
        torch.testing.assert_close(gradients[i], dz)
        if i == 0:
            torch.testing.assert_close(tangents, (dz * z[1]).sum())


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_ops_pass_opcheck(channels_last, reduction, device, kernels):
    c = case((2, 3, 2, 3), reduction, device=device)
    z, ops, weight = as_format(c.z, channels_last), torch.ops.regfast, c.options["weight"]
    arguments = (z, c.a, c.b, c.lam, weight)
    torch.library.opcheck(
        ops.mixup_cross_entropy.default, (*arguments, -100, reduction, 0.1, torch.float32)
    )
    loss, statistics = ops.mixup_cross_entropy(*arguments, -100, reduction, 0.1, torch.float32)
    backward = (loss, *arguments, statistics, -100, reduction, 0.1)
    torch.library.opcheck(ops.mixup_cross_entropy_backward.default, backward)


def compiled(backend: str, **options):
    torch._dynamo.reset()

    def function(z, a, b, lam):
        return mixup_cross_entropy(z, (a, b, lam), **options)

    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def check_compiled(function, device: str, **options) -> None:
    """Forward and backward, at two sizes and with either kind of lam."""
    for shape, per_sample in itertools.product([(4, 6), (7, 9)], [False, True]):
        c = case(shape, device=device)
        lam = c.lam if per_sample else c.lam[0]
        z = c.z.requires_grad_()
        loss = function(z, c.a, c.b, lam)
        (dz,) = torch.autograd.grad(loss, z)
        expected, _, expected_dz = exactly(
            c._replace(lam=lam, options=options), loss.new_ones((), dtype=torch.float64)
        )
        torch.testing.assert_close(loss.double(), expected, **FLOAT32)
        torch.testing.assert_close(dz.double(), expected_dz, **FLOAT32)


def test_kernels_compile_without_a_graph_break(device, kernels):
    """aot_eager traces as Inductor does, and runs the ops as they are."""
    check_compiled(compiled("aot_eager", label_smoothing=0.1), device, label_smoothing=0.1)


def test_the_reference_is_traced_without_a_graph_break():
    check_compiled(compiled("aot_eager", label_smoothing=0.1), "cpu", label_smoothing=0.1)


@pytest.mark.slow
def test_the_reference_compiles_without_a_graph_break():
    check_compiled(compiled("inductor"), "cpu")


def test_a_lam_that_is_a_number_is_not_compiled_anew():
    """lam changes each step; a frozen one would give wrong losses from the second step on."""
    frames = torch._dynamo.testing.CompileCounter()
    function = compiled(frames)
    c = case((4, 6))
    for lam in (0.25, 0.5, 0.75, 0.125):
        expected = two_terms(c.z, c.a, c.b, lam)
        torch.testing.assert_close(function(c.z, c.a, c.b, lam), expected)
    assert frames.frame_count <= 2


LOGITS, LABELS = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
TARGET = (LABELS, LABELS, 0.5)
BAD = [
    (([[1.0]], TARGET), {}, TypeError, ["input", "list", "Tensor"]),
    ((LOGITS.int(), TARGET), {}, TypeError, ["input", "torch.int32", "floating-point"]),
    ((torch.tensor(1.0), TARGET), {}, ValueError, ["input", "(N, C)", "0-d"]),
    ((LOGITS[:, :0], TARGET), {}, ValueError, ["input", "one class", "(4, 0)"]),
    ((LOGITS, 3), {}, TypeError, ["target", "int", "(a, b, lam)"]),
    ((LOGITS, (LABELS, LABELS)), {}, ValueError, ["target", "2 entries", "(a, b, lam)"]),
    ((LOGITS, (LABELS, [0, 1], 0.5)), {}, TypeError, ["labels b", "list", "Tensor"]),
    ((LOGITS, (LABELS, LABELS.float(), 0.5)), {}, TypeError,
     ["labels b", "torch.float32", "torch.int64"]),
    ((LOGITS, (LABELS.bool(), LABELS, 0.5)), {}, TypeError,
     ["labels a", "torch.bool", "torch.int64"]),
    ((LOGITS, (LABELS[:3], LABELS, 0.5)), {}, ValueError, ["labels a", "(3,)", "(4,)"]),
    ((LOGITS, (LABELS, LABELS[:, None], 0.5)), {}, ValueError, ["labels b", "(4, 1)", "(4,)"]),
    ((LOGITS[0], (LABELS, LABELS, 0.5)), {}, ValueError, ["labels a", "(4,)", "()"]),
    ((LOGITS, (LOGITS[:, :3], LOGITS[:, :3], 0.5)), {}, ValueError,
     ["labels a", "(4, 3)", "(4, 5)"]),
    ((LOGITS, (LABELS + 2, LABELS, 0.5)), {}, ValueError, ["labels a", "5", "[0, 5)", "-100"]),
    ((LOGITS, (LABELS, LABELS - 1, 0.5)), {"ignore_index": -7}, ValueError,
     ["labels b", "-1", "[0, 5)", "-7"]),
    ((LOGITS, (LABELS, LABELS, 1.5)), {}, ValueError, ["lam", "1.5", "[0, 1]"]),
    ((LOGITS, (LABELS, LABELS, math.nan)), {}, ValueError, ["lam", "nan", "[0, 1]"]),
    ((LOGITS, (LABELS, LABELS, torch.tensor([0, 1, 2, 0.5]))), {}, ValueError,
     ["lam", "2", "[0, 1]"]),
    ((LOGITS, (LABELS, LABELS, torch.rand(3))), {}, ValueError, ["lam", "(3,)", "(4,)"]),
    ((LOGITS, (LABELS, LABELS, torch.ones(4, dtype=torch.long))), {}, TypeError,
     ["lam", "torch.int64", "floating-point"]),
    ((LOGITS, (LABELS, LABELS, "half")), {}, TypeError, ["lam", "str", "number"]),
    ((LOGITS, TARGET), {"weight": [1.0] * 5}, TypeError, ["weight", "list", "Tensor"]),
    ((LOGITS, TARGET), {"weight": torch.ones(5).long()}, TypeError,
     ["weight", "torch.int64", "floating-point"]),
    ((LOGITS, TARGET), {"weight": torch.rand(4)}, ValueError, ["weight", "(4,)", "(5,)"]),
    ((LOGITS, TARGET), {"ignore_index": 1.0}, TypeError, ["ignore_index", "1.0", "integer"]),
    ((LOGITS, TARGET), {"reduction": "max"}, ValueError,
     ["reduction", "'max'", "'mean'", "'sum'", "'none'"]),
    ((LOGITS, TARGET), {"label_smoothing": 1.1}, ValueError, ["label_smoothing", "1.1", "[0, 1]"]),
    ((LOGITS, TARGET), {"label_smoothing": "much"}, TypeError,
     ["label_smoothing", "'much'", "number"]),
    ((LOGITS, (LABELS.to("meta"), LABELS, 0.5)), {}, ValueError, ["labels a", "meta", "cpu"]),
    ((LOGITS, TARGET), {"weight": torch.rand(5, device="meta")}, ValueError,
     ["weight", "meta", "cpu"]),
]  # fmt: skip


@pytest.mark.parametrize(
    "arguments,options,error,words", BAD, ids=[" ".join(words) for *_, words in BAD]
)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_bad_input(arguments, options, error, words, backend):
    with regfast.backend(backend), pytest.raises(error) as raised:
        mixup_cross_entropy(*arguments, **options)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_ops_refuse_what_does_not_belong_to_the_logits(device):
    """autograd never sends it; a direct call of the op may, and a kernel would read beyond it."""
    c = case((4, 5), device=device)
    arguments = [c.z, c.a, c.b, c.lam, None]
    options = (-100, "mean", 0.0, torch.float32)
    for place, wrong in ((1, c.a[:2]), (3, c.lam[:2]), (4, c.lam[:2])):
        changed = [*arguments[:place], wrong, *arguments[place + 1 :]]
        with pytest.raises(ValueError, match=r"must .*\(2,\)"):
            torch.ops.regfast.mixup_cross_entropy(*changed, *options)
    _, statistics = torch.ops.regfast.mixup_cross_entropy(*arguments, *options)
    backward = torch.ops.regfast.mixup_cross_entropy_backward
    with pytest.raises(ValueError, match=r"grad must be \(\) or \(4,\)"):
        backward(c.z.new_ones(2), *arguments, statistics, -100, "mean", 0.0)
    with pytest.raises(ValueError, match=r"statistics must have .*\(10,\).*got .*\(8,\)"):
        # Without the denominators of a mean.
        backward(c.z.new_ones(()), *arguments, statistics[:8], -100, "mean", 0.0)
