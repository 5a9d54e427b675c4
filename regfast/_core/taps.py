"""The taps of a blur: binomial by default, any window of SciPy, or the caller's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from .checks import as_python


def binomial(size: int) -> tuple[float, ...]:
    """Return the row of Pascal's triangle with `size` entries, divided by its sum.

    The entries, C(size-1, j) / 2^(size-1), are those of
    `scipy.stats.binom.pmf(range(size), size - 1, 0.5)` and sum to exactly one. `binomial(3)`
    is the triangle filter (1, 2, 1)/4 of Zhang, "Making Convolutional Networks Shift-Invariant
    Again" (2019).
    """
    size = as_python(size)
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"size must be an integer, got {size!r}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size!r}")
    # Integer true division rounds once, so large sizes neither overflow nor lose their middle.
    return tuple(math.comb(size - 1, j) / 2 ** (size - 1) for j in range(size))


def named(name: Any, size: int) -> tuple[float, ...]:
    """Return taps of unit sum by name: "binomial", or an argument of `scipy.signal.get_window`.

    The argument is a string, or a tuple of a name and parameters.
    """
    if name == "binomial":
        return binomial(size)
    from scipy.signal import get_window

    try:
        window = get_window(name, size + 2, fftbins=False)
        # Ends of zero (Hann's, Bartlett's) would waste two taps of every blur.
        zero_ends = max(abs(window[0]), abs(window[-1])) < 1e-9 * abs(window).max()
        window = window[1:-1] if zero_ends else get_window(name, size, fftbins=False)
    except (ValueError, TypeError) as error:
        allowed = "'binomial', a window of scipy.signal.get_window or 1-d taps"
        raise ValueError(f"filter must be {allowed}, got {name!r} ({error})") from error
    total = float(window.sum())
    if not math.isfinite(total) or abs(total) < 1e-12:
        raise ValueError(
            f"filter {name!r} must have a finite nonzero sum, got {total} at size {size}"
        )
    return tuple(float(tap) / total for tap in window)


def taps_of(
    filter: Any, sizes: tuple[int, ...], where: list[bool], resize: bool
) -> tuple[tuple[float, ...], ...]:
    """Return the taps of `filter` per axis, at the given sizes.

    `filter` is a name, 1-d taps, or one of either per axis. Taps are divided by their sum. 1-d taps
    for all axes apply to the axes that `where` marks. With `resize` their length is the size of the
    blur; otherwise it must be the given size.
    """
    rank = len(sizes)
    filter = without_tensors(filter)
    if _is_name(filter):
        return tuple(named(filter, size) for size in sizes)
    if not isinstance(filter, Sequence) or not filter:
        raise TypeError(f"filter must be a name or 1-d taps, got {filter!r}")
    if all(isinstance(tap, Real) for tap in filter):
        entries = [filter if marked else "binomial" for marked in where]
    elif len(filter) == rank:
        entries = [without_tensors(entry) for entry in filter]
    else:
        raise ValueError(f"filter must be a name, 1-d taps, or {rank} of either, got {filter!r}")
    return tuple(_entry_taps(entry, size, resize) for entry, size in zip(entries, sizes))


def without_tensors(filter: Any) -> Any:
    """Return the taps of a tensor or an array as a list, and anything else unchanged."""
    return filter.tolist() if hasattr(filter, "tolist") else filter


def _is_name(filter: Any) -> bool:
    """Return whether `filter` is a window's name or SciPy's tuple of one: ("kaiser", 8.0)."""
    if isinstance(filter, tuple) and len(filter) > 1 and isinstance(filter[0], str):
        return all(isinstance(parameter, Real) for parameter in filter[1:])
    return isinstance(filter, str)


def _entry_taps(entry: Any, size: int, resize: bool) -> tuple[float, ...]:
    """Return the taps of one axis; see `taps_of`."""
    if _is_name(entry):
        return named(entry, size)
    if (
        not isinstance(entry, Sequence)
        or not entry
        or not all(isinstance(tap, Real) for tap in entry)
    ):
        raise TypeError(f"filter must be a name or 1-d taps, got {entry!r}")
    if not all(math.isfinite(tap) for tap in entry):
        raise ValueError(f"taps must be finite, got {entry!r}")
    if not resize and len(entry) != size:
        raise ValueError(f"filter must have {size} taps, got {len(entry)} taps: {entry!r}")
    total = math.fsum(entry)
    if abs(total) <= 1e-12 * math.fsum(map(abs, entry)):
        raise ValueError(f"taps must have a nonzero sum, got {entry!r}")
    return tuple(float(tap) / total for tap in entry)
