"""The figures of a core, from the counters that it keeps as it goes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from xllm.runtime.config import EngineStats
from xllm.runtime.pages import PageState

if TYPE_CHECKING:
    from xllm.runtime.core import Core


def figures_of(core: Core) -> EngineStats:
    """A snapshot."""
    figures, plan = core.pool.figures(), core.pool.plan
    stats = EngineStats(
        running=len(core.running),
        waiting=len(core.waiting),
        oldest_wait_s=core._oldest_wait,
        free_pages=max(0, core.pool.free_pages),
        used_pages=core.pool.promises.total,
        total_pages=plan.pages,
        page_bytes=plan.page_bytes,
        steps=core._steps,
        rows=core._rows,
        tokens=core._tokens,
        prompt_tokens=core._prompt_tokens,
        generated_tokens=core._generated_tokens,
        recomputed_tokens=core._recomputed_tokens,
        preemptions=core._preemptions,
        wasted_rows=core._wasted_rows,
        finished=core._ends["stop"] + core._ends["length"],
        cancelled=core._ends["cancelled"],
        failed=core._ends["error"],
        failed_steps=core._failed_steps,
        critical_maps=figures.critical_maps,
        hidden_maps=figures.hidden_maps,
        unmaps=figures.unmaps,
        kv_waste_bytes=sum(one.rows * plan.waste_bytes(one.computed) for one in list(core.running)),
        looked_up_tokens=core._sharing.looked_up_tokens,
        cached_tokens=core._sharing.cached_tokens,
        mapped_pages=figures.states[PageState.MAPPED],
        reusable_pages=figures.states[PageState.REUSABLE],
        cached_pages=figures.states[PageState.CACHED],
        evictions=figures.evictions,
        weights=core.weights,
        preempted=sum(one.queued is not None for one in list(core.waiting)),
        sequences=core._taken,
        seconds=core.spent.seconds,
        step_sizes=core.spent.steps,
        prefix_pages=figures.prefix_pages,
        block_tokens=core.executor.kv.group_tokens,
        **core._sharing.tier_figures(),
    )
    return replace(stats, **core._causes)
