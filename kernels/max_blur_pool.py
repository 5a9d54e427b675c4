"""Anti-aliased pooling of images in one pass: a maximum at every position, then a strided blur.

Along rows and columns:
    M[q] = max(x[q - padding + i], i < kernel)
    y[o] = sum_j taps[j] * M[o*stride - lead + j]

A program streams down the rows of a block of lanes (lanes.py). It reduces each row of x along its
columns once. The last `kernel` reduced rows make a row of M, and the last `len(taps)` blurred rows
of M make a row of y. Nothing is saved for the backward: it streams down x again, computes each
maximum again and gathers, first among a window's rows, then along the row, so that a window of k*k
costs 2k selections. There are no atomics, so two runs give the same bits. With a kernel of 1 the
operation is a blur alone.

Windows are known at compile time, sizes and strides are not. A border costs a row or a column of
offsets, computed once per program. Only a border mode that moves whole windows costs more
(windows.py).

Cost with kernel 2, 3 taps, stride 2 and G columns per lane, per input element of e bytes:
    forward     1.25 e bytes; 1 + 2/G loads, 2 + 2/G maxima, 2.25 multiply-adds
    backward    2.25 e bytes; 1.25 + 3/G loads, 2 + 2/G maxima, 2.25 + 2/G multiply-adds,
                4 + 2/G selections and additions
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from regfast._core.geometry import Window
from regfast._core.layout import empty_output

from .cuts import check_window, layout_of, prepare
from .lanes import (
    NUMBERS,
    image_of,
    lane_of,
    load_columns,
    place,
    places_of,
    program_of,
    store_columns,
)
from .launch import LAUNCHES, Launch, keep, kinds_of, on_meta, strides_of
from .max_blur_pool_backward import max_blur_pool_backward
from .tiles import maximum, slide
from .windows import element, is_within, within

__all__ = ["max_blur_pool", "max_blur_pool_backward"]


@triton.jit
def _row_maxima(
    x,
    row,
    height,
    places,
    room,
    W: tl.constexpr,
    H: tl.constexpr,
    ACCESS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The maxima along columns of a row of x that a lane's outputs read."""
    row = element(row, height, H)
    if W.moves_windows:
        columns = load_columns(x, row, places, W.group, room, 0, ACCESS, TYPE)
        return slide(columns, W.maps, W.kernel, W.kernel, ACCESS.packed)
    else:
        columns = load_columns(x, row, places, -W.lead - W.padding, room, W.group, ACCESS, TYPE)
        return slide(columns, W.maps, W.kernel, 1, ACCESS.packed)


@triton.jit
def _window_places(g, width, stride_w, W: tl.constexpr, ACCESS: tl.constexpr):
    """The offsets of each window's elements where the border mode moves windows."""
    MAPS: tl.constexpr = W.maps
    K: tl.constexpr = W.kernel
    places = ()
    for j in tl.static_range(MAPS):
        first = within(g + (j - W.lead), width, W) - W.padding
        for i in tl.static_range(K):
            places = places + (place(element(first + i, width, W) - g, stride_w, ACCESS),)
    return places


