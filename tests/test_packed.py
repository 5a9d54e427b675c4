"""The packed 16-bit pooling kernels, which run on GPUs from sm_90 on, give the others' bits.

They process two numbers per instruction. The interpreter lacks these instructions, and ptx.py
provides them.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from samples import as_format, check_gradient_of_nan, max_window

import regfast
from regfast._core.geometry import Window
from regfast._core.layout import empty_output

pytest.importorskip("triton")

import ptx
from triton.runtime.interpreter import InterpreterBuilder

from regfast.kernels import cuts, launch
from regfast.kernels.launch import LAUNCHES, Target

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")

DTYPES = [torch.float16, torch.bfloat16]
WINDOWS = {
    "2 2 0": {},
    "3 2 1": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3 2 0 ceil": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    "5 3 2": {"kernel_size": 5, "stride": 3, "padding": 2},
    "3 2 1 relu": {"kernel_size": 3, "stride": 2, "padding": 1, "activation": "relu"},
    "2 2 0 relu": {"activation": "relu"},
    "1x3 reflect": {"kernel_size": (1, 3), "stride": (1, 2), "padding_mode": "reflect"},
}


@pytest.fixture
def instructions(monkeypatch):
    """Lets the interpreter run inline assembly and records it; fails if none was run."""
    run = []

    def noted(builder, asm, *args):
        run.append(asm)
        return ptx.create_inline_asm(builder, asm, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", noted)
    yield run
    assert run, "the test is of packed kernels, and ran none"


def run(
    x: torch.Tensor, window: Window, grad: torch.Tensor, packs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the gradient of x, on a device with or without packed instructions."""
    from regfast.kernels.max_blur_pool import max_blur_pool, max_blur_pool_backward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "target_of", lambda device: Target(32, packs))
        LAUNCHES.clear()
        found = max_blur_pool(x, window), max_blur_pool_backward(grad, x, window)
        LAUNCHES.clear()
    return found


