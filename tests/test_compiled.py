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
    """Images with innermost channels: four elements an access on NVIDIA, two on AMD, whose wavefronts are twice as wide.

    (Borders that send positions elsewhere, and volumes, hold too much for more than one or two elements a thread.)
    """
    with SCRIPT.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {row["dtype"] for row in rows} == {"fp16", "bf16", "fp32"}
    for row in rows:
        assert (row["spills"], row["stack"]) == ("0", "0"), row
        if row["format"] == "channels last" and row["case"] in ("2d", "2d k=2", "2d (3, 2, 1)"):
            elements = {"gfx942": 2}.get(row["target"], 4)
            bits = elements * (32 if row["dtype"] == "fp32" else 16)
            assert int(row["load_bits"]) >= bits and int(row["store_bits"]) >= bits, row
