"""The loss of mixed labels against its peers: `pytest bench/bench_mixup_cross_entropy.py`, or through run.py."""

OPERATION = "mixup_cross_entropy"


def test_mixup_cross_entropy(contest):
    contest()
