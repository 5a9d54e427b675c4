"""One table of sample inputs per operation; an operation with an entry has the contract suite.

A sample is arguments and a shape. Triton's interpreter takes some 20 ms per program, so shapes are
the smallest that have an interior and a border. Two samples have more than one block along each
axis.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import oracle
import torch
from torch import Tensor

from regfast import functional
from regfast._core import geometry
from regfast._core.geometry import Window, as_image
from regfast.ops.schema import flatten
from regfast.reference.max_blur_pool import all_maxima, max_blur_pool, split


@dataclass(frozen=True)
class Sample:
    shape: tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    # The tests that use the sample; samples without a group run in the slow half of the suite.
    group: str = ""

    @property
    def rank(self) -> int:
        return len(self.shape) - 2

    def __str__(self) -> str:
        arguments = ",".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{'x'.join(map(str, self.shape))}-{arguments}".replace(" ", "")

    def input(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu", channels_last: bool = False
    ) -> Tensor:
        """Random data with ties.

        Half of it is zero, as after a ReLU; with an activation in the sample it is rounded instead.
        """
        x = torch.randn(self.shape, dtype=torch.float32)
        x = x.mul(4).round() / 4 if "activation" in self.arguments else x.relu()
        return as_format(x.to(device=device, dtype=dtype), channels_last)


def check_signature(theirs: type, ours: type) -> None:
    """A layer has the signature of its torch.nn twin; further arguments are keyword-only."""
    expected, got = (
        list(inspect.signature(module).parameters.values()) for module in (theirs, ours)
    )
    assert [p.name for p in got[: len(expected)]] == [p.name for p in expected]
    assert all(
        own.default == p.default for own, p in zip(got, expected) if p.default is not p.empty
    )
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in got[len(expected) :])


def as_format(x: Tensor, channels_last: bool) -> Tensor:
    if not channels_last or x.ndim < 3:
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def no_synchronisation() -> contextlib.AbstractContextManager[object]:
    """A context that makes a synchronisation with the CUDA device an error."""
    # Tracing launches nothing, and Dynamo cannot trace the switch.
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return contextlib.nullcontext()
    return _strict()


@contextlib.contextmanager
def _strict() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(frozen=True)
class Operation:
    """An operation that is differentiated by one tensor, as the suite uses it."""

    name: str
    # Takes an input and a sample's arguments.
    function: Callable[..., Tensor]
    oracle: Callable[[Any, Sample], Any]
    # Takes an input, its output and a sample; returns every registered op and its arguments.
    op_calls: Callable[[Tensor, Tensor, Sample], list[tuple[Any, tuple]]]
    samples: list[Sample]
    # The sample's arguments, with its tensors on the device.
    arguments: Callable[[Sample, torch.device], dict[str, Any]] = lambda sample, device: (
        sample.arguments
    )
    # The shape for finite differences.
    least: Callable[[Sample], tuple[int, ...]] = lambda sample: sample.shape

    def __str__(self) -> str:
        return self.name

    def __call__(self, x: Tensor, sample: Sample) -> Tensor:
        arguments = self.arguments(sample, x.device)
        with no_synchronisation():
            return self.function(x, **arguments)

    def group(self, name: str) -> list[Sample]:
        return [sample for sample in self.samples if name in sample.group.split()]


def pool(x: Tensor, **arguments: Any) -> Tensor:
    return getattr(functional, f"max_blur_pool{x.ndim - 2}d")(x, **arguments)


def blur(x: Tensor, **arguments: Any) -> Tensor:
    return getattr(functional, f"blur_pool{x.ndim - 2}d")(x, **arguments)


def max_window(rank: int = 2, **changes: Any) -> Window:
    """The window of MaxPool2dAA(2) with `changes`."""
    arguments = dict(
        kernel_size=2, stride=None, padding=0, dilation=1, return_indices=False, ceil_mode=False,
        ratio=1.7, blur_size=None, filter="binomial", padding_mode="partial",
    )  # fmt: skip
    return geometry.max_blur_window(rank, **{**arguments, **changes})


def pool_window(sample: Sample) -> Window:
    return max_window(sample.rank, **sample.arguments)


def blur_window(sample: Sample) -> Window:
    defaults = dict(
        kernel_size=3, stride=2, padding="same", filter="binomial", padding_mode="reflect"
    )
    return geometry.blur_window(sample.rank, **{**defaults, **sample.arguments})


def check_gradient_of_nan(
    x: Tensor, found: Tensor, expected: Tensor, window: Window, *, rtol: float, atol: float
) -> None:
    """Compare a pooling's gradient on images with NaN to `expected`, routed by PyTorch's rule.

    A window that holds a NaN may give its gradient to any of its elements; other windows follow
    PyTorch's rule. Each image receives the whole gradient, unless a rectified element takes some of
    it.
    """
    shares = x.isnan()
    for axis, (k, d) in enumerate(zip(window.kernel_size, window.dilation)):
        dim, reach, alone = axis - window.rank, d * (k - 1), shares
        wide = torch.nn.functional.pad(alone, (0, 0) * (-dim - 1) + (reach, reach))
        for m in range(2 * k - 1):
            shares = shares | wide.narrow(dim, m * d, x.shape[dim])
    assert found.isfinite().all()
    torch.testing.assert_close(
        found.masked_fill(shares, 0), expected.masked_fill(shares, 0), rtol=rtol, atol=atol
    )
    if window.activation is None:
        dims = tuple(range(-window.rank, 0))
        error = (found.sum(dims) - expected.sum(dims)).abs()
        # A sum adds up the errors of its terms.
        assert (
            error <= rtol * (found.abs() + expected.abs()).sum(dims) + atol * x[0, 0].numel()
        ).all()


def pool_oracle(x: Any, sample: Sample) -> Any:
    w = pool_window(sample)
    rectified = w.activation == "relu"
    return oracle.max_blur_pool(
        x,
        w.kernel_size,
        w.stride,
        w.padding,
        w.dilation,
        w.ceil_mode,
        w.taps,
        w.padding_mode,
        rectified,
    )


def blur_oracle(x: Any, sample: Sample) -> Any:
    w = blur_window(sample)
    x = np.maximum(x, 0) if w.activation == "relu" else x
    return oracle.blur_pool(
        x, w.stride, sample.arguments.get("padding", "same"), w.taps, w.padding_mode
    )


def pool_op_calls(x: Tensor, y: Tensor, sample: Sample) -> list[tuple[Any, tuple]]:
    window = pool_window(sample)
    if window.is_of_images:
        return window_op_calls(x, y, window)
    before, after, blur = split(window, x.shape[2:])
    maxima = all_maxima(x, window, before, after, False, x.dtype)
    calls = plain_blur_op_calls(maxima, y, blur)
    if window.rank == 3 and all(d == 1 for d in window.dilation):
        # The slices are pooled as images; no window reaches beyond the border.
        slices = window._replace(
            stride=(1,) * 3, taps=((1.0,),) * 3, lead=(0,) * 3, trail=(0,) * 3, ceil_mode=False
        )
        images = x.transpose(1, 2).flatten(0, 1)
        slices = as_image(slices, 1, 2)
        calls += window_op_calls(images, max_blur_pool(images, slices), slices)
    return calls


def window_op_calls(x: Tensor, y: Tensor, window: Window) -> list[tuple[Any, tuple]]:
    ops, window = torch.ops.regfast, flatten(window)
    return [
        (ops.max_blur_pool.default, (x, *window)),
        (ops.max_blur_pool_backward.default, (y, x, *window)),
    ]


def blur_op_calls(x: Tensor, y: Tensor, sample: Sample) -> list[tuple[Any, tuple]]:
    if "activation" in sample.arguments:
        # An activated blur is a pooling with windows of one element.
        return window_op_calls(x, y, blur_window(sample))
    return plain_blur_op_calls(x, y, blur_window(sample))


def plain_blur_op_calls(x: Tensor, y: Tensor, window: Window) -> list[tuple[Any, tuple]]:
    ops, window = torch.ops.regfast, flatten(window)
    return [
        (ops.blur_pool.default, (x, *window)),
        (ops.blur_pool_backward.default, (y, list(x.shape), list(x.stride()), *window)),
    ]


def least_image(sample: Sample) -> tuple[int, ...]:
    """A one-channel image that still has an interior."""
    return (1, 1, *(min(size, 5 if sample.rank < 3 else 3) for size in sample.shape[2:]))


# The partner of each sample. "repeats" takes one sample three times.
INDEX = {
    "permutation": [2, 0, 3, 1],
    "involution": [1, 0, 3, 2],
    "repeats": [1, 1, 3, 1],
    "itself": [0],
    "pair": [1, 0],
}
LAM = [0.25, 1.0, 0.625, 0.0]
# Inside the image, the whole image, an empty box, and a blended sample.
BOXES = [[1, 3, 0, 2], [0, 6, 0, 5], [2, 2, 1, 4], [-1, -1, -1, -1]]


def mixup_arguments(sample: Sample, device: torch.device) -> dict[str, Any]:
    arguments = sample.arguments | {
        "index": torch.tensor(INDEX[sample.arguments["index"]], device=device)
    }
    for name, numbers in (("lam", LAM), ("box", BOXES)):
        if arguments.get(name) == "each":
            arguments[name] = torch.tensor(numbers, device=device)
    return arguments


def mixup_oracle(x: Any, sample: Sample) -> Any:
    arguments = sample.arguments
    lam = LAM if arguments["lam"] == "each" else [arguments["lam"]] * len(x)
    boxes = BOXES if arguments.get("box") == "each" else [arguments.get("box")] * len(x)
    return oracle.mixup(
        x,
        INDEX[arguments["index"]],
        lam,
        boxes,
        arguments.get("mean", 0.0),
        arguments.get("std", 1.0),
    )


def mixup_op_calls(x: Tensor, y: Tensor, sample: Sample) -> list[tuple[Any, tuple]]:
    ops, arguments = torch.ops.regfast, mixup_arguments(sample, x.device)
    index, lam = (torch.as_tensor(arguments[name], device=x.device) for name in ("index", "lam"))
    box = torch.as_tensor(arguments["box"], device=x.device) if "box" in arguments else None
    return [
        (ops.mixup.default, (x, index, lam, box, None, None, x.dtype, torch.preserve_format)),
        (ops.mixup_out.default, (x, index, lam, box, None, None, torch.empty_like(y))),
        (ops.mixup_backward.default, (y, index, lam, box, None, x.stride(), x.dtype)),
    ]


def loss(x: Tensor, lam: float | Tensor, **arguments: Any) -> Tensor:
    return functional.mixup_cross_entropy(x, (*labels_of(x), lam), **arguments)


def labels_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two labels per row of logits, (N, C, ...): every class, and some rows with equal labels."""
    shape = x.shape[:1] + x.shape[2:]
    rows = torch.arange(math.prod(shape), device=x.device).view(shape)
    return (13 * rows + 1) % x.shape[1], (11 * rows + 2) % x.shape[1]


