"""MixUp of a batch, its labels, and the forms of the book and the blog."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from peers import load
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils.pin_memory import pin_memory

from regfast import functional as F
from regfast._core.draw import PAIRINGS, beta, boxes, pairing
from regfast.mixing import MixedTarget, MixUp, MixupCollator, mixup_data

# float32 sums of two products of order one, in another order.
ROUNDING = dict(rtol=1e-6, atol=1e-6)
ALWAYS_CUT = dict(alpha=0, cutmix_alpha=1.0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


@pytest.fixture
def batch():
    return torch.randn(8, 3, 6, 7), torch.randint(10, (8,))


def expected_blend(x, index, lam, box=None):
    """Per sample, with plain slices."""
    y = x.clone()
    for i, j in enumerate(index.tolist()):
        weight = lam if not isinstance(lam, torch.Tensor) or lam.ndim == 0 else lam[i]
        edges = [-1] if box is None else (box if box.ndim == 1 else box[i]).tolist()
        if edges[0] < 0:
            y[i] = weight * x[i] + (1 - weight) * x[j]
        else:
            y0, y1, x0, x1 = edges
            y[i, ..., y0:y1, x0:x1] = x[j, ..., y0:y1, x0:x1]
    return y


@pytest.mark.parametrize("size", [1, 7, 8])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    "arguments", [{}, ALWAYS_CUT, dict(alpha=1.0, cutmix_alpha=1.0, prob=0.7)], ids=str
)
@pytest.mark.parametrize("name", PAIRINGS)
def test_it_mixes_what_it_draws(name, arguments, per_sample, size):
    x, y = torch.randn(size, 3, 6, 7), torch.randint(10, (size,))
    mix = MixUp(**arguments, pairing=name, per_sample=per_sample)
    for _ in range(3):
        state = mix.get_extra_state()
        index, lam, box = mix.draw(size, (6, 7))
        mix.set_extra_state(state)
        mixed, target = mix(x, y)
        assert isinstance(target, MixedTarget) and (box is None) == (mix.cutmix_alpha == 0)
        assert target.a is y and torch.equal(target.b, y[index])
        assert (
            torch.equal(target.lam, lam)
            and lam.dtype == torch.float32
            and lam.shape == ((size,) if per_sample else ())
        )
        torch.testing.assert_close(mixed, expected_blend(x, index, lam, box), **ROUNDING)


def test_an_alpha_of_zero_mixes_nothing(batch):
    x, y = batch
    mixed, target = MixUp(0)(x, y)
    torch.testing.assert_close(mixed, x, rtol=0, atol=0)
    assert target.lam == 1


@pytest.mark.parametrize("per_sample", [False, True])
def test_prob_is_the_share_that_is_mixed(per_sample):
    """400 draws at 0.3, to four standard deviations."""
    mix = MixUp(1.0, prob=0.3, per_sample=per_sample)
    lam = mix.draw(400)[1] if per_sample else torch.stack([mix.draw(2)[1] for _ in range(400)])
    assert abs(int((lam < 1).sum()) - 120) < 4 * math.sqrt(400 * 0.3 * 0.7)
    assert MixUp(1.0, prob=0).draw(2)[1] == 1


@pytest.mark.parametrize("arguments", [{}, ALWAYS_CUT], ids=str)
def test_what_is_not_mixed_reads_nothing_of_its_partner(arguments):
    """An infinity or a NaN stays in its image and in those mixed with it."""
    x, y = torch.randn(64, 3, 6, 7), torch.arange(64)
    x[::3] = math.inf
    x[1::3] = math.nan
    for per_sample, prob in ((True, 0.4), (False, 0)):
        mix = MixUp(**{"alpha": 1.0, **arguments}, prob=prob, per_sample=per_sample, pairing="roll")
        mixed, target = mix(x, y)
        left = (target.lam == 1).expand(64)
        assert left.any() and torch.equal(mixed[left].nan_to_num(5), x[left].nan_to_num(5))
    assert torch.equal(MixUp(0)(x, y)[0].nan_to_num(5), x.nan_to_num(5))


def test_numpy_s_numbers_and_arrays_are_taken():
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    for number in (np.float32(0.5), np.int64(1), np.array(0.5)):
        mix = MixUp(
            number,
            prob=number,
            cutmix_alpha=number,
            switch_prob=number,
            mean=np.full(3, 0.5),
            std=np.array(0.5),
        )
        assert mix(x, y)[0].shape == x.shape and "array" not in repr(mix)
        assert MixupCollator(number)([(x[0], 0), (x[1], 1)])[0].shape == (2, 3, 8, 8)
        assert mixup_data(x, y, number)[0].shape == x.shape
    index, _, box = mix.draw(np.int64(4), np.array([8, 8]))
    assert index.shape == (4,) and box.shape == (4,)
    target = MixedTarget(y, y.flip(0), np.full(4, 0.25))
    expected = MixedTarget(y, y.flip(0), 0.25).soft(4, 0.1)
    torch.testing.assert_close(target.soft(np.int64(4), np.float64(0.1)), expected)
    with pytest.raises(TypeError, match=r"alpha must be a number, got \[0.5, 0.5\]"):
        MixUp(np.array([0.5, 0.5]))


@pytest.mark.parametrize("per_sample", [False, True])
def test_what_is_not_mixed_has_no_box(per_sample, batch):
    x, y = batch
    mix = MixUp(**ALWAYS_CUT, prob=0.4, per_sample=per_sample, pairing="roll")
    outcomes = set()
    for _ in range(20):
        mixed, target = mix(x, y)
        changed = (mixed != x).flatten(1).any(1)
        assert torch.equal(changed, (target.lam < 1).expand(8))
        outcomes |= set(changed.tolist())
    assert outcomes == {False, True}


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    "arguments,share",
    [
        (dict(alpha=1, cutmix_alpha=1), 0.5),
        (dict(alpha=1, cutmix_alpha=1, switch_prob=0.2), 0.2),
        (dict(alpha=0, cutmix_alpha=1, switch_prob=0.2), 1),
        (dict(alpha=1, cutmix_alpha=1, switch_prob=0), 0),
    ],
    ids=str,
)
def test_switch_prob_is_the_share_of_cutmix(arguments, share, per_sample):
    """400 draws, to four standard deviations. With a box, lam is the uncut share of the image."""
    mix = MixUp(**arguments, per_sample=per_sample)
    draws = [mix.draw(400, (6, 7))] if per_sample else [mix.draw(2, (6, 7)) for _ in range(400)]
    lam, box = (torch.cat([draw[n].view(-1, *draw[n].shape[1:]) for draw in draws]) for n in (1, 2))
    box = box.view(-1, 4)
    pasted = (box >= 0).all(1)
    assert torch.equal(pasted, ~(box == -1).all(1))
    assert abs(int(pasted.sum()) - 400 * share) <= 4 * math.sqrt(400 * share * (1 - share))
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    torch.testing.assert_close(lam[pasted], 1 - area[pasted] / 42, **ROUNDING)


def test_the_alphas_are_those_of_their_own_draws():
    """Beta(1e-3) gives 0 or 1, Beta(1e6) gives 1/2. A box with share 1/2, uncut, leaves 1/2."""
    mix = MixUp(1e-3, cutmix_alpha=1e6, per_sample=True)
    _, lam, box = mix.draw(300, (64, 64))
    pasted = box[:, 0] >= 0
    assert bool(((lam[~pasted] < 0.01) | (lam[~pasted] > 0.99)).float().mean() > 0.95)
    whole = pasted & (box[:, 0] > 0) & (box[:, 2] > 0) & (box[:, 1] < 64) & (box[:, 3] < 64)
    assert whole.any()
    torch.testing.assert_close(lam[whole], torch.full_like(lam[whole], 0.5), rtol=0.02, atol=0)


def test_eval_mode_does_not_mix(batch):
    x, y = batch
    mix = MixUp(cutmix_alpha=1.0).eval()
    before = torch.get_rng_state()
    found, labels = mix(x, y)
    assert found is x and labels is y and torch.equal(torch.get_rng_state(), before)
    assert MixUp(dtype=torch.bfloat16).eval()(x, y)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("cut", [False, True])
def test_uint8_images_are_normalised(form, dtype, cut):
    x = torch.randint(256, (5, 3, 6, 7), dtype=torch.uint8).contiguous(memory_format=form)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = (x.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    # Half a unit in the last place of values up to 3; for float32, the rounding of the sums before
    # it too.
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-6}.get(dtype, 2e-6)
    mix = MixUp(**(ALWAYS_CUT if cut else {}), mean=mean, std=std, dtype=dtype, pairing="roll")
    state = mix.get_extra_state()
    index, lam, box = mix.draw(5, (6, 7))
    mix.set_extra_state(state)
    mixed, _ = mix(x, torch.arange(5))
    plain, _ = mix.eval()(x, torch.arange(5))
    for found, expected in (
        (mixed, expected_blend(normalised, index, lam, box)),
        (plain, normalised),
    ):
        assert found.dtype == (dtype or torch.float32) and found.is_contiguous(memory_format=form)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_float_images_are_normalised_too(batch):
    x, y = batch
    for arguments, scale in (
        (dict(mean=0.5, std=0.25), 4),
        (dict(mean=[0.5] * 3, std=torch.full((3,), 0.5)), 2),
    ):
        found, _ = MixUp(**arguments).eval()(x, y)
        torch.testing.assert_close(found, (x - 0.5) * scale, **ROUNDING)


def test_in_eval_mode_images_go_without_labels():
    x = torch.randint(256, (4, 2, 3, 3), dtype=torch.uint8)
    mix = MixUp(mean=0.5, std=0.25).eval()
    torch.testing.assert_close(mix(x), (x / 255 - 0.5) / 0.25, **ROUNDING)
    assert torch.equal(mix(x, torch.arange(4))[0], mix(x))


def test_inference_mode_leaves_nothing_to_training():
    x, y = torch.rand(4, 2, 3, 3), torch.arange(4)
    mix = MixUp(mean=0.5, std=0.5)
    with torch.inference_mode():
        mix(x, y)
    mix(x.requires_grad_(), y)[0].sum().backward()
    assert x.grad is not None


def test_the_constants_are_where_the_batch_is_and_keep_their_precision():
    x, y = torch.rand(4, 2, 3, 3, dtype=torch.float64), torch.arange(4)
    mix = MixUp(alpha=0, mean=(0.3, 0.4), std=(0.1, 0.2)).half()
    assert not list(mix.buffers())
    expected = (x - torch.tensor([0.3, 0.4]).double().view(2, 1, 1)) / torch.tensor(
        [0.1, 0.2]
    ).double().view(2, 1, 1)
    # The expected value is computed from float32 tensors.
    torch.testing.assert_close(mix(x, y)[0], expected, rtol=1e-6, atol=1e-6)
    exact = (x[:, 0] - 0.3) / 0.1
    torch.testing.assert_close(mix(x, y)[0][:, 0], exact, rtol=1e-12, atol=1e-12)
    assert mix(x.to("meta"), y)[0].is_meta
    copied = pickle.loads(pickle.dumps(mix))
    assert torch.equal(copied(x, y)[0], mix(x, y)[0])


@pytest.mark.parametrize(
    "y",
    [torch.randint(5, (8,)), torch.rand(8, 5), torch.rand(8, 5) > 0.5, torch.randint(5, (8, 6, 7))],
    ids=lambda y: str(y.dtype),
)
def test_labels_of_every_kind_are_gathered(y, batch):
    mix = MixUp(pairing="roll")
    target = mix(batch[0], y)[1]
    assert torch.equal(target.a, y) and torch.equal(target.b, y.roll(1, 0))


def test_batches_that_are_no_images():
    for x in (torch.randn(4), torch.randn(4, 5), torch.randn(4, 5, 6), torch.randn(0, 3)):
        y = torch.arange(len(x))
        mixed, target = MixUp(1.0, pairing="flip", per_sample=True)(x, y)
        torch.testing.assert_close(mixed, expected_blend(x, y.flip(0), target.lam), **ROUNDING)


def test_gradients_flow(batch):
    x, y = batch
    x.requires_grad_()
    mixed, target = MixUp(1.0, pairing="roll")(x, y)
    weight = torch.randn_like(mixed)
    (found,) = torch.autograd.grad((mixed * weight).sum(), x)
    torch.testing.assert_close(
        found, target.lam * weight + (1 - target.lam) * weight.roll(-1, 0), **ROUNDING
    )


def test_it_is_reproducible_from_manual_seed(batch):
    def run(seed):
        torch.manual_seed(seed)
        mix = MixUp(1.0)
        return [mix(*batch) for _ in range(3)]

    first, again, other = run(3), run(3), run(4)
    for (x, target), (x_again, target_again), (x_other, _) in zip(first, again, other):
        assert (
            torch.equal(x, x_again)
            and torch.equal(target.b, target_again.b)
            and target.lam == target_again.lam
        )
        assert not torch.equal(x, x_other)
    assert len({target.lam.item() for _, target in first}) == 3


def test_a_given_generator_is_drawn_from_as_it_is(batch, generator):
    twin = copy.deepcopy(generator)
    index, lam, _ = MixUp(0.7, generator=generator).draw(8)
    assert torch.equal(index, pairing("random", 8, twin)) and torch.equal(lam, beta(0.7, (), twin))
    assert torch.equal(generator.get_state(), twin.get_state())


def test_checkpoint_and_resume_give_the_same_stream(batch, tmp_path):
    model = nn.ModuleDict(dict(mix=MixUp(1.0, cutmix_alpha=1.0, mean=0.5, std=0.5)))
    assert list(model.state_dict()) == ["mix._extra_state"]
    model["mix"](*batch)
    torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
    expected = [model["mix"](*batch) for _ in range(3)]
    torch.manual_seed(99)
    resumed = nn.ModuleDict(dict(mix=MixUp(1.0, cutmix_alpha=1.0, mean=0.5, std=0.5)))
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True)
    for x, target in expected:
        found, labels = resumed["mix"](*batch)
        assert (
            torch.equal(found, x)
            and torch.equal(labels.b, target.b)
            and torch.equal(labels.lam, target.lam)
        )


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda mix: pickle.loads(pickle.dumps(mix))],
    ids=["deepcopy", "pickle"],
)
def test_it_copies_and_pickles(copied, batch):
    mix = MixUp(1.0, mean=0.5, std=0.5, per_sample=True)
    mix(*batch)
    twin = copied(mix)
    assert repr(twin) == repr(mix)
    assert torch.equal(twin(*batch)[0], mix(*batch)[0])


def test_repr_shows_the_arguments():
    assert repr(MixUp(0.4, pairing="pairs", mean=0.5, std=(0.1, 0.2), dtype=torch.float16)) == (
        "MixUp(alpha=0.4, pairing='pairs', per_sample=False, prob=1.0, cutmix_alpha=0.0, "
        "switch_prob=0.5, mean=0.5, std=(0.1, 0.2), dtype=torch.float16)"
    )
    assert repr(MixupCollator()) == "MixupCollator(alpha=0.25, base_collate=default_collate)"


def test_timm_s_mixup(generator, monkeypatch, batch):
    mixup = load("timm.data.mixup")
    x, y = batch
    lam = beta(1.0, (), generator).item()
    theirs = mixup.Mixup(num_classes=10, label_smoothing=0.1)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (lam, False))
    expected, soft = theirs(x.clone(), y)
    index = pairing("flip", 8, generator)
    torch.testing.assert_close(F.mixup(x, index, lam), expected, **ROUNDING)
    torch.testing.assert_close(MixedTarget(y, y[index], lam).soft(10, 0.1), soft, **ROUNDING)


@pytest.mark.parametrize("lam", [0.0, 0.123, 0.5, 0.81, 1 - 2**-20])
def test_timm_s_cutmix(lam, generator, monkeypatch, batch):
    """timm's own box, for the same lam and centre."""
    mixup = load("timm.data.mixup")
    x, y = batch
    twin = copy.deepcopy(generator)
    box, left = boxes(torch.tensor(lam), 6, 7, generator)
    centre = iter([int(torch.randint(length, (), generator=twin)) for length in (6, 7)])
    monkeypatch.setattr(np.random, "randint", lambda *_, **__: next(centre))
    theirs = mixup.Mixup(num_classes=10, label_smoothing=0, cutmix_alpha=1.0)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (float(torch.tensor(lam)), True))
    expected, soft = theirs(x.clone(), y)
    index = pairing("flip", 8, generator)
    torch.testing.assert_close(F.mixup(x, index, left, box=box), expected, rtol=0, atol=0)
    torch.testing.assert_close(MixedTarget(y, y[index], left).soft(10), soft, **ROUNDING)


