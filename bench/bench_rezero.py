"""rezero against its peers: `pytest bench/bench_rezero.py`, or through run.py for a table and a plot."""

OPERATION = "rezero"


def test_rezero(contest):
    contest()