def loss_arguments(sample: Sample, device: torch.device) -> dict[str, Any]:
    """The arguments with their tuples as tensors."""
    given = sample.arguments.items()
    return {
        name: torch.tensor(value, device=device) if isinstance(value, tuple) else value
        for name, value in given
    }


def loss_oracle(x: Any, sample: Sample) -> Any:
    defaults = {
        "weight": (1.0,) * x.shape[1],
        "ignore_index": -100,
        "reduction": "mean",
        "label_smoothing": 0.0,
    }
    a, b = (labels.numpy() for labels in labels_of(torch.from_numpy(x)))
    return oracle.mixup_cross_entropy(x, a, b, **(defaults | sample.arguments))


def loss_op_calls(x: Tensor, y: Tensor, sample: Sample) -> list[tuple[Any, tuple]]:
    ops, arguments = torch.ops.regfast, loss_arguments(sample, x.device)
    lam = torch.as_tensor(arguments["lam"], device=x.device)
    terms = (x, *labels_of(x), lam, arguments.get("weight"))
    ignore_index, smoothing = (
        arguments.get("ignore_index", -100),
        arguments.get("label_smoothing", 0.0),
    )
    options = (ignore_index, arguments.get("reduction", "mean"), smoothing, x.dtype)
    _, statistics = ops.mixup_cross_entropy(*terms, *options)
    return [
        (ops.mixup_cross_entropy.default, (*terms, *options)),
        (
            ops.mixup_cross_entropy_backward.default,
            (y, *terms, statistics, ignore_index, options[1], smoothing),
        ),
    ]


