"""tools/host.py on a run too short to mean anything: its rows, and that nothing is launched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import python

pytest.importorskip("triton")

from tools.host import BASE, LIMITS, STATES


def run(out: Path) -> tuple[list[dict], list[str]]:
    """The rows of a run, and the lines that it prints."""
    done = python("-m", "tools.host", "--rounds", "1", "--out", out)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout.splitlines()


def test_every_row_has_its_ratio_and_its_limit_and_the_worst_comes_last(tmp_path: Path):
    rows, (*table, last) = run(tmp_path / "host.json")
    found = [(row["operation"], row["state"]) for row in rows]
    assert found == [(name, state) for name in (BASE, *LIMITS) for state in STATES]
    base = {row["state"]: row["us"] for row in rows if row["operation"] == BASE}
    limits = [limit for each in LIMITS.values() for limit in each]
    assert [row["limit"] for row in rows] == [None] * len(STATES) + limits
    for row, line in zip(rows, table[2:], strict=True):
        assert row["ratio"] == pytest.approx(row["us"] / base[row["state"]]) and row["us"] > 0
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        limit = f"{row['limit']:.2f}" if row["limit"] else ""
        numbers = f"{row['us']:.2f}", BASE, f"{row['ratio']:.2f}", limit
        assert cells == [row["operation"], row["state"], *numbers]
    worst = max((row for row in rows if row["limit"]), key=lambda row: row["ratio"] / row["limit"])
    share = worst["ratio"] / worst["limit"]
    assert last == f"worst: {worst['operation']}, {worst['state']}: {share:.2f} of its limit"
