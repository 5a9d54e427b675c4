"""An anti-aliased ResNet-18 against its peers: `pytest bench/bench_resnet18.py`, or through run.py for a table and a plot."""

OPERATION = "resnet18"


def test_resnet18(contest):
    contest()