def residual(x: Tensor, alpha: float, **arguments: Any) -> Tensor:
    """Differentiated by the branch. (test_rezero.py covers the stream and the gate.)"""
    return functional.rezero(stream_of(x), x, torch.full((1,), alpha, device=x.device), **arguments)


def stream_of(x: Tensor) -> Tensor:
    """Multiples of 1/2 between -1.5 and 1.5, in the memory format of x."""
    pattern = (5 * torch.arange(math.prod(x.shape), device=x.device) + 1) % 7 - 3
    return torch.zeros_like(x) + (pattern / 2).view(x.shape).to(x.dtype)


def residual_oracle(x: Any, sample: Sample) -> Any:
    stream = stream_of(torch.from_numpy(x)).numpy()
    return oracle.rezero(stream, x, **({"activation": "relu", "form": "gate"} | sample.arguments))


def residual_op_calls(x: Tensor, y: Tensor, sample: Sample) -> list[tuple[Any, tuple]]:
    ops, stream, alpha = (
        torch.ops.regfast,
        stream_of(x),
        torch.full((1,), sample.arguments["alpha"], device=x.device),
    )
    form = sample.arguments.get("form", "gate")
    modes = sample.arguments.get("activation", "relu"), form
    return [
        (ops.rezero.default, (stream, x, alpha, *modes)),
        (
            ops.rezero_backward.default,
            (y, stream if form == "post" else None, x, alpha, *modes, True, True, True),
        ),
    ]


