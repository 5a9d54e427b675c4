"""Launches every kernel on small samples, for compute-sanitizer to watch: gpu.py runs it so.

    export PYTHONPATH=.:tests PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 99 python bench/sanitize.py

Without PyTorch's cache each tensor is an allocation of its own, so that a read just beyond one is seen. Under TRITON_INTERPRET=1
and without a GPU it takes the first sample of each operation, which tests this script and no kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from interpreter import mended
from samples import OPERATIONS, Operation, Sample
from test_contract import derivatives
from torch import Tensor

import regfast
from regfast.functional import mixup


def inputs(device: str) -> Iterator[tuple[Operation, Sample, Tensor]]:
    """The core samples in float32, and the main ones in bfloat16, with innermost columns and innermost channels."""
    for operation in OPERATIONS:
        core, main = operation.group("core"), operation.group("main")
        if device == "cpu":
            core, main = core[:1], []
        yield from ((operation, sample, sample.input(device=device)) for sample in core)
        for last in (False, True):
            yield from ((operation, sample, sample.input(torch.bfloat16, device, channels_last=last)) for sample in main)


def other_blends(device: str) -> int:
    """The blends that no sample is of: in place, and of bytes, to the other format too. How many there were."""
    index = torch.tensor([1, 0, 3, 2], device=device)
    x, images = torch.randn(4, 3, 7, 5, device=device), torch.randint(256, (4, 3, 7, 16), dtype=torch.uint8, device=device)
    mixup(x, index, 0.25, out=x)
    formats = (torch.contiguous_format, torch.channels_last)
    for memory_format in formats:
        mixup(images, index, 0.25, box=(1, 3, 0, 2), mean=0.5, std=0.25, memory_format=memory_format)
    return 1 + len(formats)


def main() -> None:
    torch.manual_seed(0)
    device, count = "cuda" if torch.cuda.is_available() else "cpu", 0
    with mended(), regfast.backend("triton"):
        for operation, sample, x in inputs(device):
            y = operation(x, sample)
            derivatives(operation, sample, x, x, y)
            count += 1
        count += other_blends(device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} samples and calls, on {device}")


if __name__ == "__main__":
    main()
