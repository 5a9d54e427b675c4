"""The losses of mixed labels against torch's own losses of each label."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from regfast.losses import (
    MixupBCEWithLogitsLoss,
    MixupCrossEntropyLoss,
    MixupLoss,
    mixup_accuracy,
    mixup_criterion,
)
from regfast.mixing import MixedTarget, MixUp

# float32 sums of the same terms in another order.
ROUNDING = dict(rtol=2e-6, atol=2e-6)
SCALARS = [0.0, 0.3, 1.0, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)]
NAMES = [str(lam) for lam in SCALARS]


def close(found, expected):
    torch.testing.assert_close(found, expected, **ROUNDING)


def gradient(loss, logits):
    return torch.autograd.grad(
        (loss * torch.linspace(1, 2, loss.numel()).view_as(loss)).sum(), logits, retain_graph=True
    )[0]


@pytest.fixture
def logits():
    return torch.randn(6, 5, requires_grad=True)


@pytest.fixture
def labels():
    return torch.randint(5, (2, 6)).unbind()


@pytest.mark.parametrize(
    "kind", [tuple, list, lambda target: MixedTarget(*target)], ids=["tuple", "list", "MixedTarget"]
)
@pytest.mark.parametrize("lam", SCALARS, ids=NAMES)
def test_the_book_s_loss(lam, kind, logits, labels):
    a, b = labels
    expected = lam * nn.functional.cross_entropy(logits, a) + (
        1 - lam
    ) * nn.functional.cross_entropy(logits, b)
    for found in (
        MixupLoss()(logits, kind((a, b, lam))),
        mixup_criterion(nn.CrossEntropyLoss(), logits, a, b, lam),
    ):
        assert found.dtype == torch.float32
        close(found, expected.float())
        close(gradient(found, logits), gradient(expected, logits))


def test_the_book_s_loss_of_plain_targets(logits, labels):
    base = nn.CrossEntropyLoss(label_smoothing=0.1)
    close(MixupLoss(base)(logits, labels[0]), base(logits, labels[0]))
    assert list(MixupLoss(nn.CrossEntropyLoss(torch.ones(5))).state_dict()) == ["base_loss.weight"]
    assert repr(MixupLoss()) == repr(MixupLoss(nn.CrossEntropyLoss()))


def test_any_function_is_a_base_loss(logits, labels):
    a, b = labels
    found = MixupLoss(lambda x, y: x[:, 0].mean() + y.sum())(logits, (a, b, 0.25))
    close(found, logits[:, 0].mean() + 0.25 * a.sum() + 0.75 * b.sum())


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)], ids=str)
def test_a_per_sample_lam_weighs_a_per_sample_loss(shape):
    x, lam = torch.randn(shape), torch.rand(6)
    a, b = torch.randint(5, (2, 6, *shape[2:]))
    base = nn.CrossEntropyLoss(reduction="none")
    found = MixupLoss(base)(x, (a, b, lam))
    assert found.shape == a.shape
    for i in range(6):
        close(found[i], lam[i] * base(x, a)[i] + (1 - lam[i]) * base(x, b)[i])


@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_per_sample_lam_is_refused_with_a_reduced_loss(reduction, size, logits, labels):
    """A per-sample lam needs a per-sample loss, in a batch of one too.

    A vector times a mean is a vector. Its mean is the loss of the mean lam: wrong, and silent.
    """
    a, b = (t[:size] for t in labels)
    base, lam = nn.CrossEntropyLoss(reduction=reduction), torch.rand(size)
    for call in (
        lambda: MixupLoss(base)(logits[:size], (a, b, lam)),
        lambda: mixup_criterion(base, logits[:size], a, b, lam),
        lambda: mixup_accuracy(lambda x, y: 0.5, logits[:size], a, b, lam),
    ):
        with pytest.raises(
            ValueError, match=rf"lam of shape \({size},\).*one value per sample.*got shape \(\)"
        ):
            call()


def test_the_loss_keeps_its_dtype(logits, labels):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for lam in (0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)):
            assert MixupLoss()(logits.to(dtype), (*labels, lam)).dtype == dtype
    found = mixup_accuracy(
        lambda preds, y: (preds.argmax(1) == y).sum(), logits, *labels, torch.tensor(0.3)
    )
    assert found.is_floating_point()


def test_the_blog_s_accuracy(logits, labels):
    a, b = labels

    def accuracy(preds, y):
        return (preds.argmax(1) == y).float().mean()

    close(
        mixup_accuracy(accuracy, logits, a, b, 0.3),
        0.3 * accuracy(logits, a) + 0.7 * accuracy(logits, b),
    )
    as_number = mixup_accuracy(lambda preds, y: accuracy(preds, y).item(), logits, a, b, 0.3)
    assert isinstance(as_number, float) and as_number == pytest.approx(
        mixup_accuracy(accuracy, logits, a, b, 0.3).item()
    )
    lam = torch.rand(6)
    each = mixup_accuracy(lambda preds, y: (preds.argmax(1) == y).float(), logits, a, b, lam)
    close(each, lam * (logits.argmax(1) == a) + (1 - lam) * (logits.argmax(1) == b))


@pytest.mark.parametrize(
    "lam", [*SCALARS, torch.tensor([0.0, 0.1, 0.5, 0.7, 0.9, 1.0])], ids=[*NAMES, "a sample"]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_each_label(smoothing, reduction, lam, logits, labels):
    """Class weights, and an ignored label in either target.

    A per-sample lam weights the rows within each term's own mean.
    """
    a, b = (t.clone() for t in labels)
    a[1], b[2] = 0, 0
    weight = torch.tensor([1.0, 0.5, 2.0, 1.5, 0.3])
    arguments = dict(weight=weight, ignore_index=0, label_smoothing=smoothing)
    found = MixupCrossEntropyLoss(**arguments, reduction=reduction)(logits, (a, b, lam))
    expected = torch.zeros((6,) if reduction == "none" else ())
    for labels, share in ((a, lam), (b, 1 - lam)):
        term = share * nn.functional.cross_entropy(logits, labels, **arguments, reduction="none")
        total = torch.where(labels == 0, 0, weight[labels]).sum() if reduction == "mean" else 1
        expected = expected + (term if reduction == "none" else term.sum()) / total
    assert found.dtype == torch.float32
    close(found, expected.float())
    close(gradient(found, logits), gradient(expected, logits))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_of_plain_labels_is_torch_s(reduction, logits, labels):
    arguments = dict(weight=torch.rand(5), reduction=reduction, label_smoothing=0.1)
    for target, ignored in ((labels[0], 2), (labels[0], -100), (torch.rand(6, 5), -100)):
        ours, theirs = (
            loss(**arguments, ignore_index=ignored)
            for loss in (MixupCrossEntropyLoss, nn.CrossEntropyLoss)
        )
        torch.testing.assert_close(ours(logits, target), theirs(logits, target), rtol=0, atol=0)


def test_cross_entropy_keeps_its_weight_as_torch_does():
    weight = torch.rand(5)
    ours, theirs = MixupCrossEntropyLoss(weight), nn.CrossEntropyLoss(torch.ones(5))
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
    assert not list(MixupCrossEntropyLoss().state_dict()) and not list(ours.parameters())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(theirs.weight, weight, rtol=0, atol=0)
    assert isinstance(ours, nn.CrossEntropyLoss)
    positional = MixupCrossEntropyLoss(weight, 3, "sum", 0.2)
    assert (positional.ignore_index, positional.reduction, positional.label_smoothing) == (
        3,
        "sum",
        0.2,
    )


@pytest.mark.parametrize(
    "lam", [*SCALARS, torch.tensor([0.0, 0.1, 0.5, 0.7, 0.9, 1.0])], ids=[*NAMES, "a sample"]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_bce_is_that_of_each_label(reduction, lam, logits):
    a, b = torch.rand(2, 6, 5) > 0.6
    arguments = dict(weight=torch.rand(6, 1), pos_weight=torch.rand(5) + 0.5)
    share = lam.view(-1, 1) if isinstance(lam, torch.Tensor) and lam.ndim else lam
    each = [
        nn.functional.binary_cross_entropy_with_logits(
            logits, y.float(), **arguments, reduction="none"
        )
        for y in (a, b)
    ]
    expected = share * each[0] + (1 - share) * each[1]
    expected = {"mean": expected.mean(), "sum": expected.sum(), "none": expected}[reduction].float()
    for dtype in (
        torch.bool,
        torch.int64,
        torch.uint8,
        torch.float16,
        torch.float32,
        torch.float64,
    ):
        found = MixupBCEWithLogitsLoss(**arguments, reduction=reduction)(
            logits, (a.to(dtype), b.to(dtype), lam)
        )
        assert found.dtype == torch.float32
        close(found, expected)
    close(gradient(found, logits), gradient(expected, logits))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_bce_of_plain_labels_is_torch_s(reduction, logits):
    arguments = dict(weight=torch.rand(5), reduction=reduction, pos_weight=torch.rand(5))
    ours, theirs = MixupBCEWithLogitsLoss(**arguments), nn.BCEWithLogitsLoss(**arguments)
    target = torch.rand(6, 5) > 0.5
    for dtype in (torch.bool, torch.int64, torch.float32):
        torch.testing.assert_close(
            ours(logits, target.to(dtype)), theirs(logits, target.float()), rtol=0, atol=0
        )
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "pos_weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_bce_keeps_the_logits_dtype(dtype, logits):
    a, b = torch.rand(2, 6, 5) > 0.6
    found = MixupBCEWithLogitsLoss()(logits.to(dtype), (a, b, torch.tensor(0.3)))
    assert found.dtype == dtype
    # float64 is limited by lam's float32; half precision to some units of its last place.
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-7}[dtype]
    expected = MixupBCEWithLogitsLoss()(logits.double(), (a, b, 0.3))
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "lam", [0.3, torch.tensor(0.3), torch.rand(6)], ids=["number", "0-d", "a sample"]
)
def test_bce_rounds_the_blended_labels_once(lam, dtype, logits):
    a, b = torch.rand(2, 6, 5).to(dtype)
    share = lam.view(-1, 1) if isinstance(lam, torch.Tensor) and lam.ndim else lam
    blended = (share * a.float() + (1 - share) * b.float()).to(dtype)
    loss = MixupBCEWithLogitsLoss(reduction="none")
    torch.testing.assert_close(
        loss(logits.to(dtype), (a, b, lam)), loss(logits.to(dtype), blended), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "loss", [MixupLoss(), MixupCrossEntropyLoss()], ids=["MixupLoss", "MixupCrossEntropyLoss"]
)
@pytest.mark.parametrize("training", [True, False])
def test_what_mixup_returns_is_what_the_losses_take(loss, training, logits, labels):
    _, target = MixUp().train(training)(torch.randn(6, 3), labels[0])
    expected = MixedTarget(labels[0], labels[0], 1.0) if target is labels[0] else target
    close(loss(logits, target), nn.functional.cross_entropy(logits, expected.soft(5)))


LOGITS, CLASSES = torch.randn(4, 3), torch.randint(3, (4,))
HOT = torch.rand(4, 3) > 0.5
EACH = nn.CrossEntropyLoss(reduction="none")
LOSSES = [MixupLoss(), MixupCrossEntropyLoss()]

# The call, the error, and what its message names: the value, and what is allowed.
BAD = [
    *((lambda loss=loss: loss(LOGITS, (CLASSES, CLASSES)), ValueError,
       ["tuple of three", "2"]) for loss in LOSSES),
    *((lambda loss=loss: loss(LOGITS, (CLASSES, CLASSES, 1.5)), ValueError,
       ["lam", "[0, 1]", "1.5"]) for loss in LOSSES),
    *(
        (lambda loss=loss: loss(LOGITS, (CLASSES, CLASSES, torch.tensor(-0.5))), ValueError,
         ["lam", "[0, 1]", "-0.5"])
        for loss in LOSSES
    ),
    *((lambda loss=loss: loss(LOGITS, (CLASSES, CLASSES, "half")), TypeError,
       ["lam", "number", "str"]) for loss in LOSSES),
    (lambda: MixupLoss()(LOGITS, (CLASSES, CLASSES, torch.rand(4, 1))), ValueError,
     ["(4, 1)", "()"]),
    (lambda: MixupLoss(EACH)(LOGITS, (CLASSES, CLASSES, torch.rand(3))), ValueError,
     ["(3,)", "got shape (4,)"]),
    (lambda: MixupCrossEntropyLoss()(LOGITS, (CLASSES, CLASSES, torch.rand(3))), ValueError,
     ["lam", "(4,)", "(3,)"]),
    (lambda: MixupLoss(3), TypeError, ["base_loss", "nn.CrossEntropyLoss()", "3"]),
    (lambda: MixupLoss(nn.CrossEntropyLoss), TypeError,
     ["base_loss", "nn.CrossEntropyLoss()", "class"]),
    (lambda: MixupCrossEntropyLoss(reduction="avg"), ValueError, ["reduction", "'avg'", "'mean'"]),
    (lambda: MixupCrossEntropyLoss(label_smoothing=2), ValueError,
     ["label_smoothing", "2", "[0, 1]"]),
    (lambda: MixupBCEWithLogitsLoss(reduction="x"), ValueError, ["reduction", "'x'", "'mean'"]),
    (lambda: mixup_accuracy(lambda x, y: 0.5, LOGITS, CLASSES, CLASSES, 2), ValueError,
     ["lam", "[0, 1]", "2"]),
    (lambda: MixupBCEWithLogitsLoss()(LOGITS, (HOT, HOT)), ValueError, ["tuple of three", "2"]),
    (lambda: MixupBCEWithLogitsLoss()(LOGITS, (HOT, HOT[0], 0.5)), ValueError,
     ["b", "(4, 3)", "(3,)"]),
    (lambda: MixupBCEWithLogitsLoss()(LOGITS, (CLASSES, CLASSES, 0.5)), ValueError,
     ["a", "(4, 3)", "(4,)"]),
    (lambda: MixupBCEWithLogitsLoss()(LOGITS, ([1], HOT, 0.5)), TypeError, ["a", "Tensor", "list"]),
    (lambda: MixupBCEWithLogitsLoss()(LOGITS, (HOT, HOT, 2)), ValueError, ["lam", "[0, 1]", "2"]),
    (lambda: MixupBCEWithLogitsLoss()(LOGITS, (HOT, HOT, torch.rand(3))), ValueError,
     ["lam", "(4,)", "(3,)"]),
    (lambda: MixupBCEWithLogitsLoss()(LOGITS, HOT[:3].float()), ValueError, ["[3, 3]", "[4, 3]"]),
]  # fmt: skip


@pytest.mark.parametrize("call,error,words", BAD, ids=[" ".join(words) for _, _, words in BAD])
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_numpy_s_numbers_and_arrays_are_taken():
    logits, a, b = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([2, 1, 0, 0])
    loss = MixupCrossEntropyLoss(ignore_index=np.int64(2), label_smoothing=np.array(0.25))
    expected = MixupCrossEntropyLoss(ignore_index=2, label_smoothing=0.25)
    for lam in (np.float32(0.75), np.array(0.75), np.full(4, 0.75)):
        torch.testing.assert_close(loss(logits, (a, b, lam)), expected(logits, (a, b, 0.75)))
        one_hot = [nn.functional.one_hot(labels, 3).float() for labels in (a, b)]
        bce = MixupBCEWithLogitsLoss()
        torch.testing.assert_close(bce(logits, (*one_hot, lam)), bce(logits, (*one_hot, 0.75)))
        each = MixupLoss(nn.CrossEntropyLoss(reduction="none"))
        torch.testing.assert_close(each(logits, (a, b, lam)), each(logits, (a, b, 0.75)))


def test_one_hot_labels_of_integers_are_refused_with_what_to_do():
    y = torch.nn.functional.one_hot(torch.arange(4), 6)
    with pytest.raises(ValueError, match=r"got \(4, 6\) .*one-hot labels must be floating-point"):
        MixupCrossEntropyLoss()(torch.randn(4, 6), (y, y, 0.5))


def test_a_weight_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"weight .* got 0\.1; label_smoothing goes by keyword"):
        MixupCrossEntropyLoss(0.1)
    with pytest.raises(TypeError, match="weight must be a Tensor or None"):
        MixupBCEWithLogitsLoss(0.1)