def test_timm_s_multi_label_mixup(monkeypatch, batch):
    mixup = load("timm.data.mixup")
    labels = torch.rand(8, 10) > 0.7
    soft = mixup.mixup_target(labels, 10, 0.3, multi_label=True)
    torch.testing.assert_close(MixedTarget(labels, labels.flip(0), 0.3).soft(10), soft, **ROUNDING)


def test_torchvision_s_mixup_and_cutmix(generator, batch):
    v2 = load("torchvision.transforms.v2")
    x, y = batch
    lam = beta(1.0, (), generator).item()
    index = pairing("roll", 8, generator)
    for theirs, params, box in (
        (v2.MixUp(num_classes=10), dict(lam=lam), None),
        (v2.CutMix(num_classes=10), dict(box=(1, 2, 5, 4), lam_adjusted=1 - 8 / 42), (2, 4, 1, 5)),
    ):
        params |= dict(labels=y, batch_size=8)
        weight = lam if box is None else 1 - 8 / 42
        torch.testing.assert_close(
            F.mixup(x, index, weight, box=box), theirs.transform(x, params), **ROUNDING
        )
        soft = MixedTarget(y, y[index], weight).soft(10)
        torch.testing.assert_close(soft, theirs.transform(y, params), **ROUNDING)


def test_a_mixed_target_is_the_tuple_of_the_book():
    y_i, y_j, lam = target = MixedTarget(torch.tensor([0, 1]), torch.tensor([1, 0]), 0.3)
    assert isinstance(target, tuple) and len(target) == 3 and target == (y_i, y_j, lam)


