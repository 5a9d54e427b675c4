"""Where there is no GPU the kernels run in Triton's interpreter, which must be chosen before Triton defines them."""

import inspect
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest

import regfast


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: the GPU, or the CPU through the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def mend_interpreter(monkeypatch) -> None:
    """Makes Triton's interpreter right in one thing, and fast in another."""
    from triton.runtime import interpreter

    # The minimum of NaN and a number is the number, on a GPU and in tl.minimum's documentation. The interpreter's is NaN.
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_minnumf", lambda self, a, b: self.binary_op(a, b, np.fmin))
    # A launch puts the interpreter's functions into Triton's modules, and so does each call of one jit function by another
    # within it, which takes most of a launch's time. Once for each module is enough, until the launch takes them out again.
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        modules = frozenset(id(value) for value in function.__globals__.values() if inspect.ismodule(value))
        if modules in patched:
            return None
        patched.add(modules)
        scope = patch(function)
        restore = scope.restore
        scope.restore = lambda: (patched.clear(), restore())
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


@pytest.fixture
def kernels(monkeypatch):
    """Takes the Triton path for a test, and fails the test if no kernel was launched in it."""
    from regfast.kernels import max_blur_pool

    mend_interpreter(monkeypatch)
    kernel_type = type(max_blur_pool._forward_kernel)
    launches = []
    run = kernel_type.run

    def counted(self, *args, **kwargs):
        if kwargs.get("grid") is not None:
            launches.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kernel_type, "run", counted)
    with regfast.backend("triton"):
        yield launches
    assert launches, "the test is of the kernels, and launched none"


@pytest.fixture
def poisoned():
    """Fills every new tensor with NaN, so that an element that nobody writes is seen."""
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