# core: forward, backward and tangent in the core suite. formats: channels_last and half precision
# too. main: every dtype, layout and transform as well. special: infinities and NaN too. Sizes of 4,
# 8 and 16 are aligned to the vectors.
POOL = [
    Sample((2, 3, 9, 10), {}, "core formats main special"),
    Sample((2, 4, 5, 16), {"kernel_size": 3, "stride": 2, "padding": 1}, "core formats special"),
    Sample((2, 3, 8, 7), {"kernel_size": 3, "stride": 2, "padding": 1}, "core"),
    Sample(
        (1, 2, 11, 9),
        {"kernel_size": (2, 3), "stride": (3, 1), "padding": (0, 1), "dilation": (2, 3)},
        "core special",
    ),
    Sample(
        (2, 4, 9, 16),
        {"kernel_size": 3, "stride": 2, "padding": 1, "activation": "relu"},
        "core formats main special",
    ),
    Sample(
        (1, 2, 7, 8),
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "blur_size": 6},
        "core",
    ),
    Sample(
        (1, 2, 6, 5),
        {"kernel_size": 2, "padding_mode": "reflect", "filter": (0.5, -0.25, 1.0, 0.125)},
        "core",
    ),
    Sample(
        (1, 2, 7, 6),
        {"kernel_size": 3, "stride": 3, "padding": 1, "padding_mode": "replicate"},
        "core special",
    ),
    Sample(
        (1, 2, 7, 6),
        {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "zeros", "filter": "hamming"},
        "core",
    ),
    Sample((2, 2, 11), {"kernel_size": 3, "stride": 2}, "core formats main"),
    Sample((1, 2, 13), {"stride": 3, "dilation": 2}, "core"),
    Sample((1, 2, 5, 4, 6), {"kernel_size": 2}, "core formats main"),
    Sample((1, 1, 1, 1), {"kernel_size": 2, "padding": 1, "dilation": 2}, "core"),
    Sample((1, 2, 6, 6), {"kernel_size": 3, "stride": 1, "padding": 1}, "core"),
    # A lane has only the last of these elements, and reads no output for it.
    Sample((1, 2, 9, 9), {"kernel_size": 5, "stride": 1}, "core"),
    Sample(
        (1, 2, 3, 2),
        {"padding": 1, "dilation": 3, "ceil_mode": True, "blur_size": 7, "padding_mode": "reflect"},
        "core",
    ),
    Sample((1, 2, 3, 2), {"padding": 1, "dilation": 3, "ceil_mode": True, "blur_size": 7}),
    Sample((1, 2, 3, 3), {"blur_size": 9, "padding_mode": "replicate"}),
    Sample((1, 2, 3, 3), {"blur_size": 9, "padding_mode": "zeros"}),
    Sample((1, 5, 3, 300), {}, "core"),
    Sample((1, 1, 40, 6), {"kernel_size": 3, "stride": 2, "padding": 1}, "core"),
    Sample((1, 2, 8, 8), {"kernel_size": 1, "stride": 3, "blur_size": 2}),
    Sample((1, 2, 8, 8), {"kernel_size": 2, "stride": 3, "blur_size": 1}),
    Sample((1, 2, 9, 9), {"kernel_size": 5, "stride": 4, "padding": 2}),
    Sample(
        (1, 1, 5, 6, 4),
        {"kernel_size": 2, "stride": (1, 2, 2), "ceil_mode": True, "padding_mode": "reflect"},
    ),
    Sample(
        (1, 1, 5, 5, 5),
        {"kernel_size": (1, 3, 2), "stride": 2, "padding": (0, 1, 1), "padding_mode": "zeros"},
    ),
    Sample(
        (1, 1, 4, 5, 6), {"kernel_size": 2, "padding_mode": "replicate", "blur_size": (3, 2, 5)}
    ),
    Sample(
        (1, 2, 13),
        {"kernel_size": 2, "stride": 3, "dilation": 4, "padding": 1, "padding_mode": "reflect"},
    ),
    Sample((2, 2, 9), {"kernel_size": 4, "padding": 2, "ceil_mode": True}),
    Sample((1, 2, 1, 8), {"kernel_size": (1, 2)}),
    Sample(
        (1, 2, 3, 2),
        {"padding": 1, "dilation": 3, "ceil_mode": True, "blur_size": 7, "activation": "relu"},
    ),
    Sample((1, 1, 5, 6, 4), {"kernel_size": 2, "padding_mode": "reflect", "activation": "relu"}),
]
BLUR = [
    Sample((2, 3, 9, 10), {}, "core formats main"),
    Sample((2, 4, 5, 16), {}, "core formats"),
    Sample((1, 2, 8, 8), {"kernel_size": 4, "stride": 3, "padding_mode": "replicate"}, "core"),
    Sample((1, 2, 8, 8), {"kernel_size": 5, "padding": (2, 1), "padding_mode": "zeros"}, "core"),
    Sample((2, 4, 7, 16), {"activation": "relu"}, "core formats main special"),
    Sample((2, 2, 11), {"kernel_size": 5}, "core formats main"),
    Sample((1, 2, 5, 4, 6), {}, "core formats main"),
    Sample((1, 1, 5, 4, 6), {"activation": "relu", "padding_mode": "zeros"}),
    # An output whose format is ambiguous.
    Sample((1, 2, 1, 2, 1), {"kernel_size": (1, 3, 1), "stride": (1, 2, 1)}, "formats"),
    Sample((1, 2, 11), {"kernel_size": 3, "stride": 1, "activation": "relu"}, "core"),
    Sample((1, 2, 3, 1), {"kernel_size": 7, "stride": 1}, "core"),
    Sample((1, 1, 40, 6), {"kernel_size": 5}, "core"),
    Sample((1, 2, 2, 3), {"kernel_size": 5, "padding": 7}),
    Sample((1, 2, 3, 8), {"kernel_size": 3, "padding": 2}, "core"),
    Sample((1, 2, 9, 9), {"kernel_size": 7, "padding": 0}, "core"),
    Sample((1, 2, 8, 7), {"kernel_size": 1, "stride": 2}),
    Sample(
        (1, 2, 8, 7),
        {"kernel_size": (3, 2), "stride": (1, 4), "filter": ((1.0, 2.0, -1.0), "boxcar")},
    ),
    Sample((1, 1, 5, 4, 6), {"kernel_size": 4, "stride": (2, 1, 3), "padding_mode": "replicate"}),
    Sample((1, 1, 4, 4, 4), {"kernel_size": 3, "padding": 0, "padding_mode": "zeros"}),
    Sample((1, 2, 12), {"kernel_size": 2, "stride": 5, "padding": 3, "padding_mode": "replicate"}),
]
MIXUP = [
    Sample((4, 3, 6, 5), {"index": "permutation", "lam": 0.3}, "core formats main special"),
    Sample((4, 2, 5, 16), {"index": "repeats", "lam": "each"}, "core formats special"),
    Sample(
        (4, 3, 6, 5),
        {"index": "repeats", "lam": "each", "box": "each"},
        "core formats main special",
    ),
    Sample(
        (4, 3, 7, 5),
        {"index": "permutation", "lam": 0.3, "mean": (0.1, 0.2, 0.3), "std": (0.5, 2.0, 4.0)},
        "core formats",
    ),
    Sample(
        (4, 3, 6, 5),
        {"index": "involution", "lam": 0.0, "memory_format": torch.channels_last},
        "core formats",
    ),
    Sample((4, 2, 11), {"index": "permutation", "lam": "each"}, "core formats main"),
    Sample(
        (4, 2, 3, 4, 5),
        {"index": "repeats", "lam": "each", "box": (0, 2, 1, 4)},
        "core formats main",
    ),
    Sample((2, 3, 800), {"index": "pair", "lam": 0.75, "mean": 0.5, "std": 2.0}, "core"),
    Sample((4,), {"index": "permutation", "lam": "each"}, "core"),
    Sample((4, 7), {"index": "permutation", "lam": 1, "mean": 0.5, "std": 2.0}, "core"),
    Sample((1, 2, 3, 3), {"index": "itself", "lam": 0.3}, "core"),
    Sample((4, 2, 2, 2, 3, 3), {"index": "repeats", "lam": "each", "box": (0, 2, 1, 3)}),
    Sample(
        (4, 2, 3, 3),
        {"index": "permutation", "lam": 0.3, "std": (1.0, 2.0), "mean": 0.0, "box": (1, 2, 0, 3)},
    ),
]
LOSS = [
    Sample((6, 10), {"lam": 0.3}, "core formats main special"),
    Sample(
        (2, 5, 3, 4),
        {"lam": (0.25, 1.0), "weight": (0.5, 2.0, 0.0, 1.0, 3.0), "ignore_index": 1},
        "core formats main special",
    ),
    Sample(
        (3, 4, 16),
        {"lam": (0.0, 0.5, 0.75), "reduction": "none", "label_smoothing": 0.1},
        "core formats main",
    ),
    Sample(
        (2, 7),
        {
            "lam": 0.6,
            "reduction": "sum",
            "label_smoothing": 0.2,
            "weight": (1.0, 2.0, 0.5, 1.0, 1.5, 1.0, 1.0),
        },
        "core",
    ),
    Sample((1, 3, 2, 2, 5), {"lam": 0.6, "ignore_index": 0}, "core formats"),
    Sample((2, 5000), {"lam": 0.3, "label_smoothing": 0.1}, "core"),
    Sample((300, 3), {"lam": 0.3}),
    Sample((1, 300, 6, 7), {"lam": 0.3, "label_smoothing": 0.1}),
]
REZERO = [
    Sample((4, 3, 6, 5), {"alpha": 0.3, "activation": "relu"}, "core formats main special"),
    Sample(
        (2, 4, 5, 16),
        {"alpha": -0.3, "activation": "relu", "form": "post"},
        "core formats main special",
    ),
    Sample((3, 70), {"alpha": 0.7, "activation": "gelu"}, "core formats main"),
    Sample((2, 3, 17), {"alpha": 0.7, "activation": "silu", "form": "post"}, "core formats main"),
    Sample((2, 3, 800), {"alpha": 0.3, "activation": "leaky_relu"}, "core"),
    Sample((2, 3, 4, 3, 2), {"alpha": 0.3, "activation": "identity"}, "core formats special"),
    Sample((3,), {"alpha": 0.0, "activation": "relu"}, "core"),
    Sample((2, 5), {"alpha": 0.3, "activation": "gelu", "form": "post"}),
    Sample((2, 5), {"alpha": 0.3, "activation": "silu"}),
    Sample((2, 5), {"alpha": -2.0, "activation": "leaky_relu", "form": "post"}),
    Sample((2, 5), {"alpha": 2.0, "activation": "identity", "form": "post"}),
]
OPERATIONS = [
    Operation("max_blur_pool", pool, pool_oracle, pool_op_calls, POOL, least=least_image),
    Operation("blur_pool", blur, blur_oracle, blur_op_calls, BLUR, least=least_image),
    Operation("mixup", functional.mixup, mixup_oracle, mixup_op_calls, MIXUP, mixup_arguments),
    Operation("mixup_cross_entropy", loss, loss_oracle, loss_op_calls, LOSS, loss_arguments),
    Operation("rezero", residual, residual_oracle, residual_op_calls, REZERO),
]


