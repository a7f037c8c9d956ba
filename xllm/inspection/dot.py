"""`xllm show --dot`: a program or a plan as Graphviz text. Boxes are calls with operator, module path and kernel;
colours are streams; edges carry shapes.

Layers that look alike are drawn once, with a note of which they stand for; what one hands to the next is a dashed edge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import networkx as nx

from xllm.artifact import Artifact, ArtifactError
from xllm.inspection.explain import read_report
from xllm.plan import Buffer, Call, references
from xllm.targets.base import Extent

if TYPE_CHECKING:
    from xllm.ir import Program

COLOURS = ("#dbeafe", "#fde68a", "#dcfce7", "#fae8ff", "#fee2e2")
Graph = nx.DiGraph


@dataclass(frozen=True)
class Box:
    """One call: name, label lines, the layer it is in (None: outside), its stream, and a key equal for calls alike."""

    name: str
    lines: tuple[str, ...]
    layer: int | None
    stream: str
    alike: str


@dataclass(frozen=True)
class Arrow:
    """A value from the box that makes it to one that reads it."""

    source: str
    target: str
    shape: str


def of_artifact(artifact: Artifact, layer: int | None = None) -> str:
    """The plan: kernels and streams. Raises ArtifactError for a layer there is not."""
    operators, plan = read_report(artifact)["operators"], artifact.plan
    boxes = []
    for call in plan.calls:
        held = operators[call.node]
        alike = f"{call.op} {call.kernel} {call.stream}"
        boxes.append(Box(call.node, (call.op, held["path"], call.kernel), held["layer"], call.stream, alike))
    return drawn(artifact.name, boxes, list(_plan_arrows(plan.calls, plan.buffers)), layer)


def of_program(program: Program, layer: int | None = None) -> str:
    """A captured or rewritten program; each of its layers may stand for several of the model."""
    from xllm.ir.effects import is_symbolic
    from xllm.ir.program import layer_of, path_of
    from xllm.ir.show import Names

    names = Names(program)
    stands_for = {held.index: held.stands_for[0] for held in program.layers}
    calls = [node for node in program.calls() if not is_symbolic(node)]
    boxes, arrows = [], []
    for node in calls:
        home = layer_of(node)
        shape = names.type(node.meta["val"])
        lines = (names.value(node), str(node.target), path_of(node))
        place = None if home is None else stands_for.get(home, home)
        boxes.append(Box(node.name, lines, place, "", f"{node.target} {shape}"))
        sources = [
            source for source in node.all_input_nodes if source.op == "call_function" and not is_symbolic(source)
        ]
        arrows += [Arrow(source.name, node.name, names.type(source.meta["val"])) for source in sources]
    depth = {held.stands_for[0]: held.stands_for for held in program.layers}
    return drawn(program.name, boxes, arrows, layer, depth)


def drawn(
    title: str,
    boxes: Sequence[Box],
    arrows: Iterable[Arrow],
    layer: int | None = None,
    depth: Mapping[int, Sequence[int]] | None = None,
) -> str:
    """Graphviz text. `layer` leaves out the others; `depth` says what a layer already stands for."""
    layers = list(dict.fromkeys(box.layer for box in boxes if box.layer is not None))
    every = [number for first in layers for number in (depth or {}).get(first, (first,))]
    if layer is not None and layer not in every:
        raise ArtifactError("unknown-layer", f"there is no layer {layer}; there are {len(every)} from 0")
    shown, groups = _folded(boxes, layers, depth or {})
    layer = next((first for first, numbers in groups.items() if layer in numbers), layer)
    graph = nx.DiGraph(name=title)
    for box in boxes:
        if shown[box.name] == box.name and layer in (None, box.layer):
            graph.add_node(box.name, box=box)
    home = {box.name: box.layer for box in boxes}
    for arrow in arrows:
        source, target = shown[arrow.source], shown[arrow.target]
        if source in graph and target in graph:
            crosses = home[arrow.source] != home[arrow.target] and home[source] is not None and home[target] is not None
            back = crosses and home[source] == home[target]
            graph.add_edge(source, target, shape=arrow.shape, back=back)
    return _text(graph, groups)


def _folded(
    boxes: Sequence[Box], layers: Sequence[int], depth: Mapping[int, Sequence[int]]
) -> tuple[dict[str, str], dict[int, list[int]]]:
    """The box drawn for each, and the layers each drawn layer stands for."""
    held: dict[int, list[Box]] = {number: [] for number in layers}
    for box in boxes:
        if box.layer is not None:
            held[box.layer].append(box)
    first: dict[tuple[str, ...], int] = {}
    shown = {box.name: box.name for box in boxes}
    groups: dict[int, list[int]] = {}
    for number, members in held.items():
        standing = first.setdefault(tuple(box.alike for box in members), number)
        groups.setdefault(standing, []).extend(depth.get(number, (number,)))
        shown |= {box.name: other.name for box, other in zip(members, held[standing], strict=True)}
    return shown, groups


def _text(graph: Graph, groups: Mapping[int, Sequence[int]]) -> str:
    boxes: list[Box] = [held["box"] for _, held in graph.nodes(data=True)]
    streams = sorted({box.stream for box in boxes})
    colour = {stream: COLOURS[place % len(COLOURS)] for place, stream in enumerate(streams)}
    lines = [
        f"digraph {_quoted(graph.name)} {{",
        '  rankdir=TB; node [shape=box, style=filled, fontname="monospace"]; edge [fontname="monospace", fontsize=9];',
    ]
    if any(streams):
        told = ", ".join(f"{stream} {colour[stream]}" for stream in streams)
        lines.append(f"  label={_quoted(f'{graph.name}; streams: {told}')};")
    inside: dict[int | None, list[str]] = {}
    for box in boxes:
        label = "\n".join(filter(None, box.lines))
        line = f"{_quoted(box.name)} [label={_quoted(label)}, fillcolor={_quoted(colour[box.stream])}];"
        inside.setdefault(box.layer, []).append(line)
    lines += [f"  {line}" for line in inside.pop(None, [])]
    for layer, members in inside.items():
        assert layer is not None
        numbers = groups[layer]
        told = f"layer {layer}" if len(numbers) == 1 else f"{len(numbers)} layers alike: {_ranges(numbers)}"
        lines += [f"  subgraph cluster_{layer} {{", f"    label={_quoted(told)};"]
        lines += [*(f"    {line}" for line in members), "  }"]
    for source, target, edge in graph.edges(data=True):
        style = ', style=dashed, constraint=false, color="gray40"' if edge["back"] else ""
        lines.append(f"  {_quoted(source)} -> {_quoted(target)} [label={_quoted(edge['shape'])}{style}];")
    return "\n".join([*lines, "}", ""])


def _plan_arrows(calls: Sequence[Call], buffers: Mapping[str, Buffer]) -> Iterable[Arrow]:
    writer = {reference[1:]: call.node for call in calls for reference in call.results}
    for call in calls:
        for reference in dict.fromkeys(references(call)):
            name = reference[1:]
            if reference[:1] == "%" and writer[name] != call.node:
                held = buffers[name]
                sizes = ", ".join(_size(size) for size in held.shape)
                yield Arrow(writer[name], call.node, f"{held.dtype}[{sizes}]")


def _size(size: Any) -> str:
    if not isinstance(size, Extent):
        return str(size)
    terms = [f"{factor} {name}" if name and factor != 1 else name or str(factor) for name, factor in size.terms.items()]
    return " + ".join(terms) or "0"


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def _quoted(text: str) -> str:
    """A Graphviz string: names of models and modules are anything."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
