"""functional.mixup beyond the contract suite.

uint8 images, formats and dtypes, in place, boxes, gradients of lam, bad input.

1. The output is NumPy's, for every input and argument, on both paths.
2. `out` is written; x itself only for an involution. A refused call writes nothing.
3. lam is an input of a compiled graph: a new value does not recompile.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import BOXES, LAM
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import regfast
from regfast._core.dispatch import may_read
from regfast.functional import mixup

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FORMATS = [torch.preserve_format, torch.contiguous_format, torch.channels_last]
# Sums of a few terms of order one, in another order.
FLOAT32 = dict(rtol=1e-5, atol=1e-5)
# One rounding to the dtype of values below 4, after float32. The interpreter truncates to bfloat16,
# hence a whole unit.
HALF = {
    torch.float16: dict(rtol=2.0**-10, atol=1e-5),
    torch.bfloat16: dict(rtol=2.0**-7, atol=1e-5),
}
PERMUTATION, INVOLUTION, REPEATS = (
    torch.tensor(index) for index in ([2, 0, 3, 1], [1, 0, 3, 2], [1, 1, 3, 1])
)
paths = pytest.mark.parametrize("path", ["reference", "triton"])


@pytest.fixture
def on_path(path, request):
    """Run a test on one path."""
    if path == "triton":
        request.getfixturevalue("kernels")
    with regfast.backend(path):
        yield path


def images(device: str, channels_last: bool, width: int = 16) -> torch.Tensor:
    x = torch.randint(256, (4, 3, 5, width), dtype=torch.uint8, device=device)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def tensors(device, *values):
    return [torch.as_tensor(value, device=device) for value in values]


@paths
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("box", [False, True], ids=["blended", "boxes"])
def test_uint8_images_come_out_normalised(
    box, channels_last, memory_format, path, on_path, device, poisoned
):
    x = images(device, channels_last)
    index, lam, boxes = tensors(device, PERMUTATION, LAM, BOXES)
    boxes[1] = torch.tensor([0, 5, 0, 16])
    y = mixup(
        x, index, lam, box=boxes if box else None, mean=MEAN, std=STD, memory_format=memory_format
    )
    given = boxes.tolist() if box else [None] * 4
    expected = oracle.mixup(x.cpu().numpy() / 255.0, PERMUTATION.tolist(), LAM, given, MEAN, STD)
    assert y.dtype == torch.float32
    assert y.stride() == torch.empty_like(x, memory_format=memory_format).stride()
    torch.testing.assert_close(y.cpu(), torch.from_numpy(expected).float(), **FLOAT32)


@paths
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_uint8_images_come_out_in_half_precision(dtype, path, on_path, device):
    x, (index, mean, std) = images(device, True), tensors(device, PERMUTATION, MEAN, STD)
    y = mixup(x, index, 0.3, mean=mean, std=std, dtype=dtype)
    expected = oracle.mixup(
        x.cpu().numpy() / 255.0, PERMUTATION.tolist(), [0.3] * 4, [None] * 4, MEAN, STD
    )
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.cpu().float(), torch.from_numpy(expected).float(), **HALF[dtype])
    plain = mixup(x, index, 0.3, dtype=dtype)
    expected = oracle.mixup(
        x.cpu().numpy() / 255.0, PERMUTATION.tolist(), [0.3] * 4, [None] * 4, 0.0, 1.0
    )
    torch.testing.assert_close(
        plain.cpu().float(), torch.from_numpy(expected).float(), **HALF[dtype]
    )


# Bytes are blended in float32, in an order other than the oracle's: some roundings of values below
# 4.
BYTES = dict(rtol=2.0**-21, atol=2.0**-21)


@paths
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 16, 64])
@pytest.mark.parametrize("memory_format", FORMATS[1:], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_bytes_of_any_number_of_channels(
    channels, channels_last, memory_format, path, on_path, device, poisoned
):
    """Each channel has its own mean and std, within a format and across; sizes fill no block."""
    shape = (3, channels, 23, 31) if channels < 16 else (3, channels, 7, 24)
    x = torch.randint(256, shape, dtype=torch.uint8, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    mean, std = [0.1 + 0.01 * c for c in range(channels)], [0.5 + 0.01 * c for c in range(channels)]
    index, lam = tensors(device, [2, 0, 1], [0.0, 0.3, 1.0])
    y = mixup(x, index, lam, mean=mean, std=std, memory_format=memory_format)
    expected = oracle.mixup(
        x.cpu().numpy() / 255.0, [2, 0, 1], [0.0, 0.3, 1.0], [None] * 3, mean, std
    )
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.cpu(), torch.from_numpy(expected).float(), **BYTES)


@paths
def test_every_pair_of_bytes(path, on_path, device):
    """With lam 0, 1 and between: equal to the last bits of float32."""
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    x = torch.stack((byte.repeat(256), byte.repeat_interleave(256)))
    for lam in (0.0, 0.3, 1.0):
        y = mixup(x, torch.tensor([1, 0], device=device), lam, dtype=torch.float32)
        wide = x.double() / 255
        torch.testing.assert_close(
            y.double(), lam * wide + (1 - lam) * wide.flip(0), rtol=3e-7, atol=0
        )


@pytest.mark.parametrize("box", [False, True], ids=["blended", "boxes"])
@pytest.mark.parametrize("memory_format", FORMATS[1:], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32], ids=str)
def test_a_program_has_several_samples(
    dtype, memory_format, box, device, kernels, monkeypatch, poisoned
):
    """As for a large batch; the last program has fewer samples, each with its own lam and box."""
    from regfast.kernels import mixup as module

    monkeypatch.setattr(module, "PROGRAMS", 1)
    shape = (11, 3, 19, 37)
    x = (torch.randint(256, shape) if dtype == torch.uint8 else torch.randn(shape)).to(
        device, dtype
    )
    index = torch.randperm(11, device=device)
    lam, boxes = (
        torch.rand(11, device=device),
        torch.tensor([2, 9, 3, 30], device=device).repeat(11, 1),
    )
    boxes[::3] = -1
    arguments = dict(
        mean=MEAN,
        std=STD,
        box=boxes if box else None,
        dtype=torch.float32,
        memory_format=memory_format,
    )
    y = mixup(x, index, lam, **arguments)
    with regfast.backend("reference"):
        expected = mixup(x, index, lam, **arguments)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, **FLOAT32)
    scale, shift = tensors(device, MEAN, STD)
    index[4] = 11
    y = module.mixup(x, index, lam, arguments["box"], scale, shift, torch.float32, memory_format)
    assert [row.isnan().all().item() for row in y] == [i == 4 for i in range(11)]
    assert not y[:4].isnan().any() and not y[5:].isnan().any()


def test_pairs_in_place_where_a_program_has_several_samples(device, kernels, monkeypatch):
    from regfast.kernels import mixup as module

    monkeypatch.setattr(module, "PROGRAMS", 1)
    x, index = (
        torch.randn(11, 3, 700, device=device).half(),
        torch.tensor([3, 1, 10, 0, 7, 9, 8, 4, 6, 5, 2], device=device),
    )
    lam = torch.rand(11, device=device)
    expected = mixup(x, index, lam)
    mixup(x, index, lam, out=x)
    assert torch.equal(x, expected)


@paths
@pytest.mark.parametrize(
    "given,wanted",
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_the_result_has_the_dtype_asked_for_and_the_gradient_x_s(
    given, wanted, path, on_path, device
):
    x = torch.randn(4, 3, 5, device=device).to(given).requires_grad_()
    y = mixup(x, PERMUTATION.to(device), 0.3, dtype=wanted)
    assert y.dtype == wanted
    wide = x.detach().double()
    torch.testing.assert_close(y.double(), 0.3 * wide + 0.7 * wide[PERMUTATION], **FLOAT32)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.dtype == given
    torch.testing.assert_close(
        dx, torch.ones_like(dx), **FLOAT32 if given != torch.float16 else HALF[given]
    )


@paths
@pytest.mark.parametrize("index", [PERMUTATION, REPEATS], ids=["permutation", "repeats"])
def test_the_gradient_is_the_transpose_of_the_blend(index, path, on_path, device):
    """out = A x for a matrix A of samples by samples, so grad_x = A' g."""
    lam = np.asarray(LAM)
    matrix = np.diag(lam)
    np.add.at(matrix, (np.arange(4), index.numpy()), 1 - lam)
    x, g = torch.randn(4, 6, device=device, requires_grad=True), torch.randn(4, 6, device=device)
    (dx,) = torch.autograd.grad(mixup(x, index.to(device), torch.tensor(LAM, device=device)), x, g)
    torch.testing.assert_close(
        dx.cpu(), torch.from_numpy(matrix.T @ g.cpu().double().numpy()).float(), **FLOAT32
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("index", [PERMUTATION, REPEATS], ids=["permutation", "repeats"])
def test_the_gradient_in_half_precision_is_the_rounded_sum(index, dtype):
    """On the reference; the contract suite covers the kernels."""
    lam = torch.tensor([0.3, 0.6, 0.1, 0.8])
    matrix = lam.diag().index_put_((torch.arange(4), index), 1 - lam, accumulate=True)
    x, g = torch.randn(4, 500).to(dtype).requires_grad_(), torch.randn(4, 500).to(dtype)
    (dx,) = torch.autograd.grad(mixup(x, index, lam), x, g)
    # Half a unit in the last place, and a hundredth of it for the float32 sum that is rounded.
    rtol = 1.01 * 2.0 ** (-11 if dtype == torch.float16 else -8)
    torch.testing.assert_close(dx.double(), matrix.double().T @ g.double(), rtol=rtol, atol=1e-6)


WEIGHTS = {
    "one": 1.0,
    "zero": 0.0,
    "one in a tensor": torch.tensor(1.0),
    "zero in a tensor": torch.tensor(0.0),
    "each": torch.tensor([1.0, 0.0, 0.5, 1.0]),
    "each in float64": torch.tensor([0.0, 1.0, 0.25, 0.0], dtype=torch.float64),
}


def mixed_by_hand(x, index, lam, box):
    """Per sample; the sum leaves out terms of weight zero."""
    y = torch.empty_like(x)
    for i, j in enumerate(index.tolist()):
        weight = lam if not isinstance(lam, torch.Tensor) else lam.expand(len(x))[i].item()
        y[i] = x[i] if weight == 1 else x[j] if weight == 0 else weight * x[i] + (1 - weight) * x[j]
        if box is not None and box[i, 0] >= 0:
            y0, y1, x0, x1 = box[i].tolist()
            y[i] = x[i]
            y[i, ..., y0:y1, x0:x1] = x[j, ..., y0:y1, x0:x1]
    return y


def awkward(*shape):
    """Random numbers, about a third of them replaced by infinities and NaN."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf")])
    return torch.randn(shape).where(torch.rand(shape) < 0.7, values[torch.randint(3, shape)])


@paths
@pytest.mark.parametrize("box", [None, BOXES], ids=["blended", "boxes"])
@pytest.mark.parametrize("lam", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_weight_of_zero_reads_nothing(dtype, lam, box, path, on_path, device):
    """A term of weight zero passes no infinity or NaN to the batch or its gradient.

    Each element has few bits, so that sums are exact.
    """
    x, g = (awkward(4, 3, 6, 5).mul(8).round().div(8).to(device, dtype) for _ in range(2))
    lam = WEIGHTS[lam].to(device) if isinstance(WEIGHTS[lam], torch.Tensor) else WEIGHTS[lam]
    box = None if box is None else torch.tensor(box, device=device)
    for index in (PERMUTATION.to(device), REPEATS.to(device)):
        leaf = x.clone().requires_grad_()
        y = mixup(leaf, index, lam, box=box)
        torch.testing.assert_close(
            y.detach(), mixed_by_hand(x, index, lam, box), rtol=0, atol=0, equal_nan=True
        )
        with torch.no_grad():
            torch.testing.assert_close(
                mixup(x, index, lam, box=box), y, rtol=0, atol=0, equal_nan=True
            )
        (dx,) = torch.autograd.grad(y, leaf, g)
        # By autograd on plain slices, which read only what they hold.
        plain = x.double().requires_grad_()
        (expected,) = torch.autograd.grad(mixed_by_hand(plain, index, lam, box), plain, g.double())
        torch.testing.assert_close(dx, expected.to(dtype), rtol=0, atol=0, equal_nan=True)


@paths
@pytest.mark.parametrize("lam", ["one", "zero", "each"])
def test_a_weight_of_zero_reads_nothing_in_place(lam, path, on_path, device):
    x, lam, index = awkward(4, 700).to(device), WEIGHTS[lam], INVOLUTION.to(device)
    lam = lam.to(device) if isinstance(lam, torch.Tensor) else lam
    expected = mixed_by_hand(x, index, lam, None)
    mixup(x, index, lam, out=x)
    torch.testing.assert_close(x, expected, equal_nan=True, **FLOAT32)


@pytest.mark.parametrize("lam", WEIGHTS)
@pytest.mark.parametrize("differentiated", [False, True])
def test_a_weight_of_zero_reads_nothing_in_a_compiled_graph(lam, differentiated):
    x, lam = awkward(4, 3, 6, 5).requires_grad_(differentiated), WEIGHTS[lam]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, lam: mixup(x, REPEATS, lam), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(
        compiled(x, lam), mixed_by_hand(x, REPEATS, lam, None), equal_nan=True, **FLOAT32
    )


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_derivative_by_lam_is_the_difference_also_where_one_has_no_weight(weight):
    x, lam = torch.randn(4, 3, 5), torch.full((4,), weight)
    expected = (x - x[REPEATS]).flatten(1).sum(1)

    def total(lam):
        return mixup(x, REPEATS, lam).sum()

    (found,) = torch.autograd.grad(total(lam.requires_grad_()), lam)
    tangent = torch.func.jvp(total, (lam.detach(),), (torch.ones(4),))[1]
    torch.testing.assert_close(found, expected, **FLOAT32)
    torch.testing.assert_close(torch.func.grad(total)(lam.detach()), expected, **FLOAT32)
    torch.testing.assert_close(tangent, expected.sum(), **FLOAT32)


class NoFloat64(TorchDispatchMode):
    """A device without float64, as MPS is: the meta device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, torch.Tensor) and t.is_meta:
                assert t.dtype != torch.float64, f"{func} sends float64"
        return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize(
    "lam",
    [
        torch.tensor(0.25, dtype=torch.float64),
        torch.rand(4, dtype=torch.float64),
        np.random.rand(4),
    ],
)
def test_no_float64_is_sent_to_a_device(lam, dtype):
    x, index = torch.zeros(4, 3, 6, 5, dtype=dtype, device="meta"), PERMUTATION
    labels, logits = (
        torch.zeros(4, dtype=torch.int64, device="meta"),
        torch.zeros(4, 3, device="meta"),
    )
    with NoFloat64():
        assert mixup(x, index, lam, mean=np.array(MEAN), std=STD).is_meta
        assert mixup(
            x,
            index,
            lam,
            mean=torch.tensor(MEAN, dtype=torch.float64),
            std=torch.ones(3, device="meta"),
        ).is_meta
        assert mixup(x, index, 0.5, mean=torch.zeros(3, device="meta"), std=np.float64(0.5)).is_meta
        for arguments in ({}, {"cutmix_alpha": 1.0, "per_sample": True}):
            mix = regfast.MixUp(1.0, mean=MEAN, std=STD, dtype=torch.float16, **arguments)
            mixed, target = mix(x, labels)
            assert mixed.is_meta and mix.eval()(x).is_meta
            regfast.MixupCrossEntropyLoss()(logits, target)
            regfast.MixedTarget(labels, labels, lam).soft(3)
        regfast.MixupCrossEntropyLoss()(logits, (labels, labels, lam))
        regfast.MixupBCEWithLogitsLoss()(logits, (logits, logits, lam))


