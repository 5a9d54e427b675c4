"""Every kernel compiles, without a GPU, with no spill, no stack and wide loads.

tools/compiled.csv keeps the figures. A change that is meant goes into it with
`python -m tools.compiled --write`, where a reader of the commit sees it. The compiler runs in a
process of its own, because this one may have given its kernels to the interpreter.
"""

from __future__ import annotations

import csv
import itertools
import sys
from pathlib import Path

import pytest
from commands import ROOT, python

from regfast.ops import OPERATIONS

pytest.importorskip("triton")

from tools import assembly, compiled


def check(*arguments: str) -> None:
    done = python("-m", "tools.compiled", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "cases",
    [["2d k=2", "2d (3, 2, 1)"], ["images in place", "rows smoothed"]],
    ids=["poolings", "mixup"],
)
def test_image_kernels_for_sm_90_are_as_the_table_says(cases: list[str]):
    check("--target", "sm_90", "--dtype", "bf16", "--only", *cases)


@pytest.mark.slow
def test_all_kernels_are_as_the_table_says():
    check()


def test_a_case_that_there_is_not_is_an_error(tmp_path: Path, monkeypatch, capsys):
    table = tmp_path / "compiled.csv"
    table.write_bytes(compiled.TABLE.read_bytes())
    monkeypatch.setattr(compiled, "TABLE", table)
    monkeypatch.setattr(sys, "argv", ["compiled", "--only", "2d", "3D", "--write"])
    with pytest.raises(SystemExit, match="2"):
        compiled.main()
    assert "--only '3D' chooses no kernel" in capsys.readouterr().err
    assert table.read_bytes() == (ROOT / "tools" / "compiled.csv").read_bytes()


SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   FMNMX R4, R4, R5, !PT ;
        /*0040*/                   FADD R4, R4, R5 ;
.L_x_2:
        /*0050*/               @P1 STG.E desc[UR4][R2.64], R4 ;
        /*0060*/                   BRA.U UP0, `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
        /*0090*/                   NOP;
"""
# Two loops, the inner one with a store that is skipped where no lane writes. Behind the end is what
# comes before the inner one where some lane reads.
AMDGCN = """
\ts_load_dword s0, s[4:5], 0x0
.LBB0_1:
\ts_cbranch_execnz .LBB0_5
.LBB0_2:
\tv_add_f32 v0, v0, v1
\ts_cbranch_execz .LBB0_3
\tglobal_store_dword v[2:3], v0, off
.LBB0_3:
\ts_cbranch_scc1 .LBB0_2
\ts_cbranch_vccnz .LBB0_1
\ts_endpgm
.LBB0_5:
\tglobal_load_dword v1, v[2:3], off
\ts_branch .LBB0_2
"""


@pytest.mark.parametrize(
    ("text", "pattern", "expected"),
    [(SASS, assembly.SASS, (6, 4, 2)), (AMDGCN, assembly.AMDGCN, (4, 4, 4))],
    ids=["SASS", "AMDGCN"],
)
def test_a_turn_takes_the_shortest_way_through_a_loop(text: str, pattern: str, expected: tuple):
    """The loop's instructions, a turn's, and those around it, in the program or an outer loop."""
    assert assembly.shortest(assembly.instructions(text, pattern)) == expected


def test_without_a_loop_a_turn_is_the_program():
    text = SASS.replace("BRA.U UP0, `(.L_x_1)", "NOP")
    assert assembly.shortest(assembly.instructions(text, assembly.SASS)) == (0, 8, 0)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "num_warps", "percent"),
    [
        ("sm_90", 32, 0, 4, 100),
        # 136 registers a thread, of 16384 a scheduler: three warps of 16.
        ("sm_90", 129, 0, 4, 18),
        # Two blocks of eight warps do not fit twelve warps.
        ("sm_90", 129, 0, 8, 12),
        # At most 32 blocks.
        ("sm_90", 16, 0, 1, 50),
        ("sm_90", 32, 75 * 1024, 4, 18),
        ("sm_80", 32, 75 * 1024, 4, 12),
        ("gfx942", 170, 0, 4, 25),
        ("gfx942", 32, 8192, 2, 50),
    ],
)
def test_occupancy(target: str, registers: int, shared: int, num_warps: int, percent: int):
    assert compiled.occupancy(target, registers, shared, num_warps) == percent


