"""What `make bench` runs: every bench_*.py beside it, then one table and a plot for each operation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import report
from conftest import add_options
from contestants import OPERATIONS
from report import keep

HERE = Path(__file__).parent


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and those of them that pytest is to have."""
    operations = list(OPERATIONS)
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--only", choices=operations, nargs="+", default=operations, metavar="OP", help=" or ".join(operations))
    own.add_argument("--out", type=Path, default=Path("out/bench"), help="the folder for the reports (default: %(default)s)")
    own.add_argument("-k", default="", metavar="EXPRESSION", help='choose contestants as pytest does: "regfast and not compiled"')
    everything = argparse.ArgumentParser(description=__doc__, parents=[own], allow_abbrev=False)
    add_options(everything.add_argument)
    return everything.parse_args(argv), own.parse_known_args(argv)[1]


class Collector:
    """A pytest plugin that keeps the row of each test, whatever became of it, and whether regfast failed or a test had no row.

    The rows are in `file` at once, for a run may be stopped.
    """

    def __init__(self, file: Path, found: dict[str, Any]) -> None:
        self.file, self.found = file, found
        self.rows: list[dict[str, Any]] = []
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = dict(report.user_properties).get("row")
        if row and report.when == "call":
            self.rows.append(row)
            keep(self.file, self.found | {"rows": self.rows})
        self.failed |= report.failed and (row is None or row["contestant"].startswith("regfast"))


def main(argv: list[str]) -> int:
    """0, or 1 where nothing was timed or regfast failed: not where a peer did, nor for how long anything took."""
    options, shared = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    found = report.setting(options.device)
    collector = Collector(options.out / "report.json", found)
    print(f"{found['device']}, load {found['load']}")
    files = [str(HERE / f"bench_{operation}.py") for operation in options.only]
    quiet = ["-q", "--no-header", "--disable-warnings", "--benchmark-quiet", "-p", "no:cacheprovider"]
    saved = f"--benchmark-json={options.out / 'pytest-benchmark.json'}"
    pytest.main([*files, *quiet, saved, "-k", options.k, *shared], plugins=[collector])
    if not collector.rows:
        print("nothing was timed")
        return 1
    written = report.write(collector.rows, found, options.out)
    print(f"\n{report.table(collector.rows)}\n\n{report.notes(collector.rows)}\n\nwritten: {', '.join(map(str, written))}")
    return int(collector.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
