"""The arithmetic of a window, once: arguments, output size, padding, border, taps.

A `Window` holds everything about a pooling or blurring that does not depend on an image's size; the
functions below it answer, for one axis and one size, the questions that the reference and the kernels share.
They use nothing but `+ - * //` and comparisons, so that they accept torch's symbolic sizes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

from .checks import as_python, check_bool, per_axis
from .taps import taps_of

Size = int | Sequence[int]
MaxPaddingMode = Literal["partial", "replicate", "reflect", "zeros"]
BlurPaddingMode = Literal["reflect", "replicate", "zeros"]
Activation = Literal["relu"]

# The size of a blur that takes a stride, as a multiple of that, where nobody says another: the book chapter's.
RATIO = 1.7

# The most taps of a blur. More are a number of channels, which other libraries' blurs take first.
LONGEST = 31


class Window(NamedTuple):
    """A max window followed by a strided blur, per spatial axis (a tuple has one entry an axis).

    `kernel_size`, `padding` and `dilation` belong to the maximum, which is taken at every position; `stride` and
    `taps` to the blur. Output `o` reads the maxima at `o * stride - lead + j`, `j < len(taps)`; `lead` and `trail` are the
    positions that the blur is padded by before and after the map. A kernel_size of 1 without padding is a plain blur.
    `activation` is applied to the maxima: as it never falls, that is the pooling of what was activated.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool
    taps: tuple[tuple[float, ...], ...]
    lead: tuple[int, ...]
    trail: tuple[int, ...]
    padding_mode: str
    activation: str | None = None

    @property
    def rank(self) -> int:
        return len(self.kernel_size)

    @property
    def takes_max(self) -> bool:
        """Whether the window has a maximum to take; a plain blur has none."""
        return any(k > 1 for k in self.kernel_size) or any(self.padding)

    @property
    def is_identity(self) -> bool:
        """Whether the window gives what it is given."""
        plain = not self.takes_max and self.activation is None
        return plain and all(s == 1 and taps == (1.0,) for s, taps in zip(self.stride, self.taps))

    @property
    def is_of_images(self) -> bool:
        """Whether one kernel computes it: of images, or of signals, which are images of one row; without dilation."""
        return self.rank < 3 and all(d == 1 for d in self.dilation)

    def reach(self, axis: int) -> int:
        """How many elements the max window covers from its first to its last, holes of a dilation included."""
        return self.dilation[axis] * (self.kernel_size[axis] - 1) + 1


def max_blur_window(
    rank: int,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    return_indices: bool,
    ceil_mode: bool,
    ratio: Any,
    blur_size: Any,
    filter: Any,
    padding_mode: str,
    activation: str | None = None,
) -> Window:
    """The `Window` of an anti-aliased max pooling, its arguments checked. See `regfast.MaxPool2dAA` for what they mean."""
    kernel = per_axis("kernel_size", kernel_size, rank, 1)
    if isinstance(stride, float):
        raise TypeError(
            f"stride must be an integer, got {stride!r}; if it is the blur's ratio, pass it as ratio={stride!r}"
        )
    step = kernel if stride is None else per_axis("stride", stride, rank, 1)
    pad = per_axis("padding", padding, rank, 0)
    hole = per_axis("dilation", dilation, rank, 1)
    _check_padding(pad, kernel, padding, kernel_size)
    check_bool("ceil_mode", ceil_mode)
    check_bool("return_indices", return_indices)
    if return_indices:
        raise ValueError(
            "return_indices must be False, got True: an output is a weighted sum of several maxima, so no one index belongs to it"
        )
    _check_padding_mode(padding_mode, get_args(MaxPaddingMode))
    _check_activation(activation)
    taps, lead, trail = _decimating_taps(step, ratio, blur_size, filter)
    return Window(kernel, step, pad, hole, ceil_mode, taps, lead, trail, padding_mode, activation)


