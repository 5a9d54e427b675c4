"""Every operation on tensors of a size: the one table that the tools go through.

`compiled` compiles the kernels of each problem, `traffic` counts their memory accesses, `gpu` times
them on a GPU and runs each under compute-sanitizer. A new operation adds its rows to `PROBLEMS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regfast._core.geometry import Window, blur_window, max_blur_window
from regfast._core.layout import CHANNELS_LAST, empty_output
from regfast.kernels import blur_pool, max_blur_pool, mixup, mixup_cross_entropy, rezero

from .assembly import Way

Shape = tuple[int, ...]
Call = Callable[[], Any]


class Work(NamedTuple):
    """The elements that a thread takes in one turn of its main loop, or without a loop in all.

    `lane` is their number, or a pooling's rows, columns and channels. The instructions around the
    loop run once in `turns` turns, and are not counted where these are many.
    """

    lane: tuple[float, ...]
    turns: float = math.inf

    def per_element(self, way: Way) -> float:
        """The instructions that an element takes."""
        return (way.executed + way.around / self.turns) / math.prod(self.lane)


class Calls(NamedTuple):
    """An operation's launchers on one set of tensors; `backward` is None where there is none.

    `floor` are the bytes that each must read and write, `elements` the number of the input's.
    """

    forward: Call
    backward: Call | None
    floor: tuple[int, int]
    elements: int


class Problem(NamedTuple):
    """An operation on tensors of a size.

    `directions` are the kernels that are compiled: a forward or a backward may launch a second one,
    "order" or "finish". `formats` says whether channels are innermost. `make` takes a shape, a
    dtype, a format and a device, and draws the tensors (without data on "meta"). `work` takes a
    launch's arguments by name, and the threads of a program. `toy` is a shape of some ten programs.
    Where a direction launches one kernel several times, `launch` is the number of the one that is
    compiled. A `rare` problem is compiled for fewer targets and dtypes.
    """

    directions: tuple[str, ...]
    formats: tuple[bool, ...]
    make: Callable[[Shape, torch.dtype, bool, str], Calls]
    work: Callable[[dict[str, Any], int], Work | None]
    shape: Shape
    toy: Shape
    launch: int = 0
    rare: bool = False

    def calls(
        self, dtype: torch.dtype, channels_last: bool, device: str = "meta", toy: bool = False
    ) -> Calls:
        """The launchers on fresh tensors of the problem's shape, or of its toy."""
        return self.make(self.toy if toy else self.shape, dtype, channels_last, device)


def draw(
    shape: Shape, dtype: torch.dtype, device: str, channels_last: bool = False, high: int = 256
) -> Tensor:
    """A random tensor: normal numbers, or integers below `high`. It has no data on "meta"."""
    memory_format = CHANNELS_LAST[len(shape) - 2] if channels_last else torch.contiguous_format
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    if dtype.is_floating_point:
        x = torch.randn(shape, dtype=dtype, device=device)
    else:
        x = torch.randint(high, shape, dtype=dtype, device=device)
    return x.contiguous(memory_format=memory_format)


def pool(
    rank: int, kernel_size: int, stride: int, padding: int, padding_mode: str = "partial",
    ceil_mode: bool = False, ratio: float = 1.7, blur_size: int | None = None,
) -> Window:  # fmt: skip
    border = ratio, blur_size, "binomial", padding_mode
    return max_blur_window(rank, kernel_size, stride, padding, 1, False, ceil_mode, *border)


def blur(rank: int) -> Window:
    return blur_window(rank, 3, 2, "same", "binomial", "reflect")


# By operation and direction, the launcher of an input, a gradient and a window.
POOLINGS: dict[tuple[str, str], Callable[[Tensor, Tensor, Window], Tensor]] = {
    ("max_blur_pool", "forward"): lambda x, g, w: max_blur_pool.max_blur_pool(x, w),
    ("max_blur_pool", "backward"): lambda x, g, w: max_blur_pool.max_blur_pool_backward(g, x, w),
    ("blur_pool", "forward"): lambda x, g, w: blur_pool.blur_pool(x, w),
    ("blur_pool", "backward"): lambda x, g, w: blur_pool.blur_pool_backward(
        g, x.shape, x.stride(), w
    ),
}


def pooled(values: dict[str, Any], threads: int) -> Work:
    """A turn is a group of rows of a lane's columns and channels, in x or in its gradient."""
    return Work((values["H"].group, values["W"].group, values["ACCESS"].vector))


