"""Every kernel compiles, without a GPU, with no spill, no stack and wide loads; bench/compiled.csv keeps the figures.

The compiler runs in a process of its own, because this one may have given its kernels to the interpreter. A change of a
figure that is meant goes into the table with `python bench/compiled.py --write`, where a reader of the commit sees it.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "bench" / "compiled.py"


def check(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_image_kernels_for_sm_90_are_as_the_table_says():
    check("--target", "sm_90", "--only", "2d k=2", "2d (3")


@pytest.mark.slow
def test_all_kernels_are_as_the_table_says():
    check()


def test_the_table_has_no_spill_no_stack_and_wide_accesses():
    """A lane's aligned vector is read and written at once: of channels where they are innermost, else of columns."""
    from regfast.kernels.max_blur_pool import CUTS

    with SCRIPT.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {row["dtype"] for row in rows} == {"fp16", "bf16", "fp32"}
    for row in rows:
        assert (row["spills"], row["stack"]) == ("0", "0"), row
        blur = "blur" if row["operation"] == "blur_pool" else ""
        kernel = " ".join(filter(None, (blur, "" if blur and row["direction"] == "forward" else row["direction"])))
        cut = CUTS[kernel][2 * row["case"].startswith("3d") + (row["format"] == "channels last")]
        # Every case has stride 2, and a backward writes the inputs of `own` outputs.
        elements = cut.vector if row["format"] == "channels last" else cut.own * (2 if row["direction"] == "backward" else 1)
        bits = min(elements * (32 if row["dtype"] == "fp32" else 16), 128)
        assert all(int(access.split("x")[1]) >= bits for access in row["stores"].split()), row