def blur_window(
    rank: int,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    filter: Any,
    padding_mode: str,
    activation: str | None = None,
) -> Window:
    """The `Window` of a plain strided blur, its arguments checked. See `regfast.BlurPool2d` for what they mean."""
    size = per_axis("kernel_size", kernel_size, rank, 1)
    if max(size) > LONGEST:
        hint = "the number of taps; regfast's layers take no number of channels"
        raise ValueError(
            f"kernel_size must be at most {LONGEST}, got {kernel_size!r}: it is {hint}"
        )
    step = per_axis("stride", stride, rank, 1)
    _check_padding_mode(padding_mode, get_args(BlurPaddingMode))
    _check_activation(activation)
    taps = taps_of(filter, size, where=[True] * rank, resize=False)
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(
                f"padding must be 'same', an integer or {rank} of them, got {padding!r}"
            )
        lead = tuple((b - 1) // 2 for b in size)
        trail = tuple(b - 1 - before for b, before in zip(size, lead))
    else:
        lead = trail = per_axis("padding", padding, rank, 0)
    ones = (1,) * rank
    return Window(ones, step, (0,) * rank, ones, False, taps, lead, trail, padding_mode, activation)


def decimating_window(
    rank: int,
    stride: Any,
    ratio: Any,
    blur_size: Any,
    filter: Any,
    padding_mode: str,
    activation: str | None = None,
) -> Window:
    """The `Window` of a blur that takes a stride: as long as an anti-aliased max pooling's, its arguments checked."""
    step = per_axis("stride", stride, rank, 1)
    _check_padding_mode(padding_mode, get_args(BlurPaddingMode))
    _check_activation(activation)
    taps, lead, trail = _decimating_taps(step, ratio, blur_size, filter)
    ones = (1,) * rank
    return Window(ones, step, (0,) * rank, ones, False, taps, lead, trail, padding_mode, activation)


def check_average(
    rank: int,
    kernel_size: Any,
    padding: Any,
    ceil_mode: Any,
    count_include_pad: Any,
    divisor_override: Any,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The kernel size and padding of an average pooling, its arguments checked. They are nn.AvgPool's."""
    kernel = per_axis("kernel_size", kernel_size, rank, 1)
    pad = per_axis("padding", padding, rank, 0)
    _check_padding(pad, kernel, padding, kernel_size)
    check_bool("ceil_mode", ceil_mode)
    check_bool("count_include_pad", count_include_pad)
    if divisor_override is not None and (
        isinstance(divisor_override, bool) or not isinstance(divisor_override, Integral)
    ):
        raise TypeError(f"divisor_override must be an integer or None, got {divisor_override!r}")
    if divisor_override is not None and divisor_override == 0:
        raise ValueError("divisor_override must not be 0, got 0")
    return kernel, pad


def averaged(window: Window, kernel_size: tuple[int, ...], divisor: int | None) -> Window:
    """A blur at stride 1 followed by averages of `kernel_size` elements at the stride, without padding: as one blur.

    Its taps are the convolution of the two. `divisor` is what sums are divided by, None for the number of their terms.
    """
    scale = 1.0 if divisor is None else math.prod(kernel_size) / divisor
    taps = []
    for blur, k in zip(window.taps, kernel_size):
        padded = (0.0,) * (k - 1) + blur + (0.0,) * (k - 1)
        taps.append(
            tuple(math.fsum(padded[j : j + k]) * scale / k for j in range(len(blur) + k - 1))
        )
        scale = 1.0
    return window._replace(taps=tuple(taps))


def _decimating_taps(
    stride: tuple[int, ...], ratio: Any, blur_size: Any, filter: Any
) -> tuple[Any, ...]:
    """The taps of a blur that takes a stride, and what they read before an output's own position and after it."""
    sizes = _blur_sizes(stride, ratio, blur_size)
    blurred = [b > 1 or s > 1 for b, s in zip(sizes, stride)]
    taps = taps_of(filter, sizes, where=blurred, resize=blur_size is None)
    lead = tuple((len(w) - 1) // 2 for w in taps)
    return taps, lead, tuple(len(w) - 1 - before for w, before in zip(taps, lead))


def _blur_sizes(stride: tuple[int, ...], ratio: Any, blur_size: Any) -> tuple[int, ...]:
    """The blur's size on each axis: `int(ratio * s)`, never less than s, and 1 where nothing is decimated."""
    rank, ratio, blur_size = len(stride), as_python(ratio), as_python(blur_size)
    if blur_size is not None:
        sizes = per_axis("blur_size", blur_size, rank, 1)
        literal = isinstance(blur_size, Sequence)
        return sizes if literal else tuple(b if s > 1 else 1 for b, s in zip(sizes, stride))
    ratios = (
        tuple(ratio)
        if isinstance(ratio, Sequence) and not isinstance(ratio, str)
        else (ratio,) * rank
    )
    if len(ratios) != rank:
        raise ValueError(f"ratio must be one number or {rank}, got {ratio!r}")
    if not all(isinstance(r, Real) and not isinstance(r, bool) for r in ratios):
        raise TypeError(f"ratio must be a number, got {ratio!r}")
    if not all(0 < r < math.inf for r in ratios):
        raise ValueError(f"ratio must be positive and finite, got {ratio!r}")
    # operator.index makes it a constant where a compiler was tracing the ratio as a symbol: taps are as many as their number.
    return tuple(operator.index(max(int(r * s), s)) if s > 1 else 1 for r, s in zip(ratios, stride))


def _check_padding(
    pad: tuple[int, ...], kernel: tuple[int, ...], padding: Any, kernel_size: Any
) -> None:
    if any(2 * p > k for p, k in zip(pad, kernel)):
        raise ValueError(
            f"padding must be at most half of kernel_size, got padding={padding!r} and kernel_size={kernel_size!r}"
        )


def _check_padding_mode(padding_mode: Any, allowed: tuple[str, ...]) -> None:
    if padding_mode not in allowed:
        raise ValueError(
            f"padding_mode must be one of {', '.join(map(repr, allowed))}, got {padding_mode!r}"
        )


def _check_activation(activation: Any) -> None:
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(
            f"activation must be None or one of {', '.join(map(repr, get_args(Activation)))}, got {activation!r}"
        )


def as_image(window: Window, rows: int | None, columns: int | None) -> Window:
    """The window of images whose rows and columns are these of `window`'s axes; None is an axis that passes as it is.

    `as_image(window, None, 0)` is a signal's, as that of an image of one row: how PyTorch sees one whose channels are innermost.
    """

    def pick(values: tuple[Any, ...], passing: Any) -> tuple[Any, ...]:
        return tuple(passing if axis is None else values[axis] for axis in (rows, columns))

    return window._replace(
        kernel_size=pick(window.kernel_size, 1),
        stride=pick(window.stride, 1),
        padding=pick(window.padding, 0),
        dilation=pick(window.dilation, 1),
        taps=pick(window.taps, (1.0,)),
        lead=pick(window.lead, 0),
        trail=pick(window.trail, 0),
    )


def output_size(window: Window, axis: int, size: int) -> int:
    """How many outputs an axis of `size` elements gives: for a max window, exactly nn.MaxPool2d's."""
    k_reach, s, p = window.reach(axis), window.stride[axis], window.padding[axis]
    positions = size + 2 * p - k_reach + 1
    room = positions + window.lead[axis] + window.trail[axis] - len(window.taps[axis])
    if not window.ceil_mode:
        return room // s + 1
    count = (room + s - 1) // s + 1
    # PyTorch's rule of the last window: one that starts beyond the image and its left padding is left out.
    return count - 1 if (count - 1) * s >= size + p else count


def output_shape(window: Window, shape: Sequence[int]) -> list[int]:
    """The shape of the output for a batched input of `shape`, (N, C, *spatial).

    Raises:
        ValueError: for an image too small for the window.
    """
    sizes = [output_size(window, axis, shape[axis + 2]) for axis in range(window.rank)]
    if any(size < 1 for size in sizes):
        operation = f"{'max_' if window.takes_max else ''}blur_pool{window.rank}d"
        found = f"{tuple(shape)} would be {tuple(sizes)}"
        raise ValueError(f"{operation}: the output of {found} in space, and must be at least 1")
    return [*shape[:2], *sizes]


def map_limits(window: Window, axis: int, size: int) -> tuple[int, int]:
    """The first and last position of the max map that the blur may read: beyond them the border mode answers."""
    k_reach, p = window.reach(axis), window.padding[axis]
    if window.padding_mode == "partial":
        return p - k_reach + 1, size - 1 + p
    last = size + 2 * p - k_reach
    return 0, last if last > 0 else 0