def test_a_mixed_target_moves():
    a, b = torch.randint(5, (2, 4))
    for lam in (0.3, torch.tensor(0.3), torch.rand(4)):
        moved = MixedTarget(a, b, lam).to("meta", non_blocking=True)
        assert isinstance(moved, MixedTarget) and moved.a.is_meta and moved.b.is_meta
        assert moved.lam.is_meta if isinstance(lam, torch.Tensor) else moved.lam == lam
        stayed = MixedTarget(a, b, lam).to(torch.device("cpu"))
        assert stayed.a is a and stayed.lam is lam


def test_a_mixed_target_is_pinned_as_one(monkeypatch):
    """DataLoader(pin_memory=True) rebuilds tuples."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t.clone())
    a, b = torch.randint(5, (2, 4))
    for lam in (0.3, torch.rand(4)):
        pinned = pin_memory(MixedTarget(a, b, lam))
        assert type(pinned) is MixedTarget and pinned.a is not a and torch.equal(pinned.b, b)


@pytest.mark.parametrize(
    "lam", [0.3, torch.tensor(0.3), torch.tensor([0.3, 0.6, 0.0, 1.0])], ids=lambda lam: str(lam)
)
@pytest.mark.parametrize("smoothing", [0, 0.1, 1])
def test_soft_targets(lam, smoothing):
    a, b = torch.randint(5, (2, 4))
    onehot = nn.functional.one_hot
    weight = lam.view(-1, 1) if isinstance(lam, torch.Tensor) else lam
    expected = (weight * onehot(a, 5) + (1 - weight) * onehot(b, 5)) * (
        1 - smoothing
    ) + smoothing / 5
    for labels in (
        (a, b),
        (onehot(a, 5).double(), onehot(b, 5).double()),
        (onehot(a, 5).bool(), onehot(b, 5).bool()),
    ):
        soft = MixedTarget(*labels, lam).soft(5, smoothing)
        assert soft.dtype == torch.float32
        torch.testing.assert_close(soft, expected, **ROUNDING)


def test_soft_targets_are_what_cross_entropy_smooths():
    a, b = torch.randint(5, (2, 4))
    logits, target = torch.randn(4, 5), MixedTarget(a, b, 0.3)
    found = nn.functional.cross_entropy(logits, target.soft(5, 0.1))
    expected = nn.functional.cross_entropy(logits, target.soft(5), label_smoothing=0.1)
    torch.testing.assert_close(found, expected, **ROUNDING)


@pytest.mark.parametrize(
    "target,num_classes,words",
    [
        (
            MixedTarget(torch.tensor([0, 1]), torch.tensor([1, 0]), 0.5),
            0,
            ["num_classes", "0", "at least 1"],
        ),
        (MixedTarget(torch.tensor([0, 1]), torch.tensor([1, 0]), 7.0), 2, ["lam", "7.0", "[0, 1]"]),
        (MixedTarget(torch.rand(2, 3), torch.rand(2, 3), 0.5), 4, ["dense labels", "4", "(2, 3)"]),
    ],
)
def test_soft_targets_refuse(target, num_classes, words):
    with pytest.raises(ValueError) as raised:
        target.soft(num_classes)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_soft_targets_of_maps_have_the_classes_last():
    a, b = torch.randint(5, (2, 4, 2, 3))
    lam = torch.rand(4)
    soft = MixedTarget(a, b, lam).soft(5)
    assert soft.shape == (4, 2, 3, 5)
    for i in range(4):
        torch.testing.assert_close(soft[i], MixedTarget(a[i], b[i], lam[i]).soft(5), **ROUNDING)


def test_the_blog_s_function(batch):
    x, y = batch
    mixed, y_a, y_b, lam = mixup_data(x, y)
    assert isinstance(lam, float) and y_a is y
    index = torch.tensor(
        [
            i
            for k in range(8)
            for i in range(8)
            if torch.allclose(mixed[k], lam * x[k] + (1 - lam) * x[i])
        ]
    )
    assert sorted(index.tolist()) == list(range(8)) and torch.equal(y_b, y[index])
    mixed, _, _, lam = mixup_data(x, y, 0)
    assert lam == 1 and torch.equal(mixed, x)


def test_the_blog_s_function_draws_from_the_global_generator_or_the_given_one(batch):
    torch.manual_seed(3)
    first = mixup_data(*batch)
    torch.manual_seed(3)
    again, other = mixup_data(*batch), mixup_data(*batch)
    given = mixup_data(*batch, generator=torch.Generator().manual_seed(3))
    assert first[3] == again[3] == given[3] != other[3]
    assert torch.equal(first[0], again[0]) and torch.equal(first[0], given[0])


class Numbers(Dataset):
    """Samples equal to their labels, so that a batch shows what was mixed."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return torch.full((2,), float(i)), i