@triton.jit
def _blur_row(
    rows,
    q,
    g,
    height,
    width,
    RELU: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    ACCESS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Row q of the max map, blurred along columns: a tile for each own output.

    `rows` are the reduced rows of its windows.
    """
    K: tl.constexpr = H.kernel
    OUTPUTS: tl.constexpr = W.outputs
    TAPS: tl.constexpr = len(W.taps)
    maxima = rows[0]
    for i in tl.static_range(1, K):
        maxima = maximum(maxima, rows[i], W.maps, ACCESS.packed)
    blurred = ()
    for u in tl.static_range(OUTPUTS):
        total = 0.0
        for j in tl.static_range(TAPS):
            value = maxima[u * W.stride + j].to(ACC)
            if RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if W.mode == "zeros" and W.edge != "none":
                value = tl.where(is_within(g + (u * W.stride + j - W.lead), width, W), value, 0.0)
            if j == 0:
                total = W.taps[j] * value
            else:
                total += W.taps[j] * value
        if H.mode == "zeros" and H.edge != "none":
            total = tl.where(is_within(q, height, H), total, 0.0)
        blurred = blurred + (total,)
    return blurred


@triton.jit
def _next_row(
    reduced, x, q, g, height, width, places, room, RELU: tl.constexpr, H: tl.constexpr,
    W: tl.constexpr, ACCESS: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Row q of the max map, blurred along columns, and the reduced rows that row q + 1 needs."""
    K: tl.constexpr = H.kernel
    last = q + (K - 1 - H.padding)
    reduced = reduced + (_row_maxima(x, last, height, places, room, W, H, ACCESS, TYPE),)
    rows = reduced
    if H.moves_windows:
        if is_within(q, height, H) == 0:
            first = within(q, height, H) - H.padding
            rows = ()
            for i in tl.static_range(K):
                rows = rows + (_row_maxima(x, first + i, height, places, room, W, H, ACCESS, TYPE),)
    return _blur_row(rows, q, g, height, width, RELU, H, W, ACCESS, ACC), reduced[1:]


@triton.jit
def _blur_rows(rows, H: tl.constexpr, COUNT: tl.constexpr):
    """A row of y from the blurred rows under its taps."""
    TAPS: tl.constexpr = len(H.taps)
    blurred = ()
    for u in tl.static_range(COUNT):
        total = H.taps[0] * rows[0][u]
        for j in tl.static_range(1, TAPS):
            total += H.taps[j] * rows[j][u]
        blurred = blurred + (total,)
    return blurred


@triton.jit(do_not_specialize=[*NUMBERS, *strides_of("x", "y", axes="nchw")])
def _forward_kernel(
    x_ptr, y_ptr, lanes, channels, groups, height, width, out_height, out_width, rows,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    H: tl.constexpr, W: tl.constexpr, RELU: tl.constexpr, ACCESS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program computes `rows` rows of y in LANES lanes, H.outputs rows per iteration.

    x_ptr: (N, channels, height, width)
    y_ptr: (N, channels, out_height, out_width)
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    TYPE: tl.constexpr = x_ptr.dtype.element_ty if ACCESS.packed else ACC
    block, start = program_of(out_height, rows)
    lane = lane_of(lanes, channels, groups, out_width, block, W.outputs, LANES, ACCESS)
    _, _, own, exists = lane
    x = image_of(
        x_ptr,
        lane,
        W.stride,
        ACCESS.columns,
        (x_stride_n, x_stride_c, x_stride_h, x_stride_w),
        ACCESS,
    )
    y = image_of(
        y_ptr, lane, 1, ACCESS.out_columns, (y_stride_n, y_stride_c, y_stride_h, y_stride_w), ACCESS
    )
    g = own * W.stride
    # Rounding changes no value and shows the compiler that a vector's columns exist all or none.
    room, out_room = width - g, (out_width - own) // ACCESS.out_columns * ACCESS.out_columns
    if W.moves_windows:
        places = _window_places(g, width, x[2], W, ACCESS)
    else:
        places = places_of(g, -W.lead - W.padding, W.maps + W.kernel - 1, width, x[2], W, ACCESS)

    # Successive outputs share rows of M, and these share rows of x.
    OUTPUTS: tl.constexpr = H.outputs
    S: tl.constexpr = H.stride
    HELD: tl.constexpr = H.kernel - 1
    SHARED: tl.constexpr = max(len(H.taps) - H.stride, 0)
    first = start * S - H.lead
    reduced, blurred = (), ()
    for r in tl.static_range(HELD):
        reduced = reduced + (
            _row_maxima(x, first + (r - H.padding), height, places, room, W, H, ACCESS, TYPE),
        )
    for r in tl.static_range(SHARED):
        row, reduced = _next_row(
            reduced, x, first + r, g, height, width, places, room, RELU, H, W, ACCESS, TYPE, ACC
        )
        blurred = blurred + (row,)
    for step in range(tl.cdiv(tl.minimum(rows, out_height - start), OUTPUTS)):
        for u in tl.static_range(OUTPUTS):
            o = start + step * OUTPUTS + u
            for j in tl.static_range(S):
                q = o * S + (SHARED + j - H.lead)
                row, reduced = _next_row(
                    reduced, x, q, g, height, width, places, room, RELU, H, W, ACCESS, TYPE, ACC
                )
                blurred = blurred + (row,)
            out = _blur_rows(blurred, H, W.outputs)
            there = exists & (o < out_height)
            store_columns(y, o, out, there, out_room, ACCESS)
            blurred = blurred[S:]


def max_blur_pool(x: torch.Tensor, window: Window) -> torch.Tensor:
    """Blurred maxima of x, (N, C, L) or (N, C, H, W), in x's dtype and memory format."""
    kinds = kinds_of(x)
    key = ("max_blur_pool", window, x.shape, x.device, kinds)
    shape, strides, launch = LAUNCHES.get(key) or keep(key, _prepare(x, window, kinds[-1]))
    y = x.new_empty_strided(shape, strides)
    launch(x, y)
    return y


def _prepare(
    x: torch.Tensor, window: Window, misaligned: int
) -> tuple[torch.Size, tuple[int, ...], Launch]:
    """The output's shape and strides, and the launch that writes it."""
    of_images = check_window(x, window)
    like = empty_output(on_meta(x), window)
    layouts = (layout_of(x),), layout_of(like)
    kind = "forward" if window.takes_max else "blur"
    return (
        like.shape,
        like.stride(),
        prepare(_forward_kernel, kind, of_images, *layouts, x, misaligned),
    )