def pooling(
    operation: str, window: Window, shape: Shape, launch: int = 0, rare: bool = False
) -> Problem:  # fmt: skip
    def make(shape: Shape, dtype: torch.dtype, channels_last: bool, device: str) -> Calls:
        x = draw(shape, dtype, device, channels_last)
        y = empty_output(x, window)
        g = y if device == "meta" else torch.randn_like(y)
        read = x.nbytes if window.takes_max or window.activation else 0
        return Calls(
            lambda: POOLINGS[operation, "forward"](x, g, window),
            lambda: POOLINGS[operation, "backward"](x, g, window),
            (x.nbytes + y.nbytes, read + y.nbytes + x.nbytes),
            x.numel(),
        )

    formats = (False, True) if window.rank > 1 else (False,)
    # Most axes have several blocks, and no whole number of lines is filled.
    toy = {1: (3, 32, 600), 2: (3, 32, 32, 56), 3: (2, 8, 8, 16, 28)}[window.rank]
    return Problem(("forward", "backward"), formats, make, pooled, shape, toy, launch, rare)


def activated(window: Window) -> Problem:
    """Images rectified in the pooling's pass. A blur that rectifies takes the same kernels."""
    return pooling("max_blur_pool", window._replace(activation="relu"), IMAGE, rare=True)


def blended(values: dict[str, Any], threads: int) -> Work | None:
    """A forward's turn is a block of a sample, a backward's a block of a sample's partner.

    The index is a permutation: a sample has one partner. In place turns differ: there is no count.
    """
    if values.get("IN_PLACE"):
        return None
    planes = values["ORDER"].planes
    real = values["size_c"] / planes if planes else 1
    turns = values["batch"] / values["step"] if "IN_PLACE" in values else 1
    return Work((values["BLOCK"] * real / threads,), turns)


def blend(
    read: torch.dtype | None = None, from_contiguous: bool = False, boxes: bool = False,
    in_place: bool = False, directions: tuple[str, ...] = ("forward",),
) -> Problem:  # fmt: skip
    """MixUp of images, in place with a number for lam, or with `boxes` CutMix with a lam a sample.

    Images of another dtype, `read`, are normalised.
    """

    def make(shape: Shape, dtype: torch.dtype, channels_last: bool, device: str) -> Calls:
        n, c, *_ = shape
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        x = draw(shape, read or dtype, device, channels_last and not from_contiguous)
        host = "cpu" if device == "meta" else device
        # In place the index must be an involution.
        flip = torch.arange(n, device=host).flip(0)
        index = flip if in_place else torch.randperm(n, device=host)
        lam = 0.5 if in_place else torch.rand(n if boxes else (), device=host)
        box = torch.tensor([[1, 9, 2, 30]], device=host).repeat(n, 1) if boxes else None
        scale, shift = (torch.rand(c, device=host) if read else None for _ in range(2))
        g = draw(shape, dtype, device, channels_last)
        out = x if in_place else None
        args = index, lam, box, scale
        return Calls(
            lambda: mixup.mixup(x, *args, shift, dtype, memory_format, out),
            None if read or in_place else lambda: mixup.mixup_backward(g, *args, x.stride(), dtype),
            (x.nbytes + g.nbytes, x.nbytes + g.nbytes),
            x.numel(),
        )

    formats = (True,) if from_contiguous else (False, True)
    return Problem(directions, formats, make, blended, (512, 3, 224, 224), (6, 16, 32, 48))


