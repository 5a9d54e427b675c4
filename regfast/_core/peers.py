"""Read what the blurs of other libraries compute, without importing the libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .known import library_class

Taps = tuple[tuple[float, ...], ...]


class PeerBlur(NamedTuple):
    """What a layer computes: maxima at stride 1 if there is a `pool`, then a blur.

    `pads` are, per axis, the positions that the blur reads before and after the image.
    """

    stride: Any
    pads: tuple[tuple[int, int], ...]
    padding_mode: str
    pool: dict[str, Any] | None = None


def origin_of(module: nn.Module) -> str | None:
    """Return the library and class of another library's blur ("timm's BlurPool2d"), else None."""
    for kind in type(module).__mro__:
        if library_class(kind) in _READERS:
            library, name = library_class(kind)
            return f"{library}'s {name}"
    return None


def is_plain_blur(module: nn.Module) -> bool:
    """Return whether a module is another library's blur without a maximum or a convolution."""
    return any(library_class(kind) in _PLAIN for kind in type(module).__mro__)


def read(layer: Any) -> tuple[Taps, Sequence[PeerBlur]]:
    """Return a layer's taps per axis, and what each version of its library computes with it.

    The layer has an origin (see `origin_of`).

    Raises:
        ValueError: if the layer differs from its class, or its filter is no product of taps.
    """
    reader = _READERS.get(library_class(type(layer)))
    if reader is None:
        raise ValueError("it is a subclass, which may compute another function")
    if "forward" in layer.__dict__:
        raise ValueError("its forward was replaced")
    taps = read_taps(layer, 1 if library_class(type(layer)) in _SIGNALS else 2)
    try:
        return taps, reader(layer, tuple(map(len, taps)))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"regfast does not know its version of the class: {error}") from error


def read_taps(layer: nn.Module, rank: int) -> Taps:
    """Return the taps per axis of the filter in a layer's only buffer, equal for all channels.

    Raises:
        ValueError: if the filter is no product of taps per axis, each of unit sum.
    """
    if len(layer._buffers) != 1:
        raise ValueError(f"it must have one buffer, its filter, got {', '.join(layer._buffers)}")
    (buffer,) = layer._buffers.values()
    if buffer is None or buffer.is_meta:
        raise ValueError("its taps are on the meta device, which holds no numbers")
    # A filter's sums have tens of terms of at most one, each rounded once.
    rounding = 8 * torch.finfo(buffer.dtype).eps
    filters = buffer.detach().to("cpu", torch.float64)
    filters = filters.reshape(-1, *filters.shape[-rank:])
    total = float(filters[0].sum())
    if not abs(total - 1) <= rounding:
        raise ValueError(f"its taps sum to {total:g}, and must sum to 1")
    axes = [filters[0]] if rank == 1 else [filters[0].sum(1), filters[0].sum(0)]
    product = axes[0] if rank == 1 else torch.outer(*axes)
    if not bool(((filters - product).abs() <= rounding).all()):
        raise ValueError("its filter is no product of taps, one axis each, alike in every channel")
    return tuple(tuple(axis.tolist()) for axis in axes)


def same_pads(sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return the pads of `padding="same"`: at stride 1 as many outputs as inputs."""
    return tuple(((size - 1) // 2, size // 2) for size in sizes)


def _pairs(padding: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return the pads per axis; F.pad's amounts have the last axis first."""
    pairs = list(zip(padding[::2], padding[1::2]))
    return tuple(reversed(pairs))


def _timm(layer: Any, sizes: tuple[int, ...]) -> list[PeerBlur]:
    modes = {"reflect": "reflect", "replicate": "replicate", "constant": "zeros"}
    return [PeerBlur(layer.stride, _pairs(layer.padding), modes[layer.pad_mode])]


def _antialiased_cnns(layer: Any, sizes: tuple[int, ...]) -> list[PeerBlur]:
    modes = {"Reflection": "reflect", "Replication": "replicate", "Zero": "zeros"}
    kind = type(layer.pad).__name__.partition("Pad")[0]
    return [PeerBlur(layer.stride, _pairs(layer.pad.padding), modes[kind])]


def _kornia(layer: Any, sizes: tuple[int, ...]) -> list[PeerBlur]:
    pool = None
    if hasattr(layer, "max_pool_size"):
        pool = dict(kernel_size=layer.max_pool_size, padding=0, dilation=1)
    # kornia before 0.9 padded a filter of an even size equally on both sides.
    alike = tuple(((size - 1) // 2,) * 2 for size in sizes)
    return [PeerBlur(layer.stride, pads, "zeros", pool) for pads in (same_pads(sizes), alike)]


def _composer(layer: Any, sizes: tuple[int, ...]) -> list[PeerBlur]:
    pool = None
    if hasattr(layer, "kernel_size"):
        pool = dict(kernel_size=layer.kernel_size, padding=layer.padding, dilation=layer.dilation)
    stride = layer.blur_stride if hasattr(layer, "conv") else layer.stride
    return [PeerBlur(stride, tuple((size // 2,) * 2 for size in sizes), "zeros", pool)]


_READERS: dict[tuple[str, str], Callable[[Any, tuple[int, ...]], list[PeerBlur]]] = {
    ("timm", "BlurPool2d"): _timm,
    ("antialiased_cnns", "BlurPool"): _antialiased_cnns,
    ("antialiased_cnns", "BlurPool1D"): _antialiased_cnns,
    ("kornia", "BlurPool2D"): _kornia,
    ("kornia", "MaxBlurPool2D"): _kornia,
    ("composer", "BlurPool2d"): _composer,
    ("composer", "BlurMaxPool2d"): _composer,
    ("composer", "BlurConv2d"): _composer,
}
_SIGNALS = {("antialiased_cnns", "BlurPool1D")}
_MORE = {("kornia", "MaxBlurPool2D"), ("composer", "BlurMaxPool2d"), ("composer", "BlurConv2d")}
_PLAIN = _READERS.keys() - _MORE
