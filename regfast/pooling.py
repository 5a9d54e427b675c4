"""Anti-aliased pooling: modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ._core.checks import Traceable, as_python
from ._core.geometry import (
    RATIO,
    Activation,
    BlurPaddingMode,
    MaxPaddingMode,
    Size,
    Window,
    averaged,
    blur_window,
    check_average,
    decimating_window,
    max_blur_window,
)
from .ops.blur_pool import blur_pool
from .ops.max_blur_pool import max_blur_pool

__all__ = [
    "AvgPool1dAA",
    "AvgPool2dAA",
    "AvgPool3dAA",
    "BlurLayer",
    "BlurPool1d",
    "BlurPool2d",
    "BlurPool3d",
    "MaxPool1dAA",
    "MaxPool2dAA",
    "MaxPool3dAA",
]


class _Pooling(Traceable):
    """The shared part of the modules: a window that follows the arguments.

    The window is made again whenever an argument is set. (Surgery on a model sets
    `layer.ceil_mode = True` or `layer.stride = 1`, and nn.MaxPool2d obeys.)
    """

    rank: int
    _arguments: tuple[str, ...]
    _window: Window

    def _make_window(self) -> Window:
        """Return the window of the arguments; each kind of pooling has its own."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        super().__setattr__(name, as_python(value) if name in self._arguments else value)
        if name in self._arguments and all(
            argument in self.__dict__ for argument in self._arguments
        ):
            try:
                self.__dict__["_window"] = self._make_window()
            except (TypeError, ValueError):
                # A refused value leaves the layer unchanged.
                self.__dict__[name] = before
                raise


def _activation_repr(activation: str | None) -> str:
    return "" if activation is None else f", activation={activation!r}"


class _MaxPoolAA(_Pooling):
    """The shared part of the modules. In a class's bases it comes before nn.MaxPool.

    It uses only nn.MaxPool's constructor.
    """

    _arguments = (
        "kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode",
        "ratio", "blur_size", "filter", "padding_mode", "activation",
    )  # fmt: skip

    def __init__(
        self,
        kernel_size: Size = 2,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        ratio: float | Sequence[float] = RATIO,
        blur_size: Size | None = None,
        filter: Any = "binomial",
        padding_mode: MaxPaddingMode = "partial",
        activation: Activation | None = None,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
        self.ratio = ratio
        self.blur_size = blur_size
        self.filter = filter
        self.padding_mode = padding_mode
        self.activation = activation

    def _make_window(self) -> Window:
        return max_blur_window(
            self.rank, *(getattr(self, argument) for argument in self._arguments)
        )

    def forward(self, input: Tensor) -> Tensor:
        return max_blur_pool(input, self._window)

    def extra_repr(self) -> str:
        blur = f"ratio={self.ratio}" if self.blur_size is None else f"blur_size={self.blur_size}"
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}, {blur}, "
            f"filter={self.filter!r}, padding_mode={self.padding_mode!r}"
            + _activation_repr(self.activation)
        )


class MaxPool1dAA(_MaxPoolAA, nn.MaxPool1d):
    """Anti-aliased max pooling of signals: `MaxPool2dAA` with one spatial axis.

    It replaces nn.MaxPool1d.

    Shape: (N, C, L) or (C, L).
    """

    rank = 1


class MaxPool2dAA(_MaxPoolAA, nn.MaxPool2d):
    """Anti-aliased max pooling: a stride-1 maximum, then a blur that takes the stride, in one pass.

    It replaces nn.MaxPool2d: it has the same first arguments in the same order, and the same output
    size for every argument and input size. It has no parameters and no state_dict keys. With stride
    1 nothing is decimated, and it is nn.MaxPool2d.

    Args:
        kernel_size, stride, padding, dilation, ceil_mode: as in nn.MaxPool2d; an integer or one per
            axis.
        return_indices: must be False: an output is a weighted sum of several maxima and has no
            single index.
        ratio: the blur's size is int(ratio * stride), never less than the stride; a number or one
            per axis.
        blur_size: the number of the blur's taps, in place of `ratio`: an integer for the axes with
            a stride over 1, or one per axis.
        filter: the blur's taps: "binomial", a window that scipy.signal.get_window knows, 1-d taps,
            or one of these per axis. Taps are divided by their sum.
        padding_mode: what the blur reads beyond the border. "partial": the maxima of windows that
            partly overlap the image. Or a padding of nn.MaxPool2d's stride-1 output: "replicate",
            "reflect" (as antialiased-cnns and timm train), "zeros" (as kornia and Composer train).
        activation: "relu" pools the output of nn.ReLU, in the same pass: it replaces a ReLU before
            the layer.

    Shape: (N, C, H, W) or (C, H, W); float16, bfloat16, float32, float64. The output keeps the
    input's dtype and memory format.

    Raises:
        ValueError, TypeError: if an argument or input is not allowed. The message names it and what
            is allowed.

    Source: Zhang, "Making Convolutional Networks Shift-Invariant Again" (2019); the book chapter's
    MaxPool2dAA, which lost its filter's last tap.

    Example:
        >>> regfast.MaxPool2dAA(3, 2, 1)(torch.randn(8, 64, 112, 112)).shape
        torch.Size([8, 64, 56, 56])
    """

    rank = 2


