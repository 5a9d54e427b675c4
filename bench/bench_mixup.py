"""mixup against its peers: `pytest bench/bench_mixup.py`, or through run.py for a table and a plot."""

OPERATION = "mixup"


def test_mixup(contest):
    contest()