def images(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    """Multiples of 1/4, many equal, many negative; -inf in two corners, over whole windows."""
    x = torch.randn(shape).mul(4).round().div(4).add(0.0)
    x[:1, ..., :4, :4] = x[:1, ..., -4:, -4:] = -math.inf
    return as_format(x.to(dtype), channels_last)


def check(x: torch.Tensor, window: Window) -> None:
    grad = torch.randn(empty_output(x, window).shape, dtype=torch.float32).to(x.dtype)
    for found, expected in zip(run(x, window, grad, True), run(x, window, grad, False)):
        assert torch.equal(found, expected)


slow = pytest.mark.slow


def of_dtypes(names: list):
    """Each name with each dtype; the core suite alternates between the dtypes."""
    cases = [(name, dtype, place) for place, name in enumerate(names) for dtype in DTYPES]
    return [
        pytest.param(
            name, dtype, id=f"{name}-{dtype}", marks=() if dtype == DTYPES[place % 2] else slow
        )
        for name, dtype, place in cases
    ]


# One channel per lane: pairs of columns, with one left over if their number is odd.
@pytest.mark.parametrize("width,dtype", of_dtypes([7, 10, 14, 18, 27, 28]))
@pytest.mark.parametrize("name", ["2 2 0", "3 2 1"])
def test_pairs_of_columns(name, width, dtype, instructions):
    check(images((3, 5, 9, width), dtype, False), max_window(**WINDOWS[name]))


@pytest.mark.parametrize(
    "name,dtype", of_dtypes([name for name in WINDOWS if name not in ("2 2 0", "3 2 1")])
)
@pytest.mark.parametrize("width", [10, pytest.param(27, marks=slow)])
def test_pairs_of_columns_of_other_windows(name, width, dtype, instructions):
    check(images((3, 5, 7, width), dtype, False), max_window(**WINDOWS[name]))


@pytest.mark.parametrize("name,dtype", of_dtypes(list(WINDOWS)))
@pytest.mark.parametrize("channels", [4, pytest.param(6, marks=slow), 5])
def test_pairs_of_channels(name, channels, dtype, instructions):
    """channels_last: two or four channels per lane; if odd, one per lane and pairs of columns."""
    check(images((3, channels, 7, 10), dtype, True), max_window(**WINDOWS[name]))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "name,dtype",
    of_dtypes(["2 2 0", "3 2 1"])
    + [
        pytest.param(*case.values, id=case.id, marks=slow) for case in of_dtypes(list(WINDOWS)[2:4])
    ],
)
def test_a_nan_wins_and_its_window_gives_its_gradient_to_one_of_its_own(
    name, dtype, channels_last, instructions
):
    window = max_window(**WINDOWS[name])
    x = images((4, 6, 9, 10), dtype, False)
    x.view(-1)[torch.randperm(x.numel())[: x.numel() // 16]] = math.nan
    x = as_format(x, channels_last)
    grad = torch.randn(empty_output(x, window).shape, dtype=torch.float32).to(dtype)
    (y, dx), (again, dx_again) = (run(x, window, grad, True) for _ in range(2))
    assert torch.equal(dx, dx_again) and torch.equal(y.view(torch.int16), again.view(torch.int16))
    leaf = x.float().requires_grad_()
    with regfast.backend("reference"):
        expected = regfast.ops.max_blur_pool.max_blur_pool(leaf, window)
    # Each is rounded once. The interpreter truncates to bfloat16. atol: float32's own error where
    # terms cancel.
    tolerance = dict(rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(y.float(), expected.detach(), equal_nan=True, **tolerance)
    (expected_dx,) = torch.autograd.grad(expected, leaf, grad.float())
    check_gradient_of_nan(x, dx.float(), expected_dx, window, **tolerance)


def test_a_gpu_packs_from_sm_90_on(monkeypatch):
    """Nothing packs in the interpreter, or on a CPU."""

    class Properties:
        warp_size = 32

        def __init__(self, major: int, minor: int) -> None:
            self.major, self.minor = major, minor

    device = torch.device("cuda", 0)
    monkeypatch.setattr(launch.knobs.runtime, "interpret", False)
    for major, minor, hip, packs in (
        (8, 9, None, False),
        (9, 0, None, True),
        (12, 0, None, True),
        (9, 4, "6.2", False),
    ):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _, found=(major, minor): Properties(*found)
        )
        monkeypatch.setattr(torch.version, "hip", hip)
        launch.target_of.cache_clear()
        assert launch.target_of(device) == Target(32, packs)
    launch.target_of.cache_clear()
    assert launch.target_of(torch.device("cpu")) == Target(32, False)


# ptx.py itself, against the ISA.
def test_the_instructions_are_the_isa_s():
    def words(*numbers: int) -> np.ndarray:
        return np.array(numbers, np.uint32)

    def of(
        asm: str, *inputs: np.ndarray, outputs: int = 1, bits: type = np.uint32
    ) -> list[list[int]]:
        given = {f"${place}": value for place, value in enumerate(inputs, outputs)}
        found = ptx.execute(asm, given, {f"${place}": bits for place in range(outputs)})
        return [found[f"${place}"].tolist() for place in range(outputs)]

    # 1.0 and -0.0 against 2.0 and 0.0; a NaN against a number, either way.
    assert of("max.NaN.f16x2 $0, $1, $2;", words(0x3C008000), words(0x40000000)) == [[0x40000000]]
    assert of("max.NaN.f16x2 $0, $1, $2;", words(0xFE01FC00), words(0x3C007E00)) == [[0x7FFF7FFF]]
    assert of("max.NaN.bf16x2 $0, $1, $2;", words(0x3F80FF80), words(0x4000C000)) == [[0x4000C000]]
    for op, mask in (("gt", 0xFFFF0000), ("gtu", 0xFFFFFFFF)):
        # 2.0 > 1.0; 1.0 and a NaN.
        assert of(f"set.{op}.u32.f16x2 $0, $1, $2;", words(0x40003C00), words(0x3C007E00)) == [
            [mask]
        ]
        assert of(f"set.{op}.u32.bf16x2 $0, $1, $2;", words(0x40003F80), words(0x3F807FC0)) == [
            [mask]
        ]
        assert of(f"set.{op}.u32.f16x2 $0, $1, $2;", words(0x3C008000), words(0x3C000000)) == [[0]]
    halves = "{ .reg .b32 m; mov.b32 m, $2; prmt.b32 $0, m, 0, 0x1010; prmt.b32 $1, m, 0, 0x3232; }"
    assert of(halves, words(0x1234ABCD), outputs=2) == [[0xABCDABCD], [0x12341234]]
    assert of("prmt.b32 $0, $1, $2, 0x7160;", words(0x44332211), 0x88776655) == [[0x88227711]]
    a, b, c = words(0xF0F0F0F0), words(0xCCCCCCCC), words(0xAAAAAAAA)
    for table in (0x10, 0x30, 0x40, 0xC0, 0xE8):
        assert of(f"lop3.b32 $0, $1, $2, $3, {table:#x};", a, b, c) == [[0x01010101 * table]]
    two = "{ .reg .b32 a; mov.b32 a, {$2, $3}; mov.b32 {$0, $1}, a; }"
    assert of(
        two, np.array([1], np.uint16), np.array([2], np.uint16), outputs=2, bits=np.uint16
    ) == [[1], [2]]
    with pytest.raises(AssertionError, match="no instruction"):
        of("min.NaN.f16x2 $0, $1, $2;", a, b)
    with pytest.raises(AssertionError, match="read after an output was written"):
        of("{ .reg .b32 a; mov.b32 $0, $2; mov.b32 $1, $3; }", a, b, outputs=2)
    with pytest.raises(AssertionError, match="not every output"):
        of("{ .reg .b32 a; mov.b32 $0, $2; }", a, outputs=2)
    with pytest.raises(AssertionError, match="no register to write"):
        of("mov.b32 x, $1;", a)


def test_every_instruction_of_the_kernels_is_run(instructions):
    """Maxima and comparisons of pairs of columns and of channels; selections of two and three."""
    for dtype, channels_last in zip(DTYPES, (False, True)):
        for name in ("2 2 0", "3 2 1 relu"):
            check(images((1, 4, 5, 6), dtype, channels_last), max_window(**WINDOWS[name]))
    for part in (
        "max.NaN.f16x2",
        "max.NaN.bf16x2",
        "set.gt.u32.f16x2",
        "set.gt.u32.bf16x2",
        "set.gtu.u32.",
        "{$2, $3}",
        "prmt",
    ):
        assert any(part in asm for asm in instructions), part
    assert {asm.split()[-1] for asm in instructions if asm.startswith("lop3")} == {
        "0x30;",
        "0xc0;",
        "0x10;",
        "0x40;",
    }