def test_the_book_s_collator():
    samples = [Numbers()[i] for i in range(6)]
    x, target = MixupCollator()(samples)
    y_i, y_j, lam = target
    assert isinstance(target, MixedTarget) and isinstance(lam, float)
    assert y_i.tolist() == list(range(6)) and sorted(y_j.tolist()) == list(range(6))
    torch.testing.assert_close(
        x, (lam * y_i + (1 - lam) * y_j).view(-1, 1).expand(6, 2), **ROUNDING
    )


def test_the_collator_s_alpha_and_base_collate():
    def halved(samples):
        x, y = default_collate(samples)
        return x / 2, y

    samples = [Numbers()[i] for i in range(6)]
    x, (y_i, _, lam) = MixupCollator(0, halved)(samples)
    assert lam == 1 and torch.equal(x[:, 0], y_i / 2)
    lams = torch.tensor([MixupCollator(1e6)(samples)[1].lam for _ in range(3)])
    torch.testing.assert_close(lams, torch.full((3,), 0.5), rtol=0.01, atol=0)


def epochs(context, number=2, generator=None, workers=2):
    """Each batch's lam and permutation per epoch, from loaders with the given number of workers."""
    torch.manual_seed(3)
    collate = MixupCollator(1.0, generator=generator)
    if workers:
        collate([Numbers()[0]])  # seeds the parent's stream, which the workers then hold copies of
    loader = DataLoader(
        Numbers(),
        4,
        num_workers=workers,
        collate_fn=collate,
        multiprocessing_context=context if workers else None,
    )
    return [[(target.lam, target.b.tolist()) for _, target in loader] for _ in range(number)]


