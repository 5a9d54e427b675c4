"""tools/tune.py in small: what spills is never launched, and the best cut is one that ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import python

TUNE = ("-m", "tools.tune")


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The row of a sweep over two cuts of the largest backward. One of them spills for sm_90."""
    out = tmp_path_factory.mktemp("tune") / "tune.json"
    fields = ["--columns", "2", "8", "--vector", "4", "--rows", "16"]
    done = python(*TUNE, "*backward 2d (3, 2, 1) channels last bf16", *fields, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())
    assert f"{row['sweep']}: {row['best']}" in done.stdout
    return row


def test_what_spills_is_not_launched(row: dict) -> None:
    pinned, *swept = row["candidates"]
    few, many = sorted(swept, key=lambda each: each["registers"])
    assert few["spills"] == 0 and few["ms"] > 0
    assert many["spills"] > 0 and many["ms"] is None
    assert pinned["cut"] == "pinned" and pinned["spills"] == 0 and pinned["ms"] > 0


def test_the_best_is_of_what_ran_and_the_pinned_cut_is_beside_it(row: dict) -> None:
    from regfast.kernels.cuts import Cut

    assert row["sweep"] == "max_blur_pool backward 2d (3, 2, 1) channels last bf16"
    assert row["best"] in ("pinned", str(Cut((2,), 4, 0, 1, 16, 4)))
    assert 0 < row["ms"] <= row["pinned_ms"]


def test_a_sweep_without_a_candidate_that_fits_has_the_pinned_cut(tmp_path: Path) -> None:
    out = tmp_path / "tune.json"
    done = python(
        *TUNE,
        "*forward 2d channels last bf16",
        "--columns",
        "8",
        "--vector",
        "8",
        "--out",
        str(out),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())
    assert [each["cut"] for each in row["candidates"]] == ["pinned"]
    assert row["best"] == "pinned" and row["ms"] == row["pinned_ms"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["mixup *"], "match none of\nmax_blur_pool forward 1d k=2 contiguous bf16\n"),
        (["*", "--columns", "many"], "argument --columns: invalid int value: 'many'"),
    ],
)
def test_what_is_not_there_is_named(arguments: list[str], complaint: str) -> None:
    done = python(*TUNE, *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
