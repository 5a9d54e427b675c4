"""The backward of max_blur_pool.py in one pass: gradients of outputs, of windows, of elements.

A program streams down x again and computes each maximum again. The blur's taps turn a row of the
outputs' gradient into rows of the windows' gradients. A window's gradient goes to its greatest
element: first to one of its rows, then to one of its columns, so that a window of k*k costs 2k
selections. Every sum is gathered, so two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from regfast._core.geometry import Window

from .cuts import check_window, layout_of, prepare
from .lanes import (
    NUMBERS,
    image_of,
    lane_of,
    load_columns,
    load_outputs,
    places_of,
    program_of,
    store_columns,
)
from .launch import LAUNCHES, Launch, kinds_of, strides_of
from .launch import keep as keep_launch
from .tiles import add, column, is_greater, keep, route, slide
from .windows import limits, weight


@triton.jit
def _weigh(values, weights, e: tl.constexpr, AXIS: tl.constexpr):
    """The gradient of window e of a group from the gradients of its readers."""
    COUNT: tl.constexpr = len(weights)
    total = tl.zeros_like(values[0])
    for i in tl.static_range(COUNT):
        term = weights[i] * values[AXIS.reads[e][i][0]]
        if AXIS.weighs_borders and (AXIS.kernel > 1 or AXIS.reads[e][i][1] == 0):
            # Avoid 0 * inf where an output does not read the window.
            term = tl.where(weights[i] != 0, term, 0.0)
        if i == 0:
            total = term
        else:
            total += term
    return total


@triton.jit
def _taps_of(e: tl.constexpr, SCALE: tl.constexpr, AXIS: tl.constexpr, ACC: tl.constexpr):
    """The weights with which outputs read window e of a group, without borders, times SCALE."""
    COUNT: tl.constexpr = len(AXIS.reads[e])
    weights = ()
    for i in tl.static_range(COUNT):
        weights = weights + (tl.cast(AXIS.reads[e][i][1] * SCALE, ACC),)
    return weights


@triton.jit
def _weights_of(e: tl.constexpr, own, size, AXIS: tl.constexpr, ACC: tl.constexpr):
    """The weights with which outputs read window e of a group, borders included.

    `own` is the group's first output.
    """
    COUNT: tl.constexpr = len(AXIS.reads[e])
    q = own * AXIS.stride + (e - AXIS.kernel + 1 + AXIS.padding)
    weights = ()
    for i in tl.static_range(COUNT):
        weights = weights + (weight(own + (AXIS.first + AXIS.reads[e][i][0]), q, size, AXIS, ACC),)
    return weights


@triton.jit
def _column_weights(own, width, W: tl.constexpr, ACC: tl.constexpr):
    """The weights with which outputs read each window of a lane; empty without borders."""
    WINDOWS: tl.constexpr = W.windows
    weights = ()
    for e in tl.static_range(WINDOWS):
        if W.weighs_borders:
            weights = weights + (_weights_of(e, own, width, W, ACC),)
    return weights


@triton.jit
def _window_gradients(
    outputs,
    e: tl.constexpr,
    own,
    height,
    weights,
    H: tl.constexpr,
    W: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradients of a lane's windows in row e of a group of rows.

    `outputs` are the gradients of their readers, and `own` is the group's first output.
    """
    READERS: tl.constexpr = W.readers
    WINDOWS: tl.constexpr = W.windows
    # A factor that only scales a row is moved to the columns' weights, which are constants too.
    SCALE: tl.constexpr = 1.0 if H.weighs_borders or W.weighs_borders else H.greatest[e]
    of_rows = _taps_of(e, 1.0 / SCALE, H, ACC)
    if H.weighs_borders:
        low, high = limits(height, H)
        q = own * H.stride + (e - H.kernel + 1 + H.padding)
        if (q < low + H.near) | (q > high - H.near):
            of_rows = _weights_of(e, own, height, H, ACC)
    row = ()
    for u in tl.static_range(READERS):
        row = row + (_weigh(column(outputs, u, H.readers), of_rows, e, H),)
    gradients = ()
    for t in tl.static_range(WINDOWS):
        if W.weighs_borders:
            gradients = gradients + (_weigh(row, weights[t], t, W),)
        else:
            gradients = gradients + (_weigh(row, _taps_of(t, SCALE, W, ACC), t, W),)
    return gradients


