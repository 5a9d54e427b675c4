"""The strided depthwise blur in plain PyTorch: the specification, and the path of the CPU.

Tensors are batched, (N, C, *spatial), and a `Window` whose kernel is 1 without padding says what to compute.
"""

from __future__ import annotations

import contextlib
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Window
from ..layout import is_channels_last, with_format

def blur_pool(x: Tensor, window: Window) -> Tensor:
    """Extend x by its border, correlate each channel with the taps, keep every `stride`-th output.

    x is (N, C, *spatial) in float16, bfloat16, float32 or float64; so is the result, in x's memory format.
    Sums are float32 (float64 for float64) and are rounded once. Source: Zhang, "Making Convolutional
    Networks Shift-Invariant Again" (2019).
    """
    if window.rank == 1:
        return blur_pool(x.unsqueeze(2), as_image(window)).squeeze(2)
    with outside_autocast(x):
        wide = _extend(x, window).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        blur = _convolve if prefers_library_calls(x) else _sum_slices
        return _in_format_of(x, blur(wide, window).to(x.dtype))


def prefers_library_calls(x: Tensor) -> bool:
    """Whether one library call beats the elementwise operations that it stands for: the rule of all references.

    Eager elementwise operations each pass over memory, while a compiler fuses them and cannot look into a call. An
    exported graph runs anywhere, in large nodes that every runtime knows. Other devices than the CPU may take
    convolutions in TF32, which is no float32 sum.
    """
    return x.device.type == "cpu" and (torch.compiler.is_exporting() or not torch.compiler.is_compiling())


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """y in x's memory format, which a few operations lose. Transforms of torch.func know no formats."""
    return y if torch._C._are_functorch_transforms_active() else with_format(y, is_channels_last(x))


def as_image(window: Window) -> Window:
    """A 1-d window as that of an image of one row, which is how PyTorch sees a signal whose channels are innermost."""
    return window._replace(
        kernel_size=(1, *window.kernel_size),
        stride=(1, *window.stride),
        padding=(0, *window.padding),
        dilation=(1, *window.dilation),
        taps=((1.0,), *window.taps),
        lead=(0, *window.lead),
        trail=(0, *window.trail),
    )


def outside_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which operations keep the dtypes they are given."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _extend(x: Tensor, window: Window) -> Tensor:
    """x with `lead` and `trail` more positions on each axis, as the border mode answers for them."""
    amounts = pad_amounts(window.lead, window.trail)
    if not any(amounts):
        return x
    if window.padding_mode == "zeros":
        return F.pad(x, amounts)
    if window.padding_mode == "replicate":
        return F.pad(x, amounts, mode="replicate")
    if all(max(pads) < size for pads, size in zip(zip(window.lead, window.trail), x.shape[2:])):
        return F.pad(x, amounts, mode="reflect")
    for axis in range(window.rank):
        x = _bounce(x, axis - window.rank, window.lead[axis], window.trail[axis])
    return x


def pad_amounts(before: tuple[int, ...], after: tuple[int, ...]) -> list[int]:
    """F.pad's argument: pairs, the last axis first."""
    return [amount for pair in zip(reversed(before), reversed(after)) for amount in pair]


def _bounce(x: Tensor, dim: int, lead: int, trail: int) -> Tensor:
    """x with a mirror at both ends of one axis, which F.pad cannot look into more than once."""
    last = x.shape[dim] - 1
    position = torch.arange(-lead, last + 1 + trail, device=x.device)
    folded = position % (2 * last) if last > 0 else torch.zeros_like(position)
    return x[(..., torch.minimum(folded, 2 * last - folded), *(slice(None),) * (-1 - dim))]


def _convolve(x: Tensor, window: Window) -> Tensor:
    """The blur as one grouped convolution."""
    channels = x.shape[1]
    products = [math.prod(taps) for taps in itertools.product(*window.taps)]
    kernel = torch.tensor(products, dtype=x.dtype, device=x.device).view(1, 1, *map(len, window.taps))
    convolve = F.conv2d if window.rank == 2 else F.conv3d
    return convolve(x, kernel.expand(channels, *kernel.shape[1:]), stride=window.stride, groups=channels)


def _sum_slices(x: Tensor, window: Window) -> Tensor:
    """The blur as weighted sums of strided slices, the outermost axis first: slices of rows are the cheapest to take."""
    for axis, (taps, stride) in enumerate(zip(window.taps, window.stride)):
        inner = (slice(None),) * (window.rank - 1 - axis)
        span = (x.shape[axis - window.rank] - len(taps)) // stride * stride + 1
        slices = [x[(..., slice(j, j + span, stride), *inner)] for j in range(len(taps))]
        x = taps[0] * slices[0]
        for tap, part in zip(taps[1:], slices[1:]):
            x = x + tap * part
    return x
