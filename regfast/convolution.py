"""Anti-aliased convolutions: modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ._core.checks import per_axis
from ._core.geometry import RATIO, Activation, BlurPaddingMode, Size, Window, decimating_window
from ._core.surgery import is_hooked
from .ops.blur_pool import blur_pool
from .pooling import BlurPool1d, BlurPool2d, _Pooling

__all__ = ["Conv1dAA", "Conv2dAA", "ConvNormActAA"]

Blur = Literal["after", "before"]

# A convolution without its own blur holds under this attribute the layer that blurs for it. That
# layer follows the convolution's blur arguments. It is not a child module.
FOLLOWER = "_regfast_follower"


class _ConvAA(_Pooling):
    """The shared part of the modules. In a class's bases it comes before nn.Conv."""

    _arguments = ("stride", "blur", "blur_size", "blur_filter", "blur_padding_mode", "activation")
    _convolve: Callable[..., Tensor]
    # Set by nn.Conv.
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any
    _reversed_padding_repeated_twice: list[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        blur: Blur | None = "after",
        blur_size: Size | None = None,
        blur_filter: Any = "binomial",
        blur_padding_mode: BlurPaddingMode = "reflect",
        activation: Activation | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.blur = blur
        self.blur_size = blur_size
        self.blur_filter = blur_filter
        self.blur_padding_mode = blur_padding_mode
        self.activation = activation

    def _make_window(self) -> Window:
        if self.blur not in ("after", "before", None):
            raise ValueError(f"blur must be 'after', 'before' or None, got {self.blur!r}")
        if self.activation is not None and self.blur != "after":
            raise ValueError(
                "activation must be None where no blur is after the convolution, "
                f"got {self.activation!r}"
            )
        modes = self.blur_filter, self.blur_padding_mode, self.activation
        return decimating_window(self.rank, self.stride, RATIO, self.blur_size, *modes)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        follower = self.__dict__.get(FOLLOWER)
        if follower is not None and name in self._arguments:
            follow(follower, self._window)

    def forward(self, input: Tensor) -> Tensor:
        window, ones = self._window, (1,) * self.rank
        if window.is_identity:
            return self._convolve_at(input, self.stride)
        if self._commutes():
            return self._convolve_at(blur_pool(input, window), ones)
        if self.blur == "before":
            return self._convolve_at(blur_pool(input, window._replace(stride=ones)), self.stride)
        y = self._convolve_at(input, ones)
        return y if self.blur is None else blur_pool(y, window)

    def _commutes(self) -> bool:
        """Whether the blur may come before the convolution, at the stride.

        It may if every output depends on a single position. With a bias, the blur must also map a
        constant to itself.
        """
        # Surgery on a layer may set the integers that nn.Conv takes.
        size, padding = (
            (value,) if isinstance(value, int) else value
            for value in (self.kernel_size, self.padding)
        )
        pointwise = all(k == 1 for k in size) and (padding == "valid" or not any(padding))
        if not pointwise or self.blur is None or self.activation is not None:
            return False
        unit_gain = self.blur_padding_mode != "zeros" and all(
            abs(sum(taps) - 1) < 1e-12 for taps in self._window.taps
        )
        return self.blur == "before" or self.bias is None or unit_gain

    def _convolve_at(self, x: Tensor, stride: tuple[int, ...]) -> Tensor:
        """nn.Conv's forward at another stride."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * self.rank
        return type(self)._convolve(
            x, self.weight, self.bias, stride, padding, self.dilation, self.groups
        )

    def extra_repr(self) -> str:
        size = "" if self.blur_size is None else f", blur_size={self.blur_size}"
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return (
            f"{super().extra_repr()}, blur={self.blur!r}{size}, blur_filter={self.blur_filter!r}, "
            f"blur_padding_mode={self.blur_padding_mode!r}{activation}"
        )


class Conv1dAA(_ConvAA, nn.Conv1d):
    """An anti-aliased strided convolution of signals: `Conv2dAA` with one spatial axis.

    It replaces nn.Conv1d.

    Shape: (N, C, L) or (C, L).
    """

    rank = 1
    _convolve = staticmethod(F.conv1d)


class Conv2dAA(_ConvAA, nn.Conv2d):
    """An anti-aliased strided convolution: nn.Conv2d at stride 1, then a blur at the stride.

    It replaces nn.Conv2d: it has the same first arguments in the same order, the same parameters,
    state_dict keys and output sizes. With stride 1 nothing is decimated, and it is nn.Conv2d.

    Args:
        in_channels, ..., dtype: as in nn.Conv2d; `padding_mode` is the convolution's own.
        blur: "after" the convolution; or "before" it: the convolution then takes the stride, at a
            quarter of the arithmetic with stride 2. A 1x1 convolution without padding is blurred
            before, at the stride, if that gives the same function. None leaves the decimation to
            a later layer: the convolution is at stride 1.
        blur_size: the number of taps: an integer for the axes with a stride over 1, or one per
            axis; if None, int(1.7 * stride).
        blur_filter, blur_padding_mode: `filter` and `padding_mode` of `regfast.BlurPool2d`.
        activation: "relu" stands between the convolution and the blur after it, in the blur's
            pass.

    Shape: (N, C, H, W) or (C, H, W). The output has nn.Conv2d's shape, dtype and memory format.

    Raises:
        ValueError, TypeError: if an argument is not allowed. The message names it and what is
            allowed.

    Source: Zhang, "Making Convolutional Networks Shift-Invariant Again" (2019); "before" is
    Composer's.

    Example:
        >>> regfast.Conv2dAA(64, 128, 3, stride=2, padding=1)(torch.randn(8, 64, 56, 56)).shape
        torch.Size([8, 128, 28, 28])
    """

    rank = 2
    _convolve = staticmethod(F.conv2d)


class ConvNormActAA(nn.Sequential):
    """The book chapter's anti-aliased stage.

    It consists of a convolution at stride 1, a normalisation, an activation and a blur at the
    stride. The layout is that of torchvision's Conv2dNormActivation: children 0, 1, ..., with the
    same parameters. A ReLU is folded into the blur's pass.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, dilation, device, dtype: as in
            nn.Conv2d.
        padding: if None, (kernel_size - 1) // 2 * dilation.
        norm_layer: makes a normalisation from the number of channels; None for none.
        activation_layer: makes the activation; None for none.
        bias: whether the convolution has a bias; if None, only without a normalisation.
        blur_size, blur_filter, blur_padding_mode: as in `Conv2dAA`.

    Shape: (N, C, H, W) to (N, out_channels, H', W'), as nn.Conv2d's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 2,
        padding: Size | None = None,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        activation_layer: Callable[[], nn.Module] | None = nn.ReLU,
        dilation: Size = 1,
        bias: bool | None = None,
        *,
        blur_size: Size | None = None,
        blur_filter: Any = "binomial",
        blur_padding_mode: BlurPaddingMode = "reflect",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        window = decimating_window(2, stride, RATIO, blur_size, blur_filter, blur_padding_mode)
        kernel, hole = (
            per_axis("kernel_size", kernel_size, 2, 1),
            per_axis("dilation", dilation, 2, 1),
        )
        pad = (
            tuple((k - 1) // 2 * d for k, d in zip(kernel, hole))
            if padding is None
            else per_axis("padding", padding, 2, 0)
        )
        bias = norm_layer is None if bias is None else bias
        arguments: Any = dict(
            kernel_size=kernel,
            padding=pad,
            dilation=hole,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        convolution = nn.Conv2d(in_channels, out_channels, **arguments)
        norm = (
            [] if norm_layer is None else [norm_layer(out_channels).to(device=device, dtype=dtype)]
        )
        activation = (
            [] if activation_layer is None else [activation_layer().to(device=device, dtype=dtype)]
        )
        super().__init__(convolution, *norm, *blur_layers(activation, window))


def blur_layers(activation: Sequence[nn.Module], window: Window) -> list[nn.Module]:
    """Return the activation, if any, and the blur after it; a ReLU is folded into the blur."""
    if window.is_identity:
        return list(activation)
    folded = [type(layer) for layer in activation] == [nn.ReLU] and not is_hooked(activation[0])
    blur = {1: BlurPool1d, 2: BlurPool2d}[window.rank](
        tuple(map(len, window.taps)), window.stride, filter=window.taps,
        padding_mode=window.padding_mode, activation="relu" if folded else None,
    )  # fmt: skip
    return [blur] if folded else [*activation, blur]


def follow(blur: Any, window: Window) -> None:
    """Give a `BlurPool` the stride, taps and border of a window, but keep its activation."""
    blur.__dict__.update(
        kernel_size=tuple(map(len, window.taps)), stride=window.stride, padding="same",
        filter=window.taps, padding_mode=window.padding_mode,
    )  # fmt: skip
    blur.__dict__["_window"] = blur._make_window()
