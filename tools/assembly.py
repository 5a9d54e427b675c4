"""The instructions of a compiled kernel: the shortest way through its main loop, its accesses."""

from __future__ import annotations

import re
from typing import NamedTuple

# An instruction: its condition, its name, its first operands, and the label that it may branch to.
# A label has its name alone, in the last group.
SASS = (
    r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(@!?U?P\w+\s+)?"
    r"([A-Z][A-Z0-9_.]*)([^;\n]*?)(?:`\((\.L\w+)\))?\s*;|^(\.L\w+):"
)
AMDGCN = r"^\s+()([a-z][a-z0-9_]+)()(?:[ \t]+(\.LBB\w+))?|^(\.L\w+):"
ENDS = ("EXIT", "s_endpgm")


class Instruction(NamedTuple):
    """An instruction's name, and the places of the instructions that may follow it."""

    name: str
    following: list[int]


def instructions(text: str, pattern: str) -> list[Instruction]:
    """Every instruction of an assembly, which `pattern` matches: SASS or AMDGCN."""
    found: list[tuple[str, str, bool]] = []
    labels: dict[str, int] = {}
    for match in re.finditer(pattern, text, flags=re.M):
        condition, name, operands, target, label = match.groups()
        if label:
            labels[label] = len(found)
        else:
            found.append((name, target, not condition and not operands.strip()))
    listed = []
    for i, (name, target, always) in enumerate(found):
        to = labels.get(target)
        # An AMD GPU skips what no lane does; here some lane does it.
        goes = name == "s_branch" or (always and name == "BRA")
        goes = goes or (name == "s_cbranch_execnz" and to is not None and to > i)
        following = [to] if to is not None and name != "s_cbranch_execz" else []
        if not goes and not (always and name in ENDS) and i + 1 < len(found):
            following.append(i + 1)
        listed.append(Instruction(name, following))
    return listed


class Loop(NamedTuple):
    """A loop: the places of its first instruction, of the last ones of a turn, and of all."""

    first: int
    last: set[int]
    places: set[int]


def loops_of(found: list[Instruction]) -> list[Loop]:
    """The loops of a program. A jump backwards to what does not reach it again is no loop."""
    before: list[list[int]] = [[] for _ in found]
    for i, one in enumerate(found):
        for following in one.following:
            before[following].append(i)
    reached = distances(found, {0})
    loops: dict[int, Loop] = {}
    for first, sources in enumerate(before):
        turned = {i for i in sources if i >= first and i in reached}
        if not turned:
            continue
        places, waiting = {first}, list(turned)
        while waiting:
            i = waiting.pop()
            if i not in places and i >= first:
                places.add(i)
                waiting += before[i]
        # Only what the first instruction reaches.
        places &= distances(found, {first}, places).keys()
        last = turned & places
        # A jump to itself, with which a program ends, is no loop.
        if last and len(places) > 1:
            loops[first] = Loop(first, last, places)
    return list(loops.values())


def distances(
    found: list[Instruction], starts: set[int], within: set[int] | None = None
) -> dict[int, int]:  # fmt: skip
    """The fewest steps from `starts` to each place that is reached, perhaps only `within` some."""
    steps, waiting = dict.fromkeys(starts, 0), list(starts)
    for i in waiting:
        for following in found[i].following:
            if following not in steps and (within is None or following in within):
                steps[following] = steps[i] + 1
                waiting.append(following)
    return steps


class Way(NamedTuple):
    """The instructions of a main loop, those of a turn of it, and those taken around it.

    `around` counts one turn of the enclosing loop, or without one the program. A turn takes the
    shortest way through, which meets no border and nothing rare. Without a loop, a turn is the
    whole program.
    """

    loop: int
    executed: int
    around: int


def shortest(found: list[Instruction]) -> Way:
    """The way through a program. The main loop is the longest one that has no other within it."""
    loops = loops_of(found)
    ends = {i for i, one in enumerate(found) if one.name in ENDS}
    if not loops:
        return Way(0, max(ends) + 1, 0)
    firsts = {loop.first for loop in loops}
    innermost = [loop for loop in loops if loop.places & firsts == {loop.first}]
    main = max(innermost, key=lambda loop: len(loop.places))
    turn = distances(found, {main.first}, main.places)
    outer = [loop for loop in loops if loop is not main and main.first in loop.places]
    start, ends, within = 0, ends, None
    if outer:
        start, ends, within = min(outer, key=lambda loop: len(loop.places))
    to = distances(found, {start}, within)[main.first]
    after = distances(found, main.last, within)
    left = min(after[end] for end in ends if end in after)
    return Way(len(main.places), min(turn[last] for last in main.last) + 1, to + left)


def sass_bits(ops: list[str], kind: str) -> list[int]:
    """The width in bits of every access of a kind; one that names no width has 32."""
    named = [re.search(r"\.[US]?(8|16|64|128)\b", op) for op in ops if op.startswith(kind)]
    return [int(width.group(1)) if width else 32 for width in named]


def widths(bits: list[int]) -> str:
    """How many accesses there are of each width in bits, the widest first: "2x128 4x16"."""
    return " ".join(f"{bits.count(width)}x{width}" for width in sorted(set(bits), reverse=True))