def test_a_fake_lam_blends_fake_images():
    """As in planning a network without memory."""
    with FakeTensorMode():
        x = torch.randn(4, 3, 6, 5)
        for lam in (torch.rand(()), torch.rand(4), 0.3):
            assert mixup(x, torch.randperm(4), lam).shape == x.shape


@paths
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("boxed", [False, True], ids=["blended", "boxes"])
def test_an_involution_is_blended_in_place(boxed, channels_last, path, on_path, device):
    x = torch.randn(4, 3, 6, 5, device=device)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    index, lam, boxes = tensors(device, [1, 0, 2, 3], LAM, BOXES)
    box = boxes if boxed else None
    with regfast.backend("reference"):
        expected = mixup(x, index, lam, box=box)
    given = x.clone()
    assert mixup(given, index, lam, box=box, out=given) is given
    torch.testing.assert_close(given, expected, **FLOAT32)
    sliced = torch.randn(4, 3, 6, 10, device=device)[..., ::2].copy_(x)
    mixup(sliced, index, lam, box=box, out=sliced)
    torch.testing.assert_close(sliced, expected, **FLOAT32)


@paths
def test_out_is_written_to_in_its_own_format(path, on_path, device):
    x, out = images(device, False), torch.empty(4, 3, 5, 16, dtype=torch.float16, device=device)
    out = out.contiguous(memory_format=torch.channels_last).fill_(float("nan"))
    y = mixup(x, REPEATS.to(device), 0.25, mean=0.5, std=0.5, dtype=torch.float16, out=out)
    assert y is out and y.is_contiguous(memory_format=torch.channels_last)
    expected = mixup(x, REPEATS.to(device), 0.25, mean=0.5, std=0.5)
    torch.testing.assert_close(out.float(), expected, **HALF[torch.float16])


