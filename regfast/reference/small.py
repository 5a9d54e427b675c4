"""Max-blur pooling of small images on the CPU, in few calls: their calls take most of the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.geometry import Window
from .._core.layout import is_channels_last, with_format
from .blur_pool import Averages, average, averages, pad_amounts


class Small(NamedTuple):
    """How to pool images of one shape, (N, C, H, W), in float32 or float64.

    The images are extended by `amounts`, if not None; `padding` is max pooling's own.
    """

    amounts: list[int] | None
    kernel_size: tuple[int, ...]
    padding: tuple[int, ...]
    rectified: bool
    averages: Averages

    @classmethod
    def of(cls, window: Window, before: Sequence[int], after: Sequence[int]) -> Small:
        """Return the pooling by an undilated window with binomial taps.

        The maxima reach `before` and `after` positions beyond the ends of an image.
        """
        k, rectified = window.kernel_size, window.activation is not None
        if tuple(before) == tuple(after) and all(2 * p <= size for p, size in zip(before, k)):
            return cls(None, k, tuple(before), rectified, averages(window))
        return cls(pad_amounts(before, after), k, (0, 0), rectified, averages(window))

    def pool(self, x: Tensor) -> Tensor:
        """Return x pooled by PyTorch's poolings, in x's memory format.

        It runs in channels_last if the channels fill a vector. An average divides a sum, as
        nn.AvgPool2d does: from a quarter of the largest number on, the result is inf.
        """
        y = x.contiguous(memory_format=torch.channels_last) if x.shape[1] >= 8 else x
        if self.amounts is not None:
            # Repeated ends change no maximum: a window that holds one also holds the end.
            y = F.pad(y, self.amounts, mode="replicate")
        y = torch.max_pool2d(y, self.kernel_size, 1, self.padding)
        if self.rectified:
            y = F.relu(y, inplace=True)
        y = average(y, self.averages)
        return y.contiguous() if x.is_contiguous() else with_format(y, is_channels_last(x))
