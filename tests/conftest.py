"""Without a GPU kernels run in Triton's interpreter, chosen before Triton defines them."""

import importlib.util
import os
import re
from unittest.mock import patch

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

import regfast
from regfast.ops import OPERATIONS


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give one process all tests of a sample with `--dist loadgroup`: no kernel compiles twice.

    (pytest-xdist's own groups are lost from pytest 9.2 on.) Tests of gigabytes share a process,
    because memory does not suffice for two.
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    sample = re.compile(rf"[\[-]((?:{'|'.join(OPERATIONS)})-.+)\]$")

    class BySample(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            found = sample.search(nodeid)
            return "gigabytes" if "past_two_to_the_31" in nodeid else found[1] if found else nodeid

    return BySample(config, log)


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: the GPU, or the CPU through the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="session")
def interpreter():
    """Makes Triton's interpreter right and fast, for whatever takes it."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from tests.interpreter import mended

    with mended():
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def kernels(monkeypatch):
    """Takes the Triton path for a test, and fails the test if no kernel was launched in it."""
    from regfast.kernels.launch import LAUNCHES, Launch

    launches = []
    make = Launch.__call__

    def counted(self, *args):
        launches.append(self.kernel)
        return make(self, *args)

    monkeypatch.setattr(Launch, "__call__", counted)
    with regfast.backend("triton"), patch.dict(LAUNCHES, clear=True):
        yield launches
    assert launches, "the test is of the kernels, and launched none"


@pytest.fixture
def poisoned():
    """Fills every new tensor with NaN, so that an element that nobody writes is seen."""
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
