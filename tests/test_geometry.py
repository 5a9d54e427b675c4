"""The geometry of windows and taps.

A max window's output size is nn.MaxPool1d/2d/3d's for every argument and input, refused ones
included (a size below 1). Binomial taps are SciPy's binomial distribution. A wrong argument raises
an error that names it.
"""

from __future__ import annotations

import random

import numpy as np
import oracle
import pytest
from samples import max_window as window
from scipy.stats import binom

from regfast._core.geometry import blur_window, map_limits, output_size
from regfast.filters import binomial
from regfast.kernels.windows import axis_of, place_within


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
        drawn = window(
            rank,
            kernel_size=k,
            stride=s,
            padding=p,
            dilation=d,
            ceil_mode=ceil_mode,
            blur_size=taps,
        )
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
        (
            "reflect",
            1,
            {"kernel_size": 2, "dilation": 3, "padding": 1, "ceil_mode": True, "stride": 4},
            (0, 0),
        ),
    ],
)
def test_limits(mode, size, changes, limits):
    assert map_limits(window(1, padding_mode=mode, **changes), 0, size) == limits


def extended(window, size):
    """The map positions that each output reads, by np.pad on positions; None for a zero."""
    low, high = map_limits(window, 0, size)
    s, taps, lead = window.stride[0], window.taps[0], window.lead[0]
    mode = {"partial": "edge", "replicate": "edge", "reflect": "reflect", "zeros": "constant"}[
        window.padding_mode
    ]
    before = lead + max(-low, 0)
    outputs = max(output_size(window, 0, size), 0)
    after = max(outputs * s + len(taps) - high, 0)
    # Positions plus one, so that 0 marks a zero of the padding.
    line = np.pad(np.arange(low - low + 1, high - low + 2), (before, after), mode)
    found = []
    for o in range(outputs):
        places = [line[o * s - lead + j - low + before] for j in range(len(taps))]
        found.append([int(place) - 1 + low if place else None for place in places])
    return found


def draw_window(draw):
    k, s = draw.randint(1, 5), draw.randint(1, 4)
    mode = draw.choice(["partial", "replicate", "reflect", "zeros"])
    if k == 1 and mode != "partial":
        return blur_window(
            1, draw.randint(1, 7), s, draw.choice(["same", 0, 1, 3]), "binomial", mode
        )
    return window(
        1, kernel_size=k, stride=s, padding=draw.randint(0, k // 2), ceil_mode=draw.random() < 0.5,
        blur_size=(draw.randint(1, 7),), padding_mode=mode,
    )  # fmt: skip


def test_the_kernels_know_which_outputs_read_a_window():
    """`axis_of` lists every output that reads a window of a lane's group, at every image size."""
    draw = random.Random(0)
    edges = {"none": 0, "low": 0, "high": 0}
    for _ in range(120):
        drawn, outputs = draw_window(draw), draw.randint(1, 4)
        k, s, p = drawn.kernel_size[0], drawn.stride[0], drawn.padding[0]
        for size in range(1, 30):
            low, high = map_limits(drawn, 0, size)
            axis = axis_of(drawn, 0, size, outputs)
            reads = extended(drawn, size)
            if not reads:
                continue
            # The positions beyond the limits, on either side.
            first, last = (
                -drawn.lead[0],
                (len(reads) - 1) * s - drawn.lead[0] + len(drawn.taps[0]) - 1,
            )
            assert axis.edge == ("high" if last > high else "low" if first < low else "none"), (
                drawn,
                size,
            )
            edges[axis.edge] += 1
            for o, places in enumerate(reads):
                for j, q in enumerate(places):
                    place = o * s - drawn.lead[0] + j
                    assert place_within(place, low, high, drawn.padding_mode) == q, (
                        drawn,
                        size,
                        place,
                    )
                    if q is None:
                        continue
                    # Each group that holds an element of the window has this output among its
                    # readers.
                    for group in range(
                        max((q - p) // axis.group, 0), (min(q - p + k, size) - 1) // axis.group + 1
                    ):
                        e, reader = (
                            q - p + k - 1 - group * axis.group,
                            o - group * outputs - axis.first,
                        )
                        assert 0 <= reader < axis.readers, (drawn, size, q, o)
                        taps = dict(axis.reads[e])
                        assert reader in taps, (drawn, size, q, o)
                        if q == place:
                            assert taps[reader] == drawn.taps[0][j], (drawn, size, q, o)
    assert min(edges.values()) > 100, edges


@pytest.mark.parametrize("size", [*range(1, 40), 1030])
def test_binomial_is_the_distribution(size):
    # SciPy computes probabilities from logarithms of gamma functions, and loses digits as the size
    # grows.
    assert binomial(size) == pytest.approx(
        binom.pmf(range(size), size - 1, 0.5), rel=1e-9, abs=1e-300
    )
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
