"""What the kernels are to reach on a GPU, and whether the rows of a run say that they do.

A goal takes a figure for each of its cases out of the rows of the benchmark and of costs.py. It is met if the worst one is good
enough and none is missing. A new operation adds its goals to `GOALS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from contest import Case, formats_of
from contestants import OPERATIONS

Row = dict[str, Any]
# By case, None where it should have been measured and was not.
Figures = dict[str, float | None]

PEERS = ("kornia", "timm", "antialiased-cnns", "composer", "eager composite")
COMPILED = ("reference compiled", "composite compiled")
MIXERS = ("seeds' code", "timm", "torchvision", "kornia")
SOFT_TARGETS = ("torch, soft targets", "timm, soft targets")


class Goal(NamedTuple):
    """`required` is the least that will do, or the most; `show` formats a figure."""

    name: str
    figures: Callable[[list[Row]], Figures]
    required: float
    at_most: bool
    show: str


class Verdict(NamedTuple):
    """A goal's worst figure and its case, how many cases were measured and were to be, and what follows."""

    goal: Goal
    worst: float | None
    case: str
    measured: int
    cases: int

    @property
    def met(self) -> str:
        if self.worst is None:
            return "not measured"
        good = self.worst <= self.goal.required if self.goal.at_most else self.worst >= self.goal.required
        if good and self.measured < self.cases:
            return "incomplete"
        return "yes" if good else "no"


def judge(goal: Goal, rows: list[Row]) -> Verdict:
    figures = goal.figures(rows)
    known = {case: figure for case, figure in figures.items() if figure is not None}
    if not known:
        return Verdict(goal, None, "", 0, len(figures))
    case, worst = (max if goal.at_most else min)(known.items(), key=lambda item: item[1])
    return Verdict(goal, worst, case, len(known), len(figures))


def line(verdict: Verdict, device: str) -> list[str]:
    """A verdict as the cells of `HEADER`."""
    goal, worst = verdict.goal, verdict.worst
    required = f"{'at most' if goal.at_most else 'at least'} {goal.show.format(goal.required)}"
    measured = "" if worst is None else goal.show.format(worst)
    met = verdict.met if device == "cuda" else f"not measured ({device})"
    return [goal.name, required, measured, met, f"{verdict.measured}/{verdict.cases}", verdict.case]


HEADER = ["goal", "required", "measured", "met?", "cases", "worst case"]


def cases(operation: str, direction: str, dtypes: Sequence[str], quick: bool = False) -> Iterator[Case]:
    """The benchmark's cases on CUDA; if quick, those of the first arguments and shape."""
    row, least = OPERATIONS[operation], 1 if quick else None
    for arguments, shape in itertools.product(row.arguments[:least], row.shapes["cuda"][:least]):
        for format, dtype in itertools.product(formats_of(shape), dtypes):
            yield Case(operation, arguments, shape, format, dtype, direction)


def passes(rows: list[Row], case: Case) -> Iterator[dict[str, Row]]:
    """The case's interleaved passes: of each contestant its row."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "format" in row and case_of(row) == case:
            found.setdefault(row["run"], {})[row["contestant"]] = row
    yield from found.values()


def case_of(row: Row) -> Case:
    """A row's case. (JSON has no tuples.)"""
    return Case(*(tuple(value) if isinstance(value, list) else value for value in (row[field] for field in Case._fields)))


def own(
    operation: str, direction: str, dtypes: Sequence[str], figure: str, worst: Callable[..., float | None]
) -> Callable[[list[Row]], Figures]:
    """A figure of regfast's rows: "of_copy", a fraction of a copy's bandwidth, or "ratio", a multiple of the baseline's time."""

    def figures(rows: list[Row]) -> Figures:
        found: Figures = {}
        for case in cases(operation, direction, dtypes):
            entries = [entry["regfast"] for entry in passes(rows, case) if "regfast" in entry]
            found[str(case)] = worst((row[figure] for row in entries if figure in row), default=None)
        return found

    return figures


def times_faster(
    operation: str, rivals: Sequence[str], dtypes: Sequence[str], quick: bool = False, direction: str = "forward+backward"
) -> Callable[[list[Row]], Figures]:
    """Each rival's time as a multiple of regfast's in the same pass. One that is absent or fails is no rival."""

    def figures(rows: list[Row]) -> Figures:
        found: Figures = {}
        for case, rival in itertools.product(cases(operation, direction, dtypes, quick), rivals):
            entries = [entry for entry in passes(rows, case) if rival in entry]
            if any(entry[rival]["absent"] or entry[rival]["error"] for entry in entries):
                continue
            times = [(entry[rival].get("median_ms"), entry.get("regfast", {}).get("median_ms")) for entry in entries]
            found[f"{rival}, {case}"] = min((theirs / ours for theirs, ours in times if theirs and ours), default=None)
        return found

    return figures


def cost(name: str, operations: Sequence[str]) -> Callable[[list[Row]], Figures]:
    """regfast's own value of a cost."""

    def figures(rows: list[Row]) -> Figures:
        found: Figures = {}
        for operation in operations:
            own = [row for row in rows if (row.get("cost"), row["operation"], row["contestant"]) == (name, operation, "regfast")]
            found |= {row["case"]: row.get("value") for row in own} or {operation: None}
        return found

    return figures


def cost_ratio(name: str, operations: Sequence[str], over: str, under: str) -> Callable[[list[Row]], Figures]:
    """A cost of one contestant as a multiple of another's."""

    def figures(rows: list[Row]) -> Figures:
        found: Figures = {}
        for operation in operations:
            own = [row for row in rows if (row.get("cost"), row["operation"]) == (name, operation)]
            values = {row["contestant"]: row.get("value") for row in own}
            known = values.get(over) is not None and values.get(under)
            found[own[0]["case"] if own else operation] = values[over] / values[under] if known else None
        return found

    return figures


