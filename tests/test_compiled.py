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

from regfast.ops import OPERATIONS

SCRIPT = Path(__file__).parent.parent / "bench" / "compiled.py"


def check(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("cases", [["2d k=2", "2d (3"], ["images in", "rows smoothed"]], ids=["poolings", "mixup"])
def test_image_kernels_for_sm_90_are_as_the_table_says(cases: list[str]):
    check("--target", "sm_90", "--only", *cases)


@pytest.mark.slow
def test_all_kernels_are_as_the_table_says():
    check()


@pytest.fixture(scope="module")
def table() -> list[dict[str, str]]:
    with SCRIPT.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_is_whole_and_has_no_spill_and_no_stack(table: list[dict[str, str]]):
    assert {row["operation"] for row in table} == set(OPERATIONS)
    seconds = {("mixup", "order"), ("mixup_cross_entropy", "finish"), ("rezero", "finish")}
    both = {(operation, direction) for operation in OPERATIONS for direction in ("forward", "backward")}
    assert {(row["operation"], row["direction"]) for row in table} == both | seconds
    assert {row["target"] for row in table} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {row["dtype"] for row in table} == {"fp16", "bf16", "fp32"}
    assert [row for row in table if (row["spills"], row["stack"]) != ("0", "0")] == []


def narrowest(accesses: str) -> int:
    return min(int(access.split("x")[1]) for access in accesses.split())


def widest(accesses: str) -> int:
    return max(int(access.split("x")[1]) for access in accesses.split())


def test_poolings_write_whole_vectors(table: list[dict[str, str]]):
    """A lane's aligned vector is written at once: of channels where they are innermost, else of columns."""
    from regfast.kernels.max_blur_pool import CUTS

    for row in table:
        if "pool" not in row["operation"]:
            continue
        blur = "blur" if row["operation"] == "blur_pool" else ""
        kernel = " ".join(filter(None, (blur, "" if blur and row["direction"] == "forward" else row["direction"])))
        cut = CUTS[kernel][2 * row["case"].startswith("3d") + (row["format"] == "channels last")]
        # Every case has stride 2, and a backward writes the inputs of `own` outputs.
        elements = cut.vector if row["format"] == "channels last" else cut.own * (2 if row["direction"] == "backward" else 1)
        bits = min(elements * (32 if row["dtype"] == "fp32" else 16), 128)
        assert narrowest(row["stores"]) >= bits, row


def test_blends_read_and_write_whole_vectors(table: list[dict[str, str]]):
    """Elements are taken in the output's order, so that every store is wide, and every load of what lies in the same.

    A lane has 16 elements, or 8 where they are read one by one; half as many of the twice as wide waves of a gfx942.
    """
    for row in table:
        # The backward's first launch has a few numbers of the batch.
        if row["operation"] != "mixup" or row["direction"] == "order":
            continue
        scattered = "from contiguous" in row["case"]
        elements = 16 // (2 if scattered else 1) // (2 if row["target"] == "gfx942" else 1)
        written = 32 if row["dtype"] == "fp32" else 16
        read = 8 if row["case"].startswith("uint8") else written
        assert narrowest(row["stores"]) >= min(elements * written, 128), row
        assert scattered or widest(row["loads"]) >= min(elements * read, 128), row


def test_residuals_read_and_write_whole_vectors(table: list[dict[str, str]]):
    """Of whatever dtype, 16 elements a lane; half as many of the twice as wide waves of a gfx942."""
    for row in table:
        # (A finish reads a number of each program.)
        if row["operation"] == "rezero" and row["direction"] != "finish":
            bits = 16 // (2 if row["target"] == "gfx942" else 1) * (32 if row["dtype"] == "fp32" else 16)
            # (A backward's program writes one number besides, its part of the gate's gradient; and alpha is one number.)
            assert widest(row["stores"]) >= min(bits, 128) and widest(row["loads"]) >= min(bits, 128), row


def test_losses_read_vectors_along_a_row_of_classes_or_along_the_rows(table: list[dict[str, str]]):
    """But for 21 innermost classes, an odd number, of which no vector is aligned."""
    for row in table:
        if row["operation"] != "mixup_cross_entropy" or row["direction"] == "finish" or row["format"] == "channels last":
            continue
        bits = 128 if row["case"].startswith("rows") or row["dtype"] == "fp32" else 64
        vectors = [access for access in row["loads"].split() if int(access.split("x")[1]) >= bits]
        assert vectors, row
        if row["direction"] == "backward":
            assert narrowest(row["stores"]) >= bits, row