class MaxPool3dAA(_MaxPoolAA, nn.MaxPool3d):
    """Anti-aliased max pooling of volumes: `MaxPool2dAA` with three spatial axes.

    It replaces nn.MaxPool3d.

    Shape: (N, C, D, H, W) or (C, D, H, W).
    """

    rank = 3


class _AvgPoolAA(_Pooling):
    _arguments: tuple[str, ...] = (
        "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
        "ratio", "blur_size", "filter", "padding_mode",
    )  # fmt: skip
    divisor_override: int | None = None
    _average: Callable[..., Tensor]

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        *,
        ratio: float | Sequence[float] = RATIO,
        blur_size: Size | None = None,
        filter: Any = "binomial",
        padding_mode: BlurPaddingMode = "reflect",
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.ratio = ratio
        self.blur_size = blur_size
        self.filter = filter
        self.padding_mode = padding_mode

    def _make_window(self) -> Window:
        """Return the window of blur and average together, if one pass does both.

        Otherwise return the blur's window, which leaves the stride to the average.
        """
        modes = self.ceil_mode, self.count_include_pad, self.divisor_override
        kernel, padding = check_average(self.rank, self.kernel_size, self.padding, *modes)
        stride = kernel if self.stride is None else self.stride
        window = decimating_window(
            self.rank, stride, self.ratio, self.blur_size, self.filter, self.padding_mode
        )
        together = averaged(window, kernel, self.divisor_override)
        # A kernel with many taps takes long to compile.
        fits = not any(padding) and not self.ceil_mode and max(map(len, together.taps)) <= 8
        # `forward` tells the two windows apart by the stride: only a joint one has a stride over 1.
        return (
            together
            if fits and any(s > 1 for s in window.stride)
            else window._replace(stride=(1,) * self.rank)
        )

    def forward(self, input: Tensor) -> Tensor:
        window = self._window
        if any(s > 1 for s in window.stride):
            return blur_pool(input, window)
        blurred = input if window.is_identity else blur_pool(input, window)
        divisor = () if self.rank == 1 else (self.divisor_override,)
        average = type(self)._average
        return average(
            blurred,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            *divisor,
        )

    def extra_repr(self) -> str:
        blur = f"ratio={self.ratio}" if self.blur_size is None else f"blur_size={self.blur_size}"
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"ceil_mode={self.ceil_mode}, {blur}, filter={self.filter!r}, "
            f"padding_mode={self.padding_mode!r}"
        )


class AvgPool1dAA(_AvgPoolAA):
    """Anti-aliased average pooling of signals: `AvgPool2dAA` with one spatial axis.

    It replaces nn.AvgPool1d.

    Shape: (N, C, L) or (C, L).
    """

    rank = 1
    _average = staticmethod(F.avg_pool1d)


class _DividedAvgPoolAA(_AvgPoolAA):
    _arguments = (*_AvgPoolAA._arguments, "divisor_override")

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        ratio: float | Sequence[float] = RATIO,
        blur_size: Size | None = None,
        filter: Any = "binomial",
        padding_mode: BlurPaddingMode = "reflect",
    ) -> None:
        blur: dict[str, Any] = dict(
            ratio=ratio, blur_size=blur_size, filter=filter, padding_mode=padding_mode
        )
        super().__init__(kernel_size, stride, padding, ceil_mode, count_include_pad, **blur)
        self.divisor_override = divisor_override


class AvgPool2dAA(_DividedAvgPoolAA):
    """Anti-aliased average pooling: a blur, then nn.AvgPool2d.

    An average is a poor low-pass filter for its own stride.

    It replaces nn.AvgPool2d: it has the same first arguments in the same order, with the same
    meaning, and the same output size. With stride 1 nothing is decimated, and it is nn.AvgPool2d.
    Blur and average are a single blur in one pass if there is no padding, `ceil_mode` is off and
    the two have at most 8 taps.

    Args:
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: as in
            nn.AvgPool2d.
        ratio, blur_size, filter: the blur's, as in `regfast.MaxPool2dAA`.
        padding_mode: what the blur reads beyond the image: "reflect", "replicate" or "zeros".

    Shape: (N, C, H, W) or (C, H, W); float16, bfloat16, float32, float64. The output keeps the
    input's dtype and memory format.

    Raises:
        ValueError, TypeError: if an argument or input is not allowed. The message names it and what
            is allowed.

    Source: Zhang, "Making Convolutional Networks Shift-Invariant Again" (2019).

    Example:
        >>> regfast.AvgPool2dAA(2)(torch.randn(8, 64, 56, 56)).shape
        torch.Size([8, 64, 28, 28])
    """

    rank = 2
    _average = staticmethod(F.avg_pool2d)


