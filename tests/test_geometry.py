"""Contract: a max window's output size is nn.MaxPool1d/2d/3d's for every argument and input, the refused ones included
(a size below 1); binomial taps are SciPy's binomial distribution; a wrong argument raises and names itself.
"""

from __future__ import annotations

import random

import oracle
import pytest
from samples import max_window as window
from scipy.stats import binom

from regfast._core.geometry import blur_window, map_limits, output_size
from regfast.filters import binomial
from regfast.kernels.max_blur_pool import axis_of


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_output_size_is_that_of_max_pooling(rank):
    draw = random.Random(rank)
    refused = 0
    for _ in range(4000):
        k, s, d = ([draw.randint(1, most) for _ in range(rank)] for most in (7, 6, 4))
        p = [draw.randint(0, size // 2) for size in k]
        ceil_mode = draw.random() < 0.5
        sizes = [draw.randint(1, draw.choice([6, 20, 400])) for _ in range(rank)]
        expected = oracle.max_pool_outputs(sizes, k, s, p, d, ceil_mode)
        taps = draw.choice([None, [draw.randint(1, 9) for _ in range(rank)]])
        drawn = window(rank, kernel_size=k, stride=s, padding=p, dilation=d, ceil_mode=ceil_mode, blur_size=taps)
        got = tuple(output_size(drawn, axis, size) for axis, size in enumerate(sizes))
        if expected is None:
            refused += 1
            assert min(got) < 1, (k, s, p, d, ceil_mode, sizes)
        else:
            assert got == expected, (k, s, p, d, ceil_mode, sizes)
    assert 100 < refused < 3000


def test_blur_output_size():
    same = blur_window(1, 4, 3, "same", "binomial", "reflect")
    assert [output_size(same, 0, n) for n in (1, 3, 4, 7)] == [1, 1, 2, 3]
    assert output_size(blur_window(1, 3, 1, 0, "binomial", "reflect"), 0, 8) == 6


@pytest.mark.parametrize(
    "mode, size, changes, limits",
    [
        ("partial", 8, {}, (-1, 7)),
        ("replicate", 8, {}, (0, 6)),
        ("zeros", 8, {"blur_size": 1, "stride": 1}, (0, 6)),
        ("partial", 9, {"kernel_size": 3, "stride": 2, "padding": 1}, (-1, 9)),
        ("reflect", 1, {"kernel_size": 2, "dilation": 3, "padding": 1, "ceil_mode": True, "stride": 4}, (0, 0)),
    ],
)
def test_limits(mode, size, changes, limits):
    assert map_limits(window(1, padding_mode=mode, **changes), 0, size) == limits


def test_the_kernels_bound_what_is_read_beyond_the_border():
    """Of no size do more outputs read beyond a limit than the kernels, compiled for all sizes, look for; of some do as many."""
    draw = random.Random(0)
    bounds = {"none": 0, "some": 0, "tight": 0}
    for _ in range(300):
        k, s, d = (draw.randint(1, most) for most in (5, 4, 3))
        mode = draw.choice(["partial", "replicate", "reflect"])
        drawn = window(
            1, kernel_size=k, stride=s, padding=draw.randint(0, k // 2), dilation=d, ceil_mode=draw.random() < 0.5,
            blur_size=(draw.randint(1, 7),), padding_mode=mode,
        )  # fmt: skip
        axis, most = axis_of(drawn, 0, own=1), 0
        for size in range(1, 60):
            low, high = map_limits(drawn, 0, size)
            outputs = max(output_size(drawn, 0, size), 0)
            reads = [(o * s - drawn.lead[0], o * s - drawn.lead[0] + axis.b - 1) for o in range(outputs)]
            beyond = [first < low or last > high for first, last in reads]
            assert sum(beyond) <= axis.n_edge, (drawn, size)
            assert not any(beyond[axis.n_low : max(outputs - (axis.n_edge - axis.n_low), 0)]), (drawn, size)
            most = max(most, sum(beyond))
        assert axis.edge != "none" or most == 0
        bounds["none" if axis.edge == "none" else "some"] += 1
        bounds["tight"] += most == axis.n_edge
    assert bounds["none"] > 20 and bounds["some"] > 100 and bounds["tight"] > 200, bounds


@pytest.mark.parametrize("size", [*range(1, 40), 1030])
def test_binomial_is_the_distribution(size):
    # SciPy's probabilities come from logarithms of gamma functions, which cost it digits as the size grows.
    assert binomial(size) == pytest.approx(binom.pmf(range(size), size - 1, 0.5), rel=1e-9, abs=1e-300)
    assert sum(binomial(size)) == pytest.approx(1, rel=1e-15)
    assert binomial(size) == binomial(size)[::-1]


def test_blur_size_answers_to_the_stride():
    sizes = {s: len(window(1, kernel_size=2, stride=s).taps[0]) for s in range(1, 7)}
    assert sizes == {1: 1, 2: 3, 3: 5, 4: 6, 5: 8, 6: 10}
    assert [len(taps) for taps in window(2, stride=(1, 2), blur_size=4).taps] == [1, 4]
    assert [len(taps) for taps in window(2, stride=(1, 2), blur_size=(5, 4)).taps] == [5, 4]
    assert len(window(1, stride=3, ratio=0.1).taps[0]) == 3


@pytest.mark.parametrize(
    "changes, error, name",
    [
        ({"kernel_size": 0}, ValueError, "kernel_size"),
        ({"kernel_size": (2, 2, 2)}, ValueError, "kernel_size"),
        ({"kernel_size": 2.0}, TypeError, "kernel_size"),
        ({"kernel_size": True}, TypeError, "kernel_size"),
        ({"stride": 0}, ValueError, "stride"),
        ({"stride": 1.7}, TypeError, "ratio"),
        ({"padding": 2}, ValueError, "padding"),
        ({"padding": -1}, ValueError, "padding"),
        ({"dilation": 0}, ValueError, "dilation"),
        ({"ceil_mode": 1}, TypeError, "ceil_mode"),
        ({"ratio": float("nan")}, ValueError, "ratio"),
        ({"ratio": "2"}, TypeError, "ratio"),
        ({"blur_size": 0}, ValueError, "blur_size"),
        ({"filter": "no such window"}, ValueError, "filter"),
        ({"filter": (1.0, float("inf"))}, ValueError, "finite"),
        ({"filter": (1.0, 1.0), "blur_size": 3}, ValueError, "taps"),
        ({"padding_mode": "circular"}, ValueError, "padding_mode"),
    ],
)
def test_wrong_arguments_are_named(changes, error, name):
    with pytest.raises(error, match=name):
        window(2, **changes)


@pytest.mark.parametrize("size, error", [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_binomial_refuses(size, error):
    with pytest.raises(error, match="size"):
        binomial(size)
