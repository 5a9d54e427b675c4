"""Anti-aliased max pooling in one pass: a maximum at every position, then a strided blur of the maxima.

Every kernel sees an image as (N, C, A, B, W): A is the axis its programs stream down (the rows of a 2-d image, the
slices of a 3-d one), W the innermost axis and B the one between (the rows of a 3-d image); an axis that an image has not
got has extent 1. Windows, strides, taps and border modes are compile-time, sizes and memory strides are not: one
binary serves every image size of an alignment (lanes.py).

An input row is turned, once, into its horizontal maxima; they are held in registers and serve every window below that
needs them. A lane's `group` columns share the maxima of the windows that overlap. Nothing is saved for the backward: it
streams down x again, finds which element each maximum came from, and gathers: first among the rows of a window, then
along the row, so that a window of k*k costs 2k selections. No atomics, so two runs give the same bits. An activation is
applied to the maxima; an element that is not positive is given no gradient, which is one selection more.

Two numbers, 2-d, k=2, b=3, s=2, G columns a lane, per input element of e bytes:
    forward    1.25 e bytes; 1 + 2/G loads, 2 + 2/G maxima, 2.25 multiply-adds
    backward   2.25 e bytes; 1.25 + 3/G loads, 2 + 2/G maxima with their places, 2.25 + 2/G multiply-adds, 4 + 2/G selects, adds
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from regfast._core.geometry import Window, blur_window, map_limits
from regfast._core.layout import empty, empty_output, is_channels_last

from .lanes import Access, image_of, lane_of, load_column, load_columns, store_columns
from .launch import LAUNCHES, Launch, Layout, alignment_of, keep, kinds_of, on_meta, strides_of, warp_size


class Axis(NamedTuple):
    """One axis of a window, known at compile time and whatever the image's size.

    `b` counts the taps, `span` is d*(k - 1). A group is `own` outputs and the `group` = s*own elements that begin at a multiple
    of that. The outputs read `maps` maxima. `windows` windows touch the elements; those are read by `outputs` outputs, the
    first at `first` from the group's own, which reads window e with tap `origin` + e - s*first. `edge` says where a position
    beyond the map's limits is found: "clamp", "reflect", "zeros", or "none" where no output of any size reads there;
    `ends_within`, whether a plain blur's last output begins within the image; `relu`, whether the maxima are rectified (ask W).
    `low` is the first limit, and of the `n_edge` outputs that may read beyond a limit and are sent back, `n_low` are at the low
    end.
    """

    k: int
    s: int
    p: int
    d: int
    b: int
    taps: tuple[float, ...]
    lead: int
    span: int
    own: int
    group: int
    windows: int
    maps: int
    origin: int
    first: int
    outputs: int
    edge: str
    ends_within: bool
    relu: bool
    low: int
    n_low: int
    n_edge: int


@triton.jit
def _greater_each(best, new, COUNT: tl.constexpr):
    """The greater of two tuples of tiles, tile by tile. A NaN wins."""
    greater = ()
    for t in tl.static_range(COUNT):
        greater = greater + (tl.maximum(best[t], new[t], propagate_nan=tl.PropagateNan.ALL),)
    return greater


@triton.jit
def _border(q, high, AXIS: tl.constexpr):
    """The position within the limits, the last of which is `high`, at which the border mode finds position q."""
    if AXIS.edge == "reflect":
        # A reflected map starts at 0. One element, period 0, is constant.
        period = tl.maximum(2 * high, 1)
        wave = tl.abs(q) % period
        return tl.minimum(wave, period - wave)
    else:
        return tl.minimum(tl.maximum(q, AXIS.low), high)


@triton.jit
def _row_maxima(x, a, b, high_w, AXIS_W: tl.constexpr, ACCESS: tl.constexpr, ACC: tl.constexpr):
    """One input row's maxima under the taps of a lane's outputs: `maps` tiles."""
    K: tl.constexpr = AXIS_W.k
    D: tl.constexpr = AXIS_W.d
    MAPS: tl.constexpr = AXIS_W.maps
    OWN: tl.constexpr = AXIS_W.group
    FIRST: tl.constexpr = -AXIS_W.lead - AXIS_W.p
    maxima = ()
    if AXIS_W.edge == "clamp" or AXIS_W.edge == "reflect":
        first = x[1] * OWN + FIRST
        # A plain blur's own columns lie within the limits, if the image ends where a lane ends.
        WITHIN: tl.constexpr = ACCESS.whole and K == 1 and AXIS_W.p == 0 and AXIS_W.ends_within
        if WITHIN:
            own = load_columns(x, a, b, 0, OWN, OWN, float("-inf"), ACCESS, ACC)
        for j in tl.static_range(MAPS):
            if WITHIN and FIRST + j >= 0 and FIRST + j < OWN:
                maxima = maxima + (own[FIRST + j],)
            else:
                column = _border(first + AXIS_W.p + j, high_w, AXIS_W) - AXIS_W.p
                best = load_column(x, a, b, column, OWN, float("-inf"), ACCESS, ACC)
                for i in tl.static_range(1, K):
                    new = load_column(x, a, b, column + D * i, OWN, float("-inf"), ACCESS, ACC)
                    best = tl.maximum(best, new, propagate_nan=tl.PropagateNan.ALL)
                maxima = maxima + (best,)
    else:
        columns = load_columns(x, a, b, FIRST, MAPS + AXIS_W.span, OWN, float("-inf"), ACCESS, ACC)
        for j in tl.static_range(MAPS):
            best = columns[j]
            for i in tl.static_range(1, K):
                best = tl.maximum(best, columns[j + D * i], propagate_nan=tl.PropagateNan.ALL)
            maxima = maxima + (best,)
    return maxima


@triton.jit
def _plane_maxima(x, a, b, high_b, high_w, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, ACCESS: tl.constexpr, ACC: tl.constexpr):
    """One input plane's maxima under the taps of the outputs at row b: maps_b * maps_w tiles."""
    K: tl.constexpr = AXIS_B.k
    D: tl.constexpr = AXIS_B.d
    MAPS: tl.constexpr = AXIS_B.maps
    MAPS_W: tl.constexpr = AXIS_W.maps
    first = b * AXIS_B.s - AXIS_B.lead
    maxima = ()
    if AXIS_B.edge == "clamp" or AXIS_B.edge == "reflect":
        for j in tl.static_range(MAPS):
            row = _border(first + j, high_b, AXIS_B) - AXIS_B.p
            best = _row_maxima(x, a, row, high_w, AXIS_W, ACCESS, ACC)
            for i in tl.static_range(1, K):
                best = _greater_each(best, _row_maxima(x, a, row + D * i, high_w, AXIS_W, ACCESS, ACC), MAPS_W)
            maxima = maxima + best
    else:
        rows = ()
        for offset in tl.static_range(MAPS + AXIS_B.span):
            rows = rows + (_row_maxima(x, a, first - AXIS_B.p + offset, high_w, AXIS_W, ACCESS, ACC),)
        for j in tl.static_range(MAPS):
            best = rows[j]
            for i in tl.static_range(1, K):
                best = _greater_each(best, rows[j + D * i], MAPS_W)
            maxima = maxima + best
    return maxima


