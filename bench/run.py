"""What `make bench` runs: every bench_*.py beside it, then one table and a plot for each operation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import report
from conftest import add_options

HERE = Path(__file__).parent


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and those of them that pytest is to have."""
    operations = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--only", choices=operations, nargs="+", default=operations, metavar="OP", help=f"of {', '.join(operations)}")
    own.add_argument("--out", type=Path, default=Path("out/bench"), help="the folder for the reports (default: %(default)s)")
    own.add_argument("-k", default="", metavar="EXPRESSION", help='choose contestants as pytest does: "regfast and not compiled"')
    everything = argparse.ArgumentParser(description=__doc__, parents=[own], allow_abbrev=False)
    add_options(everything.add_argument)
    return everything.parse_args(argv), own.parse_known_args(argv)[1]


class Collector:
    """A pytest plugin that keeps the row of each test, whatever became of it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.rows += [value for name, value in report.user_properties if name == "row"]


def main(argv: list[str]) -> int:
    """0, or 1 where nothing was timed or a contestant of ours failed. How long anything took decides nothing."""
    options, shared = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    collector = Collector()
    files = [str(HERE / f"bench_{operation}.py") for operation in options.only]
    quiet = ["-q", "--no-header", "--benchmark-quiet", f"--benchmark-json={options.out / 'pytest-benchmark.json'}"]
    pytest.main([*files, *quiet, "-k", options.k, *shared], plugins=[collector])
    rows = collector.rows
    if not rows:
        print("nothing was timed")
        return 1
    written = report.write(rows, options.device, options.out)
    print(f"\n{report.table(rows)}\n\n{report.notes(rows)}\n\nwritten: {', '.join(map(str, written))}")
    return int(any(row["error"] and row["contestant"].startswith("regfast") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