class AvgPool3dAA(_DividedAvgPoolAA):
    """Anti-aliased average pooling of volumes: `AvgPool2dAA` with three spatial axes.

    It replaces nn.AvgPool3d.

    Shape: (N, C, D, H, W) or (C, D, H, W). If blur and average are two passes, the output is
    contiguous, as nn.AvgPool3d's is.
    """

    rank = 3
    _average = staticmethod(F.avg_pool3d)


class _BlurPool(_Pooling):
    _arguments = ("kernel_size", "stride", "padding", "filter", "padding_mode", "activation")

    def __init__(
        self,
        kernel_size: Size = 3,
        stride: Size = 2,
        padding: str | Size = "same",
        *,
        filter: Any = "binomial",
        padding_mode: BlurPaddingMode = "reflect",
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.filter = filter
        self.padding_mode = padding_mode
        self.activation = activation

    def _make_window(self) -> Window:
        return blur_window(self.rank, *(getattr(self, argument) for argument in self._arguments))

    def forward(self, input: Tensor) -> Tensor:
        return blur_pool(input, self._window)

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}, "
            f"filter={self.filter!r}, padding_mode={self.padding_mode!r}"
            + _activation_repr(self.activation)
        )


class BlurPool1d(_BlurPool):
    """A strided blur of signals: `BlurPool2d` with one spatial axis.

    Shape: (N, C, L) or (C, L).
    """

    rank = 1


class BlurPool2d(_BlurPool):
    """A strided blur of every channel alike: decimation without aliasing.

    Args:
        kernel_size: the number of taps, at most 31; an integer or one per axis. (timm's and
            antialiased-cnns' blurs take a number of channels first. This one takes none.)
        stride: an integer or one per axis.
        padding: "same": (kernel_size - 1)//2 before and the rest after, for
            floor((H - 1)/stride) + 1 outputs. Or an integer, or one per axis, on both sides, for
            floor((H + 2 padding - kernel_size)/stride) + 1.
        filter: "binomial", a window that scipy.signal.get_window knows, 1-d taps, or one of these
            per axis. Taps are divided by their sum.
        padding_mode: "reflect", "replicate" or "zeros".
        activation: "relu" blurs the output of nn.ReLU, in the same pass: it replaces a ReLU before
            the layer.
        channels, device, dtype: ignored; with them the class serves as timm's `aa_layer`. The blur
            has no parameters and needs no channel count.

    Shape: (N, C, H, W) or (C, H, W); float16, bfloat16, float32, float64. The output keeps the
    input's dtype and memory format.

    Raises:
        ValueError, TypeError: if an argument or input is not allowed. The message names it and what
            is allowed.

    Source: Zhang, "Making Convolutional Networks Shift-Invariant Again" (2019).

    Example:
        >>> regfast.BlurPool2d(5, stride=2)(torch.randn(8, 64, 56, 56)).shape
        torch.Size([8, 64, 28, 28])
    """

    rank = 2

    def __init__(
        self,
        kernel_size: Size = 3,
        stride: Size = 2,
        padding: str | Size = "same",
        *,
        filter: Any = "binomial",
        padding_mode: BlurPaddingMode = "reflect",
        activation: Activation | None = None,
        channels: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            kernel_size,
            stride,
            padding,
            filter=filter,
            padding_mode=padding_mode,
            activation=activation,
        )


class BlurPool3d(_BlurPool):
    """A strided blur of volumes: `BlurPool2d` with three spatial axes.

    Shape: (N, C, D, H, W) or (C, D, H, W).
    """

    rank = 3


class BlurLayer(_BlurPool):
    """The book chapter's blur: `BlurPool{D}d(kernel_size, stride)`, padded "same" by reflection.

    The listing had two faults, which are corrected here: it lost the last tap, and it read its
    padding off the wrong dimension.

    Args:
        kernel_size: the number of taps.
        stride: the decimation.
        D: the number of spatial axes, 1, 2 or 3.
    """

    def __init__(self, kernel_size: Size = 5, stride: Size = 2, D: int = 2) -> None:
        if D not in (1, 2, 3):
            raise ValueError(f"D must be 1, 2 or 3, got {D!r}")
        self.rank = D
        super().__init__(kernel_size, stride)