@paths
def test_autograd_sees_that_a_batch_was_written_to(path, device):
    x, w = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device, requires_grad=True)
    y = (x * w).sum()
    with regfast.backend(path):
        mixup(x, INVOLUTION.to(device), 0.5, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@paths
def test_out_is_refused_where_a_tangent_would_be_lost(path, device):
    x = torch.randn(4, 3, device=device)
    with regfast.backend(path), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ValueError, match="out= has no gradient, and x requires one"):
            mixup(dual, INVOLUTION.to(device), 0.5, out=torch.empty_like(x))


def test_out_may_be_another_part_of_the_same_memory(device):
    both = torch.randn(8, 3, device=device)
    expected = mixup(both[:4], PERMUTATION.to(device), 0.25)
    mixup(both[:4], PERMUTATION.to(device), 0.25, out=both[4:])
    torch.testing.assert_close(both[4:], expected, rtol=0, atol=0)


@paths
def test_bytes_become_float64_in_float64(path, on_path, device):
    x, index = images(device, False), PERMUTATION.to(device)
    y = mixup(
        x, index, torch.tensor(0.3, dtype=torch.float64), mean=MEAN, std=STD, dtype=torch.float64
    )
    expected = oracle.mixup(
        x.cpu().numpy() / 255.0, PERMUTATION.tolist(), [0.3] * 4, [None] * 4, MEAN, STD
    )
    torch.testing.assert_close(y.cpu(), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@paths
def test_an_empty_batch_stays_one(path, device):
    with regfast.backend(path):
        for shape in ((0, 3, 4, 4), (2, 0, 4, 4), (0,)):
            x = torch.randn(shape, device=device, requires_grad=True)
            y = mixup(x, torch.arange(shape[0], device=device), 0.5)
            y.sum().backward()
            assert y.shape == x.grad.shape == x.shape


def test_int32_indices_and_numbers_of_other_kinds():
    x = torch.randn(4, 3)
    expected = mixup(x, PERMUTATION, 0.5)
    numbers = (
        np.float32(0.5),
        np.float64(0.5),
        np.array(0.5),
        np.full(4, 0.5),
        np.full(4, 0.5, np.float16),
        Fraction(1, 2),
    )
    for lam in (*numbers, torch.tensor(0.5, dtype=torch.float64)):
        torch.testing.assert_close(mixup(x, PERMUTATION.int(), lam), expected, **FLOAT32)
    y = mixup(x, PERMUTATION, 1)
    assert y.equal(x) and y.data_ptr() != x.data_ptr()
    assert mixup(x, PERMUTATION, 0).equal(x[PERMUTATION])


@pytest.mark.parametrize("box", [None, "each"], ids=["blended", "boxes"])
@pytest.mark.parametrize("each", [False, True], ids=["scalar", "each"])
def test_lam_has_a_gradient(each, box):
    x = torch.randn(4, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    lam = torch.tensor(
        [0.25, 0.5, 0.75, 0.1] if each else 0.4, dtype=torch.float64, requires_grad=True
    )
    box = None if box is None else torch.tensor(BOXES)

    def function(x, lam):
        return mixup(x, REPEATS, lam, box=box, mean=(0.1, 0.2), std=(0.5, 2.0))

    assert torch.autograd.gradcheck(function, (x, lam), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, lam), fast_mode=True)


def test_kernels_leave_a_lam_that_is_differentiated_to_the_reference(device):
    x, lam = torch.randn(4, 3, device=device), torch.tensor(0.5, device=device, requires_grad=True)
    with regfast.backend("triton"), pytest.raises(RuntimeError, match="lam is differentiated"):
        mixup(x, PERMUTATION.to(device), lam)
    mixup(x, PERMUTATION.to(device), lam).sum().backward()
    assert lam.grad is not None


def test_boxes_and_normalisation_of_numpy():
    x, box = torch.rand(4, 3, 6, 5), np.array([1, 3, 0, 2])
    assert mixup(x, PERMUTATION, 0.5, box=box).equal(mixup(x, PERMUTATION, 0.5, box=(1, 3, 0, 2)))
    expected = mixup(x, PERMUTATION, 0.5, mean=MEAN, std=STD)
    for mean, std in (
        (np.array(MEAN), np.array(STD)),
        ([np.float64(m) for m in MEAN], torch.tensor(STD)),
    ):
        torch.testing.assert_close(
            mixup(x, PERMUTATION, 0.5, mean=mean, std=std), expected, **FLOAT32
        )
    half = np.float32(0.5)
    assert mixup(x, PERMUTATION, 0.5, mean=half, std=half).equal(
        mixup(x, PERMUTATION, 0.5, mean=0.5, std=0.5)
    )


def test_a_compiled_graph_follows_lam_and_index_and_compiles_once():
    counter = CompileCounter()
    compiled = torch.compile(
        lambda x, index, lam: mixup(x, index, lam).relu(), fullgraph=True, backend=counter
    )
    x = torch.randn(4, 3, 8, 8)
    for index in (PERMUTATION, INVOLUTION, REPEATS):
        for lam in torch.tensor([0.0, 0.3, 0.9]):
            torch.testing.assert_close(
                compiled(x, index, lam), mixup(x, index, lam).relu(), **FLOAT32
            )
    assert counter.frame_count == 1


def test_a_compiled_graph_writes_in_place():
    compiled = torch.compile(
        lambda x, index, lam: mixup(x, index, lam, out=x), fullgraph=True, backend="aot_eager"
    )
    x, lam = torch.randn(4, 3, 8, 8), torch.tensor(0.3)
    expected = mixup(x, INVOLUTION, lam)
    torch.testing.assert_close(compiled(x, INVOLUTION, lam), expected, **FLOAT32)
    torch.testing.assert_close(x, expected, **FLOAT32)


@pytest.mark.slow
def test_inductor_follows_a_lam_that_is_a_number():
    """PyTorch 2.13's Inductor reuses torch.add's `alpha` where it is an expression of an input."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, lam: mixup(x, PERMUTATION, lam), fullgraph=True)
    x = torch.randn(4, 3, 8, 8)
    for lam in (0.1, 0.2, 0.3, 0.9):
        torch.testing.assert_close(compiled(x, lam), mixup(x, PERMUTATION, lam), **FLOAT32)


def test_values_are_looked_at_on_the_host_alone():
    assert may_read(torch.zeros(2)) and may_read(torch.nn.Parameter(torch.zeros(2)))
    assert not may_read(torch.zeros(2, device="meta"))
    with regfast.debug():
        assert not may_read(torch.zeros(2, device="meta"))
    torch.func.vmap(
        lambda t: t if may_read(t) is False else pytest.fail("a transform's tensor was read")
    )(torch.zeros(2))
    with torch._subclasses.FakeTensorMode():
        assert not may_read(torch.zeros(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA device is needed")
def test_values_on_the_device_are_looked_at_by_the_debug_switch():
    x, far = torch.randn(4, 3, device="cuda"), torch.tensor([0, 1, 2, 0], device="cuda")
    lam = torch.tensor(1.5, device="cuda")
    mixup(x, far, lam)
    with regfast.debug():
        with pytest.raises(ValueError, match=r"lam.*1\.5"):
            mixup(x, far, lam)
        with pytest.raises(ValueError, match=r"index.*\[0, 4\).*4"):
            mixup(x, far + 2, 0.5)
        with pytest.raises(ValueError, match=r"\[0, 3\).*3"):
            regfast.functional.mixup_cross_entropy(x, (far % 3, far + 1, 0.5))


@pytest.mark.parametrize("box", [None, (1, 3, 0, 2)], ids=["blended", "box"])
def test_a_partner_that_does_not_exist_makes_a_sample_nan_and_no_other(box, device, kernels):
    """The host does not read an index on CUDA; the kernels stay within the batch."""
    x = torch.randn(6, 2, 4, 5, device=device)
    lam, far = torch.tensor(0.25, device=device), torch.tensor([1, 0, -3, 6, 5, 4], device=device)
    box = None if box is None else torch.tensor(box, device=device)
    near = far.where((far >= 0) & (far < 6), 0)
    expected = mixup(x, near, lam, box=box)
    expected[2:4] = float("nan")
    y = torch.ops.regfast.mixup(x, far, lam, box, None, None, x.dtype, torch.preserve_format)
    torch.testing.assert_close(y, expected, equal_nan=True, **FLOAT32)
    around = torch.full((8, 2, 4, 5), 7.0, device=device)
    inner = around[1:-1].copy_(x)
    torch.ops.regfast.mixup_out(inner, far, lam, box, None, None, inner)
    torch.testing.assert_close(inner, expected, equal_nan=True, **FLOAT32)
    assert (around[0] == 7).all() and (around[-1] == 7).all()
    dx = torch.ops.regfast.mixup_backward(y.nan_to_num(), far, lam, box, None, x.stride(), x.dtype)
    assert dx.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_counting_sorts_as_torch_does(dtype, device, kernels, monkeypatch):
    """Several programs, repeated and missing partners; torch sorts large batches."""
    from regfast.kernels import mixup as module

    index = torch.randint(-3, 45, (41,), device=device).to(dtype)
    order = torch.full((2 * 41 + 1,), -7, dtype=torch.int32, device=device)
    module._order_kernel[(-(-42 // module.ORDER_ROWS),)](
        index, order, 41, ROWS=module.ORDER_ROWS, BLOCK=16
    )
    assert torch.equal(order, module._sorted(index))
    x, index = torch.randn(41, 3, device=device, requires_grad=True), index.clamp(0, 40)
    gradients = []
    for most in (module.ORDER_BATCH, 40):
        monkeypatch.setattr(module, "ORDER_BATCH", most)
        gradients += torch.autograd.grad(mixup(x, index, 0.3).square().sum(), x)
    assert torch.equal(*gradients)


X, U8 = torch.randn(4, 3, 6, 5), torch.zeros(4, 3, 6, 5, dtype=torch.uint8)
ARGUMENTS = [
    (lambda: mixup([1.0], PERMUTATION, 0.5), TypeError, ["x", "list", "Tensor"]),
    (lambda: mixup(X.int(), PERMUTATION, 0.5), TypeError,
     ["x", "torch.int32", "floating-point or uint8"]),
    (lambda: mixup(torch.tensor(1.0), PERMUTATION, 0.5), ValueError, ["x", "(B, ...)", "0-d"]),
    (lambda: mixup(X, [0, 1, 2, 3], 0.5), TypeError, ["index", "list", "Tensor"]),
    (lambda: mixup(X, PERMUTATION.float(), 0.5), TypeError, ["index", "torch.float32", "int64"]),
    (lambda: mixup(X, PERMUTATION[:3], 0.5), ValueError, ["index", "(4,)", "(3,)"]),
    (lambda: mixup(X, torch.tensor([0, 1, 2, 4]), 0.5), ValueError, ["index", "[0, 4)", "4"]),
    (lambda: mixup(X, torch.tensor([0, -1, 2, 3]), 0.5), ValueError, ["index", "[0, 4)", "-1"]),
    (lambda: mixup(X, PERMUTATION, "half"), TypeError, ["lam", "str", "number"]),
    (lambda: mixup(X, PERMUTATION, True), TypeError, ["lam", "bool", "number"]),
    (lambda: mixup(X, PERMUTATION, 1.5), ValueError, ["lam", "1.5", "[0, 1]"]),
    (lambda: mixup(X, PERMUTATION, float("nan")), ValueError, ["lam", "nan", "[0, 1]"]),
    (lambda: mixup(X, PERMUTATION, torch.tensor([0.5, -0.25, 0.5, 0.5])), ValueError,
     ["lam", "-0.25", "[0, 1]"]),
    (lambda: mixup(X, PERMUTATION, torch.tensor(float("nan"))), ValueError,
     ["lam", "nan", "[0, 1]"]),
    (lambda: mixup(X, PERMUTATION, torch.tensor(1)), TypeError,
     ["lam", "torch.int64", "floating-point"]),
    (lambda: mixup(X, PERMUTATION, torch.rand(3)), ValueError, ["lam", "(4,)", "(3,)"]),
    (lambda: mixup(X, PERMUTATION, 0.5, box=(0, 1.5, 0, 2)), TypeError, ["box", "1.5", "integers"]),
    (lambda: mixup(X, PERMUTATION, 0.5, box=torch.rand(4)), TypeError,
     ["box", "torch.float32", "int64"]),
    (lambda: mixup(X, PERMUTATION, 0.5, box=(0, 1, 2)), ValueError, ["box", "(4,)", "(3,)"]),
    (lambda: mixup(X, PERMUTATION, 0.5, box=(0, 7, 0, 2)), ValueError,
     ["box", "y1 <= 6", "(0, 7, 0, 2)"]),
    (lambda: mixup(X, PERMUTATION, 0.5, box=(3, 2, 0, 2)), ValueError,
     ["box", "y0 <= y1", "(3, 2, 0, 2)"]),
    (lambda: mixup(X, PERMUTATION, 0.5, box=(-1, 2, 0, 2)), ValueError, ["box", "(-1, 2, 0, 2)"]),
    (lambda: mixup(X[:, 0], PERMUTATION, 0.5, box=(0, 1, 0, 1)), ValueError, ["box", "(4, 6, 5)"]),
    (lambda: mixup(U8, PERMUTATION, 0.5), ValueError, ["uint8", "mean and std", "dtype"]),
    (lambda: mixup(U8, PERMUTATION, 0.5, dtype=torch.uint8), TypeError,
     ["dtype", "torch.uint8", "floating-point"]),
    (lambda: mixup(X, PERMUTATION, 0.5, dtype="half"), TypeError,
     ["dtype", "'half'", "floating-point"]),
    (lambda: mixup(X, PERMUTATION, 0.5, mean=0.5), ValueError, ["mean", "std", "together"]),
    (lambda: mixup(X, PERMUTATION, 0.5, mean=(0.1, 0.2), std=1.0), ValueError, ["mean", "3", "2"]),
    (lambda: mixup(X, PERMUTATION, 0.5, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0)), ValueError,
     ["mean", "std", "3", "2"]),
    (lambda: mixup(X, PERMUTATION, 0.5, mean=0.0, std=(1.0, 0.0, 1.0)), ValueError,
     ["std", "positive", "0.0"]),
    (lambda: mixup(U8, PERMUTATION, 0.5, mean=(123.7, 116.3, 103.5), std=58.0), ValueError,
     ["bytes", "x/255", "123.7"]),
    (lambda: mixup(X, PERMUTATION, [0.5] * 4), TypeError, ["lam", "list", "number"]),
    (lambda: mixup(X, PERMUTATION, np.array([0.5, 1.5, 0, 0])), ValueError,
     ["lam", "1.5", "[0, 1]"]),
    (lambda: mixup(X, PERMUTATION, np.array([0.5, 0.5])), ValueError, ["lam", "(4,)", "(2,)"]),
    (lambda: mixup(X, PERMUTATION, 0.5, mean="imagenet", std=1.0), TypeError,
     ["mean", "'imagenet'", "number"]),
    (lambda: mixup(X[:, 0, 0, 0], PERMUTATION, 0.5, mean=0.0, std=1.0), ValueError,
     ["channels", "(4,)"]),
    (lambda: mixup(X, PERMUTATION, 0.5, memory_format="NHWC"), TypeError,
     ["memory_format", "'NHWC'", "channels_last"]),
    (lambda: mixup(X[0, 0, :4], PERMUTATION, 0.5, memory_format=torch.channels_last), ValueError,
     ["channels_last", "4-d"]),
    (lambda: mixup(X, PERMUTATION, 0.5, out=1), TypeError, ["out", "int", "Tensor"]),
    (lambda: mixup(X, PERMUTATION, 0.5, out=torch.empty(4, 3, 6, 6)), ValueError,
     ["out", "(4, 3, 6, 5)", "(4, 3, 6, 6)"]),
    (lambda: mixup(X, PERMUTATION, 0.5, out=torch.empty_like(X).double()), ValueError,
     ["out", "float32", "float64"]),
    (lambda: mixup(X, PERMUTATION, 0.5, out=X), ValueError,
     ["out=x", "involution", "[2, 0, 3, 1]"]),
    (lambda: mixup(X, REPEATS, 0.5, out=X), ValueError, ["out=x", "involution"]),
    (lambda: mixup(X, INVOLUTION, 0.5, out=X[..., :4]), ValueError, ["out", "(4, 3, 6, 4)"]),
    (lambda: mixup(WIDE[1:], INVOLUTION, 0.5, out=WIDE[:-1]), ValueError,
     ["out", "share no memory"]),
    (lambda: mixup(ONE, INVOLUTION, 0.5, out=ONE), ValueError, ["out", "overlap", "(0, 30, 5, 1)"]),
    (lambda: mixup(X, INVOLUTION, 0.5, out=ONE.clone()[:1].expand(4, 3, 6, 5)), ValueError,
     ["out", "overlap"]),
    (lambda: mixup(LEAF, INVOLUTION, 0.5, out=LEAF), ValueError, ["out=", "x requires"]),
    (lambda: mixup(X, INVOLUTION, LEAF[0, 0, 0, 0].sigmoid(), out=X), ValueError,
     ["out=", "lam requires"]),
    (lambda: mixup(X, INVOLUTION, 0.5, memory_format=torch.channels_last, out=X), ValueError,
     ["out", "memory_format"]),
]  # fmt: skip
WIDE, ONE, LEAF = (
    torch.randn(5, 3, 6, 5),
    torch.randn(1, 3, 6, 5).expand(4, 3, 6, 5),
    torch.randn(4, 3, 6, 5, requires_grad=True),
)


@paths
@pytest.mark.parametrize(
    "call,error,words", ARGUMENTS, ids=[" ".join(words) for _, _, words in ARGUMENTS]
)
def test_bad_input_is_named_and_nothing_is_written(call, error, words, path):
    before = X.clone()
    with regfast.backend(path), pytest.raises(error) as raised:
        call()
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert X.equal(before)


@st.composite
def calls(draw):
    """A batch of any rank, format and dtype, and the arguments of a call."""
    batch, rank = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    shape = (batch, *(draw(st.sampled_from([1, 2, 3, 5, 16, 17])) for _ in range(rank - 1)))
    order = [0, *draw(st.permutations(range(1, rank)))]
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.uint8]))
    arguments: dict = {
        "index": torch.tensor([draw(st.integers(0, batch - 1)) for _ in range(batch)])
    }
    arguments["lam"] = draw(st.sampled_from([0.25, torch.tensor(0.5), torch.rand(batch)]))
    if rank >= 2 and (dtype == torch.uint8 or draw(st.booleans())):
        arguments |= dict(
            mean=draw(st.sampled_from([0.5, torch.rand(shape[1])])), std=torch.rand(shape[1]) + 0.5
        )
    elif dtype == torch.uint8:
        arguments["dtype"] = torch.float32
    if rank >= 4 and draw(st.booleans()):
        edges = [
            sorted((draw(st.integers(0, size)), draw(st.integers(0, size)))) for size in shape[-2:]
        ]
        arguments["box"] = torch.tensor(edges).flatten()
    if rank == 4:
        arguments["memory_format"] = draw(st.sampled_from(FORMATS))
    return shape, order, dtype, arguments


def check_drawn(call, device):
    shape, order, dtype, arguments = call
    x = (torch.randint(256, shape) if dtype == torch.uint8 else torch.randn(shape)).to(
        device, dtype
    )
    x = x.permute(order).contiguous().permute(*np.argsort(order).tolist())
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    x.requires_grad_(x.is_floating_point())
    results = []
    for path in ("triton", "reference"):
        with regfast.backend(path):
            y = mixup(x, **arguments)
        torch.manual_seed(1)
        results.append(
            (y, *torch.autograd.grad(y, x, torch.randn_like(y))) if x.requires_grad else (y,)
        )
    assert results[0][0].stride() == results[1][0].stride()
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, **FLOAT32)


# The kernels fixture deliberately spans all drawn examples: it counts their launches together.
DRAWN = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(max_examples=25, derandomize=True, **DRAWN)
@given(call=calls())
def test_kernels_agree_with_the_reference_on_drawn_calls(call, device, kernels):
    check_drawn(call, device)


@pytest.mark.slow
@settings(max_examples=300, **DRAWN)
@given(call=calls())
def test_kernels_agree_with_the_reference_on_many_drawn_calls(call, device, kernels):
    check_drawn(call, device)
