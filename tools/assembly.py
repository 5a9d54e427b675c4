"""The instructions of a compiled kernel: the shortest way through its main loop, its accesses."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import networkx as nx

# An instruction: its condition, its name, its first operands, and the label that it may branch to.
# A label has its name alone, in the last group.
SASS = (
    r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(@!?U?P\w+\s+)?"
    r"([A-Z][A-Z0-9_.]*)([^;\n]*?)(?:`\((\.L\w+)\))?\s*;|^(\.L\w+):"
)
AMDGCN = r"^\s+()([a-z][a-z0-9_]+)()(?:[ \t]+(\.LBB\w+))?|^(\.L\w+):"
ENDS = ("EXIT", "s_endpgm")
ACCESSES = {"load": "LDG|(global|buffer)_load_", "store": "STG|(global|buffer)_store_"}


def instructions(text: str, pattern: str) -> nx.DiGraph:
    """The places of an assembly, which `pattern` matches, to those that may follow; with names."""
    found: list[tuple[str, str, bool]] = []
    labels: dict[str, int] = {}
    for match in re.finditer(pattern, text, flags=re.M):
        condition, name, operands, target, label = match.groups()
        if label:
            labels[label] = len(found)
        else:
            found.append((name, target, not condition and not operands.strip()))
    graph = nx.DiGraph()
    for i, (name, target, always) in enumerate(found):
        graph.add_node(i, name=name)
        to = labels.get(target)
        # An AMD GPU skips what no lane does; here some lane does it.
        goes = name == "s_branch" or (always and name == "BRA")
        goes = goes or (name == "s_cbranch_execnz" and to is not None and to > i)
        if to is not None and name != "s_cbranch_execz":
            graph.add_edge(i, to)
        if not goes and not (always and name in ENDS) and i + 1 < len(found):
            graph.add_edge(i, i + 1)
    return graph


class Way(NamedTuple):
    """The instructions of a main loop, those of a turn of it, and those taken around it.

    `around` counts one turn of the enclosing loop, or without one the program. A turn takes the
    shortest way through, which meets no border and nothing rare. Without a loop, a turn is the
    whole program.
    """

    loop: int
    executed: int
    around: int


def loops_of(graph: nx.DiGraph) -> dict[int, set[int]]:
    """The places of each loop, by its first: what this reaches and is reached from, beyond it."""
    loops = {}
    for first in sorted(graph):
        if any(i > first for i in graph.predecessors(first)):
            beyond = graph.subgraph(i for i in graph if i >= first)
            turn = nx.descendants(beyond, first) & nx.ancestors(beyond, first)
            if turn:
                loops[first] = turn | {first}
    return loops


def shortest(graph: nx.DiGraph) -> Way:
    """The way through a program. The main loop is the longest one that has no other within it."""
    graph = graph.subgraph({0} | nx.descendants(graph, 0))
    loops = loops_of(graph)
    start, ends = 0, {i for i in graph if graph.nodes[i]["name"] in ENDS}
    if not loops:
        return Way(0, max(ends) + 1, 0)
    innermost = [first for first, places in loops.items() if places & loops.keys() == {first}]
    main = max(innermost, key=lambda first: len(loops[first]))
    last = loops[main] & set(graph.predecessors(main))
    turn = nx.single_source_shortest_path_length(graph.subgraph(loops[main]), main)
    outer = [first for first in loops if first != main and main in loops[first]]
    if outer:
        start = min(outer, key=lambda first: len(loops[first]))
        ends = loops[start] & set(graph.predecessors(start))
        graph = graph.subgraph(loops[start])
    after = nx.multi_source_dijkstra_path_length(graph, last)
    around = nx.shortest_path_length(graph, start, main) + min(
        after[i] for i in ends & after.keys()
    )
    return Way(len(loops[main]), min(turn[i] for i in last) + 1, around)


def accesses(graph: nx.DiGraph, kind: str) -> str:
    """How many loads or stores there are of each width in bits, the widest first: "2x128 4x16"."""
    names = [name for _, name in graph.nodes(data="name") if re.match(ACCESSES[kind], name)]
    counts = Counter(map(bits_of, names))
    return " ".join(f"{counts[bits]}x{bits}" for bits in sorted(counts, reverse=True))


def bits_of(name: str) -> int:
    """The width of an access; in SASS one that names none has 32 bits, in AMDGCN 16."""
    if name.isupper():
        named = re.search(r"\.[US]?(8|16|64|128)\b", name)
        return int(named[1]) if named else 32
    words = re.search(r"_dword(?:x(\d))?$", name)
    return 32 * int(words[1] or 1) if words else 16
