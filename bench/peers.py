"""The libraries that regfast is compared with, each imported only when it is needed."""

from types import ModuleType

import libraries
import pytest


class AbsentError(pytest.skip.Exception):
    """A contestant that this machine does not have, and why. A test that raises it is skipped."""


def load(name: str) -> ModuleType:
    """Import a module by name. Raises AbsentError where it is missing or does not import."""
    try:
        return libraries.load(name)
    except ImportError as error:
        raise AbsentError(str(error)) from error
