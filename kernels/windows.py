"""One axis of a pooling window: what a lane's outputs read, and what lies beyond the border.

Positions q of the max map and elements i of the image are counted as in `regfast._core.geometry`:
output o reads the maxima at o*stride - lead, ..., and the maximum at q is over the elements from
q - padding on.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from regfast._core.geometry import Window, map_limits, output_size


class Axis(NamedTuple):
    """Rows or columns, at compile time. The first six fields are the window's.

    A group is the `outputs` outputs of a lane with the `group` = stride*outputs elements that begin
    at a multiple of `group`. The outputs read `maps` maxima. `windows` windows hold elements of the
    group; the first begins kernel - 1 elements before it. `readers` outputs read these windows; the
    first of them is `first`, counted from the group's first output. `reads` lists, for each window,
    its readers and their taps; the tap is 0 where an output reads the window only through a border.
    `greatest` is the greatest tap of each window.

    `edge` says whether outputs read beyond the map's limits: "none", "low", or "high", which is
    beyond the high limit and maybe the low one. Beyond a limit the border mode puts another window
    (`moves_windows`), a window of other elements, or zero. If `weighs_borders`, an output's weight
    for a window within `near` positions of a limit depends on where the limit is.
    """

    kernel: int
    stride: int
    padding: int
    taps: tuple[float, ...]
    lead: int
    mode: str
    outputs: int
    group: int
    maps: int
    windows: int
    first: int
    readers: int
    reads: tuple[tuple[tuple[int, float], ...], ...]
    greatest: tuple[float, ...]
    edge: str
    near: int
    moves_windows: bool
    weighs_borders: bool


def axis_of(window: Window, axis: int, size: int, outputs: int) -> Axis:
    """One axis of `window` over images of this size.

    Only `edge` depends on the size, so few sizes compile anew.
    """
    low, high = map_limits(window, axis, size)
    last = (
        (output_size(window, axis, size) - 1) * window.stride[axis]
        - window.lead[axis]
        + len(window.taps[axis])
        - 1
    )
    edge = "high" if last > high else "low" if -window.lead[axis] < low else "none"
    return _axis(window, axis, outputs, edge)


@functools.cache
def _axis(window: Window, axis: int, outputs: int, edge: str) -> Axis:
    k, s, p = window.kernel_size[axis], window.stride[axis], window.padding[axis]
    taps, lead, group = window.taps[axis], window.lead[axis], s * outputs
    # For each window of a group: the outputs that read it, and their taps.
    tap_of: list[dict[int, float]] = [{} for _ in range(group + k - 1)]
    for e, readers in enumerate(tap_of):
        for j, tap in enumerate(taps):
            if (e - k + 1 + p + lead - j) % s == 0:
                readers[(e - k + 1 + p + lead - j) // s] = tap
    if edge != "none":
        for e, reader in _through_borders(window, axis, outputs):
            tap_of[e].setdefault(reader, 0.0)
    every = [reader for readers in tap_of for reader in readers] or [0]
    reads = tuple(
        tuple((reader - min(every), tap) for reader, tap in sorted(readers.items()))
        for readers in tap_of
    )
    mode = window.padding_mode
    return Axis(
        kernel=k, stride=s, padding=p, taps=taps, lead=lead, mode=mode, outputs=outputs,
        group=group, maps=group - s + len(taps), windows=group + k - 1, first=min(every),
        readers=max(every) - min(every) + 1, reads=reads,
        greatest=tuple(max((abs(tap) for _, tap in pairs), default=0.0) or 1.0 for pairs in reads),
        edge=edge, near=max(lead, window.trail[axis] + s - 1) + 1,
        moves_windows=edge != "none" and k > 1 and mode in ("reflect", "replicate"),
        # With a kernel of 1 the zeros beyond the image are no element's: no weight depends on them.
        weighs_borders=edge != "none" and not (k == 1 and mode == "zeros"),
    )  # fmt: skip


def _through_borders(window: Window, axis: int, outputs: int) -> set[tuple[int, int]]:
    """Pairs (window, output) of a group where the output reads the window through a border.

    The pairs cover images of all sizes.
    """
    k, s, p = window.kernel_size[axis], window.stride[axis], window.padding[axis]
    lead, taps, group = window.lead[axis], len(window.taps[axis]), s * outputs
    found = set()
    # Larger images repeat the pairs of these sizes.
    for size in range(1, 2 * (k + lead + taps + window.trail[axis]) + 2 * group):
        low, high = map_limits(window, axis, size)
        for o in range(output_size(window, axis, size)):
            for place in range(o * s - lead, o * s - lead + taps):
                q = place_within(place, low, high, window.padding_mode)
                if q == place or q is None:
                    continue
                # A lane may begin at any output: the last lane of a row ends where the row does.
                last = q - p + k - 1
                for own in range(max(-((group + k - 2 - last) // s), 0), last // s + 1):
                    found.add((last - own * s, o - own))
    return found


def place_within(place: int, low: int, high: int, mode: str) -> int | None:
    """The position within the limits that stands for `place`; None where zero does."""
    if mode == "zeros":
        return place if low <= place <= high else None
    if mode == "reflect":
        wave = abs(place) % max(2 * high, 1)
        return min(wave, max(2 * high, 1) - wave)
    return min(max(place, low), high)


@triton.jit
def limits(size, AXIS: tl.constexpr):
    """The first and the last position of the max map that outputs read without a border."""
    if AXIS.mode == "partial":
        return AXIS.padding - AXIS.kernel + 1, size - 1 + AXIS.padding
    else:
        return 0, tl.maximum(size + (2 * AXIS.padding - AXIS.kernel), 0)


@triton.jit
def within(q, size, AXIS: tl.constexpr):
    """The position within the limits that stands for position q in the border mode."""
    low, high = limits(size, AXIS)
    if AXIS.mode == "reflect":
        # A map of one element would have period 0.
        period = tl.maximum(2 * high, 1)
        wave = tl.abs(q) % period
        return tl.minimum(wave, period - wave)
    else:
        return tl.minimum(tl.maximum(q, low), high)


@triton.jit
def is_within(q, size, AXIS: tl.constexpr):
    """Whether position q is within the limits."""
    low, high = limits(size, AXIS)
    return (q >= low) & (q <= high)


@triton.jit
def element(i, size, AXIS: tl.constexpr):
    """The element of the image that stands for element i, which may lie beyond the image.

    It is the nearest element, or, with a kernel of 1 in border mode "reflect", the reflected one. A
    window that overlaps the image already holds the nearest element, so repeating it changes no
    maximum. A window wholly beyond the image takes the nearest element's value, as border mode
    "partial" defines, and "replicate" for a kernel of 1.
    """
    if AXIS.mode == "reflect" and AXIS.kernel == 1 and AXIS.edge != "none":
        return within(i, size, AXIS)
    else:
        return tl.minimum(tl.maximum(i, 0), size - 1)


@triton.jit
def weight(o, q, size, AXIS: tl.constexpr, ACC: tl.constexpr):
    """The weight by which output o reads position q, borders included."""
    TAPS: tl.constexpr = len(AXIS.taps)
    total = 0.0
    for j in tl.static_range(TAPS):
        place = o * AXIS.stride + (j - AXIS.lead)
        if AXIS.mode == "zeros":
            reads = (place == q) & is_within(q, size, AXIS)
        else:
            reads = within(place, size, AXIS) == q
        total += AXIS.taps[j] * reads.to(ACC)
    return total
