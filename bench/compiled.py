"""What the compiler makes of every kernel, with no GPU: registers, spills, stack, and how wide the loads and stores are.

    python bench/compiled.py [--target sm_90] [--only max_blur_pool] [--check FILE | --write FILE]

Each launch of `LAUNCHES` is recorded from the operation's own launcher, on tensors without data, so that what is compiled is
what a GPU would be given: the same blocks, the same specialisation on alignment. `compiled.csv` beside this file keeps the
figures; `--check` fails where a kernel spills, has a stack, or has become worse than its row.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


class Recorder:
    """Stands in for a kernel: `recorder[grid](*args, **options)` notes the launch instead of making it."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((grid, args, options))


def source_of(kernel, args: tuple, options: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """The source and compiler options of one launch, specialised as Triton's launcher would: on 1 and on multiples of 16."""
    values = dict(zip(kernel.arg_names, args)) | {name: value for name, value in options.items() if name in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for param in kernel.params:
        value = values[param.name]
        if param.is_constexpr:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = "*" + TYPES[value.dtype]
            attributes[(param.num,)] = [["tt.divisibility", 16]]
        elif value == 1 and not param.do_not_specialize:
            signature[param.name], constants[param.name] = "constexpr", value
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(param.num,)] = [["tt.divisibility", 16]]
    rest = {name: value for name, value in options.items() if name not in kernel.arg_names}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), rest


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def nvidia_figures(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    figure = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    ops = re.findall(r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, flags=re.M)
    return dict(
        registers=int(figure["REG"]), stack=int(figure["STACK"]), shared=int(figure["SHARED"]),
        spills=sum(op.startswith(("LDL", "STL")) for op in ops), instructions=len(ops),
        loads=sum(op.startswith("LDG") for op in ops), load_bits=widest(ops, "LDG"), store_bits=widest(ops, "STG"),
    )  # fmt: skip


def widest(ops: list[str], kind: str) -> int:
    """The bits of the most common access of a kind (16 to 128); of equals the widest."""
    widths = [next((int(part) for part in re.findall(r"\.(?:U|S)?(8|16|64|128)\b", op)), 32) for op in ops if op.startswith(kind)]
    return max(set(widths), key=lambda width: (widths.count(width), width), default=0)


def amd_figures(text: str) -> dict[str, int]:
    get = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))
    ops = re.findall(r"^\s+([a-z][a-z0-9_]+)", text, flags=re.M)
    width = {"ubyte": 8, "ushort": 16, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    def common(kind):
        found = [width.get(re.sub(r"_d16.*", "", op.split("_", 2)[2]), 16) for op in ops if re.match(rf"(global|buffer)_{kind}_", op)]
        return max(set(found), key=lambda w: (found.count(w), w), default=0)
    return dict(
        registers=get("vgpr_count"), stack=get("private_segment_fixed_size"), shared=get("group_segment_fixed_size"),
        spills=get("vgpr_spill_count") + get("sgpr_spill_count"), instructions=len(ops),
        loads=sum(bool(re.match(r"(global|buffer)_load", op)) for op in ops), load_bits=common("load"), store_bits=common("store"),
    )  # fmt: skip


def figures(kernel, args, options, target: str) -> dict[str, int]:
    source, rest = source_of(kernel, args, options)
    compiled = triton.compile(source, target=TARGETS[target], options=rest)
    return amd_figures(compiled.asm["amdgcn"]) if target.startswith("gfx") else nvidia_figures(compiled.asm["cubin"])