def lams(of_epochs):
    return [lam for epoch in of_epochs for lam, _ in epoch]


def test_workers_have_streams_of_their_own():
    """Four batches per epoch, two per worker, all distinct; the same seed repeats them all."""
    first = epochs("fork")
    assert len(set(lams(first))) == 8
    assert epochs("fork") == first
    np.random.seed(0)
    assert epochs("fork", 1) == first[:1]


def test_spawned_workers_draw_what_forked_ones_draw():
    assert epochs("spawn", 1) == epochs("fork", 1)


def test_workers_have_streams_of_their_own_beside_a_given_generator():
    def run(seed):
        return epochs("fork", generator=torch.Generator().manual_seed(seed))

    first = run(5)
    assert (
        len(set(lams(first))) == 8 and run(5) == first and not set(lams(run(6))) & set(lams(first))
    )


def test_a_loader_without_workers():
    first = epochs(None, workers=0)
    assert len(set(lams(first))) == 8 and epochs(None, workers=0) == first


def test_persistent_workers_go_on():
    torch.manual_seed(3)
    loader = DataLoader(
        Numbers(), 4, num_workers=2, collate_fn=MixupCollator(1.0), persistent_workers=True
    )
    assert len({target.lam for _ in range(2) for _, target in loader}) == 8


