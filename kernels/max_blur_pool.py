"""Anti-aliased max pooling in one pass: a maximum at every position, then a strided blur of the maxima.

Every kernel sees an image as (N, C, A, B, W): A is the axis its programs stream down (the rows of a 2-d image, the
slices of a 3-d one), W the innermost axis and B the one between (the rows of a 3-d image); an axis that an image has
not got has extent 1. Windows, strides, taps and border modes are compile-time, sizes and memory strides are not: one
binary serves every image size.

An input row is turned, once, into its horizontal maxima under each tap; they are held in registers and serve every
window below that needs them. So the forward asks L1 for (b + k - 1) / s loads an input element (2 for k=2, b=3, s=2),
whatever the window's height. Nothing is saved for the backward: it streams down x again, recomputes which element each
maximum came from, and gathers. No atomics, so two runs give the same bits.

Two numbers, 2-d, k=2, b=3, s=2, per input element of e bytes:
    forward    1.25 e bytes; 2 loads, 1.75 maxima, 1.5 multiply-adds
    backward   2.25 e bytes; 2.75 loads, 3.5 maxima with their places, 2.25 multiply-adds, 4 selects and adds
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from regfast.geometry import Window, blur_window, map_limits
from regfast.layout import empty_output


class Axis(NamedTuple):
    """One axis of a window, known at compile time and whatever the image's size.

    `b` counts the taps, `span` is d*(k - 1), and s + span are the `windows` that touch a group of s elements. `edge` says where
    a position beyond the map's limits is found: "clamp", "reflect", "zeros", or "none" where no output of any size reads there;
    `low` is the first limit, and of the `n_edge` outputs that may read beyond a limit, `n_low` are at the low end.
    """

    k: int
    s: int
    p: int
    d: int
    b: int
    taps: tuple[float, ...]
    lead: int
    span: int
    windows: int
    edge: str
    low: int
    n_low: int
    n_edge: int


@triton.jit
def _later(best, new, outside, CARRY: tl.constexpr):
    """The greater of two samples, `best` the earlier in window order: the first of equals, the last of NaNs.

    A sample is its value and, with CARRY, what travels with it. `outside`: best lies before the image; even -inf beats it.
    """
    if CARRY:
        take = (new[0] > best[0]) | (new[0] != new[0]) | outside
        return (tl.where(take, new[0], best[0]), tl.where(take, new[1], best[1]))
    else:
        return (tl.maximum(best[0], new[0], propagate_nan=tl.PropagateNan.ALL),)


@triton.jit
def _later_each(best, new, outside, COUNT: tl.constexpr, CARRY: tl.constexpr):
    """`_later` over two tuples of samples."""
    merged = ()
    for t in tl.static_range(COUNT):
        merged = merged + (_later(best[t], new[t], outside, CARRY),)
    return merged


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
def _load(plane, a, b, w, other: tl.constexpr, ACC: tl.constexpr):
    """Elements (a, b, w) of every channel of a tile: a and b scalars, w a scalar or a tile's columns.

    plane: the tile's pointers, its mask, the sizes and the strides of A, B and W. Beyond the image, `other`.
    """
    ptr, keep, size_a, size_b, size_w, stride_a, stride_b, stride_w = plane
    inside = ((a >= 0) & (a < size_a) & (b >= 0) & (b < size_b)) & (keep & (w >= 0) & (w < size_w))
    row = ptr + (tl.cast(a, tl.int64) * stride_a + tl.cast(b, tl.int64) * stride_b)
    return tl.load(row + w * stride_w, mask=inside, other=other).to(ACC)


@triton.jit
def _sample(x, t, a, b, w, CARRY: tl.constexpr, ACC: tl.constexpr):
    """The sample at (a, b, w): x's value and, with CARRY, t's."""
    value = _load(x, a, b, w, float("-inf"), ACC)
    if CARRY:
        return (value, _load(t, a, b, w, 0.0, ACC))
    else:
        return (value,)


@triton.jit
def _row_maxima(x, t, a, b, w, high_w, AXIS_W: tl.constexpr, CARRY: tl.constexpr, ACC: tl.constexpr):
    """One input row's maxima under each tap of the outputs `w`: len(taps) samples."""
    K: tl.constexpr = AXIS_W.k
    D: tl.constexpr = AXIS_W.d
    TAPS: tl.constexpr = AXIS_W.b
    first = w * AXIS_W.s - AXIS_W.lead
    maxima = ()
    if AXIS_W.edge == "clamp" or AXIS_W.edge == "reflect":
        for j in tl.static_range(TAPS):
            column = _border(first + j, high_w, AXIS_W) - AXIS_W.p
            best = _sample(x, t, a, b, column, CARRY, ACC)
            for i in tl.static_range(1, K):
                best = _later(best, _sample(x, t, a, b, column + D * i, CARRY, ACC), column + D * (i - 1) < 0, CARRY)
            maxima = maxima + (best,)
    else:
        columns = ()
        for offset in tl.static_range(TAPS + D * (K - 1)):
            columns = columns + (_sample(x, t, a, b, first - AXIS_W.p + offset, CARRY, ACC),)
        for j in tl.static_range(TAPS):
            best = columns[j]
            for i in tl.static_range(1, K):
                best = _later(best, columns[j + D * i], first - AXIS_W.p + j + D * (i - 1) < 0, CARRY)
            maxima = maxima + (best,)
    return maxima


