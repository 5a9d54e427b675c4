"""tools/traffic.py counts what a kernel asks of memory: exactly, for kernels counted by hand.

It runs in processes of its own, because this one interprets kernels only where there is no GPU.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from commands import python

TRAFFIC = ["-m", "tools.traffic"]
POOL = ["max_blur_pool", "--only=2d k=2"]

# Counts launches of kernels of its own, and prints the figures by name. It is a file, because the
# interpreter reads the source of kernels.
DRIVER = """
import json

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from tools import traffic


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def add_next_block(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + tl.load(x_ptr + i + BLOCK))


@triton.jit
def add_pairs(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + 2 * i) + tl.load(x_ptr + 2 * i + 1))


@triton.jit
def broadcast_rows(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row, column = tl.program_id(1), tl.program_id(0)
    tl.store(y_ptr + (2 * row + column) * BLOCK + i, tl.load(x_ptr + row * BLOCK + i))


def figures(kernel, grid, *args, l2=1 << 30):
    with traffic.recording() as launches:
        kernel[grid](*args)
    (launch,) = launches
    found = {"elements": launch.elements} | launch.figures(l2)
    return {
        "names": dict.fromkeys(launch.names),
        "programs": len(launch.programs),
        **{key: dict(zip(launch.names, each.tolist())) for key, each in found.items()},
    }


def hooked():
    builder = InterpreterBuilder
    return [GridExecutor._init_args_hst, builder.create_masked_load, builder.create_masked_store]


x, half = torch.arange(400.0), torch.ones(300, dtype=torch.bfloat16)
found = {
    "copy": figures(copy, (3,), x, torch.zeros(300), 300, 128),
    "half": figures(copy, (3,), half, half.clone(), 300, 128),
    "shifted": figures(copy, (3,), x[16:], torch.zeros(300), 300, 128),
    "in place": figures(copy, (3,), x, x, 300, 128),
    "overlap": figures(add_next_block, (4,), x, torch.zeros(256), 64),
    "overlap, no cache": figures(add_next_block, (4,), x, torch.zeros(256), 64, l2=0),
    "pairs": figures(add_pairs, (1,), x, torch.zeros(128), 128),
    "rows": figures(broadcast_rows, (2, 2), x, torch.zeros(128), 32, l2=256),
}
A, B, C, WRITE = 1, 2, 3, traffic.WRITE
found["lru"] = list(traffic.misses([A, B, A, C, B], 2))
missed = traffic.misses([A | WRITE, A | WRITE, A, B, B | WRITE], 2)
found["written once"] = [key & ~WRITE for key in missed]

before = hooked()
y = torch.zeros(300)
with traffic.recording():
    copy[(3,)](x, y, 300, 128)
    inside = hooked()
    try:
        copy[(4,)](x, torch.zeros(300), 512, 128)
    except Exception as error:
        found["outside"] = str(error)
found["hooked"], found["restored"] = inside != before, hooked() == before
found["copied"] = torch.equal(y, x[:300])
print(json.dumps(found))
"""


FORMATS = ("contiguous", "channels_last")


def shape(*sizes: int) -> list[str]:
    return ["--shape", *map(str, sizes)]


# The poolings with one program for all rows of an image.
ONE_PROGRAM = """
from tools import traffic
from regfast.kernels.cuts import CUTS

CUTS.update({kind: tuple(cut._replace(programs=1) for cut in cuts) for kind, cuts in CUTS.items()})
traffic.main()
"""


def rows_of(out: Path, *arguments: str, command: list[str | Path] = TRAFFIC) -> list[dict]:
    done = python(*command, *arguments, f"--out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    driver = tmp_path_factory.mktemp("traffic") / "driver.py"
    driver.write_text(DRIVER)
    done = python(driver)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def blended(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The blend of six samples in random pairs: a cache of one sample holds two blocks of each."""
    return rows_of(tmp_path_factory.mktemp("blended") / "rows.json", "mixup", "--only=images")


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The pooling of images that a program covers, and that fill no whole number of lines."""
    return rows_of(tmp_path_factory.mktemp("pooled") / "rows.json", *POOL, *shape(2, 2, 14, 62))


def test_copy_with_a_masked_tail(counted: dict) -> None:
    """300 floats in blocks of 128: two blocks of four lines, and 44 floats on two lines.

    A figure is of loads, then of stores.
    """
    copy = counted["copy"]
    assert copy["programs"] == 3
    assert copy["elements"] == {"x_ptr": [300, 0], "y_ptr": [0, 300]}
    assert copy["L1"] == {"x_ptr": [1200, 0], "y_ptr": [0, 1200]}
    for figure in ("lines", "L2", "device", "grid"):
        assert copy[figure] == {"x_ptr": [1280, 0], "y_ptr": [0, 1280]}, figure


def test_half_precision_has_half_the_bytes(counted: dict) -> None:
    assert counted["half"]["elements"]["x_ptr"] == [300, 0]
    assert counted["half"]["L1"]["x_ptr"] == [600, 0]
    assert counted["half"]["grid"]["x_ptr"] == [5 * 128, 0]


def test_lines_are_those_of_the_storage(counted: dict) -> None:
    """A view from the middle of a line: its blocks have five, five and two lines, and share two."""
    assert counted["shifted"]["L2"]["x_ptr"] == [12 * 128, 0]
    assert counted["shifted"]["grid"]["x_ptr"] == [10 * 128, 0]


def test_arguments_of_one_storage_are_one_tensor(counted: dict) -> None:
    found = counted["in place"]
    assert found["elements"] == {"x_ptr/y_ptr": [300, 300]}
    assert found["grid"] == found["device"] == {"x_ptr/y_ptr": [1280, 1280]}


def test_overlap_is_counted_by_program_and_once_over_the_grid(counted: dict) -> None:
    """Four programs read two blocks of two lines each, and the inner blocks are read by two."""
    found = counted["overlap"]
    assert found["elements"]["x_ptr"] == [512, 0]
    assert found["L2"]["x_ptr"] == found["lines"]["x_ptr"] == [16 * 128, 0]
    assert found["device"]["x_ptr"] == found["grid"]["x_ptr"] == [10 * 128, 0]
    assert counted["overlap, no cache"]["device"] == {"x_ptr": [16 * 128, 0], "y_ptr": [0, 8 * 128]}


def test_a_strided_load_touches_every_line_for_half_of_the_elements(counted: dict) -> None:
    """Two loads, of the even and the odd elements, of the same eight lines."""
    assert counted["pairs"]["L1"]["x_ptr"] == [8 * 128, 0]
    assert counted["pairs"]["lines"]["x_ptr"] == [16 * 128, 0]
    assert counted["pairs"]["L2"]["x_ptr"] == [8 * 128, 0]


def test_programs_are_in_a_gpus_order(counted: dict) -> None:
    """A row's two programs come one after the other: a cache of two lines has it for the second."""
    assert counted["rows"]["L2"]["x_ptr"] == [4 * 128, 0]
    assert counted["rows"]["device"]["x_ptr"] == [2 * 128, 0]


def test_the_cache_drops_the_least_recent_and_writes_a_line_back_once(counted: dict) -> None:
    assert counted["lru"] == [1, 2, 3, 2]
    assert counted["written once"] == [1, 2, 2]


def test_an_address_outside_the_tensors_is_an_error(counted: dict) -> None:
    assert "copy asks for an address outside the tensors it was given" in counted["outside"]


def test_the_interpreter_computes_the_same_and_is_restored(counted: dict) -> None:
    assert counted["hooked"] and counted["restored"] and counted["copied"]


def test_every_format_and_direction_has_a_row(pooled: list[dict]) -> None:
    found = [(row["format"], row["direction"]) for row in pooled]
    assert found == list(itertools.product(FORMATS, ("forward", "backward")))


def test_the_pooling_moves_its_floor_and_no_more_than_lines_round_it_to(pooled: list[dict]) -> None:
    x, y = 2 * 2 * 2 * 14 * 62, 2 * 2 * 2 * 7 * 31
    for row in pooled:
        assert row["floor"] == (x + y if row["direction"] == "forward" else 2 * x + y)
        tensors = 2 if row["direction"] == "forward" else 3
        assert row["floor"] <= row["grid"] < row["floor"] + tensors * 128
        assert row["grid"] <= row["device"] <= row["L2"] <= row["lines"]


def test_the_pooling_loads_as_often_as_its_docstring_says(tmp_path: Path) -> None:
    """But for what the border cuts off, and a program's warm-up adds: one program streams all rows.

    Its lanes are whole programs, because lanes beyond the last read what that one does.
    """
    n, c, h, w = 8, 16, 32, 64
    driver = tmp_path / "driver.py"
    driver.write_text(ONE_PROGRAM)
    rows = rows_of(tmp_path / "rows.json", *POOL, *shape(n, c, h, w), command=[driver])
    for row in rows:
        x, forward = n * c * h * w, row["direction"] == "forward"
        # A lane has a vector of 16 bytes, and in a forward of many channels half as many columns.
        group = 4 if forward and row["format"] == "channels_last" else 8
        loads = 1 + 2 / group if forward else 1.25 + 3 / group
        assert row["loads"] / x == pytest.approx(loads, rel=0.08)
        assert row["stores"] == (x / 4 if forward else x)


def test_a_blend_reads_each_sample_from_memory_once(blended: list[dict]) -> None:
    """It asks for each twice, with programs of all samples between, and has a sixth for a cache."""
    batch = 2 * 6 * 16 * 32 * 48
    found = [(row["format"], row["direction"]) for row in blended]
    assert found == list(itertools.product(FORMATS, ("forward", "backward")))
    for row in blended:
        assert row["floor"] == 2 * batch and row["l2"] == 2 * batch // 6
        # Every program asks for a few numbers of index and lam too.
        assert row["loads"] == pytest.approx(2 * row["inputs"], rel=0.005)
        # The backward first sorts the samples by their partner, and writes their order.
        order = 2 * 6 + 1 if row["direction"] == "backward" else 0
        assert row["stores"] == row["inputs"] + order
        assert row["device"] == pytest.approx(row["floor"], rel=0.01)
        assert row["L2"] == pytest.approx(1.5 * row["floor"], rel=0.05)


def test_a_cache_too_small_for_a_block_of_every_sample_is_seen(tmp_path: Path) -> None:
    """Partners are read anew: three passes in place of two, but for partners close to another."""
    arguments = ["mixup", "--only=images", *shape(6, 4, 32, 48), "--l2=0.1"]
    for row in rows_of(tmp_path / "rows.json", *arguments):
        assert 1.2 * row["floor"] < row["device"] <= row["L2"]


def test_bytes_are_blended_and_normalised_in_one_pass(tmp_path: Path) -> None:
    """One byte is read an element, and two are written. There is no backward."""
    arguments = ["mixup", "--only=uint8", *shape(2, 3, 32, 64)]
    rows = rows_of(tmp_path / "rows.json", *arguments)
    assert [(row["format"], row["direction"]) for row in rows] == [(f, "forward") for f in FORMATS]
    for row in rows:
        assert row["floor"] == 3 * 2 * 3 * 32 * 64
        assert row["device"] == pytest.approx(row["floor"], rel=0.05)


def test_a_loss_moves_its_three_passes(tmp_path: Path) -> None:
    """Besides it has two statistics a row, where the floor has one; four sums of each program,
    which has a row; a loss and two denominators.
    """
    arguments = ["mixup_cross_entropy", "--only=rows", *shape(32, 1000), "--l2=8"]
    for row in rows_of(tmp_path / "rows.json", *arguments):
        rows, classes = 32, 1000
        passes = 1 if row["direction"] == "forward" else 2
        assert row["floor"] == passes * 2 * rows * classes + (8 + 8 + 4) * rows
        assert row["grid"] == pytest.approx(row["floor"], rel=0.05)
        assert row["device"] == pytest.approx(row["floor"], rel=0.05)
        assert row["stores"] == (row["inputs"] if passes == 2 else (2 + 4) * rows + 3)


def test_a_gated_residual_moves_three_tensors_each_way(tmp_path: Path) -> None:
    """And the gate; in the backward a number of each program besides.

    That is its part of the gate's gradient, and from the finish, which is one program, their sum.
    """
    arguments = ["rezero", "--only=gate relu", *shape(2, 3, 32, 64)]
    for row in rows_of(tmp_path / "rows.json", *arguments):
        assert row["floor"] == 3 * 2 * 2 * 3 * 32 * 64
        assert row["device"] == pytest.approx(row["floor"], rel=0.03)
        parts = row["programs"] if row["direction"] == "backward" else 0
        assert row["stores"] == row["inputs"] + parts


def test_rare_cases_are_counted_where_they_are_named(tmp_path: Path) -> None:
    toy = ["max_blur_pool", *shape(1, 2, 8, 8)]
    usual = rows_of(tmp_path / "usual.json", *toy)
    assert {row["case"] for row in usual} == {"2d k=2", "2d (3, 2, 1)"}
    narrow = rows_of(tmp_path / "narrow.json", *toy, "--only", "2d narrow*")
    assert {row["case"] for row in narrow} == {"2d narrow k=2", "2d narrow (3, 2, 1)"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["avg_pool"], "invalid choice: 'avg_pool'"),
        (["mixup_uint8"], "invalid choice: 'mixup_uint8'"),
        (["mixup", "--only", "2d k=2"], "the options choose no case"),
    ],
)
def test_what_is_not_there_is_named(arguments: list[str], complaint: str) -> None:
    done = python(*TRAFFIC, *arguments, *shape(1, 2, 8, 8))
    assert done.returncode == 2, done.stdout + done.stderr
    assert complaint in done.stderr
