"""max_blur_pool against its peers: `pytest bench/bench_max_blur_pool.py`, or through run.py for a table and a plot."""

OPERATION = "max_blur_pool"


def test_max_blur_pool(contest):
    contest()
