"""pytest-benchmark's side: the cases as parameters, and each contestant's rounds of an interleaved pass played back to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from contest import DIRECTIONS, DTYPES, FORMATS, Case, formats_of
from contestants import OPERATIONS
from measure import QUICK, USUAL, Rounds, measure


def some_of(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    """An option's type: names of `allowed`, separated by commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= set(allowed):
            raise ValueError(text)
        return names

    parse.__name__ = f"choice of {','.join(allowed)}"
    return parse


def shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, shape.split("x"))) for shape in text.split(",")]


def add_options(add: Callable[..., object]) -> None:
    """The options that pytest and run.py share: both know argparse's arguments."""
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--quick", action="store_true", help="a tenth of the rounds, and only the first shape and arguments of each operation")
    add("--seconds", type=float, help="what a case's rounds may take, if there are enough of them (default: 3, or 0.3 if quick)")
    add("--dtypes", type=some_of(DTYPES), help="default: float32 on the CPU, bfloat16,float32 on CUDA")
    add("--formats", type=some_of(tuple(FORMATS)), default=list(FORMATS), help="default: all that a shape has")
    add("--directions", type=some_of(DIRECTIONS), help="default: those of an operation; on the CPU no backward alone")
    add("--shapes", type=shapes, help="instead of the operation's own, those of its rank: 8x64x112x112,64x1000")


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser.getgroup("regfast").addoption)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device=cuda: PyTorch finds no CUDA device")


def cases(operation: str, config: pytest.Config) -> list[Case]:
    row, cpu, quick = OPERATIONS[operation], config.getoption("device") == "cpu", config.getoption("quick")
    least = 1 if quick or cpu else None
    choices = itertools.product(
        row.arguments[:least],
        config.getoption("shapes") or row.shapes[config.getoption("device")][:least],
        config.getoption("formats"),
        config.getoption("dtypes") or (["float32"] if cpu else ["bfloat16", "float32"]),
        config.getoption("directions") or [way for way in DIRECTIONS if not cpu or way != "backward"],
    )
    ranks = {len(shape) for shapes in row.shapes.values() for shape in shapes}
    return [
        case
        for case in itertools.starmap(partial(Case, operation), choices)
        if len(case.shape) in ranks and case.format in formats_of(case.shape) and case.direction in row.directions
    ]


def rounds(config: pytest.Config) -> Rounds:
    usual, seconds = QUICK if config.getoption("quick") else USUAL, config.getoption("seconds")
    return usual if seconds is None else usual._replace(seconds=seconds)


class Tape:
    """A clock that moves only when it is told to, so that pytest-benchmark reads off it times that were taken before."""

    now = 0.0

    def read(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


TAPE = Tape()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contestant" in metafunc.fixturenames:
        operation = metafunc.module.OPERATION
        params = [
            pytest.param(case, name, id=f"{case}-{name}", marks=pytest.mark.benchmark(group=str(case), timer=TAPE.read))
            for case in cases(operation, metafunc.config)
            for name in OPERATIONS[operation].contestants
        ]
        metafunc.parametrize(("case", "contestant"), params)


@pytest.fixture
def contest(case: Case, contestant: str, request: pytest.FixtureRequest, record_property: Any) -> Callable[[], None]:
    """Times the contestant in one pass with those of its case that were selected too, and reports its own rounds."""

    def run() -> None:
        params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
        selected = tuple(chosen["contestant"] for chosen in params if chosen.get("case") == case)
        result = measure(case, selected, torch.device(request.config.getoption("device")), rounds(request.config))
        row = result.row(contestant)
        record_property("row", row)
        if row["absent"]:
            pytest.skip(f"{contestant}: {row['absent']}")
        if row["error"]:
            pytest.fail(f"{contestant}: {row['error']}", pytrace=False)
        play(request.getfixturevalue("benchmark"), result.seconds[contestant], row)

    return run


def play(benchmark: Any, seconds: list[float], row: dict[str, Any]) -> None:
    figures = ("ratio", "bytes", "gb_per_s", "copy_gb_per_s", "of_copy")
    benchmark.extra_info.update({figure: row[figure] for figure in figures if figure in row})
    rounds = iter(seconds)
    benchmark.pedantic(TAPE.advance, setup=lambda: ((next(rounds),), {}), rounds=len(seconds))
