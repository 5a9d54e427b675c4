"""An anti-aliased ResNet-50 against its peers: `pytest bench/bench_resnet50.py`, or through run.py for a table and a plot."""

OPERATION = "resnet50"


def test_resnet50(contest):
    contest()