@triton.jit
def _plane_maxima(
    x, t, a, b, w, high_b, high_w, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, CARRY: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """One input plane's maxima under each pair of taps of the outputs (b, w): len(taps_b) * len(taps_w) samples."""
    K: tl.constexpr = AXIS_B.k
    D: tl.constexpr = AXIS_B.d
    TAPS: tl.constexpr = AXIS_B.b
    TAPS_W: tl.constexpr = AXIS_W.b
    first = b * AXIS_B.s - AXIS_B.lead
    maxima = ()
    if AXIS_B.edge == "clamp" or AXIS_B.edge == "reflect":
        for j in tl.static_range(TAPS):
            row = _border(first + j, high_b, AXIS_B) - AXIS_B.p
            best = _row_maxima(x, t, a, row, w, high_w, AXIS_W, CARRY, ACC)
            for i in tl.static_range(1, K):
                new = _row_maxima(x, t, a, row + D * i, w, high_w, AXIS_W, CARRY, ACC)
                best = _later_each(best, new, row + D * (i - 1) < 0, TAPS_W, CARRY)
            maxima = maxima + best
    else:
        rows = ()
        for offset in tl.static_range(TAPS + D * (K - 1)):
            rows = rows + (_row_maxima(x, t, a, first - AXIS_B.p + offset, w, high_w, AXIS_W, CARRY, ACC),)
        for j in tl.static_range(TAPS):
            best = rows[j]
            for i in tl.static_range(1, K):
                best = _later_each(best, rows[j + D * i], first - AXIS_B.p + j + D * (i - 1) < 0, TAPS_W, CARRY)
            maxima = maxima + best
    return maxima


@triton.jit
def _window_maxima(planes, a, AXIS_A: tl.constexpr, COUNT: tl.constexpr, CARRY: tl.constexpr):
    """The maxima of the windows that start at row a, from the COUNT maxima of each plane they cover."""
    K_A: tl.constexpr = AXIS_A.k
    best = planes[0]
    for i in tl.static_range(1, K_A):
        best = _later_each(best, planes[AXIS_A.d * i], a + AXIS_A.d * (i - 1) < 0, COUNT, CARRY)
    return best


@triton.jit
def _blur_plane(maxima, b, w, high_b, high_w, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, CARRY: tl.constexpr):
    """The maxima (or, with CARRY, what came with them) weighted by the taps of B and W and summed: one tile."""
    TAPS_B: tl.constexpr = AXIS_B.b
    TAPS_W: tl.constexpr = AXIS_W.b
    total = 0.0
    for j in tl.static_range(TAPS_B):
        row = 0.0
        for i in tl.static_range(TAPS_W):
            value = maxima[j * TAPS_W + i][CARRY]
            if AXIS_W.edge == "zeros":
                q = w * AXIS_W.s - AXIS_W.lead + i
                value = tl.where((q >= 0) & (q <= high_w), value, 0.0)
            row += AXIS_W.taps[i] * value
        if AXIS_B.edge == "zeros":
            q = b * AXIS_B.s - AXIS_B.lead + j
            row = tl.where((q >= 0) & (q <= high_b), row, 0.0)
        total += AXIS_B.taps[j] * row
    return total


@triton.jit
def _next_map_row(
    held, x, t, q, b, w, high_a, high_b, high_w,
    AXIS_A: tl.constexpr, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, CARRY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Row q of the max map, blurred along B and W, and the plane maxima to hold for row q + 1."""
    COUNT: tl.constexpr = AXIS_B.b * AXIS_W.b
    K: tl.constexpr = AXIS_A.k
    D: tl.constexpr = AXIS_A.d
    first = q - AXIS_A.p
    held = held + (_plane_maxima(x, t, first + D * (K - 1), b, w, high_b, high_w, AXIS_B, AXIS_W, CARRY, ACC),)
    maxima = _window_maxima(held, first, AXIS_A, COUNT, CARRY)
    if AXIS_A.edge == "clamp" or AXIS_A.edge == "reflect":
        if (q < AXIS_A.low) | (q > high_a):
            first = _border(q, high_a, AXIS_A) - AXIS_A.p
            planes = ()
            for offset in tl.static_range(D * (K - 1) + 1):
                planes = planes + (_plane_maxima(x, t, first + offset, b, w, high_b, high_w, AXIS_B, AXIS_W, CARRY, ACC),)
            maxima = _window_maxima(planes, first, AXIS_A, COUNT, CARRY)
    blurred = _blur_plane(maxima, b, w, high_b, high_w, AXIS_B, AXIS_W, CARRY)
    if AXIS_A.edge == "zeros":
        blurred = tl.where((q >= 0) & (q <= high_a), blurred, 0.0)
    return blurred, held[1:]


@triton.jit
def _tile(CHANNELS_LAST: tl.constexpr, block_w, block_c, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """The columns and channels of a tile, shaped to broadcast with the contiguous axis last."""
    w = (block_w * BLOCK_W + tl.arange(0, BLOCK_W)).to(INDEX)
    c = (block_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(INDEX)
    if CHANNELS_LAST:
        return w[:, None], c[None, :]
    else:
        return w[None, :], c[:, None]


@triton.jit
def _blank_tiles(like, COUNT: tl.constexpr, ACC: tl.constexpr):
    """COUNT tiles of zeros."""
    tiles = ()
    for t in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros(like.shape, ACC),)
    return tiles


@triton.jit
def _blank_planes(like, PLANES: tl.constexpr, COUNT: tl.constexpr, CARRY: tl.constexpr, ACC: tl.constexpr):
    """PLANES planes of COUNT samples of zeros."""
    planes = ()
    for p in tl.static_range(PLANES):
        plane = ()
        for t in tl.static_range(COUNT):
            plane = plane + (_blank_tiles(like, CARRY + 1, ACC),)
        planes = planes + (plane,)
    return planes


@triton.jit(do_not_specialize=["size_a", "size_b", "size_w", "out_a", "out_b", "out_w", "high_a", "high_b", "high_w", "rows"])
def _forward_kernel(
    x_ptr, t_ptr, y_ptr, channels, size_a, size_b, size_w, out_a, out_b, out_w, high_a, high_b, high_w, rows,
    x_stride_n, x_stride_c, x_stride_a, x_stride_b, x_stride_w,
    t_stride_n, t_stride_c, t_stride_a, t_stride_b, t_stride_w,
    y_stride_n, y_stride_c, y_stride_a, y_stride_b, y_stride_w,
    AXIS_A: tl.constexpr, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, TANGENT: tl.constexpr, INDEX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Shapes: x and t (N, channels, size_a, size_b, size_w); y (N, channels, out_a, out_b, out_w). t is read with TANGENT only.

    This program processes `rows` successive output rows of A, at one position of B, for a tile of BLOCK_W outputs by
    BLOCK_C channels of one image.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    blocks_w, blocks_c, chunks = tl.cdiv(out_w, BLOCK_W), tl.cdiv(channels, BLOCK_C), tl.cdiv(out_a, rows)
    block_w, pid = pid % blocks_w, pid // blocks_w
    block_c, pid = pid % blocks_c, pid // blocks_c
    b, pid = pid % out_b, pid // out_b
    chunk, n = pid % chunks, (pid // chunks).to(tl.int64)
    w, c = _tile(CHANNELS_LAST, block_w, block_c, BLOCK_W, BLOCK_C, INDEX)

    x = (x_ptr + n * x_stride_n + c * x_stride_c, c < channels, size_a, size_b, size_w, x_stride_a, x_stride_b, x_stride_w)
    t = (t_ptr + n * t_stride_n + c * t_stride_c, c < channels, size_a, size_b, size_w, t_stride_a, t_stride_b, t_stride_w)
    y = y_ptr + n * y_stride_n + c * y_stride_c + tl.cast(b, tl.int64) * y_stride_b + w * y_stride_w
    keep = (c < channels) & (w < out_w)

    S: tl.constexpr = AXIS_A.s
    TAPS: tl.constexpr = AXIS_A.b
    SPAN: tl.constexpr = AXIS_A.span
    COUNT: tl.constexpr = AXIS_B.b * AXIS_W.b
    # Successive outputs share TAPS - S rows of the map, and successive rows of it SPAN planes of maxima. The first
    # outputs of a program find neither: it begins WARM_UP outputs early, and does not store those.
    SHARED: tl.constexpr = max(TAPS - S, 0)
    WARM_UP: tl.constexpr = -(-(SHARED + SPAN) // S)
    held = _blank_planes(w + c, SPAN, COUNT, TANGENT, ACC)
    shared = _blank_tiles(w + c, SHARED, ACC)
    start = chunk * rows
    for o in range(start - WARM_UP, tl.minimum(start + rows, out_a)):
        q = o * S - AXIS_A.lead + SHARED
        for j in tl.static_range(S):
            row, held = _next_map_row(held, x, t, q + j, b, w, high_a, high_b, high_w, AXIS_A, AXIS_B, AXIS_W, TANGENT, ACC)
            shared = shared + (row,)
        total = 0.0
        for j in tl.static_range(TAPS):
            total += AXIS_A.taps[j] * shared[j]
        tl.store(y + tl.cast(o, tl.int64) * y_stride_a, total.to(y_ptr.dtype.element_ty), mask=keep & (o >= start))
        shared = shared[S:]


@triton.jit
def _row_places(x, a, b, g, AXIS_W: tl.constexpr, ACC: tl.constexpr):
    """One row's maxima, with the slot each came from, of every window that touches the columns of the groups `g`.

    Group g is columns s*g to s*g + s - 1; window e of it starts at column s*g - d*(k - 1) + e.
    """
    S_W: tl.constexpr = AXIS_W.s
    K: tl.constexpr = AXIS_W.k
    D: tl.constexpr = AXIS_W.d
    SPAN: tl.constexpr = D * (K - 1)
    first = g * S_W - SPAN
    columns = ()
    for offset in tl.static_range(S_W + 2 * SPAN):
        columns = columns + (_load(x, a, b, first + offset, float("-inf"), ACC),)
    places = ()
    for e in tl.static_range(S_W + SPAN):
        best = (columns[e], tl.zeros(columns[e].shape, tl.int32))
        for i in tl.static_range(1, K):
            best = _later(best, (columns[e + D * i], i), first + e + D * (i - 1) < 0, True)
        places = places + (best,)
    return places


@triton.jit
def _shift_slots(places, by: tl.constexpr, COUNT: tl.constexpr):
    """Samples whose slots begin at `by`."""
    shifted = ()
    for e in tl.static_range(COUNT):
        shifted = shifted + ((places[e][0], places[e][1] + by),)
    return shifted


@triton.jit
def _plane_places(x, a, g_b, g_w, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, ACC: tl.constexpr):
    """`_row_places` over the windows of B too, those of W varying fastest. Slots count row-major."""
    S_B: tl.constexpr = AXIS_B.s
    K: tl.constexpr = AXIS_B.k
    D: tl.constexpr = AXIS_B.d
    SPAN: tl.constexpr = D * (K - 1)
    WINDOWS_W: tl.constexpr = AXIS_W.windows
    first = g_b * S_B - SPAN
    rows = ()
    for offset in tl.static_range(S_B + 2 * SPAN):
        rows = rows + (_row_places(x, a, first + offset, g_w, AXIS_W, ACC),)
    places = ()
    for e in tl.static_range(S_B + SPAN):
        best = rows[e]
        for i in tl.static_range(1, K):
            new = _shift_slots(rows[e + D * i], AXIS_W.k * i, WINDOWS_W)
            best = _later_each(best, new, first + e + D * (i - 1) < 0, WINDOWS_W, True)
        places = places + best
    return places


@triton.jit
def _window_places(planes, a, AXIS_A: tl.constexpr, SLOTS: tl.constexpr, COUNT: tl.constexpr):
    """The maxima, with their slots, of the windows that start at row a, from the COUNT of each plane they cover."""
    K_A: tl.constexpr = AXIS_A.k
    best = planes[0]
    for i in tl.static_range(1, K_A):
        new = _shift_slots(planes[AXIS_A.d * i], SLOTS * i, COUNT)
        best = _later_each(best, new, a + AXIS_A.d * (i - 1) < 0, COUNT, True)
    return best


@triton.jit
def _edge_output(n: tl.constexpr, outputs, AXIS: tl.constexpr):
    """The n-th output that may read beyond a limit, and whether there is one: the low ones first, then those at the high end."""
    if n < AXIS.n_low:
        return n, n < outputs
    else:
        o = outputs - 1 - (n - AXIS.n_low)
        return o, o >= AXIS.n_low


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
def _row_adjoint(grad, oa, ob, g, out_w, high_w, AXIS_W: tl.constexpr, ACC: tl.constexpr):
    """One row of grad_y, taken back through the blur of W to every window that touches the groups `g`: a tuple of tiles."""
    EDGES_W: tl.constexpr = AXIS_W.n_edge
    S: tl.constexpr = AXIS_W.s
    TAPS: tl.constexpr = AXIS_W.b
    SPAN: tl.constexpr = AXIS_W.span
    # Output g + u reads window e with tap ORIGIN + e - s*u.
    ORIGIN: tl.constexpr = AXIS_W.p - SPAN + AXIS_W.lead
    FIRST: tl.constexpr = -((TAPS - 1 - ORIGIN) // S)
    LAST: tl.constexpr = (ORIGIN + S + SPAN - 1) // S
    columns = ()
    for u in tl.static_range(FIRST, LAST + 1):
        columns = columns + (_load(grad, oa, ob, g + u, 0.0, ACC),)
    adjoint = ()
    for e in tl.static_range(S + SPAN):
        total = tl.zeros(columns[0].shape, ACC)
        for u in tl.static_range(FIRST, LAST + 1):
            if ORIGIN + e - S * u >= 0 and ORIGIN + e - S * u < TAPS:
                total += AXIS_W.taps[ORIGIN + e - S * u] * columns[u - FIRST]
        if AXIS_W.edge != "none":
            q = g * S + (AXIS_W.p - SPAN + e)
            total = tl.where((q >= AXIS_W.low) & (q <= high_w), total, 0.0)
            if AXIS_W.edge != "zeros":
                for n in tl.static_range(EDGES_W):
                    o, exists = _edge_output(n, out_w, AXIS_W)
                    total += _edge_weight(o, exists, q, high_w, AXIS_W, ACC) * _load(grad, oa, ob, o, 0.0, ACC)
        adjoint = adjoint + (total,)
    return adjoint


@triton.jit
def _weighted_sum(rows, e: tl.constexpr, FIRST: tl.constexpr, AXIS: tl.constexpr, COUNT: tl.constexpr):
    """Window e's gradient from the adjoint rows of the outputs g + FIRST, g + FIRST + 1, ...: COUNT tiles."""
    TAPS: tl.constexpr = AXIS.b
    ROWS: tl.constexpr = len(rows)
    TAP: tl.constexpr = AXIS.p - AXIS.span + AXIS.lead + e
    total = ()
    for t in tl.static_range(COUNT):
        tile = tl.zeros_like(rows[0][t])
        for r in tl.static_range(ROWS):
            if TAP - AXIS.s * (FIRST + r) >= 0 and TAP - AXIS.s * (FIRST + r) < TAPS:
                tile += AXIS.taps[TAP - AXIS.s * (FIRST + r)] * rows[r][t]
        total = total + (tile,)
    return total


@triton.jit
def _add_each(total, weight, new, COUNT: tl.constexpr):
    """total + weight * new, tile by tile."""
    added = ()
    for t in tl.static_range(COUNT):
        added = added + (total[t] + weight * new[t],)
    return added


@triton.jit
def _keep_each(tiles, keep, COUNT: tl.constexpr):
    """The tiles where `keep`, else zeros."""
    kept = ()
    for t in tl.static_range(COUNT):
        kept = kept + (tl.where(keep, tiles[t], 0.0),)
    return kept


@triton.jit
def _plane_adjoint(
    grad, oa, g_b, g_w, out_b, out_w, high_b, high_w, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """One plane of grad_y taken back through the blurs of B and W: a tile for each window, those of W varying fastest."""
    EDGES_B: tl.constexpr = AXIS_B.n_edge
    S: tl.constexpr = AXIS_B.s
    SPAN: tl.constexpr = AXIS_B.span
    ORIGIN: tl.constexpr = AXIS_B.p - SPAN + AXIS_B.lead
    FIRST: tl.constexpr = -((AXIS_B.b - 1 - ORIGIN) // S)
    LAST: tl.constexpr = (ORIGIN + S + SPAN - 1) // S
    WINDOWS_W: tl.constexpr = AXIS_W.windows
    rows = ()
    for u in tl.static_range(FIRST, LAST + 1):
        rows = rows + (_row_adjoint(grad, oa, g_b + u, g_w, out_w, high_w, AXIS_W, ACC),)
    adjoint = ()
    for e in tl.static_range(S + SPAN):
        total = _weighted_sum(rows, e, FIRST, AXIS_B, WINDOWS_W)
        if AXIS_B.edge != "none":
            q = g_b * S + (AXIS_B.p - SPAN + e)
            total = _keep_each(total, (q >= AXIS_B.low) & (q <= high_b), WINDOWS_W)
            if AXIS_B.edge != "zeros":
                for n in tl.static_range(EDGES_B):
                    o, exists = _edge_output(n, out_b, AXIS_B)
                    weight = _edge_weight(o, exists, q, high_b, AXIS_B, ACC)
                    if weight != 0.0:
                        row = _row_adjoint(grad, oa, o, g_w, out_w, high_w, AXIS_W, ACC)
                        total = _add_each(total, weight, row, WINDOWS_W)
        adjoint = adjoint + total
    return adjoint


@triton.jit
def _window_adjoint(
    planes, FIRST: tl.constexpr, e: tl.constexpr, grad, g_a, g_b, g_w, out_a, out_b, out_w, high_a, high_b, high_w,
    AXIS_A: tl.constexpr, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of row e of group g_a's windows, from the adjoint planes of the outputs g_a + FIRST onwards."""
    EDGES_A: tl.constexpr = AXIS_A.n_edge
    COUNT: tl.constexpr = AXIS_B.windows * AXIS_W.windows
    total = _weighted_sum(planes, e, FIRST, AXIS_A, COUNT)
    if AXIS_A.edge != "none":
        q = g_a * AXIS_A.s + (AXIS_A.p - AXIS_A.span + e)
        total = _keep_each(total, (q >= AXIS_A.low) & (q <= high_a), COUNT)
        if AXIS_A.edge != "zeros":
            for n in tl.static_range(EDGES_A):
                o, exists = _edge_output(n, out_a, AXIS_A)
                weight = _edge_weight(o, exists, q, high_a, AXIS_A, ACC)
                if weight != 0.0:
                    plane = _plane_adjoint(grad, o, g_b, g_w, out_b, out_w, high_b, high_w, AXIS_B, AXIS_W, ACC)
                    total = _add_each(total, weight, plane, COUNT)
    return total


@triton.jit
def _gather(places, adjoint, slot_a: tl.constexpr, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr):
    """What a row of windows gives to the elements in its slot `slot_a` of A: a tile for each of a group's s_b * s_w elements."""
    S_B: tl.constexpr = AXIS_B.s
    S_W: tl.constexpr = AXIS_W.s
    K_B: tl.constexpr = AXIS_B.k
    K_W: tl.constexpr = AXIS_W.k
    gathered = ()
    for f_b in tl.static_range(S_B):
        for f_w in tl.static_range(S_W):
            total = tl.zeros_like(adjoint[0])
            for i_b in tl.static_range(K_B):
                for i_w in tl.static_range(K_W):
                    # Element f is in slot i of the window that starts d*i before it.
                    total += _given(
                        places,
                        adjoint,
                        (f_b + AXIS_B.span - AXIS_B.d * i_b) * AXIS_W.windows + f_w + AXIS_W.span - AXIS_W.d * i_w,
                        (slot_a * K_B + i_b) * K_W + i_w,
                    )
            gathered = gathered + (total,)
    return gathered


@triton.jit
def _given(places, adjoint, window: tl.constexpr, slot: tl.constexpr):
    """The window's gradient where its maximum came from `slot`, else zero."""
    return tl.where(places[window][1] == slot, adjoint[window], 0.0)


@triton.jit
def _next_gradient_row(
    held, sums, x, adjoint, e: tl.constexpr, g_a, g_b, g_w,
    AXIS_A: tl.constexpr, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, TAKES_MAX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds row e of group g_a's windows. Gives the finished row of grad_x, the plane maxima to hold and the sums under way."""
    K: tl.constexpr = AXIS_A.k
    D: tl.constexpr = AXIS_A.d
    SPAN: tl.constexpr = D * (K - 1)
    WINDOWS: tl.constexpr = AXIS_B.windows * AXIS_W.windows
    if TAKES_MAX:
        held = held + (_plane_places(x, g_a * AXIS_A.s + e, g_b, g_w, AXIS_B, AXIS_W, ACC),)
        places = _window_places(held, g_a * AXIS_A.s + e - SPAN, AXIS_A, AXIS_B.k * AXIS_W.k, WINDOWS)
        added = ()
        for r in tl.static_range(SPAN + 1):
            if r == SPAN:
                added = added + (_gather(places, adjoint, K - 1, AXIS_B, AXIS_W),)
            elif r % D == 0:
                added = added + (_add_each(sums[r], 1.0, _gather(places, adjoint, r // D, AXIS_B, AXIS_W), AXIS_B.s * AXIS_W.s),)
            else:
                added = added + (sums[r],)
        return added[0], held[1:], added[1:]
    else:
        return adjoint, held, sums


@triton.jit
def _blank_places(like, PLANES: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr):
    """PLANES planes of COUNT maxima and slots of zeros."""
    planes = ()
    for p in tl.static_range(PLANES):
        plane = ()
        for t in tl.static_range(COUNT):
            plane = plane + ((tl.zeros(like.shape, ACC), tl.zeros(like.shape, tl.int32)),)
        planes = planes + (plane,)
    return planes


@triton.jit(do_not_specialize=["size_a", "size_b", "size_w", "out_a", "out_b", "out_w", "high_a", "high_b", "high_w", "groups"])
def _backward_kernel(
    g_ptr, x_ptr, dx_ptr, channels, size_a, size_b, size_w, out_a, out_b, out_w, high_a, high_b, high_w, groups,
    g_stride_n, g_stride_c, g_stride_a, g_stride_b, g_stride_w,
    x_stride_n, x_stride_c, x_stride_a, x_stride_b, x_stride_w,
    dx_stride_n, dx_stride_c, dx_stride_a, dx_stride_b, dx_stride_w,
    AXIS_A: tl.constexpr, AXIS_B: tl.constexpr, AXIS_W: tl.constexpr, TAKES_MAX: tl.constexpr, INDEX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Shapes: x and dx (N, channels, size_a, size_b, size_w); g (N, channels, out_a, out_b, out_w). x is read if TAKES_MAX.

    A group is the s input rows (columns) that begin at a multiple of the stride s: within it every window, tap and
    weight is known at compile time. This program processes `groups` successive groups of A, at one group of B, for a tile of
    BLOCK_W groups of W by BLOCK_C channels of one image.
    """
    ACC: tl.constexpr = tl.float64 if g_ptr.dtype.element_ty == tl.float64 else tl.float32
    S: tl.constexpr = AXIS_A.s
    S_B: tl.constexpr = AXIS_B.s
    S_W: tl.constexpr = AXIS_W.s
    SPAN: tl.constexpr = AXIS_A.span
    pid = tl.program_id(0)
    groups_a, groups_b, groups_w = tl.cdiv(size_a, S), tl.cdiv(size_b, S_B), tl.cdiv(size_w, S_W)
    blocks_w, blocks_c, chunks = tl.cdiv(groups_w, BLOCK_W), tl.cdiv(channels, BLOCK_C), tl.cdiv(groups_a, groups)
    block_w, pid = pid % blocks_w, pid // blocks_w
    block_c, pid = pid % blocks_c, pid // blocks_c
    g_b, pid = pid % groups_b, pid // groups_b
    chunk, n = pid % chunks, (pid // chunks).to(tl.int64)
    g_w, c = _tile(CHANNELS_LAST, block_w, block_c, BLOCK_W, BLOCK_C, INDEX)

    grad = (g_ptr + n * g_stride_n + c * g_stride_c, c < channels, out_a, out_b, out_w, g_stride_a, g_stride_b, g_stride_w)
    x = (x_ptr + n * x_stride_n + c * x_stride_c, c < channels, size_a, size_b, size_w, x_stride_a, x_stride_b, x_stride_w)
    dx = dx_ptr + n * dx_stride_n + c * dx_stride_c

    # Output g + u reads row e of group g's windows with tap ORIGIN + e - s*u; rows SPAN to SPAN + s - 1 of them finish the
    # group's own rows. Windows that begin before a program's first row reach into it, and hold planes from before themselves: it
    # begins WARM_UP groups early, and does not store those.
    WINDOWS: tl.constexpr = AXIS_B.windows * AXIS_W.windows
    ORIGIN: tl.constexpr = AXIS_A.p - SPAN + AXIS_A.lead
    FIRST: tl.constexpr = -((AXIS_A.b - 1 - ORIGIN - SPAN) // S)
    LAST: tl.constexpr = (ORIGIN + S + SPAN - 1) // S
    WARM_UP: tl.constexpr = -(-2 * SPAN // S)
    held = _blank_places(g_w + c, SPAN, WINDOWS, ACC)
    sums = ()
    for r in tl.static_range(SPAN):
        sums = sums + (_blank_tiles(g_w + c, S_B * S_W, ACC),)
    start = chunk * groups
    planes = ()
    for u in tl.static_range(FIRST, LAST):
        planes = planes + (
            _plane_adjoint(grad, start - WARM_UP + u, g_b, g_w, out_b, out_w, high_b, high_w, AXIS_B, AXIS_W, ACC),
        )
    for g_a in range(start - WARM_UP, tl.minimum(start + groups, groups_a)):
        planes = planes + (_plane_adjoint(grad, g_a + LAST, g_b, g_w, out_b, out_w, high_b, high_w, AXIS_B, AXIS_W, ACC),)
        for f in tl.static_range(S):
            adjoint = _window_adjoint(
                planes, FIRST, SPAN + f, grad, g_a, g_b, g_w, out_a, out_b, out_w, high_a, high_b, high_w,
                AXIS_A, AXIS_B, AXIS_W, ACC,
            )  # fmt: skip
            row, held, sums = _next_gradient_row(
                held, sums, x, adjoint, SPAN + f, g_a, g_b, g_w, AXIS_A, AXIS_B, AXIS_W, TAKES_MAX, ACC
            )
            a = g_a * S + f
            for f_b in tl.static_range(S_B):
                b = g_b * S_B + f_b
                to = dx + (tl.cast(a, tl.int64) * dx_stride_a + tl.cast(b, tl.int64) * dx_stride_b)
                for f_w in tl.static_range(S_W):
                    w = g_w * S_W + f_w
                    keep = (g_a >= start) & (a < size_a) & (b < size_b) & (c < channels) & (w < size_w)
                    tl.store(to + w * dx_stride_w, row[f_b * S_W + f_w].to(dx_ptr.dtype.element_ty), mask=keep)
        planes = planes[1:]


@functools.cache
def axes_of(window: Window) -> tuple[Axis, Axis, Axis]:
    """The window's axes as the kernels see them: A, B and W."""
    axes = [axis_of(window, axis) for axis in range(window.rank)]
    absent = axis_of(blur_window(1, 1, 1, 0, "binomial", "zeros"), 0)
    if window.rank == 1:
        return absent, absent, axes[0]
    if window.rank == 2:
        return axes[0], absent, axes[1]
    return axes[0], axes[1], axes[2]


def axis_of(window: Window, axis: int) -> Axis:
    """One axis of `window`; its bounds on reading beyond the border hold for every size, so that no size compiles anew."""
    k, s, p, d = window.kernel_size[axis], window.stride[axis], window.padding[axis], window.dilation[axis]
    taps, lead, trail = window.taps[axis], window.lead[axis], window.trail[axis]
    span = d * (k - 1)
    low = p - span if window.padding_mode == "partial" else 0
    # The last output's centre is at most s*(outputs - 1) <= size - 1 + p in ceil_mode, size + 2p - 1 - span without.
    slack = span - p if window.ceil_mode else 0
    over = trail + slack if window.padding_mode != "partial" else trail + slack - (span - p)
    mode = "clamp" if window.padding_mode in ("partial", "replicate") else window.padding_mode
    edge = mode if lead + low > 0 or over > 0 else "none"
    n_low, n_high = max(-(-(lead + low) // s), 0), max(-(-over // s), 0)
    return Axis(k, s, p, d, len(taps), taps, lead, span, s + span, edge, low, n_low, n_low + n_high)


def five_axes(t: torch.Tensor) -> torch.Tensor:
    """A batched tensor of 1 to 3 spatial axes as (N, C, A, B, W), a view."""
    if t.ndim == 3:
        return t[:, :, None, None]
    if t.ndim == 4:
        return t.unsqueeze(3)
    return t


class Blocks(NamedTuple):
    """How a launch is cut: a tile of w columns by c channels, `rows` rows (groups, in the backward) a program, warps."""

    w: int
    c: int
    rows: int
    num_warps: int


def blocks_for(columns: int, channels: int, rows: int, others: int, channels_last: bool, tiles: int) -> Blocks:
    """The cut for a shape class; `others` counts what else the grid runs over, `tiles` how many tiles a thread's state holds.

    With innermost channels, four elements a thread keep a 2-d state in registers and make 64-bit loads of half precision.
    Innermost columns are read at the stride, which makes no wide loads, so that fewer elements and more warps do as well; and
    states of many tiles leave room for fewer. A program streams all rows, unless that leaves a large device without programs.
    """
    elements = 128 * max(4 // -(-tiles // 8) if channels_last else 2 // -(-tiles // 4), 1)
    fast, slow = (channels, columns) if channels_last else (columns, channels)
    block_fast = min(triton.next_power_of_2(fast), elements, 128)
    block_slow = min(triton.next_power_of_2(slow), elements // block_fast)
    block_w, block_c = (block_slow, block_fast) if channels_last else (block_fast, block_slow)
    programs = others * -(-columns // block_w) * -(-channels // block_c)
    chunks = min(max(16384 // max(programs, 1), 1), max(rows // 8, 1))
    return Blocks(block_w, block_c, -(-rows // chunks), num_warps=4)


def index_type(*tensors: torch.Tensor) -> tl.dtype:
    """What counts elements within a tile's row: int64 where the channels and columns of a tensor span 2^31 elements or more."""
    spans = ((t.shape[1] - 1) * t.stride(1) + (t.shape[-1] - 1) * t.stride(-1) for t in tensors)
    return tl.int64 if any(span >= 2**31 - 2**16 for span in spans) else tl.int32


def launch_forward(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, window: Window, tangent: bool) -> torch.Tensor:
    """Fills y, (N, C, *out), with the blurred maxima of x, or with t, (N, C, *size) like x, read where they came from."""
    if y.numel() == 0:
        return y
    x5, t5, y5 = five_axes(x), five_axes(t), five_axes(y)
    axes = axes_of(window)
    n, channels, out_a, out_b, out_w = y5.shape
    channels_last = x5.stride(1) < x5.stride(4)
    # A border that sends positions elsewhere shares no loads among windows, and so holds more at a time.
    remapped = window.takes_max and any(axis.edge in ("clamp", "reflect") for axis in axes)
    tiles = axes[1].b * axes[2].b * (1 + tangent) * (1 + remapped)
    blocks = blocks_for(out_w, channels, out_a, n * out_b, channels_last, tiles)
    grid = (n * -(-out_a // blocks.rows) * out_b * -(-channels // blocks.c) * -(-out_w // blocks.w),)
    with device_guard(x):
        _forward_kernel[grid](
            x5, t5, y5, channels, *x5.shape[2:], *y5.shape[2:], *_highs(window, x), blocks.rows,
            *x5.stride(), *t5.stride(), *y5.stride(),
            *axes, TANGENT=tangent, INDEX=index_type(x5, t5, y5), CHANNELS_LAST=channels_last,
            BLOCK_W=blocks.w, BLOCK_C=blocks.c, num_warps=blocks.num_warps,
        )  # fmt: skip
    return y


def launch_backward(g: torch.Tensor, x: torch.Tensor, dx: torch.Tensor, window: Window) -> torch.Tensor:
    """Fills dx with the gradient that g, (N, C, *out), sends back to x; x is not read where the window takes no maximum."""
    if dx.numel() == 0:
        return dx
    g5, x5, dx5 = five_axes(g), five_axes(x), five_axes(dx)
    axes = axes_of(window)
    n, channels, *sizes = dx5.shape
    groups_a, groups_b, groups_w = (-(-size // axis.s) for size, axis in zip(sizes, axes))
    channels_last = dx5.stride(1) < dx5.stride(4)
    tiles = axes[1].windows * axes[2].windows * 2
    blocks = blocks_for(groups_w, channels, groups_a, n * groups_b, channels_last, tiles)
    grid = (n * -(-groups_a // blocks.rows) * groups_b * -(-channels // blocks.c) * -(-groups_w // blocks.w),)
    with device_guard(dx):
        _backward_kernel[grid](
            g5, x5, dx5, channels, *sizes, *g5.shape[2:], *_highs(window, dx), blocks.rows,
            *g5.stride(), *x5.stride(), *dx5.stride(),
            *axes, TAKES_MAX=window.takes_max, INDEX=index_type(g5, x5, dx5), CHANNELS_LAST=channels_last,
            BLOCK_W=blocks.w, BLOCK_C=blocks.c, num_warps=blocks.num_warps,
        )  # fmt: skip
    return dx


def _highs(window: Window, x: torch.Tensor) -> tuple[int, int, int]:
    """The last limit of the max map along A, B and W."""
    highs = [map_limits(window, axis, x.shape[axis + 2])[1] for axis in range(window.rank)]
    return (*highs[:-1], *[0] * (3 - window.rank), highs[-1]) if window.rank > 1 else (0, 0, highs[0])


def device_guard(x: torch.Tensor):
    """Makes x's device the current one while a kernel is launched on it; nothing to guard on the CPU (the interpreter)."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def max_blur_pool(x: torch.Tensor, window: Window) -> torch.Tensor:
    """Blurred maxima of x, (N, C, *spatial), in x's dtype and memory format."""
    return launch_forward(x, x, empty_output(x, window), window, tangent=False)


def max_blur_pool_tangent(t: torch.Tensor, x: torch.Tensor, window: Window) -> torch.Tensor:
    """The derivative of `max_blur_pool` at x in the direction t: t, like x, read where the maxima of x lie, and blurred."""
    return launch_forward(x, t, empty_output(x, window), window, tangent=True)


def max_blur_pool_backward(g: torch.Tensor, x: torch.Tensor, window: Window) -> torch.Tensor:
    """The gradient of x, laid out as x is (contiguous where x overlaps itself), from that of the output."""
    return launch_backward(g, x, torch.empty_like(x), window)
