"""Commands that run one after the other, each in its share of the time that is left."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Seconds for an interrupted command to write what it has: pytest-xdist waits ten for its processes.
GRACE = 15


class Step(NamedTuple):
    """A command; `share` is about its seconds on an H200.

    A command whose program is None is absent; one whose log matches `unable` cannot run on this
    machine. "{seconds}" in it becomes the time after which it should end by itself.
    """

    name: str
    command: Sequence[str | Path | None]
    share: float
    environment: Mapping[str, str] = {}
    unable: str = "(?!)"


def run_all(
    steps: Sequence[Step], minutes: float, log: Path, environment: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Runs the steps, in `minutes` together, and yields what became of each: its name, its status,
    its seconds and the end of its output. All output goes into `log`.
    """
    deadline = time.monotonic() + 60 * minutes - GRACE
    for index, step in enumerate(steps):
        start = time.monotonic()
        shares = sum(other.share for other in steps[index:] if other.command[0])
        limit = max(deadline - start, 0) * step.share / max(shares, step.share)
        with log.open("a+") as output:
            begin = output.tell()
            given = {**environment, **step.environment}
            status = run(step, limit, output, given) if limit >= 1 else "cut"
            output.seek(begin)
            text = output.read()
        if status == "failed" and re.search(step.unable, text):
            status = "absent"
        found = {"name": step.name, "status": status, "seconds": time.monotonic() - start}
        yield found | {"ending": text.strip().splitlines()[-30:]}


def run(step: Step, limit: float, output: Any, environment: Mapping[str, str]) -> str:
    """Runs a step in its own group of processes. Returns "ok", "failed", "cut" or "absent"."""
    program, *words = step.command
    if program is None:
        return "absent"
    seconds = f"{max(limit - GRACE / 2, 1):.0f}"
    command = [program, *(str(word).replace("{seconds}", seconds) for word in words)]
    streams = dict(stdout=output, stderr=subprocess.STDOUT)
    process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
    try:
        return "failed" if process.wait(limit) else "ok"
    except subprocess.TimeoutExpired:
        # pytest then writes what it has. Interrupted themselves, its workers would not answer it.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return "cut"
    finally:
        # And the processes that it left behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
