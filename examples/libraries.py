"""Import timm and torchvision also where torchvision's C++ operators do not load."""

from __future__ import annotations

import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import torch


def load(name: str) -> ModuleType:
    """Import a module by name.

    Raises:
        ImportError: if it is not installed or fails to import; one line says why.
    """
    package = name.split(".")[0]
    try:
        if package in ("timm", "torchvision"):
            _declare_operators()
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} does not import: {error} (pip install {package})") from error
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ImportError(f"{name} does not import beside torch {torch.__version__}: {reason}") from error


@cache
def _declare_operators() -> torch.library.Library | None:
    """Let torchvision, which timm imports too, load beside a build of torch that it was not made for.

    A package index serves one build of torchvision, linked against a CUDA build of torch. Beside a CPU build its operators
    (`nms`, `roi_align`) are missing, and the import stops where it describes them. The classifiers and data sets call none,
    so it is enough to declare the names. The cache keeps the library, and the declarations with it, alive.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    source = Path(spec.origin).with_name("_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "DEF")
    for name in set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', source)):
        library.define(f"{name}() -> ()")
    return library