def test_a_time_is_foretold_by_bytes_or_by_instructions():
    """By hand, for 1e9 elements: 4.066e12 bytes and 20.87e12 lane instructions a second."""
    # Two bytes are read and two written, which takes longer than few instructions.
    assert compiled.foretold(8, 50, 10**9, 4 * 10**9) == pytest.approx(983.8e-6, rel=1e-4)
    assert compiled.foretold(30, 12, 10**9, 4 * 10**9) == pytest.approx(1437.7e-6, rel=1e-4)
    # With fewer warps half as many instructions are issued.
    assert compiled.foretold(30, 11, 10**9, 4 * 10**9) == pytest.approx(2875.4e-6, rel=1e-4)


@pytest.fixture(scope="module")
def table() -> list[dict[str, str]]:
    with compiled.TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_is_whole_and_has_no_spill_and_no_stack(table: list[dict[str, str]]):
    assert {row["operation"] for row in table} == set(OPERATIONS)
    seconds = {("mixup", "order"), ("mixup_cross_entropy", "finish"), ("rezero", "finish")}
    both = set(itertools.product(OPERATIONS, ("forward", "backward")))
    assert {(row["operation"], row["direction"]) for row in table} == both | seconds
    assert {row["target"] for row in table} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {row["dtype"] for row in table} == {"fp16", "bf16", "fp32"}
    assert [row for row in table if (row["spills"], row["stack"]) != ("0", "0")] == []


def narrowest(accesses: str) -> int:
    return min(int(access.split("x")[1]) for access in accesses.split())


def widest(accesses: str) -> int:
    return max(int(access.split("x")[1]) for access in accesses.split())


def lane_of(row: dict[str, str]) -> tuple[int, int, int]:
    """The rows, columns and channels of a pooling's lane."""
    rows, columns, channels = map(int, row["elements"].split("x"))
    return rows, columns, channels


def test_poolings_write_whole_vectors(table: list[dict[str, str]]):
    """A lane's aligned vector is written at once: channels where they are innermost, else columns.

    Columns that are no aligned vector, in a width of 28 or 27, are exchanged by the threads: they
    write one each, side by side.
    """
    for row in table:
        contiguous = row["format"] == "contiguous"
        narrow = row["case"].startswith(("2d narrow", "2d odd"))
        if "pool" not in row["operation"] or (contiguous and narrow):
            continue
        _, columns, elements = lane_of(row)
        if contiguous:
            # A forward halves the columns, but for the pass down a volume.
            halves = row["direction"] == "forward" and row["case"] != "3d second"
            elements = columns // 2 if halves else columns
        # Between the two passes of a volume are float32 numbers.
        size = 32 if row["dtype"] == "fp32" or row["case"] == "3d first" else 16
        assert narrowest(row["stores"]) >= min((elements & -elements) * size, 128), row


# The limits for sm_90 in bfloat16: the instructions of an element, in contiguous tensors and with
# channels last, and the registers of a thread.
LIMITS = {
    ("max_blur_pool", "forward", "2d k=2"): (9, 9, 128),
    ("max_blur_pool", "forward", "2d (3, 2, 1)"): (11, 11, 128),
    ("max_blur_pool", "backward", "2d k=2"): (20, 24, 128),
    ("max_blur_pool", "backward", "2d (3, 2, 1)"): (36, 40, 168),
    ("blur_pool", "forward", "2d"): (9, 9, 128),
    ("blur_pool", "backward", "2d"): (13, 13, 128),
    ("mixup", "forward", "uint8"): (16, 16, 128),
    ("mixup", "forward", "uint8 from contiguous"): (None, 24, 128),
    ("mixup_cross_entropy", "forward", "maps"): (None, 20, 128),
    ("mixup_cross_entropy", "backward", "maps"): (None, 30, 128),
    ("mixup_cross_entropy", "forward", "rows"): (10, None, 128),
    ("mixup_cross_entropy", "backward", "rows"): (15, None, 128),
    ("rezero", "backward", "gate gelu"): (30, None, 128),
}


