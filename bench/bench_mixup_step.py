"""mixup_step against its peers: `pytest bench/bench_mixup_step.py`, or through run.py for a table and a plot."""

OPERATION = "mixup_step"


def test_mixup_step(contest):
    contest()
