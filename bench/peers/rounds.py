"""What was measured, kept line by line as it is made, and what comes next: a run goes on where an earlier one ended."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.peers.workloads import Figure, Workload
from bench.report import Spread

NEAR = 1.5  # a peer that many times worse than the best one is left out of later rounds
TRIES = 2  # failures after which a cell is given up
OURS = "xllm"


class Cell(NamedTuple):
    workload: str
    weights: str
    contender: str


@dataclass(frozen=True)
class Failure:
    """Why there are no figures; `final` where another try would tell nothing new."""

    why: str
    final: bool = False


Measured = dict[str, Any] | Failure


def is_ours(contender: str) -> bool:
    return contender.split()[0] == OURS


class Found(list[Measured]):
    """What a cell has, oldest first."""

    @property
    def figures(self) -> list[dict[str, Any]]:
        return [one for one in self if isinstance(one, dict)]

    @property
    def failures(self) -> list[Failure]:
        return [one for one in self if isinstance(one, Failure)]

    @property
    def given_up(self) -> bool:
        return len(self.failures) >= TRIES or any(failure.final for failure in self.failures)

    @property
    def seconds(self) -> float:
        """What a measurement takes, the start of the process included; 0 where none told."""
        return max((one.get("seconds", 0.0) for one in self.figures), default=0.0)


class Log:
    """One JSON object a line: a cell, the identity of what ran (whatever a figure depends on, as JSON), and its figures
    or its failure. Each begins with the end of the one before: what a dying machine cut short spoils no other."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._held: list[dict[str, Any]] = []
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                self._held.append(json.loads(line))
            except ValueError:
                continue

    def forget(self, workloads: Collection[str], weights: Collection[str]) -> None:
        self._held = [one for one in self._held if one["workload"] not in workloads or one["weights"] not in weights]
        self._file.write_text("".join(f"\n{json.dumps(one)}" for one in self._held))

    def add(self, cell: Cell, identity: Mapping[str, Any], measured: Measured) -> None:
        result = {"failure": vars(measured)} if isinstance(measured, Failure) else {"figures": measured}
        line = json.dumps({**cell._asdict(), "identity": identity, **result})
        self._held.append(json.loads(line))
        with self._file.open("a") as out:
            out.write(f"\n{line}")

    def found(self, cell: Cell, identity: Mapping[str, Any]) -> Found:
        """What was measured of the cell under this very identity."""
        wanted = {**cell._asdict(), "identity": json.loads(json.dumps(identity))}
        return Found(
            one["figures"] if "figures" in one else Failure(**one["failure"])
            for one in self._held
            if wanted.items() <= one.items()
        )


def following(
    cells: Mapping[Cell, Found], rounds: int, out: Collection[Cell] = (), left: float = math.inf
) -> Cell | None:
    """Of the cells that lack rounds, are not `out` and took no longer than the seconds `left`, the one tried least, the
    first of several: every one has its turn before any has another. Contenders of a workload take turns in another
    order each round: some machines lend speed for a while, which whoever comes next pays back. None when nothing is
    left to do."""
    places = {place: at for at, place in enumerate(dict.fromkeys(cell[:2] for cell in cells))}
    lacking = [
        cell
        for cell, found in cells.items()
        if len(found.figures) < rounds and not found.given_up and cell not in out and found.seconds <= left
    ]

    def turn(cell: Cell) -> tuple[int, int, int]:
        tried = len(cells[cell])
        return tried, places[cell[:2]], zlib.crc32(f"{tried} {cell.contender}".encode())

    return min(lacking, key=turn, default=None)


def minutes_a_round(cells: Mapping[Cell, Found], out: Collection[Cell] = ()) -> dict[str, float]:
    """By workload, what another round of the cells that are not `out` takes; of those that told."""
    took: dict[str, float] = {}
    for cell, found in cells.items():
        if found.seconds and cell not in out:
            took[cell.workload] = took.get(cell.workload, 0.0) + found.seconds / 60
    return took


def left_out(cells: Mapping[Cell, Found], workloads: Mapping[str, Workload]) -> set[Cell]:
    """Peers that cannot be the best: their median is more than NEAR times worse than that of the best peer."""
    out = set()
    for name, weights in dict.fromkeys(cell[:2] for cell in cells):
        figure = workloads[name].figures[0]
        peers = _spreads(cells, name, weights, figure)
        peers = {contender: spread for contender, spread in peers.items() if not is_ours(contender)}
        for contender, spread in peers.items():
            if (found := ratio(spread, peers, figure.more_is_better)) and found[0] * NEAR < 1:
                out.add(Cell(name, weights, contender))
    return out


def ratio(ours: Spread | None, peers: Mapping[str, Spread], more_is_better: bool) -> tuple[float, str] | None:
    """How many times better we are than the best peer, and its name; None without both. A figure that is not positive
    compares with nothing: of memory, what is subtracted may be more than was ever resident."""
    peers = {name: spread for name, spread in peers.items() if spread.median > 0}
    if ours is None or not peers:
        return None
    best = (max if more_is_better else min)(peers, key=lambda name: peers[name].median)
    mine, other = ours.median, peers[best].median
    return (mine / other if more_is_better else other / mine), best


def summarize(
    cells: Mapping[Cell, Found], workloads: Mapping[str, Workload], out: Collection[Cell] = ()
) -> list[dict[str, Any]]:
    """A row for each workload, figure and weight type: a spread or a sentence for each contender, and the ratio of each
    of ours. The ceiling is what the machine could do right after our measurements of that row."""
    rows = []
    for name, weights in dict.fromkeys(cell[:2] for cell in cells):
        held = {cell.contender: found for cell, found in cells.items() if cell[:2] == (name, weights)}
        ours = [contender for contender in held if is_ours(contender)]
        ceilings = [one["ceiling"] for mine in ours for one in held[mine].figures if "ceiling" in one]
        for figure in workloads[name].figures:
            good = _spreads(cells, name, weights, figure)
            peers = {contender: spread for contender, spread in good.items() if not is_ours(contender)}
            found = {mine: ratio(good.get(mine), peers, figure.more_is_better) for mine in ours}
            rows.append(
                {
                    "workload": name, "figure": figure.name, "weights": weights, "unit": figure.unit,
                    "cells": {contender: good.get(contender) or _why(found) for contender, found in held.items()},
                    "failures": {contender: _why(found) for contender, found in held.items() if found.failures},
                    "left_out": [contender for contender in held if Cell(name, weights, contender) in out],
                    "ratios": {mine: one[0] for mine, one in found.items() if one},
                    "best_peer": next((one[1] for one in found.values() if one), None),
                    "ceiling": {key: Spread.of(one[key] for one in ceilings) for key in (ceilings or [{}])[0]},
                }
            )  # fmt: skip
    return rows


def _spreads(cells: Mapping[Cell, Found], workload: str, weights: str, figure: Figure) -> dict[str, Spread]:
    """By contender, of those that have figures."""
    held = {cell.contender: found.figures for cell, found in cells.items() if cell[:2] == (workload, weights)}
    return {name: Spread.of(one[figure.key] for one in figures) for name, figures in held.items() if figures}


def _why(found: Found) -> str:
    return f"failed: {found.failures[-1].why}" if found.failures else "not yet"