@triton.jit
def _window_maxima(planes, AXIS_A: tl.constexpr, COUNT: tl.constexpr):
    """The maxima of the windows over planes of A, from the COUNT maxima of each plane."""
    K_A: tl.constexpr = AXIS_A.k
    best = planes[0]
    for i in tl.static_range(1, K_A):
        best = _greater_each(best, planes[AXIS_A.d * i], COUNT)
    return best


@triton.jit
def _rectify(maxima, COUNT: tl.constexpr):
    """The maxima, zero at least. A NaN stays."""
    rectified = ()
    for t in tl.static_range(COUNT):
        rectified = rectified + (tl.maximum(maxima[t], 0.0, propagate_nan=tl.PropagateNan.ALL),)
    return rectified


@triton.jit
def _blur_plane(maxima, b, g, high_b, high_w, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr):
    """The maxima weighted by the taps of B and W and summed: a tile for each own output."""
    TAPS_B: tl.constexpr = AXIS_B.b
    TAPS_W: tl.constexpr = AXIS_W.b
    OWN: tl.constexpr = AXIS_W.own
    blurred = ()
    for u in tl.static_range(OWN):
        total = 0.0
        for j in tl.static_range(TAPS_B):
            row = 0.0
            for i in tl.static_range(TAPS_W):
                value = maxima[j * AXIS_W.maps + u * AXIS_W.s + i]
                if AXIS_W.edge == "zeros":
                    q = g * AXIS_W.group - AXIS_W.lead + u * AXIS_W.s + i
                    value = tl.where((q >= 0) & (q <= high_w), value, 0.0)
                row = _add_product(row, AXIS_W.taps[i], value, i == 0)
            if AXIS_B.edge == "zeros":
                q = b * AXIS_B.s - AXIS_B.lead + j
                row = tl.where((q >= 0) & (q <= high_b), row, 0.0)
            total = _add_product(total, AXIS_B.taps[j], row, j == 0)
        blurred = blurred + (total,)
    return blurred


@triton.jit
def _add_product(total, weight: tl.constexpr, value, FIRST: tl.constexpr):
    """total + weight * value; the first product stands for itself."""
    if FIRST:
        return weight * value
    else:
        return total + weight * value


@triton.jit
def _blur_rows(rows, AXIS_A: tl.constexpr, COUNT: tl.constexpr):
    """Successive rows of the blurred map weighted by the taps of A and summed: COUNT tiles."""
    TAPS: tl.constexpr = AXIS_A.b
    blurred = ()
    for u in tl.static_range(COUNT):
        total = 0.0
        for j in tl.static_range(TAPS):
            total = _add_product(total, AXIS_A.taps[j], rows[j][u], j == 0)
        blurred = blurred + (total,)
    return blurred