def of_rows(values: dict[str, Any], threads: int) -> Work:
    """A turn is a tile of rows with all their classes or a block of them."""
    blocks = -(-values["classes"] // values["BLOCK_C"])
    if blocks > 1 or "turns" not in values:
        # A backward's program has one tile.
        turns = blocks
    else:
        # A forward's rows end side by side after so many tiles, or a tile is one turn.
        turns = values["turns"] if values["TURNS"] > 1 else math.inf
    return Work((values["ROWS"] * values["classes"] / blocks / threads,), turns)


def loss(
    shape: Shape, toy: Shape, smoothed: bool = False,
    directions: tuple[str, ...] = ("forward", "backward"),
) -> Problem:  # fmt: skip
    """The mean loss of logits, in float32; smoothed, and with weights of the classes."""

    def make(shape: Shape, dtype: torch.dtype, channels_last: bool, device: str) -> Calls:
        n, c, *positions = shape
        host = "cpu" if device == "meta" else device
        z = draw(shape, dtype, device, channels_last)
        a, b = (draw((n, *positions), torch.int64, device, high=c) for _ in range(2))
        weight, smoothing = (torch.rand(c, device=host), 0.1) if smoothed else (None, 0.0)
        lam, g = (torch.rand((), device=host) for _ in range(2))
        inputs, options = (z, a, b, lam, weight), (-100, "mean", smoothing)

        def forward() -> tuple[Tensor, Tensor]:
            return mixup_cross_entropy.mixup_cross_entropy(*inputs, *options, torch.float32)

        meta = device == "meta"
        statistics = torch.empty(2 * a.numel() + 2) if meta else forward()[1]
        labels = a.nbytes + b.nbytes + 4 * a.numel()
        return Calls(
            forward,
            lambda: mixup_cross_entropy.mixup_cross_entropy_backward(
                g, *inputs, statistics, *options
            ),
            (z.nbytes + labels, 2 * z.nbytes + labels),
            z.numel(),
        )

    return Problem(
        directions, (False, True) if len(shape) > 2 else (False,), make, of_rows, shape, toy
    )


def of_block(values: dict[str, Any], threads: int) -> Work:
    """A turn is a block."""
    return Work((values["BLOCK"] / threads,))


def residual(
    activation: str, form: str = "gate", branch: torch.dtype | None = None,
    directions: tuple[str, ...] = ("forward", "backward"),
) -> Problem:  # fmt: skip
    """A stream and a branch, perhaps of another dtype. The kernels are the same in both formats."""

    def make(shape: Shape, dtype: torch.dtype, channels_last: bool, device: str) -> Calls:
        x, f = draw(shape, dtype, device), draw(shape, branch or dtype, device)
        g = draw(shape, torch.promote_types(x.dtype, f.dtype), device)
        alpha, post = torch.rand(1, device="cpu" if device == "meta" else device), form == "post"
        stream = x if post else None
        return Calls(
            lambda: rezero.rezero(x, f, alpha, activation, form),
            lambda: rezero.rezero_backward(g, stream, f, alpha, activation, form, post, True, True),
            (x.nbytes + f.nbytes + g.nbytes, g.nbytes + 2 * f.nbytes + 2 * x.nbytes * post),
            x.numel(),
        )

    return Problem(directions, (False,), make, of_block, IMAGE, (3, 32, 32, 56))


SIGNAL, IMAGE, VOLUME = (64, 64, 4096), (256, 64, 112, 112), (16, 64, 32, 32, 32)
NARROW, ODD = (256, 256, 28, 28), (256, 256, 27, 27)
ROWS, MAPS = ((65536, 1000), (48, 1000)), ((16, 21, 512, 512), (2, 21, 32, 64))
# Other borders, and another blur.
RARE = {
    "2d (3, 2, 0) ceil": pool(2, 3, 2, 0, ceil_mode=True),
    "2d k=2 reflect": pool(2, 2, 2, 0, "reflect"),
    "2d k=2 reflect 4": pool(2, 2, 2, 0, "reflect", blur_size=4),
    "2d k=2 zeros": pool(2, 2, 2, 0, "zeros"),
    "2d k=2 ratio 2.5": pool(2, 2, 2, 0, ratio=2.5),
}
PROBLEMS = {
    ("max_blur_pool", "1d k=2"): pooling("max_blur_pool", pool(1, 2, 2, 0), SIGNAL),
    ("max_blur_pool", "2d k=2"): pooling("max_blur_pool", pool(2, 2, 2, 0), IMAGE),
    ("max_blur_pool", "2d (3, 2, 1)"): pooling("max_blur_pool", pool(2, 3, 2, 1), IMAGE),
    ("max_blur_pool", "2d (3, 2, 1) relu"): activated(pool(2, 3, 2, 1)),
    ("max_blur_pool", "2d narrow k=2"): pooling(
        "max_blur_pool", pool(2, 2, 2, 0), NARROW, rare=True
    ),
    ("max_blur_pool", "2d narrow (3, 2, 1)"): pooling(
        "max_blur_pool", pool(2, 3, 2, 1), NARROW, rare=True
    ),
    ("max_blur_pool", "2d odd k=2"): pooling("max_blur_pool", pool(2, 2, 2, 0), ODD, rare=True),
    **{
        ("max_blur_pool", case): pooling("max_blur_pool", window, IMAGE, rare=True)
        for case, window in RARE.items()
    },
    ("blur_pool", "1d"): pooling("blur_pool", blur(1), SIGNAL),
    ("blur_pool", "2d"): pooling("blur_pool", blur(2), IMAGE),
    ("blur_pool", "2d narrow"): pooling("blur_pool", blur(2), NARROW, rare=True),
    ("blur_pool", "3d first"): pooling("blur_pool", blur(3), VOLUME, rare=True),
    ("blur_pool", "3d second"): pooling("blur_pool", blur(3), VOLUME, launch=1, rare=True),
    ("blur_pool", "2d relu"): activated(blur(2)),
    ("mixup", "images"): blend(directions=("forward", "order", "backward")),
    ("mixup", "images in place"): blend(in_place=True),
    ("mixup", "boxes"): blend(boxes=True, directions=("forward", "backward")),
    ("mixup", "uint8"): blend(torch.uint8),
    ("mixup", "uint8 from contiguous"): blend(torch.uint8, from_contiguous=True),
    ("mixup_cross_entropy", "rows"): loss(*ROWS, directions=("forward", "finish", "backward")),
    ("mixup_cross_entropy", "rows smoothed"): loss(*ROWS, smoothed=True),
    ("mixup_cross_entropy", "maps"): loss(*MAPS),
    ("mixup_cross_entropy", "maps smoothed"): loss(*MAPS, smoothed=True),
    ("rezero", "gate relu"): residual("relu", directions=("forward", "backward", "finish")),
    ("rezero", "gate gelu"): residual("gelu"),
    ("rezero", "gate relu of bf16"): residual("relu", branch=torch.bfloat16),
    ("rezero", "post relu"): residual("relu", "post"),
}
