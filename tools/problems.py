"""Every operation on tensors of a size: the one table that the tools go through.

A new operation adds its rows to `PROBLEMS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
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
    "order" or "finish", or one several times, of which `launch` is compiled. `formats` says whether
    channels are innermost. `make` draws the tensors, without data on "meta". `work` takes the
    arguments of a launch by name, and the threads of a program. `toy` is a shape of some ten
    programs. A `rare` problem is compiled for fewer targets and dtypes.
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
    if dtype.is_floating_point:
        x = torch.randn(shape, dtype=dtype, device=device)
    else:
        x = torch.randint(high, shape, dtype=dtype, device=device)
    return x.contiguous(memory_format=memory_format)


def pool(rank: int, kernel_size: int, padding: int = 0, **more: Any) -> Window:
    """A max blur pooling's window of stride 2; `more` are arguments of `max_blur_window`."""
    usual = {"ratio": 1.7, "blur_size": None, "padding_mode": "partial", "ceil_mode": False} | more
    return max_blur_window(rank, kernel_size, 2, padding, 1, False, filter="binomial", **usual)


def blur(rank: int, activation: str | None = None) -> Window:
    return blur_window(rank, 3, 2, "same", "binomial", "reflect", activation)


def pooled(values: dict[str, Any], threads: int) -> Work:
    """A turn is a group of rows of a lane's columns and channels, in x or in its gradient."""
    return Work((values["H"].group, values["W"].group, values["ACCESS"].vector))


def pooling(window: Window, shape: Shape, launch: int = 0, rare: bool = False) -> Problem:
    """A blur that rectifies takes a max pooling's kernels."""
    reads_x = window.takes_max or window.activation is not None

    def make(shape: Shape, dtype: torch.dtype, channels_last: bool, device: str) -> Calls:
        x = draw(shape, dtype, device, channels_last)
        y = empty_output(x, window)
        g = torch.randn_like(y)
        if reads_x:
            forward = partial(max_blur_pool.max_blur_pool, x, window)
            backward = partial(max_blur_pool.max_blur_pool_backward, g, x, window)
        else:
            forward = partial(blur_pool.blur_pool, x, window)
            backward = partial(blur_pool.blur_pool_backward, g, x.shape, x.stride(), window)
        floor = x.nbytes + y.nbytes
        return Calls(forward, backward, (floor, floor + x.nbytes * reads_x), x.numel())

    formats = (False, True) if window.rank > 1 else (False,)
    # Most axes have several blocks, and no whole number of lines is filled.
    toy = {1: (3, 32, 600), 2: (3, 32, 32, 56), 3: (2, 8, 8, 16, 28)}[window.rank]
    return Problem(BOTH, formats, make, pooled, shape, toy, launch, rare)


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


def blend(kind: str, *directions: str) -> Problem:
    """MixUp of images, in place with a number for lam, or of boxes: CutMix with a lam a sample.

    Bytes, "uint8", are normalised.
    """
    uint8, in_place = kind.startswith("uint8"), kind.endswith("in place")
    from_contiguous = kind.endswith("from contiguous")

    def make(shape: Shape, dtype: torch.dtype, channels_last: bool, device: str) -> Calls:
        n, c, *_ = shape
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        x = draw(
            shape, torch.uint8 if uint8 else dtype, device, channels_last and not from_contiguous
        )
        # In place the index must be an involution.
        flip = torch.arange(n, device=device).flip(0)
        index = flip if in_place else torch.randperm(n, device=device)
        lam = 0.5 if in_place else torch.rand(n if kind == "boxes" else (), device=device)
        box = torch.tensor([[1, 9, 2, 30]], device=device).repeat(n, 1) if kind == "boxes" else None
        scale, shift = (torch.rand(c, device=device) if uint8 else None for _ in range(2))
        g = draw(shape, dtype, device, channels_last)
        out = x if in_place else None
        args = index, lam, box, scale
        return Calls(
            lambda: mixup.mixup(x, *args, shift, dtype, memory_format, out),
            None
            if uint8 or in_place
            else lambda: mixup.mixup_backward(g, *args, x.stride(), dtype),
            (x.nbytes + g.nbytes, x.nbytes + g.nbytes),
            x.numel(),
        )

    formats = (True,) if from_contiguous else (False, True)
    return Problem(directions, formats, make, blended, (512, 3, 224, 224), (6, 16, 32, 48))


