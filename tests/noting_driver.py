"""A Triton driver that records launches instead of making them, for test_launch.py.

Only the driver is replaced: what is recorded is what the installed Triton gives a launcher.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import LazyDict
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import regfast
from regfast.kernels import blur_pool, launch, max_blur_pool, mixup, mixup_cross_entropy, rezero

NOTED: list[tuple[str, tuple[Any, ...]]] = []
ORDINARY = threading.local()


class NotingLauncher:
    """Replaces Triton's launcher.

    Its arguments: grid (3), stream, function, two metadata, two hooks, the kernel's arguments.
    """

    def __init__(self, src: Any, metadata: Any) -> None:
        self.name = src.fn.__name__

    def __call__(self, *given: Any) -> None:
        way = "triton" if getattr(ORDINARY, "running", False) else "handle"
        NOTED.append((way, given))
        enter, metadata = given[7], given[6]
        if enter is not None and metadata is not None:
            enter(metadata)


class Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        return name, name, 32, 0, 1024


class NotingDriver:
    launcher_cls, utils, stream = NotingLauncher, Utils(), 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_device_interface(self) -> Any:
        return torch.cpu


def ways_of(call: Callable[[], Any]) -> list[str]:
    del NOTED[:]
    call()
    return [way for way, _ in NOTED]


def calls() -> dict[str, Callable[[], Any]]:
    """Every kernel, by the operation that launches it.

    The addresses of the tensors that an operation allocates differ between calls.
    """
    x = torch.randn(4, 8, 16, 16)
    g, window, blur = (
        torch.randn(4, 8, 8, 8),
        regfast.MaxPool2dAA(3, 2, 1)._window,
        regfast.BlurPool2d()._window,
    )
    index, lam, box = torch.tensor([1, 0, 3, 2]), torch.rand(4), torch.tensor([[1, 3, 0, 2]] * 4)
    scale, form, dtype = torch.rand(8), torch.preserve_format, torch.bfloat16
    logits, weight, alpha = torch.randn(64, 10), torch.rand(10), torch.ones(1)
    a, b = torch.randint(10, (2, 64))
    loss = mixup_cross_entropy.mixup_cross_entropy
    terms = logits, a, b, 0.3, weight, -100
    _, statistics = loss(*terms, "mean", 0.1, torch.float32)
    modes = "gelu", "post"
    return {
        "max_blur_pool": lambda: max_blur_pool.max_blur_pool(x, window),
        "max_blur_pool backward": lambda: max_blur_pool.max_blur_pool_backward(g, x, window),
        "blur_pool": lambda: blur_pool.blur_pool(x, blur),
        "blur_pool backward": lambda: blur_pool.blur_pool_backward(g, x.shape, x.stride(), blur),
        "mixup, a tensor": lambda: mixup.mixup(x, index, lam, box, scale, scale, dtype, form),
        "mixup, a number": lambda: mixup.mixup(x, index, 0.3, None, None, None, x.dtype, form),
        "mixup backward": lambda: mixup.mixup_backward(
            x, index, lam, box, scale, x.stride(), dtype
        ),
        "loss": lambda: loss(*terms, "mean", 0.1, torch.float32),
        "loss, none": lambda: loss(*terms, "none", 0.0, torch.float32),
        "loss backward": lambda: mixup_cross_entropy.mixup_cross_entropy_backward(
            torch.ones(()), *terms[:5], statistics, -100, "mean", 0.1
        ),
        "rezero": lambda: rezero.rezero(x, x, 0.5, *modes),
        "rezero backward": lambda: rezero.rezero_backward(x, x, x, alpha, *modes, True, True, True),
    }


def comparable(given: tuple[Any, ...]) -> list[Any]:
    """A launcher's arguments.

    A tensor is replaced by what Triton reads of it, except its address: an output's differs.
    """
    found = []
    for value in given:
        if isinstance(value, torch.Tensor):
            value = (
                "tensor",
                str(value.dtype),
                tuple(value.shape),
                value.stride(),
                value.data_ptr() % 16,
            )
        elif isinstance(value, LazyDict):
            value = repr(value.get())
        found.append(
            value if isinstance(value, (int, float, str, tuple, type(None))) else repr(value)
        )
    return found


def arguments() -> dict[str, Any]:
    found = {}
    for name, call in calls().items():
        del NOTED[:]
        launch.LAUNCHES.clear()
        for _ in range(3):
            call()
        count = len(NOTED) // 3
        for place in range(count):
            turns = NOTED[place::count]
            kernel = f"{name}, launch {place}"
            same = all(comparable(given) == comparable(turns[0][1]) for _, given in turns)
            found[kernel] = {"ways": [way for way, _ in turns], "same": same}
    return found


def hooks() -> dict[str, Any]:
    seen: list[str] = []

    def enter(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    call = calls()["blur_pool"]
    ways = ways_of(call)
    knobs.runtime.launch_enter_hook.add(enter)
    ways += ways_of(call) + ways_of(call)
    knobs.runtime.launch_enter_hook.remove(enter)
    return {"ways": ways, "seen": seen}


def switches() -> dict[str, list[str]]:
    call = calls()["blur_pool"]
    call()
    found = {}
    for owner, switch, value in (
        (knobs.runtime, "debug", True),
        (knobs.compilation, "instrumentation_mode", "consan"),
    ):
        before = getattr(owner, switch)
        setattr(owner, switch, value)
        found[switch] = ways_of(call)
        setattr(owner, switch, before)
        found[switch] += ways_of(call)
        # A kernel that was compiled for the switch is not launched again.
        launch.LAUNCHES.clear()
        setattr(owner, switch, value)
        found[switch] += ways_of(call)
        setattr(owner, switch, before)
        found[switch] += ways_of(call) + ways_of(call)
    kernel = max_blur_pool._forward_kernel
    seen: list[Any] = []

    def hook(*args: Any, **options: Any) -> None:
        seen.append(options)

    kernel.add_pre_run_hook(hook)
    found["pre_run_hook"] = ways_of(call) if not seen else []
    kernel.pre_run_hooks.remove(hook)
    found["pre_run_hook"] = found["pre_run_hook"] if len(seen) == 1 else []
    found["pre_run_hook"] += ways_of(call)
    return found


def misaligned() -> list[str]:
    x = torch.randn(1025)[1:].view(1, 4, 16, 16)
    window = regfast.BlurPool2d()._window
    return [way for _ in range(3) for way in ways_of(lambda: blur_pool.blur_pool(x, window))]


def streams() -> list[int]:
    call, found = calls()["blur_pool"], []
    for stream in (7, 8, 7):
        NotingDriver.stream = stream
        ways_of(call)
        found.append(NOTED[-1][1][3])
    return found


def in_order(count: int) -> list[list[Any]]:
    """The outputs of launches of `count` sizes, each made twice."""
    window, found = regfast.BlurPool2d()._window, []
    for size in range(8, 8 + count):
        x = torch.zeros(1, 4, size, 16)
        for _ in range(2):
            blur_pool.blur_pool(x, window)
    return found


def grids() -> dict[tuple[Any, ...], int]:
    """The number of launches of each grid and shape."""
    counts: dict[tuple[Any, ...], int] = {}
    for _, given in NOTED:
        key = (*given[:3], *(tuple(t.shape) for t in given if isinstance(t, torch.Tensor)))
        counts[key] = counts.get(key, 0) + 1
    return counts


def threads() -> bool:
    del NOTED[:]
    in_order(20)
    expected = {key: 8 * count for key, count in grids().items()}
    launch.LAUNCHES.clear()
    del NOTED[:]
    started = [threading.Thread(target=in_order, args=(20,)) for _ in range(8)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return grids() == expected


def fork() -> bool:
    """Fork after a launch, and launch new shapes in the child."""
    del NOTED[:]
    in_order(10)
    expected = grids()
    pid = os.fork()
    if pid == 0:
        del NOTED[:]
        in_order(10)
        os._exit(0 if grids() == expected else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def ways() -> list[str]:
    return [way for call in calls().values() for _ in range(2) for way in ways_of(call)]


def main(checks: list[str]) -> None:
    driver.set_active(NotingDriver())
    run = JITFunction.run

    def noted_run(self: Any, *args: Any, **options: Any) -> Any:
        ORDINARY.running = True
        try:
            return run(self, *args, **options)
        finally:
            ORDINARY.running = False

    JITFunction.run = noted_run
    print(json.dumps({name: globals()[name]() for name in checks}))


if __name__ == "__main__":
    main(sys.argv[1:])