def test_mixup_itself_within_a_worker():
    mix = MixUp(1.0)
    mix.draw(1)

    loader = DataLoader(
        Numbers(),
        4,
        num_workers=2,
        collate_fn=lambda samples: mix(*default_collate(samples)),
        multiprocessing_context="fork",
    )
    assert len({target.lam.item() for _ in range(2) for _, target in loader}) == 8


class Step(nn.Module):
    """A training step's forward: blend, small model, loss."""

    def __init__(self):
        super().__init__()
        from regfast.losses import MixupCrossEntropyLoss

        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 3 * 3, 10),
        )
        self.loss = MixupCrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x, index, lam, box, y):
        return self.loss(self.model(F.mixup(x, index, lam, box=box)), MixedTarget(y, y[index], lam))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "arguments",
    [
        dict(),
        dict(per_sample=True),
        dict(cutmix_alpha=1.0, per_sample=True),
        dict(cutmix_alpha=1.0),
    ],
    ids=str,
)
def test_a_whole_step_compiles_once(arguments, backend):
    """One graph; each step's own index and lam apply, and no later step recompiles."""
    torch._dynamo.reset()
    step = Step()
    compiled = torch.compile(copy.deepcopy(step), fullgraph=True, backend=backend)
    mix = MixUp(1.0, **arguments)
    losses = []
    for n in range(4):
        x, y = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
        index, lam, box = mix.draw(8, (8, 8))
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            found = compiled(x, index, lam, box, y)
        found.backward()
        expected = step(x, index, lam, box, y)
        expected.backward()
        # float32 through a convolution and a normalisation, which Inductor fuses in another order.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        losses.append(found.item())
    for ours, theirs in zip(compiled.parameters(), step.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert len(set(losses)) == 4


def test_lam_is_not_frozen_in_the_graph(batch):
    torch._dynamo.reset()
    x, _ = batch
    index = torch.arange(8).roll(1)
    blend = torch.compile(lambda lam: F.mixup(x, index, lam), fullgraph=True, backend="aot_eager")
    for n, lam in enumerate(torch.rand(3)):
        with torch._dynamo.config.patch(error_on_recompile=n > 0):
            torch.testing.assert_close(blend(lam), expected_blend(x, index, lam), **ROUNDING)


def test_the_module_s_draws_stay_outside_a_compiled_graph(batch):
    """The graph breaks at the draws; with fullgraph=True the error names the alternative."""
    mix = MixUp(1.0)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"MixUp\.draw"):
        torch.compile(mix, fullgraph=True, backend="aot_eager")(*batch)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: mix(x, y)[0] * 2, backend="aot_eager")
    for _ in range(3):
        state = mix.get_extra_state()
        found = compiled(*batch)
        mix.set_extra_state(state)
        torch.testing.assert_close(found, mix(*batch)[0] * 2, **ROUNDING)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a device is needed")
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_nothing_waits_for_the_device(on_device, per_sample):
    generator = torch.Generator("cuda").manual_seed(3) if on_device else None
    mix = MixUp(
        1.0,
        cutmix_alpha=1.0,
        prob=0.9,
        per_sample=per_sample,
        pairing="pairs",
        mean=0.5,
        std=0.5,
        generator=generator,
    ).cuda()
    x, y = (
        torch.randint(256, (8, 3, 6, 7), dtype=torch.uint8, device="cuda"),
        torch.arange(8, device="cuda"),
    )
    mix(x, y)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixed, target = mix(x, y)
        mix.draw(8, (6, 7), "cuda")
        soft = target.soft(8)
        mix.eval()(x, y)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert mixed.is_cuda and target.lam.is_cuda and soft.is_cuda


