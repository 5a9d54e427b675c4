"""Classify the layers of PyTorch and of other libraries by class, without importing the latter."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import CodeType
from typing import Any

from torch import nn

# Elementwise: a blur may follow them.
ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.PReLU, nn.RReLU, nn.ReLU, nn.SELU, nn.SiLU,
    nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip

# Normalisations of images of any size. nn.LayerNorm and nn.RMSNorm fix the sizes of the last axes.
_NORMALISATIONS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)
_NORM_ACTS = (
    "BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d", "GroupNormAct", "GroupNorm1Act",
    "LayerNormAct2d", "LayerNormAct2dFp32", "RmsNormAct2d", "RmsNormAct2dFp32",
)  # fmt: skip
_OTHER_NORMALISATIONS = {
    "timm": (
        "LayerNorm2d", "LayerNorm2dFp32", "LayerNormExp2d", "RmsNorm2d", "RmsNorm2dFp32",
        "SimpleNorm2d", "SimpleNorm2dFp32",
        "FilterResponseNormTlu2d", "FilterResponseNormAct2d", "InplaceAbn", *_NORM_ACTS,
        *(f"EvoNorm2d{kind}" for kind in ("B0", "B1", "B2", "S0", "S0a", "S1", "S1a", "S2", "S2a")),
    ),
    "torchvision": ("FrozenBatchNorm2d", "LayerNorm2d"),
    "detectron2": ("FrozenBatchNorm2d",),
}  # fmt: skip

# These merge patches by moving pixels into channels.
_SPACE_TO_CHANNELS = {"timm": ("PatchMerging",), "torchvision": ("PatchMerging", "PatchMergingV2")}
_LP_POOLS = (nn.LPPool1d, nn.LPPool2d, nn.LPPool3d)
_ADAPTIVE_POOLS = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip

_FUNCTIONS = {f"{name}_pool{rank}d" for name in ("max", "avg", "lp") for rank in (1, 2, 3)}
_FUNCTIONS |= {"conv1d", "conv2d", "fractional_max_pool2d", "pixel_unshuffle"}


def library_class(kind: type[Any]) -> tuple[str, str]:
    """Return a class's top-level package and its qualified name: ("timm", "BlurPool2d")."""
    return kind.__module__.partition(".")[0], kind.__qualname__


def is_one_of(module: nn.Module, classes: dict[str, tuple[str, ...]]) -> bool:
    """Return whether a module's class, or a base of it, is among `classes`, listed by library."""
    found = map(library_class, type(module).__mro__)
    return any(name in classes.get(library, ()) for library, name in found)


def is_normalisation(module: nn.Module) -> bool:
    """Return whether a module is a normalisation of images of any size.

    It is of a known class, or its attribute `is_normalisation` is True.
    """
    if getattr(module, "is_normalisation", False) is True:
        return True
    return isinstance(module, _NORMALISATIONS) or is_one_of(module, _OTHER_NORMALISATIONS)


def is_norm_act(module: nn.Module) -> bool:
    """Return whether a module is a timm normalisation that ends with an activation, `act`."""
    return is_one_of(module, {"timm": _NORM_ACTS})


def stride_of(module: Any) -> tuple[int, ...]:
    """Return the stride of a torch.nn layer; the default of a pooling is its kernel_size."""
    stride = module.kernel_size if module.stride is None else module.stride
    return tuple(stride) if isinstance(stride, Sequence) else (stride,)


def is_patch_embedding(convolution: Any, min_channels: int) -> bool:
    """Return whether a convolution takes adjacent patches: of an image, or 4 or more wide."""
    size, stride = convolution.kernel_size, stride_of(convolution)
    if tuple(size) != stride or min(stride) == 1:
        return False
    return convolution.in_channels < min_channels or min(stride) >= 4


def otherwise_decimating(module: Any) -> str | None:
    """Return why a decimating layer has no anti-aliased twin; None for any other layer."""
    name = type(module).__name__
    if isinstance(module, _LP_POOLS) and max(stride_of(module)) > 1:
        return f"there is no anti-aliased {name}"
    if isinstance(module, (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
        return "its windows are drawn at random, at no one stride"
    if isinstance(module, _ADAPTIVE_POOLS):
        size: Any = module.output_size
        sizes = size if isinstance(size, Sequence) else (size,)
        # One output per axis is a summary of it, and None leaves the axis as it is.
        whole = all(n in (1, None) for n in sizes)
        return None if whole else "its stride depends on the image's size"
    if isinstance(module, nn.PixelUnshuffle) or is_one_of(module, _SPACE_TO_CHANNELS):
        return "it moves pixels into channels and drops none"
    return None


def functional_calls(module: nn.Module) -> str | None:
    """Return a message that lists the decimating functions that a module's forward names, or None.

    The search sees only the code of the forward and of the functions that it names.
    """
    kind = type(module)
    if kind.__module__.startswith(("torch.nn.", "regfast.")):
        return None
    codes = _codes(kind.forward)
    for code in codes:  # the body extends the list
        called = [*code.co_consts, *(getattr(kind, name, None) for name in code.co_names)]
        codes += [found for item in called for found in _codes(item) if found not in codes]
    names = dict.fromkeys(name for code in codes for name in code.co_names)
    found = [name for name in names if name in _FUNCTIONS and not hasattr(module, name)]
    return f"its forward calls {', '.join(found)}, which is no layer" if found else None


def _codes(item: Any) -> list[CodeType]:
    """Return the code of a function or method, or a code object itself, in a list; else []."""
    code = item if inspect.iscode(item) else getattr(inspect.unwrap(item), "__code__", None)
    return [code] if inspect.iscode(code) else []
