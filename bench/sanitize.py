"""Launches every kernel on small samples, for compute-sanitizer to watch: gpu.py runs it so.

    export PYTHONPATH=.:tests PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 99 python bench/sanitize.py

Without PyTorch's cache each tensor is an allocation of its own, so that a read just beyond one is seen. Under TRITON_INTERPRET=1
and without a GPU it takes the first sample of each operation, which tests this script and no kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from samples import OPERATIONS, Operation, Sample
from test_contract import derivatives
from torch import Tensor

import regfast


def inputs(device: str) -> Iterator[tuple[Operation, Sample, Tensor]]:
    """The core samples in float32, and the main ones in bfloat16 with innermost channels."""
    for operation in OPERATIONS:
        core, main = operation.group("core"), operation.group("main")
        if device == "cpu":
            core, main = core[:1], []
        yield from ((operation, sample, sample.input(device=device)) for sample in core)
        yield from ((operation, sample, sample.input(torch.bfloat16, device, channels_last=True)) for sample in main)


def main() -> None:
    torch.manual_seed(0)
    device, count = "cuda" if torch.cuda.is_available() else "cpu", 0
    with regfast.backend("triton"):
        for operation, sample, x in inputs(device):
            y = operation(x, sample)
            derivatives(operation, sample, x, x, y)
            count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} samples: forward, backward and tangent, on {device}")


if __name__ == "__main__":
    main()
