"""A recording as a flame graph: an SVG that needs nothing else, widths in proportion to time. Below all: the kinds of
steps; below them equal operators of all layers together, sampling, and kernels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape

from xllm.watch.profiler import SAMPLING, Recording

WIDTH, HEIGHT, CHAR = 1200, 18, 6.6  # pixels: of the drawing, of a line, of a letter
LEAST = 0.3  # pixels: what is narrower is not drawn
COLOURS = ("#e8a33d", "#d9773c", "#e3c04b", "#c95d4a", "#dd9160", "#cf8f2e")


@dataclass
class Frame:
    name: str
    seconds: float = 0.0
    inner: dict[str, Frame] = field(default_factory=dict)

    def add(self, path: tuple[str, ...], seconds: float) -> None:
        """The time belongs to every frame on the path, this one first."""
        self.seconds += seconds
        if path:
            self.inner.setdefault(path[0], Frame(path[0])).add(path[1:], seconds)

    @property
    def depth(self) -> int:
        return 1 + max((frame.depth for frame in self.inner.values()), default=0)


def frames(recording: Recording) -> Frame:
    """All steps; and beside them, on its own, what the engine's thread does while they run or wait for it."""
    root = Frame("all")
    for kind, totals in recording.totals.items():
        *calls, sampling = totals.tolist()
        for (node, kernel), seconds in zip(recording.operators, calls, strict=True):
            root.add((f"{kind} steps", re.sub(r"_\d+_", "_*_", node), kernel), seconds)
        root.add((f"{kind} steps", SAMPLING), sampling)
    if recording.host:
        root.add(("engine's thread: commit, deliver and plan",), sum(stop - start for start, stop in recording.host))
    return root


def flame_graph(recording: Recording) -> bytes:
    """The text of an .svg file. Pointing at a frame shows its name, seconds and share."""
    root = frames(recording)
    height = (root.depth + 1) * HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' font-family="monospace" font-size="11">',
        f"<title>{len(recording.steps)} steps in {recording.ended - recording.began:.3f} s</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        *_drawn(root, 0.0, 0, WIDTH / root.seconds if root.seconds else 0.0, root.seconds),
        "</svg>",
    ]
    return "\n".join(lines).encode() + b"\n"


def _drawn(frame: Frame, x: float, level: int, scale: float, whole: float) -> Iterator[str]:
    width = frame.seconds * scale
    if width < LEAST:
        return
    share = frame.seconds / whole
    said = escape(f"{frame.name}: {frame.seconds * 1e3:.3f} ms, {share:.1%}")
    y, room = level * HEIGHT, int((width - 4) / CHAR)
    shown = frame.name if len(frame.name) <= room else f"{frame.name[: room - 1]}…" if room > 2 else ""
    drawn = width - LEAST / 2  # a line between neighbours
    colour = COLOURS[sum(frame.name.encode()) % len(COLOURS)]
    yield (
        f'<g><title>{said}</title><rect x="{x:.2f}" y="{y}" width="{drawn:.2f}" height="{HEIGHT - 1}" fill="{colour}"/>'
        f'<text x="{x + 3:.2f}" y="{y + HEIGHT - 6}">{escape(shown)}</text></g>'
    )
    for inner in sorted(frame.inner.values(), key=lambda one: -one.seconds):
        yield from _drawn(inner, x, level + 1, scale, whole)
        x += inner.seconds * scale