@pytest.fixture(scope="module")
def found(table: list[dict[str, str]]) -> dict[tuple[str, str, str, str], dict[str, str]]:
    """The rows of sm_90 in bfloat16, by operation, direction, case and format."""
    chosen = [row for row in table if (row["target"], row["dtype"]) == ("sm_90", "bf16")]
    return {(row["operation"], row["direction"], row["case"], row["format"]): row for row in chosen}


@pytest.mark.parametrize("kernel", LIMITS, ids=" ".join)
def test_an_element_takes_few_instructions(kernel: tuple[str, str, str], found: dict):
    *limits, registers = LIMITS[kernel]
    for format, limit in zip(("contiguous", "channels last"), limits):
        if limit is not None:
            row = found[(*kernel, format)]
            assert float(row["per_element"]) <= limit and int(row["registers"]) <= registers, row


def cost(row: dict[str, str], width: int) -> float:
    """The instructions of an element of images of a width, which the lanes of a row may exceed."""
    _, columns, _ = lane_of(row)
    return float(row["per_element"]) * -(-width // columns) * columns / width


@pytest.mark.parametrize("format", ["contiguous", "channels last"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("operation", "wide", "narrow", "ratio"),
    [
        ("max_blur_pool", "2d k=2", "2d narrow k=2", 1.15),
        ("max_blur_pool", "2d (3, 2, 1)", "2d narrow (3, 2, 1)", 1.15),
        # A blur has few instructions, and more of them are once a row.
        ("blur_pool", "2d", "2d narrow", 1.25),
    ],
)
def test_narrow_images_cost_little_more(
    operation: str, wide: str, narrow: str, ratio: float, direction: str, format: str, found: dict
) -> None:  # fmt: skip
    """28 columns, of which a lane has as many as divide them, against 112."""
    narrow_row, wide_row = (found[operation, direction, case, format] for case in (narrow, wide))
    assert cost(narrow_row, 28) <= ratio * cost(wide_row, 112)
    registers = 168 if "(3, 2, 1)" in narrow and direction == "backward" else 128
    assert int(narrow_row["registers"]) <= registers


def test_blends_read_and_write_whole_vectors(table: list[dict[str, str]]):
    """A lane has 16 elements, or half as many in a gfx942's twice as wide waves.

    It reads as many bytes at once as it writes numbers, or all that it has where they are written
    in another order.
    """
    for row in table:
        # The backward's first launch has a few numbers of the batch.
        if row["operation"] != "mixup" or row["direction"] == "order":
            continue
        elements = 16 // (2 if row["target"] == "gfx942" else 1)
        written = read = 32 if row["dtype"] == "fp32" else 16
        at_once = elements
        if row["case"].startswith("uint8"):
            read, at_once = 8, elements if "from contiguous" in row["case"] else 128 // written
        assert narrowest(row["stores"]) >= min(elements * written, 128), row
        assert widest(row["loads"]) >= min(at_once * read, 128), row


def test_residuals_read_and_write_whole_vectors(table: list[dict[str, str]]):
    """A lane has 16 elements of any dtype, or half as many in a gfx942's twice as wide waves."""
    for row in table:
        # A finish reads a number of each program.
        if row["operation"] == "rezero" and row["direction"] != "finish":
            elements = 16 // (2 if row["target"] == "gfx942" else 1)
            bits = min(elements * (32 if row["dtype"] == "fp32" else 16), 128)
            # Single numbers are alpha, and what a backward's program adds to the gate's gradient.
            assert widest(row["stores"]) >= bits and widest(row["loads"]) >= bits, row


def test_losses_read_vectors_along_a_row_of_classes_or_along_the_rows(table: list[dict[str, str]]):
    """Or along a run of rows: with 21 classes innermost, an odd number, no row is aligned."""
    for row in table:
        if row["operation"] != "mixup_cross_entropy" or row["direction"] == "finish":
            continue
        along_rows = row["case"].startswith("maps") and row["format"] == "contiguous"
        bits = 64 if along_rows and row["dtype"] != "fp32" else 128
        vectors = [access for access in row["loads"].split() if int(access.split("x")[1]) >= bits]
        assert vectors, row
        if row["direction"] == "backward":
            assert narrowest(row["stores"]) >= bits, row
