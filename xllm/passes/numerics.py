"""Checks a rewrite by running it: the program before and after, in torch, on the same random weights and inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from xllm.errors import CompileError
from xllm.ir import Either, Permute, Program, Slice, Source, WeightRule
from xllm.ir.interpret import bind, empty_state, run

TOLERANCE = 1e-5


def check_same(
    before: Program, after: Program, who: str, sources: Mapping[str, np.ndarray], tolerance: float = TOLERANCE
) -> float:
    """Largest ‖after - before‖/‖before‖ over two steps (a prefill of two sequences, then a decode of both).

    `sources` are checkpoint tensors (see `random_sources`). Raises CompileError naming pass `who` above `tolerance`.
    """
    steps = random_steps(before, 0)
    outputs = [run_steps(program, sources, steps) for program in (before, after)]
    worst = max(difference(old, new) for old, new in zip(*outputs, strict=True))
    if worst > tolerance:
        raise CompileError(
            f"the program computes something else after this pass: relative difference {worst:.2e}",
            code="numerics",
            pass_name=who,
            try_=f"--disable-pass {who}, and report it with the output of XLLM_DEBUG=3",
        )
    return worst


def difference(old: torch.Tensor, new: torch.Tensor) -> float:
    """‖new - old‖/‖old‖; infinite where the shapes differ or either side is not finite."""
    if old.shape != new.shape or not (old.isfinite().all() and new.isfinite().all()):
        return float("inf")
    return float((new - old).norm() / old.norm().clamp_min(1e-30))


def random_sources(captured: Program, seed: int = 0) -> dict[str, np.ndarray]:
    """A random float32 tensor for each checkpoint tensor a captured program reads; its rewrites read the same."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in captured.weights.values():
        for name, shape in _source_shapes(weight.rule, weight.shape):
            shapes[name] = tuple(map(max, shapes.get(name, shape), shape))
    arrays = {}
    for name, shape in shapes.items():
        generator = np.random.default_rng([seed, *name.encode()])
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        arrays[name] = generator.standard_normal(shape, np.float32) * np.float32(scale)
    return arrays


def _source_shapes(rule: WeightRule, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that a captured weight of this shape reads, in their preferred spelling, and how large they must be
    for it.
    """
    match rule:
        case Source(names):
            yield names[0], shape
        case Either(options):
            yield from _source_shapes(options[0], shape)
        case Slice(of, axis, _, stop):
            yield from _source_shapes(of, (*shape[:axis], stop, *shape[axis + 1 :]))
        case Permute(of, axes):
            yield from _source_shapes(of, tuple(shape[axes.index(axis)] for axis in range(len(axes))))


def random_steps(program: Program, seed: int) -> list[dict[str, torch.Tensor]]:
    """Inputs of two steps over two slots: prompts of 5 and 3 tokens, then one token each."""
    vocab = program.output().all_input_nodes[0].meta["val"].shape[1]
    generator = torch.Generator().manual_seed(seed)
    spans = [((0, 0, 5), (1, 0, 3)), ((0, 5, 1), (1, 3, 1))]
    steps = []
    for rows in spans:
        slots = [slot for slot, _, count in rows for _ in range(count)]
        positions = [start + i for _, start, count in rows for i in range(count)]
        ends = np.cumsum([count for _, _, count in rows]) - 1
        steps.append(
            {
                "ids": torch.randint(0, vocab, (len(slots),), generator=generator, dtype=torch.int32),
                "positions": torch.tensor(positions, dtype=torch.int32),
                "slots": torch.tensor(slots, dtype=torch.int32),
                "last": torch.tensor(ends, dtype=torch.int32),
            }
        )
    return steps


def run_steps(
    program: Program, sources: Mapping[str, np.ndarray], steps: list[dict[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """Logits of each step, one state carried through."""
    weights, state = bind(program, sources), empty_state(program, slots=2, tokens=16)
    return [run(program, {**step, **state}, weights) for step in steps]
