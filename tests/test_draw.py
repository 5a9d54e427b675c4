"""The random numbers of mixing: their distributions, and reproducible, independent streams."""

from __future__ import annotations

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from regfast._core import draw
from regfast._core.draw import Stream, beta, boxes, pairing

# Seeds are fixed, so a test always passes or always fails. A right distribution has a smaller
# p-value for one seed in a thousand.
P_VALUE = 1e-3


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


def test_a_stream_that_was_used_before_its_rank_was_known_parts_from_the_others(monkeypatch):
    """A checkpoint may be loaded, or saved, before torch.distributed is initialised."""

    def draws(rank):
        monkeypatch.setattr(draw, "_rank", lambda: None)
        torch.manual_seed(0)
        stream = Stream()
        before = torch.rand(3, generator=stream.generator)
        stream.set_state(stream.get_state())
        monkeypatch.setattr(draw, "_rank", lambda: rank)
        return (
            before,
            torch.rand(3, generator=stream.generator),
            torch.rand(3, generator=stream.generator),
        )

    zero, one, again = draws(0), draws(1), draws(1)
    assert torch.equal(zero[0], one[0])
    assert not torch.equal(zero[1], one[1]) and not torch.equal(one[1], one[2])
    assert torch.equal(one[1], again[1]) and torch.equal(one[2], again[2])


@pytest.mark.parametrize("alpha", [1e-310, 1e-30])
def test_the_smallest_alphas_toss_a_coin(alpha):
    lam = beta(alpha, (1000,), torch.Generator().manual_seed(0))
    assert ((lam == 0) | (lam == 1)).all() and 400 < int(lam.sum()) < 600


@pytest.mark.parametrize("alpha", [0.01, 0.25, 1, 8])
def test_beta_is_scipy_s(alpha, generator):
    """Kolmogorov-Smirnov from 1e-30 to 1/2, where float32 resolves lam; beyond, the counts.

    (A quarter of Beta(0.01, 0.01) is below 1e-30, and a quarter rounds to 1 in float32.)
    """
    lam = beta(alpha, (4, 25000), generator)
    assert (
        lam.shape == (4, 25000)
        and lam.dtype == torch.float32
        and bool(((lam >= 0) & (lam <= 1)).all())
    )
    lam, expected = lam.flatten().double().numpy(), stats.beta(alpha, alpha)
    low, high = expected.cdf(1e-30), 0.5
    within = lam[(lam > 1e-30) & (lam <= 0.5)]
    assert stats.kstest(within, lambda v: (expected.cdf(v) - low) / (high - low)).pvalue > P_VALUE
    assert stats.binomtest(int((lam > 0.5).sum()), lam.size, 0.5).pvalue > P_VALUE
    assert stats.binomtest(len(within), lam.size, high - low).pvalue > P_VALUE


def test_beta_is_symmetric_in_float64_too(generator, monkeypatch):
    """Before rounding: the upper half of Beta(1/4, 1/4), which float32 coarsens."""
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t)
    lam = beta(0.25, (100000,), generator).numpy()
    assert lam.dtype == np.float64
    assert stats.kstest(lam, stats.beta(0.25, 0.25).cdf).pvalue > P_VALUE


@pytest.mark.parametrize("alpha", [1e-30, 1e-3, 1e6, 1e30])
def test_beta_of_extreme_alphas_is_a_weight(alpha, generator):
    lam = beta(alpha, (1000,), generator)
    assert bool(((lam >= 0) & (lam <= 1)).all())
    if alpha < 1:
        assert 400 < int((lam > 0.5).sum()) < 600 and bool(
            ((lam < 0.01) | (lam > 0.99)).float().mean() > 0.98
        )
    else:
        torch.testing.assert_close(lam, torch.full_like(lam, 0.5), rtol=0.01, atol=0)


def test_an_alpha_of_zero_mixes_nothing(generator):
    assert beta(0, (3,), generator).tolist() == [1, 1, 1] and beta(0.0, (), generator).shape == ()


@pytest.mark.parametrize("batch", [0, 1, 2, 5, 8, 33])
@pytest.mark.parametrize("name", draw.PAIRINGS)
def test_pairings_are_permutations(name, batch, generator):
    index = pairing(name, batch, generator)
    assert index.dtype == torch.int64 and sorted(index.tolist()) == list(range(batch))


