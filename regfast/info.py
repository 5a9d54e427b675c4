"""`python -m regfast.info`: versions, devices, and the path of each operation on each device."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

import regfast

from ._core.dispatch import INTERPRETED, TRITON_DTYPES, obstacle
from .ops import OPERATIONS


def versions() -> dict[str, str]:
    """Return the versions of Python, the libraries and regfast."""
    found = {
        "regfast": regfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "numpy", "scipy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def processor() -> str:
    """Return the name of the CPU; py-cpuinfo gives the most precise one."""
    try:
        from cpuinfo import get_cpu_info

        return get_cpu_info()["brand_raw"]
    except (ImportError, KeyError):
        return platform.processor() or platform.machine()


def devices() -> dict[torch.device, str]:
    """Return the devices of this machine with their names."""
    found = {torch.device("cpu"): processor()}
    for index in range(torch.cuda.device_count()):
        found[torch.device("cuda", index)] = torch.cuda.get_device_name(index)
    if torch.backends.mps.is_available():
        found[torch.device("mps")] = "Apple GPU"
    return found


def path(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return the path that an operation takes for tensors of this device and dtype, and why."""
    choice = os.environ.get("REGFAST_BACKEND", "auto")
    if choice == "reference":
        return "reference", "REGFAST_BACKEND=reference"
    reason = obstacle(device, dtype)
    if choice == "triton":
        return ("triton", "REGFAST_BACKEND=triton") if reason is None else ("error", reason)
    if device.type == "cpu" and INTERPRETED:
        return "reference", "the interpreter runs kernels only within regfast.backend('triton')"
    return ("triton", "a CUDA device and Triton") if reason is None else ("reference", reason)


def main() -> None:
    print("versions")
    for name, version in versions().items():
        print(f"  {name:<10} {version}")
    for variable in ("REGFAST_BACKEND", "REGFAST_LAUNCH", "TRITON_INTERPRET"):
        print(f"  {variable}={os.environ.get(variable, '')}")
    dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in TRITON_DTYPES))
    for device, name in devices().items():
        print(f"{device} ({name})")
        for operation in OPERATIONS:
            taken, reason = path(device, torch.float32)
            print(f"  {operation:<20} {taken:<10} {dtypes}: {reason}")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # A reader such as `head` has closed the pipe. Python flushes again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