@triton.jit
def _route_rows(
    reduced, sums, gradients, top, FIRST: tl.constexpr, W: tl.constexpr, ACCESS: tl.constexpr
):
    """Add a row of windows' gradients to the rows of their greatest elements.

    `sums` are the sums of all these rows but the last.
    """
    K: tl.constexpr = len(reduced)
    WINDOWS: tl.constexpr = W.windows
    dealt = route(reduced, gradients, top, FIRST, WINDOWS, ACCESS.packed)
    totals = ()
    for r in tl.static_range(K):
        if r < K - 1:
            totals = totals + (add(sums[r], column(dealt, r, WINDOWS), WINDOWS),)
        else:
            totals = totals + (column(dealt, r, WINDOWS),)
    return totals


@triton.jit
def _route_columns(columns, gradients, left, W: tl.constexpr, ACCESS: tl.constexpr):
    """The gradients of a lane's own elements from those of a row's windows: a tile for each."""
    K: tl.constexpr = W.kernel
    GROUP: tl.constexpr = W.group
    WINDOWS: tl.constexpr = W.windows
    values = ()
    for i in tl.static_range(K):
        values = values + (columns[i : i + WINDOWS],)
    dealt = route(values, gradients, left, "each", WINDOWS, ACCESS.packed)
    elements = ()
    for f in tl.static_range(GROUP):
        total = dealt[f + K - 1][0]
        for i in tl.static_range(1, K):
            total += dealt[f + K - 1 - i][i]
        elements = elements + (total,)
    return elements


@triton.jit
def _rectify(gradients, columns, ACCESS: tl.constexpr):
    """The gradients where the elements of `columns` are positive or NaN, else 0."""
    COUNT: tl.constexpr = len(gradients)
    zeros = ()
    for t in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros_like(columns[t]),)
    positive = is_greater(columns, zeros, COUNT, ACCESS.packed, "gtu")
    rectified = ()
    for t in tl.static_range(COUNT):
        rectified = rectified + (keep(gradients[t], positive[t]),)
    return rectified