class NetworkWindow(NamedTuple):
    # A model that has the window.
    name: str
    operation: str
    sample: Sample
    models: int


_SAME = {"kernel_size": 3, "stride": 2, "padding": 1}
_VALID = {"kernel_size": 3, "stride": 2}
_REFLECT = {"padding_mode": "reflect"}
_ZEROS = {"padding_mode": "zeros"}
# The distinct windows of networks. `models` counts the models of torchvision 0.28 (89) and timm
# 1.0.31 (1371) in which `antialias` puts the window, with blur="before" where the name says so; it
# is 0 for a window of a peer library, by its class or weights. The blur of 3 taps at stride 2 is
# that of a convolution, of a 1x1 convolution after the blur, of an activation other than ReLU, and
# of nn.AvgPool2d(1, 2).
NETWORK_WINDOWS = [
    # `antialias`, max poolings. Sizes are nearly always even for (3, 2, 1) and (2, 2, 0), odd for
    # (3, 2, 0).
    NetworkWindow("resnet50", "max_blur_pool", Sample((1, 2, 8, 12), _SAME), 183),
    NetworkWindow("vgg16", "max_blur_pool", Sample((1, 2, 8, 12), {"kernel_size": 2}), 33),
    NetworkWindow("inception_v4", "max_blur_pool", Sample((1, 2, 9, 11), _VALID), 11),
    NetworkWindow(
        "squeezenet1_1", "max_blur_pool", Sample((1, 2, 8, 11), _VALID | {"ceil_mode": True}), 22
    ),
    NetworkWindow(
        "googlenet", "max_blur_pool", Sample((1, 2, 8, 7), {"kernel_size": 2, "ceil_mode": True}), 1
    ),
    # `antialias`, blurs.
    NetworkWindow("resnet50 convolution", "blur_pool", Sample((1, 2, 8, 9), {}), 857),
    NetworkWindow("regnet_y_400mf", "blur_pool", Sample((1, 2, 8, 8), {"activation": "relu"}), 68),
    NetworkWindow("resnet50d average", "blur_pool", Sample((1, 2, 8, 8), {"stride": 1}), 160),
    NetworkWindow(
        "densenet121 average",
        "blur_pool",
        Sample((1, 2, 8, 10), {"kernel_size": 4, "padding": 1}),
        80,
    ),
    NetworkWindow(
        "mvitv2_tiny", "blur_pool", Sample((1, 2, 12, 13), {"kernel_size": 6, "stride": 4}), 33
    ),
    NetworkWindow(
        "pvt_v2_b0", "blur_pool", Sample((1, 1, 17, 9), {"kernel_size": 13, "stride": 8}), 14
    ),
    NetworkWindow(
        "crossvit_9_dagger_240",
        "blur_pool",
        Sample((1, 2, 7, 10), {"kernel_size": 5, "stride": 3, "activation": "relu"}),
        5,
    ),
    NetworkWindow(
        "mvitv2_tiny before", "blur_pool", Sample((1, 2, 7, 8), {"kernel_size": 6, "stride": 1}), 33
    ),
    NetworkWindow(
        "pvt_v2_b0 before", "blur_pool", Sample((1, 1, 9, 7), {"kernel_size": 13, "stride": 1}), 14
    ),
    NetworkWindow(
        "crossvit_9_dagger_240 before",
        "blur_pool",
        Sample((1, 2, 7, 8), {"kernel_size": 5, "stride": 1}),
        5,
    ),
    # `antialias`, signals and volumes.
    NetworkWindow(
        "nextvit_small by 4", "blur_pool", Sample((1, 2, 20), {"kernel_size": 6, "stride": 1}), 3
    ),
    NetworkWindow(
        "nextvit_small by 16", "blur_pool", Sample((1, 2, 32), {"kernel_size": 27, "stride": 1}), 3
    ),
    NetworkWindow(
        "mvit_v1_b",
        "max_blur_pool",
        Sample(
            (1, 1, 3, 6, 8), {"kernel_size": (1, 3, 3), "stride": (1, 2, 2), "padding": (0, 1, 1)}
        ),
        3,
    ),
    NetworkWindow("s3d 3", "max_blur_pool", Sample((1, 1, 4, 6, 5), _SAME), 1),
    NetworkWindow("s3d 2", "max_blur_pool", Sample((1, 1, 4, 4, 6), {"kernel_size": 2}), 1),
    # Peer libraries' layers. antialiased-cnns publishes weights for 4 taps, and for 2, 3 and 5.
    NetworkWindow(
        "antialiased_cnns.resnet50",
        "max_blur_pool",
        Sample((1, 2, 8, 12), {"blur_size": 4} | _REFLECT),
        0,
    ),
    NetworkWindow(
        "antialiased_cnns.alexnet",
        "max_blur_pool",
        Sample((1, 2, 9, 11), _VALID | {"blur_size": 4} | _REFLECT),
        0,
    ),
    NetworkWindow(
        "antialiased_cnns.densenet121",
        "max_blur_pool",
        Sample((1, 2, 8, 12), _SAME | {"blur_size": 4} | _REFLECT),
        0,
    ),
    NetworkWindow(
        "antialiased_cnns.vgg16 lpf3", "max_blur_pool", Sample((1, 2, 8, 12), _REFLECT), 0
    ),
    NetworkWindow(
        "antialiased_cnns.vgg16 lpf5",
        "max_blur_pool",
        Sample((1, 2, 8, 12), {"blur_size": 5} | _REFLECT),
        0,
    ),
    NetworkWindow(
        "antialiased_cnns.vgg16 lpf2",
        "max_blur_pool",
        Sample((1, 2, 8, 12), {"blur_size": 2} | _REFLECT),
        0,
    ),
    NetworkWindow(
        "antialiased_cnns.mobilenet_v2", "blur_pool", Sample((1, 2, 8, 9), {"kernel_size": 4}), 0
    ),
    NetworkWindow(
        "antialiased_cnns.mobilenet_v2 lpf5",
        "blur_pool",
        Sample((1, 2, 8, 9), {"kernel_size": 5}),
        0,
    ),
    NetworkWindow(
        "antialiased_cnns.mobilenet_v2 lpf2",
        "blur_pool",
        Sample((1, 2, 8, 9), {"kernel_size": 2}),
        0,
    ),
    # timm: its max pooling at stride 1 and its blur as one layer; and its `aa_layer="blurpc"`.
    NetworkWindow("resnetblur50", "max_blur_pool", Sample((1, 2, 8, 12), _SAME | _REFLECT), 0),
    NetworkWindow("efficientnet_blur_b0", "blur_pool", Sample((1, 2, 8, 9), _ZEROS), 0),
    # kornia (the first) and Composer (the others): three taps, and zeros beyond the border.
    NetworkWindow("kornia.MaxBlurPool2D", "max_blur_pool", Sample((1, 2, 8, 12), _ZEROS), 0),
    NetworkWindow("composer resnet50", "max_blur_pool", Sample((1, 2, 8, 12), _SAME | _ZEROS), 0),
    NetworkWindow(
        "composer inception_v4", "max_blur_pool", Sample((1, 2, 9, 11), _VALID | _ZEROS), 0
    ),
    NetworkWindow(
        "composer convolution", "blur_pool", Sample((1, 2, 8, 8), {"stride": 1} | _ZEROS), 0
    ),
]
