"""The libraries that regfast is compared with, each imported only when it is needed."""

from __future__ import annotations

import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch


class AbsentError(pytest.skip.Exception):
    """A contestant that this machine does not have, and why. A test that raises it is skipped."""


@cache
def load(name: str) -> ModuleType:
    """The module of that name. Raises AbsentError where it is missing or does not import."""
    try:
        if name.split(".")[0] in ("timm", "torchvision"):
            _help_torchvision()
        return importlib.import_module(name)
    except ImportError as error:
        raise AbsentError(f"not installed: {error}") from error
    except RuntimeError as error:
        raise AbsentError(f"{name} does not import: {error}") from error


@cache
def _help_torchvision() -> torch.library.Library | None:
    """Lets torchvision, which timm imports too, load beside a torch that it was not built for.

    It stops at its first fake operator, because the real one was never declared. Naming the
    operators is enough: nothing here calls them. The cache keeps the library alive, and the names.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError:
        source = Path(spec.origin).with_name("_meta_registrations.py").read_text()
        library = torch.library.Library("torchvision", "DEF")
        names = re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', source)
        for name in set(names):
            library.define(f"{name}() -> ()")
        return library