@triton.jit
def _load_row(
    x,
    row,
    height,
    places,
    room,
    H: tl.constexpr,
    W: tl.constexpr,
    ACCESS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """A row of x: a lane's own columns, and the others of the windows that hold them."""
    row = tl.minimum(tl.maximum(row, 0), height - 1)
    return load_columns(x, row, places, 1 - W.kernel, room, W.group, ACCESS, TYPE)


@triton.jit
def _gradient_row(
    g, o, out_height, exists, before, room, W: tl.constexpr, ACCESS: tl.constexpr, ACC: tl.constexpr
):
    """Row o of the output's gradient by `load_outputs`; 0 where the row does not exist."""
    there = exists & (o >= 0) & (o < out_height)
    return load_outputs(g, o, there, before, room, W, ACCESS, ACC)


@triton.jit(do_not_specialize=[*NUMBERS, *strides_of("g", "x", "dx", axes="nchw")])
def _backward_kernel(
    g_ptr, x_ptr, dx_ptr, lanes, channels, groups, height, width, out_height, out_width, rows,
    g_stride_n, g_stride_c, g_stride_h, g_stride_w, x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    dx_stride_n, dx_stride_c, dx_stride_h, dx_stride_w,
    H: tl.constexpr, W: tl.constexpr, RELU: tl.constexpr, ACCESS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program computes the rows of dx that belong to `rows` rows of g, in LANES lanes.

    g_ptr: (N, channels, out_height, out_width)
    x_ptr: (N, channels, height, width), read only for a maximum or an activation
    dx_ptr: (N, channels, height, width)

    An iteration takes H.outputs rows of g.
    """
    ACC: tl.constexpr = tl.float64 if g_ptr.dtype.element_ty == tl.float64 else tl.float32
    TYPE: tl.constexpr = x_ptr.dtype.element_ty if ACCESS.packed else ACC
    S: tl.constexpr = H.stride
    block, start = program_of(tl.cdiv(height, S), rows)
    lane = lane_of(lanes, channels, groups, out_width, block, W.outputs, LANES, ACCESS)
    _, _, own, exists = lane
    g = image_of(
        g_ptr, lane, 1, ACCESS.out_columns, (g_stride_n, g_stride_c, g_stride_h, g_stride_w), ACCESS
    )
    x = image_of(
        x_ptr,
        lane,
        W.stride,
        ACCESS.columns,
        (x_stride_n, x_stride_c, x_stride_h, x_stride_w),
        ACCESS,
    )
    dx = image_of(
        dx_ptr,
        lane,
        W.stride,
        ACCESS.columns,
        (dx_stride_n, dx_stride_c, dx_stride_h, dx_stride_w),
        ACCESS,
    )
    # Rounding changes no value and shows the compiler that a vector's columns exist all or none.
    room, out_room = (width - own * W.stride) // ACCESS.columns * ACCESS.columns, out_width - own
    places = places_of(
        own * W.stride, 1 - W.kernel, W.group + 2 * (W.kernel - 1), width, x[2], W, ACCESS
    )
    weights = _column_weights(own, width, W, ACC)
    if ACCESS.packed:
        top, left = tl.where(start == 0, -1, 0), tl.where(own == 0, -1, 0)
    else:
        top, left = start == 0, own == 0

    # A row is complete when the last window that begins in it is routed. The windows that begin
    # before a program's first row are routed first.
    OUTPUTS: tl.constexpr = H.outputs
    ROWS: tl.constexpr = H.group
    HELD: tl.constexpr = H.kernel - 1
    READERS: tl.constexpr = H.readers
    WINDOWS: tl.constexpr = W.windows
    VECTOR: tl.constexpr = ACCESS.vector
    TAKES_MAX: tl.constexpr = H.kernel > 1 or W.kernel > 1
    inputs, reduced, sums, outputs = (), (), (), ()
    if HELD > 0:
        for u in tl.static_range(READERS):
            o = start + (H.first + u)
            outputs = outputs + (
                _gradient_row(g, o, out_height, exists, own, out_room, W, ACCESS, ACC),
            )
        blank = ()
        for t in tl.static_range(WINDOWS):
            blank = blank + (tl.zeros((LANES, VECTOR), ACC),)
        for e in tl.static_range(HELD):
            columns = _load_row(x, start * S + (e - HELD), height, places, room, H, W, ACCESS, TYPE)
            reduced = reduced + (slide(columns, W.windows, W.kernel, 1, ACCESS.packed),)
            sums = sums + (blank,)
        for e in tl.static_range(HELD):
            columns = _load_row(x, start * S + e, height, places, room, H, W, ACCESS, TYPE)
            inputs = inputs + (columns,)
            reduced = reduced + (slide(columns, W.windows, W.kernel, 1, ACCESS.packed),)
            gradients = _window_gradients(outputs, e, start, height, weights, H, W, ACC)
            sums = _route_rows(reduced, sums, gradients, top, HELD - e, W, ACCESS)[1:]
            reduced = reduced[1:]
        outputs = outputs[: READERS - OUTPUTS]
    else:
        for u in tl.static_range(READERS - OUTPUTS):
            o = start + (H.first + u)
            outputs = outputs + (
                _gradient_row(g, o, out_height, exists, own, out_room, W, ACCESS, ACC),
            )
    for step in range(tl.cdiv(tl.minimum(rows, tl.cdiv(height, S) - start), OUTPUTS)):
        first = start + step * OUTPUTS
        for u in tl.static_range(OUTPUTS):
            o = first + (H.first + READERS - OUTPUTS + u)
            outputs = outputs + (
                _gradient_row(g, o, out_height, exists, own, out_room, W, ACCESS, ACC),
            )
        for e in tl.static_range(ROWS):
            row = first * S + e
            elements = _window_gradients(outputs, HELD + e, first, height, weights, H, W, ACC)
            if TAKES_MAX or RELU:
                inputs = inputs + (
                    _load_row(x, row + HELD, height, places, room, H, W, ACCESS, TYPE),
                )
            if TAKES_MAX:
                reduced = reduced + (slide(inputs[HELD], W.windows, W.kernel, 1, ACCESS.packed),)
                sums = _route_rows(reduced, sums, elements, top, -1, W, ACCESS)
                elements = _route_columns(inputs[0], sums[0], left, W, ACCESS)
                reduced, sums = reduced[1:], sums[1:]
            if RELU:
                elements = _rectify(elements, inputs[0][W.kernel - 1 :], ACCESS)
            inputs = inputs[1:]
            there = exists & (row < height)
            store_columns(dx, row, elements, there, room, ACCESS)
        outputs = outputs[OUTPUTS:]


def max_blur_pool_backward(g: torch.Tensor, x: torch.Tensor, window: Window) -> torch.Tensor:
    """The gradient of x, laid out as x is, or contiguous if x overlaps itself.

    g is the gradient of the output.
    """
    kinds = kinds_of(g, x)
    key = ("max_blur_pool_backward", window, x.shape, x.device, kinds)
    dx = torch.empty_like(x)
    launch = LAUNCHES.get(key) or keep_launch(key, prepare_backward(g, x, dx, window, kinds[-1]))
    launch(g, x, dx)
    return dx


def prepare_backward(
    g: torch.Tensor, x: torch.Tensor, dx: torch.Tensor, window: Window, misaligned: int
) -> Launch:
    """The launch that writes dx. It reads x if the window takes a maximum or is activated."""
    of_images = check_window(dx, window)
    layouts = (layout_of(x), layout_of(dx)), layout_of(g)
    kind = "backward" if window.takes_max else "blur backward"
    return prepare(_backward_kernel, kind, of_images, *layouts, g, misaligned)
