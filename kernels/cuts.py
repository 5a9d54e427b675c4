"""The cuts of the pooling kernels: a lane's elements, a program's rows, and the access to tensors.

A launch takes sizes and strides as numbers. A kernel is compiled for the window, the alignment, the
borders that the image's sizes have and, for narrow images, the columns per lane that fit the width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from regfast._core.geometry import Window, as_image

from .lanes import Access
from .launch import Launch, Layout, alignment_of, target_of
from .windows import axis_of


class Cut(NamedTuple):
    """How a launch is cut.

    `columns` are choices for a lane's elements of a row: the first that fits or, in images no wider
    than NARROW, the cheapest. `vector` is the most channels of a lane where they are innermost.
    `held` bounds the windows' elements that a lane holds. `unroll` is the rows of outputs per
    iteration, `rows` the most rows per program. `programs` fill a large device: a launch with fewer
    programs gives each fewer rows, but at least four.
    """

    columns: tuple[int, ...]
    vector: int
    held: int
    unroll: int
    rows: int = 16
    num_warps: int = 4
    programs: int = 2048


# Up to this width lanes of the first choice could waste more than an eighth of a row, so the lanes
# are cut to fit.
NARROW = 64

# The pinned cuts. They balance the loads and maxima that a lane's columns share against registers,
# short of a spill. The first choice of innermost columns is a vector of 16 bytes, written at once.
COLUMNS = (8, 10, 12, 14, 18)
BORDERS = Cut((4,), 2, 24, 1, num_warps=8)
CUTS = {
    # For 16-bit numbers with innermost columns, and with innermost channels; for wider numbers with
    # innermost columns, and with innermost channels.
    "forward": (
        Cut((*COLUMNS, 20, 22, 24, 26), 1, 72, 2),
        Cut((4,), 4, 72, 2),
        Cut((4,), 1, 72, 2),
        Cut((4,), 4, 72, 1),
    ),
    "backward": (
        Cut(COLUMNS, 1, 44, 1, num_warps=8),
        Cut((8, 4), 2, 40, 1),
        Cut((4,), 1, 24, 1),
        Cut((4,), 1, 24, 1),
    ),
    # The backward where weights depend on the border: each lane holds its own weights.
    "borders": (
        BORDERS._replace(columns=COLUMNS, vector=1, held=22),
        BORDERS._replace(held=40),
        *(BORDERS._replace(vector=1),) * 2,
    ),
    "blur": (
        Cut((*COLUMNS, 20, 22, 24, 26), 1, 72, 1),
        Cut((4,), 4, 72, 2),
        Cut((4,), 1, 72, 1),
        Cut((4,), 4, 72, 1),
    ),
    "blur backward": (
        Cut(COLUMNS, 1, 72, 1),
        Cut((8, 4), 2, 72, 1),
        Cut((4,), 1, 72, 1),
        Cut((8, 4), 2, 72, 1),
    ),
}


def _outputs_for(
    cut: Cut, window: Window, width: int, outputs: int, vector: int, lane_vector: int
) -> int:
    """The outputs of a row that a lane has: those that cost the fewest windows and accesses."""
    s, k = window.stride[1], window.kernel_size[1]
    choices = [max(columns // s, 1) for columns in cut.columns]
    fitting = [own for own in choices if (own * s + k - 1) * k * lane_vector <= cut.held] or [
        min(choices)
    ]

    def cost(own: int) -> float:
        loads = own * s // math.gcd(own * s, width, vector)
        return -(-outputs // own) * (own * s + k - 1 + loads / 2)

    return min(fitting, key=cost) if width <= NARROW else fitting[0]


def _columns_for(group: int, most: int, layouts: tuple[Layout, ...]) -> int:
    """The columns of these layouts that are read or written at once."""
    columns = min(group & -group, most)
    while columns > 1 and not all(layout.is_cut(4, columns) for layout in layouts):
        columns //= 2
    return columns


def _span(layout: Layout) -> int:
    """The elements that an image spans, with two more rows and columns for reads beside it."""
    (_, _, *sizes), (_, _, *strides) = layout.shape, layout.strides
    return sum((size + 2) * abs(stride) for size, stride in zip(sizes, strides))


def prepare(
    kernel: Any, kind: str, window: Window, inputs: tuple[Layout, ...], output: Layout,
    t: torch.Tensor, misaligned: int,
) -> Launch:  # fmt: skip
    """The launch of a kernel, cut by CUTS[kind].

    `inputs` are the layouts of x in a forward, or of x and its gradient in a backward; `output` is
    that of y or its gradient. t gives the dtype and the device. `misaligned` is the last of
    `kinds_of`.
    """
    backward = len(inputs) > 1
    target, itemsize = target_of(t.device), t.element_size()
    n, channels, _, height, width = inputs[0].shape
    out_height, out_width = output.shape[3:]
    channels_last = inputs[0].is_channels_last
    if kind == "backward" and axis_of(window, 1, width, 1).weighs_borders:
        kind = "borders"
    cut, alignment = (
        CUTS[kind][2 * (itemsize > 2) + channels_last],
        max(alignment_of(misaligned) // itemsize, 1),
    )
    vector, dense, most = 1, False, 1
    if channels_last:
        vector = min(cut.vector, alignment)
        while vector > 1 and not all(layout.is_cut(1, vector) for layout in (*inputs, output)):
            vector //= 2
    else:
        dense = all(layout.is_cut(4, 1) for layout in (*inputs, output))
        most = min(alignment, 16 // itemsize) if dense else 1
    w = axis_of(window, 1, width, _outputs_for(cut, window, width, out_width, most, vector))
    h = axis_of(window, 0, height, cut.unroll)
    covered = out_width * w.stride
    whole = out_width >= w.outputs and (covered == width or (covered < width and not backward))
    # A vector cannot hold what a border mode puts beyond the image, and the forward reads that.
    beyond = not backward and (w.moves_windows or (not whole and w.edge == "high"))
    columns = 1 if beyond else _columns_for(math.gcd(w.group, covered), most, inputs)
    out_columns = _columns_for(w.outputs, most, (output,))
    packed = target.packs and itemsize == 2 and window.takes_max
    small = all(_span(layout) < 2**31 for layout in (*inputs, output))
    access = Access(channels_last, vector, dense, columns, out_columns, whole, small, packed)

    groups = -(-width // w.group) if backward else -(-out_width // w.outputs)
    rows_in_all = -(-height // window.stride[0]) if backward else out_height
    lanes, lanes_a_program = n * (channels // vector) * groups, target.warp_size * cut.num_warps
    blocks = -(-lanes // lanes_a_program)
    # An empty batch has no block.
    chunks = max(-(-rows_in_all // cut.rows), min(cut.programs // max(blocks, 1), rows_in_all // 4))
    rows = -(-rows_in_all // chunks)
    layouts = (output, *inputs) if backward else (*inputs, output)
    strides = (layout.strides[axis] for layout in layouts for axis in (0, 1, 3, 4))
    return Launch(
        kernel,
        blocks * -(-rows_in_all // rows),
        (lanes, channels, groups, height, width, out_height, out_width, rows, *strides),
        t.device,
        not misaligned,
        H=h, W=w, RELU=window.activation == "relu", ACCESS=access, LANES=lanes_a_program,
        num_warps=cut.num_warps,
    )  # fmt: skip


def layout_of(t: torch.Tensor) -> Layout:
    """The layout of a batch of images, or of signals: these are the rows of one image."""
    shape, strides = t.shape, t.stride()
    if t.ndim == 3:
        shape, strides = (1, shape[1], shape[0], shape[2]), (0, strides[1], strides[0], strides[2])
    return Layout((*shape[:2], 1, *shape[2:]), (*strides[:2], 0, *strides[2:]))


def check_window(x: torch.Tensor, window: Window) -> Window:
    """The window as the kernels take it: a window of images.

    Raises:
        ValueError: for windows of volumes or with a dilation; and for a spatial size of 2^30 or
            more, because the kernels count positions up to twice a size in 32 bits.
    """
    if not window.is_of_images:
        raise ValueError(
            f"the kernels take windows of signals and images without dilation, got {window}"
        )
    if max(x.shape[2:]) >= 2**30:
        raise ValueError(
            f"the kernels take spatial sizes below 2^30, got {tuple(x.shape[2:])}: "
            "use backend='reference'"
        )
    return as_image(window, None, 0) if window.rank == 1 else window