@pytest.mark.parametrize("batch", [1, 2, 5, 8, 33])
def test_pairs_are_a_perfect_matching(batch, generator):
    own = torch.arange(batch)
    for _ in range(20):
        index = pairing("pairs", batch, generator)
        assert torch.equal(index[index], own)
        assert own[index == own].tolist() == ([batch - 1] if batch % 2 else [])


def test_flip_is_timm_s_and_roll_torchvision_s(generator):
    for x in (torch.randn(7, 2), torch.randn(8, 2)):
        assert torch.equal(x[pairing("flip", len(x), generator)], x.flip(0))
        assert torch.equal(x[pairing("roll", len(x), generator)], x.roll(1, 0))


@pytest.mark.parametrize("name,outcomes", [("random", 24), ("pairs", 3)])
def test_random_pairings_are_uniform(name, outcomes, generator):
    """All permutations of four are equally frequent, and so are the three matchings."""
    found = [tuple(pairing(name, 4, generator).tolist()) for _ in range(4800)]
    counts = [found.count(outcome) for outcome in set(found)]
    assert len(counts) == outcomes
    assert stats.chisquare(counts).pvalue > P_VALUE


def test_an_unknown_pairing_is_named(generator):
    with pytest.raises(ValueError, match="'random', 'pairs', 'flip', 'roll', got 'swap'"):
        pairing("swap", 4, generator)


@pytest.mark.parametrize("size", [(1, 1), (7, 12), (32, 32)], ids=str)
def test_boxes_lie_within_the_image_and_lam_is_their_area(size, generator):
    lam = torch.cat((beta(1.0, (200,), generator), torch.tensor([0.0, 1.0])))
    box, left = boxes(lam, *size, generator)
    assert box.dtype == torch.int64 and box.shape == (202, 4) and left.dtype == torch.float32
    for (y0, y1, x0, x1), weight, asked in zip(box.tolist(), left.tolist(), lam.double().tolist()):
        assert 0 <= y0 <= y1 <= size[0] and 0 <= x0 <= x1 <= size[1]
        inside = torch.zeros(size)
        inside[y0:y1, x0:x1] = 1
        assert weight == pytest.approx(1 - inside.double().mean().item(), abs=1e-7)
        for low, high, length in ((y0, y1, size[0]), (x0, x1, size[1])):
            cut = int(length * (1 - asked) ** 0.5)
            # The whole box where no border cuts it off, and never less than half.
            assert high - low == cut if low > 0 and high < length else cut // 2 <= high - low <= cut
    assert left[-1] == 1 and (box[-1, 0] == box[-1, 1]) and (box[-1, 2] == box[-1, 3])


def test_a_box_s_centre_is_uniform(generator):
    """The box has one pixel, its centre."""
    lam = torch.full((6000,), 1 - (1.5 / 6) ** 2)
    box, left = boxes(lam, 6, 6, generator)
    assert torch.equal(box[:, 1] - box[:, 0], torch.ones(6000, dtype=torch.int64))
    assert torch.equal(left, torch.full_like(left, 35 / 36))
    assert (
        stats.chisquare(torch.bincount(box[:, 0] * 6 + box[:, 2], minlength=36).numpy()).pvalue
        > P_VALUE
    )


def test_one_box_for_one_lam(generator):
    box, left = boxes(beta(1.0, (), generator), 7, 9, generator)
    assert box.shape == (4,) and left.shape == ()


def numbers(stream: Stream, n: int = 4) -> list[float]:
    return torch.rand(n, generator=stream.generator).tolist()


def test_a_stream_is_reproducible_from_manual_seed():
    torch.manual_seed(3)
    first, second = numbers(Stream()), numbers(Stream())
    torch.manual_seed(3)
    assert numbers(Stream()) == first != second
    torch.manual_seed(4)
    assert numbers(Stream()) not in (first, second)


def test_a_stream_and_the_global_generator_do_not_disturb_each_other():
    torch.manual_seed(3)
    stream = Stream()
    expected = numbers(stream) + numbers(stream)
    torch.manual_seed(3)
    stream = Stream()
    found = numbers(stream)
    before = torch.get_rng_state()
    torch.rand(10)
    torch.set_rng_state(before)
    found += numbers(stream)
    assert found == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_is_seeded_at_its_first_use():
    before = torch.get_rng_state()
    stream = Stream()
    assert torch.equal(torch.get_rng_state(), before)
    numbers(stream)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_given_generator_is_drawn_from_as_it_is():
    given, same = (torch.Generator().manual_seed(5) for _ in range(2))
    before = torch.get_rng_state()
    stream = Stream(given)
    assert numbers(stream) == torch.rand(4, generator=same).tolist()
    assert stream.generator is given and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("given", [False, True])
