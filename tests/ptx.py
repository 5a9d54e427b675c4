"""PTX on NumPy arrays, for Triton's interpreter, which runs no inline assembly.

It runs the instructions of kernels/tiles.py, by the PTX ISA, and refuses any other. A value is an
array of registers, one per instance of the assembly.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from triton.runtime.interpreter import TensorHandle, _get_np_dtype

Values = dict[str, np.ndarray]
BITS = {"r": np.uint32, "f": np.uint32, "h": np.uint16}
# The canonical NaN of either 16-bit format.
NAN = 0x7FFF


class Results(NamedTuple):
    """What Triton's builder returns."""

    handles: list[TensorHandle]

    def get_result(self, place: int) -> TensorHandle:
        return self.handles[place]


def create_inline_asm(
    builder: Any,
    asm: str,
    constraints: str,
    values: list[TensorHandle],
    types: list[Any],
    is_pure: bool,
    pack: int,
) -> Results:
    """`InterpreterBuilder.create_inline_asm`: each instance takes `pack` elements per tensor."""
    shape = values[0].data.shape
    kinds = [kind.strip() for kind in constraints.split(",")]
    outputs = [kind[1:] for kind in kinds if kind.startswith("=")]
    assert all(kind.startswith("=") for kind in kinds[: len(outputs)]), constraints
    inputs = [register for value in values for register in registers_of(value.data, pack)]
    assert [BITS[kind] for kind in kinds[len(outputs) :]] == [
        register.dtype for register in inputs
    ], constraints
    given = {f"${place}": register for place, register in enumerate(inputs, len(outputs))}
    written = execute(asm, given, {f"${place}": BITS[kind] for place, kind in enumerate(outputs)})
    registers, handles = [written[f"${place}"] for place in range(len(outputs))], []
    for dtype in types:
        data, registers = tensor_of(registers, shape, _get_np_dtype(dtype), pack)
        handles.append(TensorHandle(data, dtype.scalar))
    assert not registers, constraints
    return Results(handles)


def elements_per_register(itemsize: int, pack: int) -> int:
    return min(4 // itemsize, pack)


def registers_of(data: np.ndarray, pack: int) -> list[np.ndarray]:
    """The registers that hold `pack` successive elements, the first element in the lowest bits."""
    size = data.itemsize
    count = elements_per_register(size, pack)
    bits = np.ascontiguousarray(data).reshape(-1, pack).view(f"u{size}")
    words = bits.view(f"u{size * count}") if count > 1 else bits
    return list(words.T)


def tensor_of(
    registers: list[np.ndarray], shape: tuple[int, ...], dtype: np.dtype, pack: int
) -> tuple[Any, list[np.ndarray]]:
    """The tensor that the first registers hold, and the remaining registers."""
    count = pack // elements_per_register(dtype.itemsize, pack)
    words = np.stack(registers[:count], axis=-1)
    assert words.dtype.itemsize * count == dtype.itemsize * pack, (
        "a register is not as wide as its elements"
    )
    return words.reshape(-1).view(dtype).reshape(shape), registers[count:]


def execute(asm: str, given: Values, outputs: dict[str, Any]) -> Values:
    """The output registers after a block of assembly, which must write them all.

    An input may share an output's register, as the constraints allow it: no input is read after an
    output is written.
    """
    known, locals_, written = dict(given), set(), {}
    statements = [statement.strip() for statement in asm.split(";")]
    if statements[0].startswith("{"):
        assert statements.pop() == "}", f"no end of the block in {asm!r}"
        statements[0] = statements[0][1:].strip()
    else:
        assert statements.pop() == "", f"no end of the last instruction in {asm!r}"
    for statement in statements:
        opcode, rest = statement.split(maxsplit=1)
        operands = re.findall(r"\{[^}]*\}|[^\s,]+", rest)
        if opcode == ".reg":
            assert operands[0].startswith(".b32 ") or operands[0] == ".b32", statement
            locals_.update(operands[1:])
            continue
        to, *sources = (tuple(re.findall(r"[^\s,{}]+", operand)) for operand in operands)
        for name in (name for source in sources for name in source):
            assert not (written and name in given), (
                f"{name} is read after an output was written in {asm!r}"
            )
        results = instruction(opcode)(*(value_of(source, known) for source in sources))
        for name, value in zip(to, halves_of(results) if len(to) == 2 else [results]):
            assert name in locals_ or name in outputs, f"{name} is no register to write in {asm!r}"
            known[name] = value
            if name in outputs:
                assert value.dtype == outputs[name], f"{name} is another register in {asm!r}"
                written[name] = value
    assert written.keys() == outputs.keys(), f"not every output is written in {asm!r}"
    return written


def value_of(names: tuple[str, ...], known: Values) -> Any:
    """The value of an operand: a number, a register, or two halves in braces."""
    if len(names) == 2:
        low, high = (known[name].astype(np.uint32) for name in names)
        return low | high << 16
    return known[names[0]] if names[0] in known else np.uint32(int(names[0], 0))


def halves_of(words: np.ndarray) -> list[np.ndarray]:
    return [(words & 0xFFFF).astype(np.uint16), (words >> 16).astype(np.uint16)]


def numbers_of(halves: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bf16x2":
        return (halves.astype(np.uint32) << 16).view(np.float32)
    return halves.view(np.float16).astype(np.float32)


def instruction(opcode: str) -> Callable[..., np.ndarray]:
    """The result of an instruction on its sources."""
    if opcode == "mov.b32":
        return lambda a: a
    if opcode == "lop3.b32":
        return lop3
    if opcode == "prmt.b32":
        return prmt
    name, *modes, dtype = opcode.split(".")
    assert dtype in ("bf16x2", "f16x2"), f"no instruction {opcode}"
    if (name, modes) == ("max", ["NaN"]):
        return lambda a, b: on_halves(greatest, a, b, dtype)
    if name == "set" and modes in (["gt", "u32"], ["gtu", "u32"]):
        return lambda a, b: on_halves(
            exceeds if modes[0] == "gt" else exceeds_or_unordered, a, b, dtype
        )
    raise AssertionError(f"no instruction {opcode}")


def on_halves(
    function: Callable[..., np.ndarray], a: np.ndarray, b: np.ndarray, dtype: str
) -> np.ndarray:
    low, high = (
        function(x, y, numbers_of(x, dtype), numbers_of(y, dtype))
        for x, y in zip(halves_of(a), halves_of(b))
    )
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def greatest(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # Positive zero is greater than negative zero.
    wins = (a > b) | ((a == b) & ~np.signbit(a))
    return np.where(np.isnan(a) | np.isnan(b), NAN, np.where(wins, x, y))


def exceeds(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(a > b, 0xFFFF, 0)


def exceeds_or_unordered(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(a <= b, 0, 0xFFFF)


def prmt(a: Any, b: Any, selector: Any) -> np.ndarray:
    """Any four of the eight bytes, with b's above a's. (Sign replication is not implemented.)"""
    eight, picked = a.astype(np.uint64) | np.uint64(b) << np.uint64(32), np.uint64(0)
    for place in range(4):
        nibble = int(selector) >> 4 * place & 15
        assert nibble < 8, f"no selector {selector:#x}"
        picked = picked | (eight >> np.uint64(8 * nibble) & np.uint64(255)) << np.uint64(8 * place)
    return picked.astype(np.uint32)


def lop3(a: Any, b: Any, c: Any, table: Any) -> np.ndarray:
    """Any function of three bits: bit 4*a + 2*b + c of its truth table."""
    found = np.zeros_like(a)
    for place in range(8):
        if int(table) >> place & 1:
            found |= (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
    return found
