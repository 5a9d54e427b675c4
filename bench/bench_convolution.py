"""Anti-aliased convolutions against their peers: `pytest bench/bench_convolution.py`, or run.py for a table and a plot."""

OPERATION = "convolution"


def test_convolution(contest):
    contest()
