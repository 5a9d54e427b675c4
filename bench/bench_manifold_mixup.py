"""manifold_mixup against its peers: `pytest bench/bench_manifold_mixup.py`, or through run.py for a table and a plot."""

OPERATION = "manifold_mixup"


def test_manifold_mixup(contest):
    contest()
