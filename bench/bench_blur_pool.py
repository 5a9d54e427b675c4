"""blur_pool against its peers: `pytest bench/bench_blur_pool.py`, or through run.py for a table and a plot."""

OPERATION = "blur_pool"


def test_blur_pool(contest):
    contest()
