"""Commands that run one after the other, each in a share of the time left; what becomes of one is nothing to the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

# Seconds for an interrupted step to write what it has.
GRACE = 10


@dataclass
class Step:
    """A command, and what became of it. `share` is of the time left: about its seconds on an H100, as estimated.

    The part that it belongs to is the name's first word. `results` is the file it writes, JSON or JUnit's XML. A log that
    contains `unable` says that this machine cannot do it, which is no failure.
    """

    name: str
    command: Sequence[str | Path]
    share: float
    results: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    unable: str = ""
    status: str = "not reached"
    seconds: float = 0
    limit: float = 0
    last_lines: list[str] = field(default_factory=list)

    @property
    def part(self) -> str:
        return self.name.split("-")[0]

    @property
    def troubled(self) -> bool:
        return self.status in ("failed", "timed out")

    def read(self) -> Any:
        """What the results' file holds: None where there is none, or half of one."""
        if self.results is None or not self.results.exists():
            return None
        if self.results.suffix == ".json":
            return json.loads(self.results.read_text())
        try:
            (suite,) = ElementTree.parse(self.results).getroot().iter("testsuite")
        except ElementTree.ParseError:
            return None
        return {outcome: int(suite.attrib[outcome]) for outcome in ("tests", "failures", "errors", "skipped")}


def run_all(steps: list[Step], minutes: float, out: Path, environment: dict[str, str]) -> Iterator[Step]:
    """Runs the steps that are not absent, in `minutes` together, and yields each as it ends. Their logs go into `out`."""
    deadline = time.monotonic() + 60 * minutes - GRACE
    for step in steps:
        # An earlier run's.
        if step.results is not None:
            step.results.unlink(missing_ok=True)
    for index, step in enumerate(steps):
        if step.status == "absent":
            continue
        to_come = sum(other.share for other in steps[index:] if other.status != "absent")
        step.limit = max(deadline - time.monotonic(), 0) * step.share / to_come
        run(step, out / f"{step.name}.log", environment)
        yield step


def run(step: Step, log: Path, environment: dict[str, str]) -> None:
    """Runs a step in its own group of processes, which ends with it, or at its limit."""
    start = time.monotonic()
    with log.open("w") as output:
        command, environment = list(map(str, step.command)), environment | step.environment
        streams = dict(stdout=output, stderr=subprocess.STDOUT)
        try:
            process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        except OSError as error:
            step.status, step.last_lines = "failed", [str(error)]
            return
        try:
            step.status = "ok" if process.wait(step.limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            step.status = "timed out"
            interrupt(process)
        finally:
            # What it left behind; and the step itself, if this process is being stopped.
            signal_group(process, signal.SIGKILL)
            process.wait()
    step.seconds = time.monotonic() - start
    text = log.read_text(errors="replace")
    step.last_lines = text.strip().splitlines()[-20:]
    if step.status == "failed" and step.unable and step.unable in text:
        step.status = "absent"


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Asks a step to end as a terminal would. pytest and run.py then write what they have."""
    signal_group(process, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


def signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
