"""mixup_uint8 against its peers: `pytest bench/bench_mixup_uint8.py`, or through run.py for a table and a plot."""

OPERATION = "mixup_uint8"


def test_mixup_uint8(contest):
    contest()