IMAGES, LABELS = torch.randn(4, 3, 6, 7), torch.arange(4)

# The call, the error, and what its message names: the value, and what is allowed.
BAD = [
    (lambda: MixUp(-0.1), ValueError, ["alpha", "-0.1", "at least 0"]),
    (lambda: MixUp(float("nan")), ValueError, ["alpha", "nan", "finite"]),
    (lambda: MixUp("1"), TypeError, ["alpha", "'1'", "number"]),
    (lambda: MixUp(cutmix_alpha=-1), ValueError, ["cutmix_alpha", "-1", "at least 0"]),
    (lambda: MixUp(prob=1.5), ValueError, ["prob", "1.5", "[0, 1]"]),
    (lambda: MixUp(prob=None), TypeError, ["prob", "None", "number"]),
    (lambda: MixUp(switch_prob=-1), ValueError, ["switch_prob", "-1", "[0, 1]"]),
    (lambda: MixUp(pairing="swap"), ValueError, ["pairing", "'swap'", "'random'", "'roll'"]),
    (lambda: MixUp(per_sample=1), TypeError, ["per_sample", "1", "True or False"]),
    (lambda: MixUp(mean=0.5), ValueError, ["mean", "std", "together", "0.5", "None"]),
    (lambda: MixUp(mean="a", std=1), TypeError, ["mean", "'a'", "number"]),
    (lambda: MixUp(mean=0.5, std=0), ValueError, ["std", "0", "positive"]),
    (lambda: MixUp(mean=[[0.5]], std=1), ValueError, ["mean", "(1, 1)", "channel"]),
    (lambda: MixUp(dtype=torch.uint8), TypeError, ["dtype", "torch.uint8", "floating-point"]),
    (lambda: MixUp(generator=3), TypeError, ["generator", "int", "torch.Generator"]),
    (lambda: MixUp().draw(-1), ValueError, ["B", "-1", "number of samples"]),
    (lambda: MixUp().draw(2.5), ValueError, ["B", "2.5", "number of samples"]),
    (lambda: MixUp(**ALWAYS_CUT).draw(4), ValueError, ["size", "None", "(H, W)"]),
    (lambda: MixUp(**ALWAYS_CUT).draw(4, (0, 3)), ValueError, ["size", "(0, 3)", "at least 1"]),
    (
        lambda: MixUp(**ALWAYS_CUT)(IMAGES[0], LABELS[:3]),
        ValueError,
        ["CutMix", "(3, 6, 7)", "(B, C, ..., H, W)"],
    ),
    (lambda: MixUp()([1.0], LABELS), TypeError, ["x", "list", "Tensor"]),
    (lambda: MixUp()(IMAGES.int(), LABELS), TypeError, ["x", "torch.int32", "uint8"]),
    (lambda: MixUp()(IMAGES.byte(), LABELS), ValueError, ["torch.uint8", "mean and std", "dtype"]),
    (
        lambda: MixUp().eval()(IMAGES.byte(), LABELS),
        ValueError,
        ["torch.uint8", "mean and std", "dtype"],
    ),
    (lambda: MixUp()(IMAGES[0, 0, 0, 0], LABELS), ValueError, ["x", "(B, ...)", "0-d"]),
    (lambda: MixUp()(IMAGES, LABELS.tolist()), TypeError, ["y", "list", "Tensor"]),
    (lambda: MixUp()(IMAGES, LABELS[:3]), ValueError, ["y", "(3,)", "(4, ...)"]),
    (lambda: MixUp()(IMAGES), TypeError, ["y", "None", "training"]),
    (lambda: MixUp(cutmix_alpha=1.0).draw(4, 32), ValueError, ["size", "(H, W)", "32"]),
    (lambda: MixUp()(IMAGES, LABELS[0]), ValueError, ["y", "()", "(4, ...)"]),
    (lambda: MixUp(mean=[0.5] * 2, std=1)(IMAGES, LABELS), ValueError, ["mean", "got 2", "3"]),
    (lambda: MixUp(mean=0.5, std=1)(IMAGES[:, 0, 0, 0], LABELS), ValueError, ["channels", "(4,)"]),
    (
        lambda: MixUp().set_extra_state(torch.zeros(3, dtype=torch.uint8)),
        ValueError,
        ["state", "(3,)", "(5064,)"],
    ),
    (lambda: mixup_data(IMAGES, LABELS, -1), ValueError, ["alpha", "-1", "at least 0"]),
    (lambda: mixup_data(IMAGES, LABELS[:3]), ValueError, ["y", "(3,)", "(4, ...)"]),
    (
        lambda: mixup_data(IMAGES, LABELS, generator=3),
        TypeError,
        ["generator", "int", "torch.Generator"],
    ),
    (
        lambda: mixup_data(IMAGES.byte(), LABELS),
        TypeError,
        ["torch.uint8", "floating-point", "regfast.MixUp"],
    ),
    (lambda: MixupCollator(-1), ValueError, ["alpha", "-1", "at least 0"]),
    (lambda: MixupCollator(base_collate=3), TypeError, ["base_collate", "3", "callable"]),
    (lambda: MixupCollator()([1.0, 2.0]), ValueError, ["base_collate", "pair (x, y)", "Tensor"]),
    (
        lambda: MixupCollator()([(IMAGES[0], 1, 2)]),
        ValueError,
        ["base_collate", "pair (x, y)", "3"],
    ),
    (
        lambda: MixupCollator()([(IMAGES[0].byte(), 1)]),
        TypeError,
        ["torch.uint8", "floating-point", "regfast.MixUp"],
    ),
    (
        lambda: MixedTarget(LABELS, LABELS, 0.5).soft(4, 1.5),
        ValueError,
        ["smoothing", "1.5", "[0, 1]"],
    ),
    (lambda: MixedTarget(LABELS, LABELS, 0.5).soft(3), ValueError, ["labels", "3", "[0, 3)"]),
    (
        lambda: MixedTarget(LABELS, LABELS - 101, 0.5).soft(4),
        ValueError,
        ["labels", "-101", "[0, 4)"],
    ),
]


@pytest.mark.parametrize("call,error,words", BAD, ids=[" ".join(words) for _, _, words in BAD])
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    assert all(word in str(raised.value) for word in words), str(raised.value)