def test_a_stream_goes_on_from_a_saved_state(given):
    def make(seed):
        return Stream(torch.Generator().manual_seed(seed)) if given else Stream()

    stream, other = make(5), make(6)
    fresh = stream.get_state()
    first = numbers(stream)
    middle = stream.get_state()
    second = numbers(stream)
    for state, expected in ((fresh, first + second), (middle, second)):
        other.set_state(state)
        assert numbers(other, len(expected)) == expected
    assert stream.get_state().dtype == torch.uint8


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("given", [False, True])
def test_a_copied_stream_goes_on_alike_and_apart(copied, given):
    stream = Stream(torch.Generator().manual_seed(5) if given else None)
    numbers(stream)
    twin = copied(stream)
    assert twin.generator.initial_seed() == stream.generator.initial_seed()
    assert numbers(twin) == numbers(stream)
    numbers(twin)
    assert numbers(twin) != numbers(stream)


def test_ranks_differ(monkeypatch):
    def of_rank(rank):
        monkeypatch.setenv("RANK", str(rank))
        torch.manual_seed(3)
        return numbers(Stream())

    assert len({tuple(of_rank(rank)) for rank in range(16)}) == 16
    assert of_rank(7) == of_rank(7)
    monkeypatch.delenv("RANK")
    torch.manual_seed(3)
    assert numbers(Stream()) == of_rank(0)


def test_ranks_that_load_one_rank_s_checkpoint_stay_distinct(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    saved = Stream()
    numbers(saved)
    state = saved.get_state()
    expected = numbers(saved)
    found = []
    for rank in (0, 1, 2, 2):
        monkeypatch.setenv("RANK", str(rank))
        resumed = Stream()
        resumed.set_state(state)
        found.append(numbers(resumed))
    assert found[1] == expected
    assert len({tuple(drawn) for drawn in found}) == 3 and found[2] == found[3]


def test_a_spawned_worker_knows_its_parent_s_rank(monkeypatch):
    """The pickle carries the rank; a worker has no process group, and perhaps no environment."""
    monkeypatch.setenv("RANK", "3")
    pickled = pickle.dumps(Stream())
    monkeypatch.delenv("RANK")
    torch.manual_seed(3)
    found = numbers(pickle.loads(pickled))
    monkeypatch.setenv("RANK", "3")
    torch.manual_seed(3)
    assert found == numbers(Stream())


def draw_in_a_group(rank: int, folder: str) -> None:
    os.environ.pop("RANK", None)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(numbers(Stream()))
    torch.save(runs, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch.distributed is not available"
)
def test_two_ranks_over_gloo_draw_differently_and_reproduce(tmp_path):
    torch.multiprocessing.spawn(draw_in_a_group, (str(tmp_path),), nprocs=2)
    (first, again), (other, other_again) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == again and other == other_again and first != other
    torch.manual_seed(3)
    assert numbers(Stream()) == first


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda: Stream(3), TypeError, ["generator", "torch.Generator", "int"]),
        (lambda: Stream().set_state("state"), TypeError, ["state", "uint8", "str"]),
        (
            lambda: Stream().set_state(torch.zeros(3)),
            TypeError,
            ["state", "uint8", "torch.float32"],
        ),
        (
            lambda: Stream().set_state(torch.get_rng_state()),
            ValueError,
            ["state", "its own cpu", "(5056,)"],
        ),
        (lambda: draw.check_alpha("alpha", -1), ValueError, ["alpha", "-1", "at least 0"]),
        (lambda: draw.check_alpha("alpha", float("nan")), ValueError, ["alpha", "nan", "finite"]),
        (lambda: draw.check_alpha("alpha", float("inf")), ValueError, ["alpha", "inf", "finite"]),
        (lambda: draw.check_alpha("alpha", "1"), TypeError, ["alpha", "'1'", "number"]),
        (lambda: draw.check_alpha("alpha", True), TypeError, ["alpha", "True", "number"]),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call()
    assert all(word in str(raised.value) for word in words), str(raised.value)
