"""Max-blur pooling of small images on the CPU: it takes what the calls of PyTorch's operators take, so they are few."""

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
    """How images of a shape are pooled, (N, C, H, W), float32 or float64: all that is the same for each of them.

    They are extended by `amounts`, if there are any; `padding` is max pooling's own.
    """

    amounts: list[int] | None
    kernel_size: tuple[int, ...]
    padding: tuple[int, ...]
    rectified: bool
    averages: Averages

    @classmethod
    def of(cls, window: Window, before: Sequence[int], after: Sequence[int]) -> Small:
        """For an undilated window, binomial taps, and maxima that reach so far beyond the ends of an image."""
        k, rectified = window.kernel_size, window.activation is not None
        if tuple(before) == tuple(after) and all(2 * p <= size for p, size in zip(before, k)):
            return cls(None, k, tuple(before), rectified, averages(window))
        return cls(pad_amounts(before, after), k, (0, 0), rectified, averages(window))

    def pool(self, x: Tensor) -> Tensor:
        """x pooled by PyTorch's poolings, with its channels innermost where they are a vector, and back in its own format.

        (An average is a sum that is then divided, as nn.AvgPool2d's: from a quarter of the greatest number on it is inf.)
        """
        y = x.contiguous(memory_format=torch.channels_last) if x.shape[1] >= 8 else x
        if self.amounts is not None:
            # A window holds what its positions outside repeat.
            y = F.pad(y, self.amounts, mode="replicate")
        y = torch.max_pool2d(y, self.kernel_size, 1, self.padding)
        if self.rectified:
            y = F.relu(y, inplace=True)
        y = average(y, self.averages)
        return y.contiguous() if x.is_contiguous() else with_format(y, is_channels_last(x))
