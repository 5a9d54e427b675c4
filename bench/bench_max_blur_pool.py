"""max_blur_pool against its peers: `pytest bench/bench_max_blur_pool.py`, or `make bench ARGS="--only max_blur_pool"` for a table and a plot."""

OPERATION = "max_blur_pool"


def test_max_blur_pool(contest):
    contest()