@triton.jit
def _next_map_row(
    held, x, q, b, high_a, high_b, high_w, AXIS_A: tl.constexpr, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr,
    ACCESS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Row q of the max map, blurred along B and W, and the plane maxima to hold for row q + 1."""
    COUNT: tl.constexpr = AXIS_B.maps * AXIS_W.maps
    OWN: tl.constexpr = AXIS_W.own
    held = held + (_plane_maxima(x, q - AXIS_A.p + AXIS_A.span, b, high_b, high_w, AXIS_B, AXIS_W, ACCESS, ACC),)
    maxima = _window_maxima(held, AXIS_A, COUNT)
    if AXIS_A.edge == "clamp" or AXIS_A.edge == "reflect":
        if (q < AXIS_A.low) | (q > high_a):
            first = _border(q, high_a, AXIS_A) - AXIS_A.p
            planes = ()
            for offset in tl.static_range(AXIS_A.span + 1):
                planes = planes + (_plane_maxima(x, first + offset, b, high_b, high_w, AXIS_B, AXIS_W, ACCESS, ACC),)
            maxima = _window_maxima(planes, AXIS_A, COUNT)
    if AXIS_W.relu:
        maxima = _rectify(maxima, COUNT)
    blurred = _blur_plane(maxima, b, x[1], high_b, high_w, AXIS_B, AXIS_W)
    if AXIS_A.edge == "zeros":
        blurred = _keep_each(blurred, (q >= 0) & (q <= high_a), OWN)
    return blurred, held[1:]


@triton.jit
def _blank_tiles(COUNT: tl.constexpr, LANES: tl.constexpr, ACCESS: tl.constexpr, ACC: tl.constexpr):
    """COUNT tiles of zeros."""
    VECTOR: tl.constexpr = ACCESS.vector
    tiles = ()
    for t in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((LANES, VECTOR), ACC),)
    return tiles


@triton.jit
def _program(others, chunks, per_chunk):
    """What this program processes: a block of lanes, a position of B, and of the positions of A the first.

    Programs that follow each other in A do so in launch order: they read each other's borders while those are in a cache.
    """
    pid = tl.program_id(0)
    chunk, pid = pid % chunks, pid // chunks
    return pid // others, pid % others, chunk * per_chunk


# None of a kernel's numbers is specialised on.
NUMBERS = [
    "lanes", "channels", "groups", "rows", *(f"{what}_{axis}" for what in ("size", "out", "high") for axis in "abw"),
]  # fmt: skip


@triton.jit(do_not_specialize=[*NUMBERS, *strides_of("x", "y")])
def _forward_kernel(
    x_ptr, y_ptr, lanes, channels, groups, size_a, size_b, size_w, out_a, out_b, out_w, high_a, high_b, high_w, rows,
    x_stride_n, x_stride_c, x_stride_a, x_stride_b, x_stride_w,
    y_stride_n, y_stride_c, y_stride_a, y_stride_b, y_stride_w,
    AXIS_A: tl.constexpr, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, ACCESS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Shapes: x (N, channels, size_a, size_b, size_w); y (N, channels, out_a, out_b, out_w).

    This program processes `rows` successive output rows of A, at one position of B, for LANES lanes of `own` outputs of W.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    block, b, start = _program(out_b, tl.cdiv(out_a, rows), rows)
    lane = lane_of(lanes, channels, groups, block, LANES, ACCESS)
    sizes = (size_a, size_b, size_w)
    x_strides = (x_stride_n, x_stride_c, x_stride_a, x_stride_b, x_stride_w)
    y_strides = (y_stride_n, y_stride_c, y_stride_a, y_stride_b, y_stride_w)
    x = image_of(x_ptr, lane, AXIS_W.group, sizes, x_strides, ACCESS)
    y = image_of(y_ptr, lane, AXIS_W.own, (out_a, out_b, out_w), y_strides, ACCESS)

    S: tl.constexpr = AXIS_A.s
    TAPS: tl.constexpr = AXIS_A.b
    SPAN: tl.constexpr = AXIS_A.span
    OWN: tl.constexpr = AXIS_W.own
    # Successive outputs share TAPS - S rows of the map, and successive rows of it SPAN planes of maxima. The first
    # outputs of a program find neither: it begins WARM_UP outputs early, and does not store those.
    SHARED: tl.constexpr = max(TAPS - S, 0)
    WARM_UP: tl.constexpr = -(-(SHARED + SPAN) // S)
    held = ()
    for p in tl.static_range(SPAN):
        held = held + (_blank_tiles(AXIS_B.maps * AXIS_W.maps, LANES, ACCESS, ACC),)
    shared = ()
    for r in tl.static_range(SHARED):
        shared = shared + (_blank_tiles(OWN, LANES, ACCESS, ACC),)
    for step in range(WARM_UP + tl.minimum(rows, out_a - start)):
        o = start - WARM_UP + step
        q = o * S - AXIS_A.lead + SHARED
        for j in tl.static_range(S):
            row, held = _next_map_row(held, x, q + j, b, high_a, high_b, high_w, AXIS_A, AXIS_B, AXIS_W, ACCESS, ACC)
            shared = shared + (row,)
        store_columns(y, o, b, _blur_rows(shared, AXIS_A, OWN), OWN, o >= start, ACCESS)
        shared = shared[S:]


@triton.jit
def _row_windows(columns, AXIS_W: tl.constexpr):
    """The maxima of every window that touches a lane's columns, from those and `span` on either side.

    Window e starts `span` columns before the lane's column e.
    """
    K: tl.constexpr = AXIS_W.k
    WINDOWS: tl.constexpr = AXIS_W.windows
    maxima = ()
    for e in tl.static_range(WINDOWS):
        best = columns[e]
        for i in tl.static_range(1, K):
            best = tl.maximum(best, columns[e + AXIS_W.d * i], propagate_nan=tl.PropagateNan.ALL)
        maxima = maxima + (best,)
    return maxima


@triton.jit
def _plane_windows(x, a, g_b, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, ACCESS: tl.constexpr, ACC: tl.constexpr):
    """One plane's rows, and the maxima of every window of B and W that touches a group: those of W vary fastest."""
    S_B: tl.constexpr = AXIS_B.s
    K: tl.constexpr = AXIS_B.k
    SPAN: tl.constexpr = AXIS_B.span
    SPAN_W: tl.constexpr = AXIS_W.span
    GROUP: tl.constexpr = AXIS_W.group
    WINDOWS_B: tl.constexpr = AXIS_B.windows
    WINDOWS_W: tl.constexpr = AXIS_W.windows
    rows = ()
    row_maxima = ()
    for offset in tl.static_range(S_B + 2 * SPAN):
        b = g_b * S_B - SPAN + offset
        row = load_columns(x, a, b, -SPAN_W, GROUP + 2 * SPAN_W, GROUP, float("-inf"), ACCESS, ACC)
        rows = rows + (row,)
        row_maxima = row_maxima + (_row_windows(row, AXIS_W),)
    maxima = ()
    for e in tl.static_range(WINDOWS_B):
        for t in tl.static_range(WINDOWS_W):
            best = row_maxima[e][t]
            for i in tl.static_range(1, K):
                best = tl.maximum(best, row_maxima[e + AXIS_B.d * i][t], propagate_nan=tl.PropagateNan.ALL)
            maxima = maxima + (best,)
    return rows, maxima


@triton.jit
def _route(values, gradient, group, LEAST: tl.constexpr, start: tl.constexpr, AXIS: tl.constexpr):
    """The gradient of a group's window, given to the greatest of its k values: k tiles, zeros but where a value is.

    The greatest is the first of equals, the last of NaNs. The window starts at element `start` of the group, which is LEAST or
    a later one; where that is before the image, the greatest is not one of those before it, even where all are -inf.
    """
    K: tl.constexpr = AXIS.k
    best = (values[0],)
    for i in tl.static_range(1, K - 1):
        best = best + (tl.maximum(best[i - 1], values[i], propagate_nan=tl.PropagateNan.ALL),)
    given = ()
    for j in tl.static_range(1, K):
        # Later and greater, or NaN. A NaN before it counts as inf, which nothing but NaN beats.
        take = (values[K - j] <= tl.minimum(best[K - j - 1], float("inf"))) == 0
        if LEAST * AXIS.group + start + AXIS.d * (K - j - 1) < 0:
            take = take | (group * AXIS.group + (start + AXIS.d * (K - j - 1)) < 0)
        given = (tl.where(take, gradient, 0.0),) + given
        gradient = tl.where(take, 0.0, gradient)
    return (gradient,) + given


@triton.jit
def _slots(values, start: tl.constexpr, AXIS: tl.constexpr):
    """What the k slots of window `start` hold: values[start], values[start + d], ..."""
    K: tl.constexpr = AXIS.k
    slots = ()
    for i in tl.static_range(K):
        slots = slots + (values[start + AXIS.d * i],)
    return slots


@triton.jit
def _each(tuples, t: tl.constexpr):
    """The t-th of every tuple."""
    COUNT: tl.constexpr = len(tuples)
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (tuples[i][t],)
    return values


@triton.jit
def _gather(given, AXIS: tl.constexpr):
    """What a group's s * own elements receive, from what each of its windows gives its k slots: a tile an element."""
    K: tl.constexpr = AXIS.k
    GROUP: tl.constexpr = AXIS.group
    elements = ()
    for f in tl.static_range(GROUP):
        # Element f is in slot i of the window that starts d*i before it.
        total = given[f + AXIS.span][0]
        for i in tl.static_range(1, K):
            total += given[f + AXIS.span - AXIS.d * i][i]
        elements = elements + (total,)
    return elements


@triton.jit
def _edge_output(n, outputs, AXIS: tl.constexpr):
    """The n-th output that may read beyond a limit, and whether there is one: the low ones first, then those at the high end."""
    o = tl.where(n < AXIS.n_low, n, outputs - 1 - (n - AXIS.n_low))
    return o, (n < AXIS.n_low) & (n < outputs) | (n >= AXIS.n_low) & (o >= AXIS.n_low)


@triton.jit
def _edge_weight(o, exists, q, high, AXIS: tl.constexpr, ACC: tl.constexpr):
    """The weight with which output o reads position q through the border: by its taps that lie beyond the limits."""
    TAPS: tl.constexpr = AXIS.b
    weight = 0.0
    for j in tl.static_range(TAPS):
        place = o * AXIS.s - AXIS.lead + j
        reads = exists & ((place < AXIS.low) | (place > high)) & (_border(place, high, AXIS) == q)
        weight += AXIS.taps[j] * reads.to(ACC)
    return weight


@triton.jit
def _row_gradients(grad, oa, ob, out_w, AXIS_W: tl.constexpr, ACCESS: tl.constexpr, ACC: tl.constexpr):
    """One row of grad_y: the outputs that read a lane's windows, then those that read beyond W's limits."""
    EDGES: tl.constexpr = AXIS_W.n_edge
    columns = load_columns(grad, oa, ob, AXIS_W.first, AXIS_W.outputs, AXIS_W.own, 0.0, ACCESS, ACC)
    for n in tl.static_range(EDGES):
        o, _ = _edge_output(n, out_w, AXIS_W)
        columns = columns + (load_column(grad, oa, ob, o, AXIS_W.own, 0.0, ACCESS, ACC),)
    return columns


@triton.jit
def _weighted_sum(rows, e: tl.constexpr, AXIS: tl.constexpr, COUNT: tl.constexpr):
    """Window e's gradient from those of the outputs that read a group's windows, `COUNT` tiles each."""
    OUTPUTS: tl.constexpr = AXIS.outputs
    # The first output that reads window e; the one before it would with a tap beyond the last.
    START: tl.constexpr = max(-((AXIS.b - 1 - AXIS.origin - e) // AXIS.s) - AXIS.first, 0)
    total = ()
    for t in tl.static_range(COUNT):
        tile = tl.zeros_like(rows[0][t])
        for r in tl.static_range(START, OUTPUTS):
            if AXIS.origin + e - AXIS.s * (AXIS.first + r) >= 0:
                tile = _add_product(tile, AXIS.taps[AXIS.origin + e - AXIS.s * (AXIS.first + r)], rows[r][t], r == START)
        total = total + (tile,)
    return total


@triton.jit
def _add_each(total, new, COUNT: tl.constexpr):
    """total + new, tile by tile."""
    added = ()
    for t in tl.static_range(COUNT):
        added = added + (total[t] + new[t],)
    return added


@triton.jit
def _scale_each(tiles, weight, COUNT: tl.constexpr):
    """The tiles times `weight`."""
    scaled = ()
    for t in tl.static_range(COUNT):
        scaled = scaled + (weight * tiles[t],)
    return scaled


@triton.jit
def _keep_each(tiles, keep, COUNT: tl.constexpr):
    """The tiles where `keep`, else zeros."""
    kept = ()
    for t in tl.static_range(COUNT):
        kept = kept + (tl.where(keep, tiles[t], 0.0),)
    return kept


@triton.jit
def _plane_gradients(
    grad, oa, g_b, out_b, out_w, high_b, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, ACCESS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """One plane of grad_y taken back through the blur of B: `_row_gradients` for each window of a group, one after the other."""
    EDGES: tl.constexpr = AXIS_B.n_edge
    OUTPUTS: tl.constexpr = AXIS_B.outputs
    WINDOWS: tl.constexpr = AXIS_B.windows
    COUNT: tl.constexpr = AXIS_W.outputs + AXIS_W.n_edge
    rows = ()
    for u in tl.static_range(OUTPUTS):
        rows = rows + (_row_gradients(grad, oa, g_b + AXIS_B.first + u, out_w, AXIS_W, ACCESS, ACC),)
    plane = ()
    for e in tl.static_range(WINDOWS):
        total = _weighted_sum(rows, e, AXIS_B, COUNT)
        if AXIS_B.edge != "none":
            q = g_b * AXIS_B.s + (AXIS_B.p - AXIS_B.span + e)
            total = _keep_each(total, (q >= AXIS_B.low) & (q <= high_b), COUNT)
            # Seldom taken: a loop, so that there is one copy of it to compile.
            for n in range(EDGES):
                o, exists = _edge_output(n, out_b, AXIS_B)
                weight = _edge_weight(o, exists, q, high_b, AXIS_B, ACC)
                if weight != 0.0:
                    row = _row_gradients(grad, oa, o, out_w, AXIS_W, ACCESS, ACC)
                    total = _add_each(total, _scale_each(row, weight, COUNT), COUNT)
        plane = plane + total
    return plane


@triton.jit
def _window_gradients(
    planes, e: tl.constexpr, grad, g_a, g_b, out_a, out_b, out_w, high_a, high_b, high_w,
    AXIS_A: tl.constexpr, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, ACCESS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of row e of group g_a's windows, from the planes of the outputs that read them: those of W vary fastest."""
    EDGES: tl.constexpr = AXIS_A.n_edge
    WINDOWS_B: tl.constexpr = AXIS_B.windows
    COUNT_W: tl.constexpr = AXIS_W.outputs + AXIS_W.n_edge
    COUNT: tl.constexpr = WINDOWS_B * COUNT_W
    total = _weighted_sum(planes, e, AXIS_A, COUNT)
    if AXIS_A.edge != "none":
        q = g_a * AXIS_A.s + (AXIS_A.p - AXIS_A.span + e)
        total = _keep_each(total, (q >= AXIS_A.low) & (q <= high_a), COUNT)
        for n in range(EDGES):
            o, exists = _edge_output(n, out_a, AXIS_A)
            weight = _edge_weight(o, exists, q, high_a, AXIS_A, ACC)
            if weight != 0.0:
                plane = _plane_gradients(grad, o, g_b, out_b, out_w, high_b, AXIS_B, AXIS_W, ACCESS, ACC)
                total = _add_each(total, _scale_each(plane, weight, COUNT), COUNT)
    gradients = ()
    for b in tl.static_range(WINDOWS_B):
        gradients = gradients + _unblur_row(total[b * COUNT_W : (b + 1) * COUNT_W], grad[1], out_w, high_w, AXIS_W, ACC)
    return gradients


@triton.jit
def _unblur_row(outputs, g, out_w, high_w, AXIS_W: tl.constexpr, ACC: tl.constexpr):
    """`_row_gradients` taken back through the blur of W: a tile for each window that touches a lane's columns."""
    EDGES: tl.constexpr = AXIS_W.n_edge
    WINDOWS: tl.constexpr = AXIS_W.windows
    OUTPUTS: tl.constexpr = AXIS_W.outputs
    columns = ()
    for u in tl.static_range(OUTPUTS):
        columns = columns + ((outputs[u],),)
    windows = ()
    for e in tl.static_range(WINDOWS):
        total = _weighted_sum(columns, e, AXIS_W, 1)[0]
        if AXIS_W.edge != "none":
            q = g * AXIS_W.group + (AXIS_W.p - AXIS_W.span + e)
            total = tl.where((q >= AXIS_W.low) & (q <= high_w), total, 0.0)
            for n in tl.static_range(EDGES):
                o, exists = _edge_output(n, out_w, AXIS_W)
                weight = _edge_weight(o, exists, q, high_w, AXIS_W, ACC)
                # Not 0 * inf where an output does not read the window.
                total += tl.where(weight != 0.0, weight * outputs[OUTPUTS + n], 0.0)
        windows = windows + (total,)
    return windows


@triton.jit
def _route_plane(rows, gradients, g_b, g_w, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr):
    """The gradients of a plane's windows, given to the elements of a group: a tile for each, those of W varying fastest."""
    S_B: tl.constexpr = AXIS_B.s
    GROUP: tl.constexpr = AXIS_W.group
    ROWS: tl.constexpr = len(rows)
    WINDOWS_B: tl.constexpr = AXIS_B.windows
    WINDOWS_W: tl.constexpr = AXIS_W.windows
    row_maxima = ()
    for r in tl.static_range(ROWS):
        row_maxima = row_maxima + (_row_windows(rows[r], AXIS_W),)
    row_gradients = ()
    for t in tl.static_range(WINDOWS_W):
        given = ()
        for e in tl.static_range(WINDOWS_B):
            values = _slots(_each(row_maxima, t), e, AXIS_B)
            given = given + (_route(values, gradients[e * WINDOWS_W + t], g_b, 0, e - AXIS_B.span, AXIS_B),)
        row_gradients = row_gradients + (_gather(given, AXIS_B),)
    elements = ()
    for f_b in tl.static_range(S_B):
        given = ()
        for e in tl.static_range(WINDOWS_W):
            values = _slots(rows[f_b + AXIS_B.span], e, AXIS_W)
            given = given + (_route(values, row_gradients[e][f_b], g_w, 0, e - AXIS_W.span, AXIS_W),)
        row = _gather(given, AXIS_W)
        if AXIS_W.relu:
            row = _rectify_gradients(row, rows[f_b + AXIS_B.span][AXIS_W.span : AXIS_W.span + GROUP], GROUP)
        elements = elements + row
    return elements


@triton.jit
def _rectify_gradients(gradients, values, COUNT: tl.constexpr):
    """The gradients of elements that are rectified, of these values."""
    rectified = ()
    for t in tl.static_range(COUNT):
        rectified = rectified + (tl.where(values[t] <= 0, 0.0, gradients[t]),)
    return rectified


@triton.jit
def _route_windows(held, sums, gradients, group, start: tl.constexpr, AXIS_A: tl.constexpr, COUNT: tl.constexpr):
    """Adds the gradients of the windows that start at row `start` of a group to those of the planes held: COUNT tiles a plane."""
    D: tl.constexpr = AXIS_A.d
    SPAN: tl.constexpr = AXIS_A.span
    given = ()
    for t in tl.static_range(COUNT):
        # A program begins before its first group, by no more groups than these.
        given = given + (_route(_slots(_each(_each(held, 1), t), 0, AXIS_A), gradients[t], group, -2 * SPAN, start, AXIS_A),)
    added = ()
    for r in tl.static_range(SPAN + 1):
        if r % D == 0:
            plane = ()
            for t in tl.static_range(COUNT):
                if r == SPAN:
                    plane = plane + (given[t][r // D],)
                else:
                    plane = plane + (sums[r][t] + given[t][r // D],)
            added = added + (plane,)
        else:
            added = added + (sums[r],)
    return added


@triton.jit
def _next_gradient_row(
    held, sums, x, gradients, e: tl.constexpr, g_a, g_b, AXIS_A: tl.constexpr, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr,
    TAKES_MAX: tl.constexpr, ACCESS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds row e of group g_a's windows. Gives the finished row of grad_x, the planes to hold and the sums under way.

    The sums are the gradients of the maxima of the planes held, from the windows so far.
    """
    SPAN: tl.constexpr = AXIS_A.span
    COUNT: tl.constexpr = AXIS_B.windows * AXIS_W.windows
    if TAKES_MAX:
        held = held + (_plane_windows(x, g_a * AXIS_A.s + e, g_b, AXIS_B, AXIS_W, ACCESS, ACC),)
        sums = _route_windows(held, sums, gradients, g_a, e - SPAN, AXIS_A, COUNT)
        return _route_plane(held[0][0], sums[0], g_b, x[1], AXIS_B, AXIS_W), held[1:], sums[1:]
    elif AXIS_W.relu:
        S_B: tl.constexpr = AXIS_B.s
        GROUP: tl.constexpr = AXIS_W.group
        elements = ()
        for f_b in tl.static_range(S_B):
            values = load_columns(x, g_a * AXIS_A.s + e, g_b * S_B + f_b, 0, GROUP, GROUP, 0.0, ACCESS, ACC)
            elements = elements + _rectify_gradients(gradients[f_b * GROUP : (f_b + 1) * GROUP], values, GROUP)
        return elements, held, sums
    else:
        return gradients, held, sums


@triton.jit(do_not_specialize=[*NUMBERS, *strides_of("g", "x", "dx")])
def _backward_kernel(
    g_ptr, x_ptr, dx_ptr, lanes, channels, groups, size_a, size_b, size_w, out_a, out_b, out_w, high_a, high_b, high_w, rows,
    g_stride_n, g_stride_c, g_stride_a, g_stride_b, g_stride_w,
    x_stride_n, x_stride_c, x_stride_a, x_stride_b, x_stride_w,
    dx_stride_n, dx_stride_c, dx_stride_a, dx_stride_b, dx_stride_w,
    AXIS_A: tl.constexpr, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, TAKES_MAX: tl.constexpr, ACCESS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Shapes: x and dx (N, channels, size_a, size_b, size_w); g (N, channels, out_a, out_b, out_w).

    x is read if TAKES_MAX, or where maxima are rectified. Within a group every window, tap and weight is known at compile time.
    This program processes `rows` successive groups of A, at one group of B, for LANES lanes of a group of W.
    """
    ACC: tl.constexpr = tl.float64 if g_ptr.dtype.element_ty == tl.float64 else tl.float32
    S: tl.constexpr = AXIS_A.s
    S_B: tl.constexpr = AXIS_B.s
    SPAN: tl.constexpr = AXIS_A.span
    GROUP: tl.constexpr = AXIS_W.group
    groups_a = tl.cdiv(size_a, S)
    block, g_b, start = _program(tl.cdiv(size_b, S_B), tl.cdiv(groups_a, rows), rows)
    lane = lane_of(lanes, channels, groups, block, LANES, ACCESS)
    sizes = (size_a, size_b, size_w)
    g_strides = (g_stride_n, g_stride_c, g_stride_a, g_stride_b, g_stride_w)
    x_strides = (x_stride_n, x_stride_c, x_stride_a, x_stride_b, x_stride_w)
    dx_strides = (dx_stride_n, dx_stride_c, dx_stride_a, dx_stride_b, dx_stride_w)
    grad = image_of(g_ptr, lane, AXIS_W.own, (out_a, out_b, out_w), g_strides, ACCESS)
    x = image_of(x_ptr, lane, GROUP, sizes, x_strides, ACCESS)
    dx = image_of(dx_ptr, lane, GROUP, sizes, dx_strides, ACCESS)

    # Rows SPAN to SPAN + s - 1 of a group's windows finish its own rows. Windows that begin before a program's first row reach
    # into it, and hold planes from before themselves: it begins WARM_UP groups early, and does not store those.
    WINDOWS: tl.constexpr = AXIS_B.windows * AXIS_W.windows
    LAST: tl.constexpr = AXIS_A.first + AXIS_A.outputs - 1
    WARM_UP: tl.constexpr = -(-2 * SPAN // S)
    ROWS_B: tl.constexpr = S_B + 2 * AXIS_B.span
    held = ()
    sums = ()
    for r in tl.static_range(SPAN):
        blank = ()
        for row in tl.static_range(ROWS_B):
            blank = blank + (_blank_tiles(GROUP + 2 * AXIS_W.span, LANES, ACCESS, ACC),)
        held = held + ((blank, _blank_tiles(WINDOWS, LANES, ACCESS, ACC)),)
        sums = sums + (_blank_tiles(WINDOWS, LANES, ACCESS, ACC),)
    FIRST: tl.constexpr = AXIS_A.first
    planes = ()
    for u in tl.static_range(FIRST, LAST):
        planes = planes + (_plane_gradients(grad, start - WARM_UP + u, g_b, out_b, out_w, high_b, AXIS_B, AXIS_W, ACCESS, ACC),)
    for step in range(WARM_UP + tl.minimum(rows, groups_a - start)):
        g_a = start - WARM_UP + step
        planes = planes + (_plane_gradients(grad, g_a + LAST, g_b, out_b, out_w, high_b, AXIS_B, AXIS_W, ACCESS, ACC),)
        for f in tl.static_range(S):
            gradients = _window_gradients(
                planes, SPAN + f, grad, g_a, g_b, out_a, out_b, out_w, high_a, high_b, high_w, AXIS_A, AXIS_B, AXIS_W, ACCESS, ACC
            )
            elements, held, sums = _next_gradient_row(
                held, sums, x, gradients, SPAN + f, g_a, g_b, AXIS_A, AXIS_B, AXIS_W, TAKES_MAX, ACCESS, ACC
            )
            for f_b in tl.static_range(S_B):
                columns = elements[f_b * GROUP : (f_b + 1) * GROUP]
                store_columns(dx, g_a * S + f, g_b * S_B + f_b, columns, GROUP, g_a >= start, ACCESS)
        planes = planes[1:]


@functools.cache
def axes_of(window: Window, own: int) -> tuple[Axis, Axis, Axis]:
    """The window's axes as the kernels see them, A, B and W, with `own` outputs a group of W."""
    axes = [axis_of(window, axis, own if axis == window.rank - 1 else 1) for axis in range(window.rank)]
    absent = axis_of(blur_window(1, 1, 1, 0, "binomial", "zeros"), 0, 1)
    return (*axes[:-1], *[absent] * (3 - window.rank), axes[-1])


def axis_of(window: Window, axis: int, own: int) -> Axis:
    """One axis of `window`; its bounds on reading beyond the border hold for every size, so that no size compiles anew."""
    k, s, p, d = window.kernel_size[axis], window.stride[axis], window.padding[axis], window.dilation[axis]
    taps, lead, trail = window.taps[axis], window.lead[axis], window.trail[axis]
    b, span, group = len(taps), d * (k - 1), s * own
    origin = p - span + lead
    first = -((b - 1 - origin) // s)
    outputs = (origin + group + span - 1) // s - first + 1
    low = p - span if window.padding_mode == "partial" else 0
    # The last output's centre is at most s*(outputs - 1) <= size - 1 + p in ceil_mode, size + 2p - 1 - span without.
    slack = span - p if window.ceil_mode else 0
    over = trail + slack if window.padding_mode != "partial" else trail + slack - (span - p)
    mode = "clamp" if window.padding_mode in ("partial", "replicate") else window.padding_mode
    edge = mode if lead + low > 0 or over > 0 else "none"
    sent_back = edge not in ("zeros", "none")
    n_low, n_high = (max(-(-beyond // s), 0) if sent_back else 0 for beyond in (lead + low, over))
    return Axis(
        k=k, s=s, p=p, d=d, b=b, taps=taps, lead=lead, span=span, own=own, group=group, windows=group + span, maps=group - s + b,
        origin=origin, first=first, outputs=outputs, edge=edge, ends_within=lead + trail < b,
        relu=window.activation == "relu", low=low, n_low=n_low, n_edge=n_low + n_high,
    )  # fmt: skip


class Cut(NamedTuple):
    """How a launch is cut: outputs and channels a lane, positions of A that a program streams at most, its warps.

    `programs` are what a large device wants: a launch with fewer streams fewer positions a program, but four at least.
    """

    own: int
    vector: int
    rows: int
    num_warps: int
    programs: int = 2048


# The pinned cuts: of signals and images, and of volumes, whose B axis multiplies a lane's state; with innermost columns, and with
# innermost channels. `own` and `vector` are upper bounds: tensors that are not aligned to them have smaller ones. They balance
# the loads and maxima that a lane's columns share against registers, of which spilling is the end.
CUTS = {
    #            contiguous          channels last       volumes: contiguous  channels last
    "forward": (Cut(4, 1, 16, 4), Cut(2, 4, 16, 4), Cut(2, 1, 8, 4), Cut(1, 4, 8, 4)),
    "backward": (Cut(4, 1, 16, 4), Cut(2, 2, 16, 4), Cut(2, 1, 8, 4), Cut(1, 2, 8, 4)),
    "blur": (Cut(4, 1, 16, 4), Cut(2, 4, 16, 4), Cut(4, 1, 8, 4), Cut(1, 4, 8, 4)),
    "blur backward": (Cut(4, 1, 16, 4), Cut(2, 4, 16, 4), Cut(2, 1, 8, 8), Cut(1, 4, 8, 4)),
}


def cut_for(kernel: str, rank: int, channels_last: bool) -> Cut:
    """The pinned cut of a kernel of CUTS for images of a rank and format."""
    return CUTS[kernel][2 * (rank == 3) + channels_last]


def access_for(cut: Cut, stride: int, alignment: int, inputs: tuple[Layout, ...], output: Layout) -> tuple[int, Access]:
    """The outputs a lane, and how tensors of an input's and of an output's size are read and written: within a cut, as aligned.

    `alignment` is that of their addresses, in elements. All are taken to be laid out as the first input is.
    """
    if inputs[0].is_channels_last:
        vector = min(cut.vector, alignment)
        while vector > 1 and not all(layout.is_cut(1, vector) for layout in (*inputs, output)):
            vector //= 2
        return cut.own, Access(True, vector, False)
    own = cut.own
    while own:
        group = stride * own
        whole = group & (group - 1) == 0 and group <= alignment and output.is_cut(4, own)
        if whole and all(layout.is_cut(4, group) for layout in inputs):
            return own, Access(False, 1, True)
        own //= 2
    return 1, Access(False, 1, False)


def _prepare_forward(x: torch.Tensor, window: Window, misaligned: int) -> tuple[torch.Size, tuple[int, ...], Launch]:
    """The output's shape and strides, and the launch that fills it."""
    check_sizes(x)
    like = empty_output(on_meta(x), window)
    read, written = layout_of(x), layout_of(like)
    cut = cut_for("forward" if window.takes_max else "blur", window.rank, read.is_channels_last)
    own, access = access_for(cut, window.stride[-1], alignment_of(misaligned) // x.element_size(), (read,), written)
    *positions, out_w = written.shape[2:]
    covered = (*positions, -(-out_w // own))
    options = _options(window, own, access, cut, x.device)
    grid, numbers = _numbers(window, access, (read, written), read, written, covered, cut, options["LANES"])
    return like.shape, like.stride(), Launch(_forward_kernel, grid, numbers, x.device, not misaligned, **options)


def _prepare_backward(g: torch.Tensor, x: torch.Tensor, dx: torch.Tensor, window: Window, misaligned: int) -> Launch:
    """The launch that fills dx. x is read where the window takes a maximum."""
    check_sizes(dx)
    layouts = sent, read, written = layout_of(g), layout_of(x), layout_of(dx)
    cut = cut_for("backward" if window.takes_max else "blur backward", window.rank, written.is_channels_last)
    own, access = access_for(cut, window.stride[-1], alignment_of(misaligned) // g.element_size(), (written, read), sent)
    covered = tuple(-(-size // axis.group) for size, axis in zip(written.shape[2:], axes_of(window, own)))
    options = _options(window, own, access, cut, g.device) | {"TAKES_MAX": window.takes_max}
    grid, numbers = _numbers(window, access, layouts, written, sent, covered, cut, options["LANES"])
    return Launch(_backward_kernel, grid, numbers, g.device, not misaligned, **options)


def _options(window: Window, own: int, access: Access, cut: Cut, device: torch.device) -> dict[str, Any]:
    """The kernels' constants and options."""
    axes = dict(zip(("AXIS_A", "AXIS_B", "AXIS_W"), axes_of(window, own)))
    return axes | {"ACCESS": access, "LANES": warp_size(device) * cut.num_warps, "num_warps": cut.num_warps}


def _numbers(
    window: Window, access: Access, layouts: tuple[Layout, ...], x: Layout, y: Layout, covered: tuple[int, ...], cut: Cut,
    lanes_a_program: int,
) -> tuple[int, tuple[int, ...]]:  # fmt: skip
    """The programs of a launch, and a kernel's numbers in their order.

    `layouts` are the arguments'; x is the input's and y the output's; `covered` are the positions of A and B and the groups of W
    that there are programs for.
    """
    n, channels, *sizes = x.shape
    positions_a, positions_b, groups = covered
    lanes = n * channels // access.vector * groups
    blocks = -(-lanes // lanes_a_program) * positions_b
    # (No image has no block.)
    chunks = max(-(-positions_a // cut.rows), min(cut.programs // max(blocks, 1), positions_a // 4))
    rows = -(-positions_a // chunks)
    strides = (stride for layout in layouts for stride in layout.strides)
    numbers = (lanes, channels, groups, *sizes, *y.shape[2:], *_highs(window, x), rows, *strides)
    return blocks * -(-positions_a // rows), numbers


def _highs(window: Window, x: Layout) -> tuple[int, ...]:
    """The last limit of the max map along A, B and W."""
    spatial = [size for axis, size in enumerate(x.shape[2:]) if axis == 2 or axis < window.rank - 1]
    highs = [map_limits(window, axis, size)[1] for axis, size in enumerate(spatial)]
    return (*highs[:-1], *(0,) * (3 - window.rank), highs[-1])


def layout_of(t: torch.Tensor) -> Layout:
    """The layout of a batched tensor of 1 to 3 spatial axes."""
    (n, c, *sizes), (stride_n, stride_c, *strides) = t.shape, t.stride()
    absent = 3 - len(sizes)
    return Layout(
        (n, c, *sizes[:-1], *(1,) * absent, sizes[-1]),
        (stride_n, stride_c, *strides[:-1], *(0,) * absent, strides[-1]),
    )  # fmt: skip


def check_sizes(x: torch.Tensor) -> None:
    """Refuses what the kernels, which count positions along an axis in 32 bits, cannot count twice over.

    Raises:
        ValueError: for a spatial size of 2^30 or more.
    """
    if max(x.shape[2:]) >= 2**30:
        raise ValueError(f"the kernels take spatial sizes below 2^30, got {tuple(x.shape[2:])}: take backend 'reference'")


def max_blur_pool(x: torch.Tensor, window: Window) -> torch.Tensor:
    """Blurred maxima of x, (N, C, *spatial), in x's dtype and memory format."""
    kinds = kinds_of(x)
    key = ("max_blur_pool", window, x.shape, x.device, kinds)
    shape, strides, launch = LAUNCHES.get(key) or keep(key, _prepare_forward(x, window, kinds[-1]))
    y = x.new_empty_strided(shape, strides)
    launch(x, y)
    return y


def max_blur_pool_backward(g: torch.Tensor, x: torch.Tensor, window: Window) -> torch.Tensor:
    """The gradient of x, laid out as x is (contiguous where x overlaps itself), from that of the output."""
    kinds = kinds_of(g, x)
    key = ("max_blur_pool_backward", window, x.shape, x.device, kinds)
    dx = torch.empty_like(x)
    launch = LAUNCHES.get(key) or keep(key, _prepare_backward(g, x, dx, window, kinds[-1]))
    launch(g, x, dx)
    return dx


def blur_pool_backward(g: torch.Tensor, shape: torch.Size, stride: tuple[int, ...], window: Window) -> torch.Tensor:
    """The gradient of an input of a plain blur, of such a shape and strides, in its memory format, from that of the output."""
    kinds = kinds_of(g)
    key = ("blur_pool_backward", window, shape, stride, g.device, kinds)
    found = LAUNCHES.get(key)
    if found is None:
        channels_last = is_channels_last(torch.empty_strided(shape, stride, device="meta"))
        like = empty(list(shape), on_meta(g), channels_last)
        found = keep(key, (like.stride(), _prepare_backward(g, like, like, window, kinds[-1])))
    strides, launch = found
    dx = g.new_empty_strided(shape, strides)
    launch(g, dx, dx)
    return dx