def of_rows(values: dict[str, Any], threads: int) -> Work:
    """A turn is a tile of rows with all their classes or a block of them."""
    blocks = -(-values["classes"] // values["BLOCK_C"])
    turns = blocks
    # A backward's program has one tile. A forward's rows, where all their classes are in a tile,
    # end side by side after so many, or a tile is one turn.
    if blocks == 1 and "turns" in values:
        turns = values["turns"] if values["TURNS"] > 1 else math.inf
    return Work((values["ROWS"] * values["classes"] / blocks / threads,), turns)


def loss(*directions: str, shape: Shape, toy: Shape, smoothed: bool = False) -> Problem:
    """The mean loss of logits, in float32; smoothed, and with weights of the classes."""

    def make(shape: Shape, dtype: torch.dtype, channels_last: bool, device: str) -> Calls:
        n, c, *positions = shape
        z = draw(shape, dtype, device, channels_last)
        a, b = (draw((n, *positions), torch.int64, device, high=c) for _ in range(2))
        weight, smoothing = (torch.rand(c, device=device), 0.1) if smoothed else (None, 0.0)
        lam, g = (torch.rand((), device=device) for _ in range(2))
        inputs, options = (z, a, b, lam, weight), (-100, "mean", smoothing)
        forward = partial(mixup_cross_entropy.mixup_cross_entropy, *inputs, *options, torch.float32)
        meta = device == "meta"
        given = g, *inputs, torch.empty(2 * a.numel() + 2) if meta else forward()[1], *options
        backward = partial(mixup_cross_entropy.mixup_cross_entropy_backward, *given)
        labels = a.nbytes + b.nbytes + 4 * a.numel()
        return Calls(forward, backward, (z.nbytes + labels, 2 * z.nbytes + labels), z.numel())

    formats = (False, True) if len(shape) > 2 else (False,)
    return Problem(directions, formats, make, of_rows, shape, toy)


def residual(activation: str, *directions: str, form: str = "gate", bf16: bool = False) -> Problem:
    """A stream and a branch, perhaps of another dtype. The kernels are the same in both formats."""

    def make(shape: Shape, dtype: torch.dtype, channels_last: bool, device: str) -> Calls:
        x, f = draw(shape, dtype, device), draw(shape, torch.bfloat16 if bf16 else dtype, device)
        g = draw(shape, torch.promote_types(x.dtype, f.dtype), device)
        alpha, post = torch.rand(1, device=device), form == "post"
        given = f, alpha, activation, form
        return Calls(
            partial(rezero.rezero, x, *given),
            partial(rezero.rezero_backward, g, x if post else None, *given, post, True, True),
            (x.nbytes + f.nbytes + g.nbytes, g.nbytes + 2 * f.nbytes + 2 * x.nbytes * post),
            x.numel(),
        )

    def work(values: dict[str, Any], threads: int) -> Work:
        return Work((values["BLOCK"] / threads,))

    return Problem(directions, (False,), make, work, IMAGE, (3, 32, 32, 56))


BOTH = ("forward", "backward")
SIGNAL, IMAGE, VOLUME = (64, 64, 4096), (256, 64, 112, 112), (16, 64, 32, 32, 32)
NARROW = (256, 256, 28, 28)
ROWS = {"shape": (65536, 1000), "toy": (48, 1000)}
MAPS = {"shape": (16, 21, 512, 512), "toy": (2, 21, 32, 64)}
USUAL = ("1d k=2", "2d k=2", "2d (3, 2, 1)", "1d", "2d")
# The window and the shape of each pooling, and the number of its launch.
POOLINGS: dict[tuple[str, str], Any] = {
    ("max_blur_pool", "1d k=2"): (pool(1, 2), SIGNAL),
    ("max_blur_pool", "2d k=2"): (pool(2, 2), IMAGE),
    ("max_blur_pool", "2d (3, 2, 1)"): (pool(2, 3, 1), IMAGE),
    ("max_blur_pool", "2d (3, 2, 1) relu"): (pool(2, 3, 1, activation="relu"), IMAGE),
    ("max_blur_pool", "2d narrow k=2"): (pool(2, 2), NARROW),
    ("max_blur_pool", "2d narrow (3, 2, 1)"): (pool(2, 3, 1), NARROW),
    ("max_blur_pool", "2d odd k=2"): (pool(2, 2), (256, 256, 27, 27)),
    ("max_blur_pool", "2d (3, 2, 0) ceil"): (pool(2, 3, ceil_mode=True), IMAGE),
    ("max_blur_pool", "2d k=2 reflect"): (pool(2, 2, padding_mode="reflect"), IMAGE),
    ("max_blur_pool", "2d k=2 reflect 4"): (pool(2, 2, padding_mode="reflect", blur_size=4), IMAGE),
    ("max_blur_pool", "2d k=2 zeros"): (pool(2, 2, padding_mode="zeros"), IMAGE),
    ("max_blur_pool", "2d k=2 ratio 2.5"): (pool(2, 2, ratio=2.5), IMAGE),
    ("blur_pool", "1d"): (blur(1), SIGNAL),
    ("blur_pool", "2d"): (blur(2), IMAGE),
    ("blur_pool", "2d narrow"): (blur(2), NARROW),
    ("blur_pool", "3d first"): (blur(3), VOLUME),
    ("blur_pool", "3d second"): (blur(3), VOLUME, 1),
    ("blur_pool", "2d relu"): (blur(2, "relu"), IMAGE),
}
PROBLEMS = {key: pooling(*each, rare=key[1] not in USUAL) for key, each in POOLINGS.items()} | {
    ("mixup", "images"): blend("images", "forward", "order", "backward"),
    ("mixup", "images in place"): blend("images in place", "forward"),
    ("mixup", "boxes"): blend("boxes", *BOTH),
    ("mixup", "uint8"): blend("uint8", "forward"),
    ("mixup", "uint8 from contiguous"): blend("uint8 from contiguous", "forward"),
    ("mixup_cross_entropy", "rows"): loss("forward", "finish", "backward", **ROWS),
    ("mixup_cross_entropy", "rows smoothed"): loss(*BOTH, **ROWS, smoothed=True),
    ("mixup_cross_entropy", "maps"): loss(*BOTH, **MAPS),
    ("mixup_cross_entropy", "maps smoothed"): loss(*BOTH, **MAPS, smoothed=True),
    ("rezero", "gate relu"): residual("relu", *BOTH, "finish"),
    ("rezero", "gate gelu"): residual("gelu", *BOTH),
    ("rezero", "gate relu of bf16"): residual("relu", *BOTH, bf16=True),
    ("rezero", "post relu"): residual("relu", *BOTH, form="post"),
}
