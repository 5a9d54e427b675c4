"""What the layers of PyTorch and of other libraries are, by class. None is imported."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import CodeType
from typing import Any

from torch import nn

# Element by element and without state: a blur may come after them.
ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.PReLU, nn.RReLU, nn.ReLU, nn.SELU, nn.SiLU,
    nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip

# Normalisations of images of any size. Not nn.LayerNorm and nn.RMSNorm: they count the elements of
# the last axes.
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

# Merges patches by moving pixels into channels.
_SPACE_TO_CHANNELS = {"timm": ("PatchMerging",), "torchvision": ("PatchMerging", "PatchMergingV2")}
_LP_POOLS = (nn.LPPool1d, nn.LPPool2d, nn.LPPool3d)
_ADAPTIVE_POOLS = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip

_FUNCTIONS = {f"{name}_pool{rank}d" for name in ("max", "avg", "lp") for rank in (1, 2, 3)}
_FUNCTIONS |= {"conv1d", "conv2d", "fractional_max_pool2d", "pixel_unshuffle"}


def library_class(kind: type[Any]) -> tuple[str, str]:
    """The top-level package of a class and its name in its module: ("timm", "BlurPool2d")."""
    return kind.__module__.partition(".")[0], kind.__qualname__


def is_one_of(module: nn.Module, classes: dict[str, tuple[str, ...]]) -> bool:
    """Whether a module's class, or one that it derives from, is among these, by library."""
    found = map(library_class, type(module).__mro__)
    return any(name in classes.get(library, ()) for library, name in found)


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module is a normalisation of images of any size: a known class, or it says so."""
    if getattr(module, "is_normalisation", False) is True:
        return True
    return isinstance(module, _NORMALISATIONS) or is_one_of(module, _OTHER_NORMALISATIONS)


def is_norm_act(module: nn.Module) -> bool:
    """Whether a module is one of timm's normalisations with an activation at its end, `act`."""
    return is_one_of(module, {"timm": _NORM_ACTS})


def stride_of(module: Any) -> tuple[int, ...]:
    """The stride of a layer of torch.nn; a pooling without one has its kernel's size."""
    stride = module.kernel_size if module.stride is None else module.stride
    return tuple(stride) if isinstance(stride, Sequence) else (stride,)


def is_patch_embedding(convolution: Any, min_channels: int) -> bool:
    """Whether a convolution takes patches side by side: of an image, or large ones anywhere."""
    size, stride = convolution.kernel_size, stride_of(convolution)
    if tuple(size) != stride or min(stride) == 1:
        return False
    return convolution.in_channels < min_channels or min(stride) >= 4


def otherwise_decimating(module: Any) -> str | None:
    """Why a layer that decimates has no anti-aliased twin; None for one that has, or does not."""
    name = type(module).__name__
    if isinstance(module, _LP_POOLS) and max(stride_of(module)) > 1:
        return f"there is no anti-aliased {name}"
    if isinstance(module, (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
        return "its windows are drawn at random, at no one stride"
    if isinstance(module, _ADAPTIVE_POOLS):
        size: Any = module.output_size
        sizes = size if isinstance(size, Sequence) else (size,)
        # One output for a whole axis summarises it, and None leaves the axis as it is.
        whole = all(n in (1, None) for n in sizes)
        return None if whole else "its stride depends on the image's size"
    if isinstance(module, nn.PixelUnshuffle) or is_one_of(module, _SPACE_TO_CHANNELS):
        return "it moves pixels into channels and drops none"
    return None


def functional_calls(module: nn.Module) -> str | None:
    """The functions that decimate and that a module's forward, or what it calls, names.

    They are found in the code alone, as far as that shows them.
    """
    kind = type(module)
    if kind.__module__.startswith(("torch.nn.", "regfast.")):
        return None
    codes = _codes(kind.forward)
    for code in codes:  # which grows
        called = [*code.co_consts, *(getattr(kind, name, None) for name in code.co_names)]
        codes += [found for item in called for found in _codes(item) if found not in codes]
    names = dict.fromkeys(name for code in codes for name in code.co_names)
    found = [name for name in names if name in _FUNCTIONS and not hasattr(module, name)]
    return f"its forward calls {', '.join(found)}, which is no layer" if found else None


def _codes(item: Any) -> list[CodeType]:
    """The code of a function or a method, or what is code itself: one, or none."""
    code = item if inspect.iscode(item) else getattr(inspect.unwrap(item), "__code__", None)
    return [code] if inspect.iscode(code) else []