HALF, BOTH, PERCENT, TIMES = ("bfloat16", "float16"), ("bfloat16", "float32"), "{:.0%}", "{:.2f}x"
POOLS = ("max_blur_pool", "blur_pool")
BLENDS = ("mixup", "mixup_uint8")
DIFFERENTIATED = (*POOLS, "mixup", "mixup_cross_entropy", "rezero")
LAUNCHED = (*DIFFERENTIATED, "mixup_uint8")


def of_copy(operation: str, direction: str, required: float) -> Goal:
    """The bytes that must move, by regfast's time."""
    figures = own(operation, direction, BOTH, "of_copy", min)
    return Goal(f"{operation} {direction}, of a copy's bandwidth", figures, required, False, PERCENT)


def of_max_pooling(name: str, dtypes: Sequence[str], required: float) -> Goal:
    figures = own("max_blur_pool", "forward+backward", dtypes, "ratio", max)
    return Goal(f"training, of nn.MaxPool2d's time, {name}", figures, required, True, TIMES)


def of_plain(network: str, required: float) -> Goal:
    """Its multiply-adds, counted, as a multiple of the plain network's: then pooling and blurring cost nothing."""
    figures = own(network, "forward+backward", ["bfloat16"], "ratio", max)
    return Goal(f"a training {network}, of the plain one's time, bfloat16", figures, required, True, TIMES)


def faster(what: str, operation: str, rivals: Sequence[str], required: float, **chosen: Any) -> Goal:
    return Goal(f"{what}, bfloat16", times_faster(operation, rivals, ["bfloat16"], **chosen), required, False, TIMES)


GOALS = [
    of_copy("max_blur_pool", "forward", 0.9),
    of_copy("max_blur_pool", "backward", 0.8),
    of_copy("blur_pool", "forward", 0.9),
    of_copy("blur_pool", "backward", 0.85),
    of_max_pooling("half precision", HALF, 0.8),
    of_max_pooling("float32", ["float32"], 1.0),
    Goal("training, faster than the peers, bfloat16", times_faster("max_blur_pool", PEERS, ["bfloat16"]), 4, False, TIMES),
    Goal("training, faster than the peers, float32", times_faster("max_blur_pool", PEERS, ["float32"]), 3, False, TIMES),
    Goal(
        "training, faster than torch.compile, bfloat16",
        times_faster("max_blur_pool", COMPILED, ["bfloat16"], quick=True),
        1.5, False, TIMES,
    ),
    of_copy("mixup", "forward", 0.9),
    of_copy("mixup", "backward", 0.8),
    of_copy("mixup_uint8", "forward", 0.9),
    of_copy("mixup_cross_entropy", "forward", 0.9),
    of_copy("mixup_cross_entropy", "backward", 0.9),
    # Nine tenths of what passes over memory say: 9 to 2, compiled 3 to 2, with bytes 53 bytes to 3; of the loss 15 and 20 to 3,
    # compiled 3 to 3.
    faster("a blend, faster than the peers", "mixup", MIXERS, 4, direction="forward"),
    faster("a blend of bytes, faster than the peers", "mixup_uint8", MIXERS, 15, direction="forward"),
    faster("a blend, faster than torch.compile", "mixup", ["seeds' code compiled"], 1.3, quick=True),
    faster("a mixed loss, faster than two terms", "mixup_cross_entropy", ["two-term loss"], 4.5),
    faster("a mixed loss, faster than soft targets", "mixup_cross_entropy", SOFT_TARGETS, 6),
    faster("a mixed loss, faster than torch.compile", "mixup_cross_entropy", ["two-term loss compiled"], 0.9, quick=True),
    of_copy("rezero", "forward", 0.9),
    of_copy("rezero", "backward", 0.85),
    # Nine tenths of 7 passes to 3 forward, and 9 to 3 backward.
    faster("a gated residual, faster than written out", "rezero", ["eager composite"], 2.4),
    faster("a gated residual, faster than torch.compile", "rezero", ["composite compiled"], 0.9, quick=True),
    faster("a manifold step, faster than the blog's", "manifold_mixup", ["seeds' code"], 1.1),
    faster("a training step with MixUp, faster than the peers'", "mixup_step", MIXERS, 1),
    faster("an anti-aliased convolution, faster than timm's", "convolution", ["timm"], 1),
    of_plain("resnet18", 1.29),
    of_plain("resnet50", 1.26),
    *(faster(f"a training {name}, faster than timm's blurred one", name, ["timm"], 1.1) for name in ("resnet18", "resnet50")),
    Goal("bytes saved for the backward beside x", cost("saved beside x", (*POOLS, *BLENDS, "rezero")), 0, True, "{:.0f}"),
    Goal("bytes of training's peak beside x, y, gradients", cost("peak beside x, y and gradients", POOLS), 0, True, "{:.0f}"),
    Goal(
        "host time of a call, to F.max_pool2d's",
        cost_ratio("host time of a call", POOLS, over="regfast", under="F.max_pool2d"),
        2, True, TIMES,
    ),
    Goal("first forward, seconds a kernel", cost("first forward", LAUNCHED), 1, True, "{:.2f}"),
    Goal("first backward, seconds a kernel", cost("first backward", DIFFERENTIATED), 1, True, "{:.2f}"),
    Goal("kernels compiled for a new size", cost("compiled for a new size", LAUNCHED), 0, True, "{:.0f}"),
]  # fmt: skip
