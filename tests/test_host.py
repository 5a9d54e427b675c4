"""tools/host.py on a run too short to mean anything: its rows, and that nothing is launched where there is no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import host
import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "host.py"
NUMBERS = r"[\d.]+ / [\d.]+ / [\d.]+"


def test_every_row_has_its_ratios_and_its_limits_and_the_worst_comes_last():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--rounds", "1"], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    base, *rows, last = done.stdout.splitlines()
    assert re.fullmatch(rf"nn.MaxPool2d: {NUMBERS} us \(no grad / grad / forward \+ backward\)", base)
    shares = {}
    for row, (name, limits) in zip(rows, host.LIMITS.items(), strict=True):
        found = re.fullmatch(rf"{re.escape(name)} +({NUMBERS}) +at most ({NUMBERS}) +([\d.]+)", row)
        assert found, row
        measured, allowed = ([float(number) for number in found.group(i).split(" / ")] for i in (1, 2))
        assert allowed == list(limits)
        # Each is rounded to a hundredth.
        assert float(found.group(3)) == pytest.approx(max(m / a for m, a in zip(measured, allowed)), abs=0.02)
        shares[name] = float(found.group(3))
    name, share = re.fullmatch(r"worst: (.+) ([\d.]+)", last).groups()
    assert float(share) == max(shares.values()) == shares[name]


def test_small_batches_on_the_cpu_have_their_ratios():
    done = subprocess.run([sys.executable, SCRIPT, "--cpu", "--rounds", "1"], capture_output=True, text=True)
    pooling, blend = done.stdout.splitlines()
    assert re.match(rf"MaxPool2dAA\(2\) by nn.MaxPool2d\(2\) of \(2, 8, 16, 16\): {NUMBERS}", pooling)
    assert re.match(rf"mixup by .* of \(8, 3, 32, 32\): {NUMBERS}", blend)


def test_the_benchmark_has_every_operation():
    from contestants import OPERATIONS

    import regfast.ops

    assert set(regfast.ops.OPERATIONS) <= set(OPERATIONS)
