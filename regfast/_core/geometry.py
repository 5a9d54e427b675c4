"""The arithmetic of a window: arguments, output size, padding, border and taps.

A `Window` holds everything about a pooling or a blur that does not depend on the image's size. The
functions below it compute the rest for one axis and one size, for the reference and the kernels.
They use only `+ - * //` and comparisons, so they accept torch's symbolic sizes.
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

# The default ratio of a strided blur's size to its stride; the book chapter's.
RATIO = 1.7

# The most taps of a blur. A larger number is meant as a number of channels, the first argument of
# other libraries' blurs.
LONGEST = 31


class Window(NamedTuple):
    """A max window followed by a strided blur. Each tuple has one entry per spatial axis.

    The maximum has `kernel_size`, `padding` and `dilation`, and is taken at every position. The
    blur has `stride` and `taps`: output `o` reads the maxima at `o * stride - lead + j` for every
    `j < len(taps)`. `lead` and `trail` are the positions of padding before and after the maxima.
    A kernel_size of 1 without padding is a plain blur. `activation` is applied to the maxima; it
    is monotonic, so this equals pooling the activated input.
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
        """Whether the window takes a maximum; a plain blur takes none."""
        return any(k > 1 for k in self.kernel_size) or any(self.padding)

    @property
    def is_identity(self) -> bool:
        """Whether the output is the input."""
        plain = not self.takes_max and self.activation is None
        return plain and all(s == 1 and taps == (1.0,) for s, taps in zip(self.stride, self.taps))

    @property
    def is_of_images(self) -> bool:
        """Whether one kernel computes it: images, or signals as images of one row; no dilation."""
        return self.rank < 3 and all(d == 1 for d in self.dilation)

    def reach(self, axis: int) -> int:
        """Return how many elements the max window spans on `axis`, dilation included."""
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
    """Return the checked `Window` of an anti-aliased max pooling; see `regfast.MaxPool2dAA`."""
    kernel = per_axis("kernel_size", kernel_size, rank, 1)
    if isinstance(stride, float):
        hint = f"if it is the blur's ratio, pass it as ratio={stride!r}"
        raise TypeError(f"stride must be an integer, got {stride!r}; {hint}")
    step = kernel if stride is None else per_axis("stride", stride, rank, 1)
    pad = per_axis("padding", padding, rank, 0)
    hole = per_axis("dilation", dilation, rank, 1)
    _check_padding(pad, kernel, padding, kernel_size)
    check_bool("ceil_mode", ceil_mode)
    check_bool("return_indices", return_indices)
    if return_indices:
        reason = "an output is a weighted sum of several maxima and has no index"
        raise ValueError(f"return_indices must be False, got True: {reason}")
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
    """Return the checked `Window` of a plain strided blur; see `regfast.BlurPool2d`."""
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
    """Return the checked `Window` of a strided blur as long as an anti-aliased max pooling's."""
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
    """Check the arguments of nn.AvgPool; return its kernel size and padding per axis."""
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
    """Return one blur for `window`, a blur at stride 1, and an average at its stride after it.

    The average is over `kernel_size` elements, without padding. The taps are the convolution of
    both. `divisor` divides the average's sums; None divides by the number of their terms.
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
    """Return the taps of a strided blur, its `lead` and its `trail`."""
    sizes = _blur_sizes(stride, ratio, blur_size)
    blurred = [b > 1 or s > 1 for b, s in zip(sizes, stride)]
    taps = taps_of(filter, sizes, where=blurred, resize=blur_size is None)
    lead = tuple((len(w) - 1) // 2 for w in taps)
    return taps, lead, tuple(len(w) - 1 - before for w, before in zip(taps, lead))


def _blur_sizes(stride: tuple[int, ...], ratio: Any, blur_size: Any) -> tuple[int, ...]:
    """Return the blur's size per axis: max(int(ratio * s), s), and 1 where the stride s is 1."""
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
    # operator.index makes a constant of a traced symbol: the number of taps must be one.
    return tuple(operator.index(max(int(r * s), s)) if s > 1 else 1 for r, s in zip(ratios, stride))


def _check_padding(
    pad: tuple[int, ...], kernel: tuple[int, ...], padding: Any, kernel_size: Any
) -> None:
    if any(2 * p > k for p, k in zip(pad, kernel)):
        found = f"padding={padding!r} and kernel_size={kernel_size!r}"
        raise ValueError(f"padding must be at most half of kernel_size, got {found}")


def _check_padding_mode(padding_mode: Any, allowed: tuple[str, ...]) -> None:
    if padding_mode not in allowed:
        raise ValueError(
            f"padding_mode must be one of {', '.join(map(repr, allowed))}, got {padding_mode!r}"
        )


def _check_activation(activation: Any) -> None:
    if activation is not None and activation not in get_args(Activation):
        allowed = ", ".join(map(repr, get_args(Activation)))
        raise ValueError(f"activation must be None or one of {allowed}, got {activation!r}")


def as_image(window: Window, rows: int | None, columns: int | None) -> Window:
    """Return the window of images whose rows and columns are these axes of `window`.

    None is an axis that passes unchanged: `as_image(window, None, 0)` pools a signal as an image of
    one row.
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
    """Return the number of outputs along `axis`: for a max window, exactly nn.MaxPool2d's."""
    k_reach, s, p = window.reach(axis), window.stride[axis], window.padding[axis]
    positions = size + 2 * p - k_reach + 1
    room = positions + window.lead[axis] + window.trail[axis] - len(window.taps[axis])
    if not window.ceil_mode:
        return room // s + 1
    count = (room + s - 1) // s + 1
    # PyTorch drops a last window that starts beyond the image and its left padding.
    return count - 1 if (count - 1) * s >= size + p else count


def output_shape(window: Window, shape: Sequence[int]) -> list[int]:
    """Return the output's shape for a batched input of `shape`, (N, C, *spatial).

    Raises:
        ValueError: if the image is too small for the window.
    """
    sizes = [output_size(window, axis, shape[axis + 2]) for axis in range(window.rank)]
    if any(size < 1 for size in sizes):
        operation = f"{'max_' if window.takes_max else ''}blur_pool{window.rank}d"
        found = f"{tuple(shape)} would be {tuple(sizes)}"
        raise ValueError(f"{operation}: the spatial output size of {found}, must be at least 1")
    return [*shape[:2], *sizes]


def map_limits(window: Window, axis: int, size: int) -> tuple[int, int]:
    """Return the first and last position of the maxima that the blur reads as they are.

    Beyond them the border mode supplies the values.
    """
    k_reach, p = window.reach(axis), window.padding[axis]
    if window.padding_mode == "partial":
        return p - k_reach + 1, size - 1 + p
    last = size + 2 * p - k_reach
    return 0, last if last > 0 else 0
