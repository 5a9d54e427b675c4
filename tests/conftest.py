"""Where there is no GPU the kernels run in Triton's interpreter, which must be chosen before Triton defines them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

import regfast


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: the GPU, or the CPU through the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernels(monkeypatch):
    """Takes the Triton path for a test, and fails the test if no kernel was launched in it."""
    from regfast.kernels import max_blur_pool

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
