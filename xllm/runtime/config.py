"""The engine's settings and the figures it reports. Unsafe combinations are refused here, with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from xllm.runtime.errors import RuntimeFault
from xllm.runtime.policies import choose
from xllm.runtime.policies.state import AGED_SECONDS, StepCost
from xllm.runtime.policies.trace import Trace


@dataclass(frozen=True)
class LoadCost:
    """What it takes to have a token's keys and values: computing them, or loading them from a tier. Seconds; `wait` is
    what a load takes before its first byte."""

    compute: float = 1.0
    host: float = 0.0
    disk: float = 0.0
    wait: float = 0.0

    def pays(self, tokens: int, from_host: int, from_disk: int) -> bool:
        """Is loading faster? `tokens` need not be computed then; for that, so many are loaded from each tier."""
        return self.wait + from_host * self.host + from_disk * self.disk < tokens * self.compute


@dataclass(frozen=True)
class TierConfig:
    """Where the state of texts goes that has no room in the pool. host_bytes: memory beside the pool, 0 for none. disk:
    a folder for files of `disk_bytes` in all, None for none. identity: hex digest of whatever decides the bytes
    (weights, their layout, kernels): nothing is shared with another one's files. cost: when loading is worth it."""

    host_bytes: int = 0
    disk: str | None = None
    disk_bytes: int = 0
    identity: str = ""
    cost: LoadCost = LoadCost()


@dataclass(frozen=True)
class TierFigures:
    """One tier, in bytes and in groups of `group_bytes` each. loaded and corrupt: asked for, and found as they were
    stored or not (corrupt, short or gone). off: why the tier is not used any more (an errno's name), empty while it
    is."""

    name: str
    group_bytes: int = 0
    limit_bytes: int = 0
    held_bytes: int = 0
    stored: int = 0
    loaded: int = 0
    corrupt: int = 0
    evictions: int = 0
    off: str = ""

    def plus(self, stored: int = 0, loaded: int = 0, corrupt: int = 0, evictions: int = 0) -> TierFigures:
        return replace(
            self,
            stored=self.stored + stored,
            loaded=self.loaded + loaded,
            corrupt=self.corrupt + corrupt,
            evictions=self.evictions + evictions,
        )


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine.

    kv_bytes: memory of the KV pool. page_bytes: None lets the pool choose (2 MiB, see xtensor).
    max_tokens_per_step, max_seqs: None takes the executor's limit, otherwise the smaller one counts.
    max_beside_decodes: prompt tokens of a step that also decodes, which bounds how long a decode waits for prompts;
    None is no bound of its own. step_seconds: how long such a step should take; the bound then follows what steps
    really take. None leaves it as it is. max_chunk: tokens of one prompt per step while others need the budget or
    memory is scarce (see scheduler).
    queue_limit: accepted requests that may wait for admission, a tenth less for offline ones. admit_below: share of the
    pool in use at which admission stops while something runs. async_scheduling False is the plain loop. premap: map
    pages ahead of need in a background thread. prefix_cache: start a sequence on pages that others computed of the same
    text; without effect for models with state that does not grow with the text. weights: their version, which outputs
    name. cost: what steps take on this machine, where that was measured; without, policies that go by time use what
    tokens have taken. tiers: where cached pages go when the pool has no room; needs the prefix cache, and is without
    effect where that is. scheduler, order: names of policies, the order None for the preset's own. aged_seconds: a
    request that is the oldest and has been here so long goes first; ten times so long where it is offline. trace: gets
    every decision. check: assert all invariants after each step (for tests; cost grows with pages).
    """

    kv_bytes: int
    page_bytes: int | None = None
    eos_ids: tuple[int, ...] = ()
    max_tokens_per_step: int | None = 512
    max_beside_decodes: int | None = None
    step_seconds: float | None = None
    max_chunk: int = 512
    max_seqs: int | None = None
    queue_limit: int = 4096
    admit_below: float = 0.95
    async_scheduling: bool = True
    premap: bool = True
    prefix_cache: bool = True
    weights: str = ""
    cost: StepCost | None = None
    tiers: TierConfig | None = None
    check: bool = False
    scheduler: str = "chunked"
    order: str | None = None
    aged_seconds: float = AGED_SECONDS
    trace: Trace | None = None

    def __post_init__(self) -> None:
        for name in (
            "kv_bytes",
            "page_bytes",
            "max_tokens_per_step",
            "max_beside_decodes",
            "max_chunk",
            "max_seqs",
            "queue_limit",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RuntimeFault("invalid_config", f"{name} is {value}, must be at least 1")
        choose(self.scheduler, self.order)
        for name in ("aged_seconds", "step_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RuntimeFault("invalid_config", f"{name} is {value}, must be above 0 and finite")
        if not 0 < self.admit_below <= 1:
            raise RuntimeFault("invalid_config", f"admit_below is {self.admit_below}, must be above 0 and at most 1")
        if self.tiers is not None and not self.prefix_cache:
            raise RuntimeFault("invalid_config", "tiers hold what the prefix cache knows: prefix_cache must be on")


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. running and waiting are requests; the token and event figures count since start.

    rows and tokens: what all steps computed. mapped_pages: of running sequences; reusable_pages: mapped, and of nobody.
    prompt_tokens counts prompts of finished prefills once; recomputed_tokens what preemption made the engine compute
    again. wasted_rows: row-steps whose result was dropped. free_pages: pages no running sequence needs, of
    other models neither; used_pages: those that sequences of this one need.
    oldest_wait_s: age of the first request that waits for admission. kv_waste_bytes: memory of pages held by running
    sequences beyond their tokens. critical_maps and hidden_maps: pages mapped while a step waited for them, and by the
    background thread. looked_up_tokens and cached_tokens: prompt tokens of admitted requests, and those of them found
    in the prefix cache. cached_pages: pages it holds for nobody; evictions: pages it gave up. A_B_preempt_C:
    preemptions by who needed what the victim had (class A in phase B) and the class of the victim; their sum is
    `preemptions`. tiers: those that there are; loads: times that a sequence waited for one; not_stored: groups of
    tokens that were gone before they were copied. refusal: "code: message" once no request is taken any more (stopping,
    draining, failed). paused: no step is computed, asleep: the level, see Engine.pause and Engine.sleep. weights: the
    version that steps compute with.
    pending: requests that the engine thread has not taken over yet; preempted: of those that wait, who had begun;
    sequences: slots that are taken; prefix_pages: pages in the prefix cache, used or not; block_tokens: tokens of its
    units. seconds: by what they went into; step_sizes: counts of steps by tokens; of both see spent.
    """

    running: int = 0
    waiting: int = 0
    oldest_wait_s: float = 0.0
    free_pages: int = 0
    used_pages: int = 0
    total_pages: int = 0
    page_bytes: int = 0
    steps: int = 0
    rows: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    wasted_rows: int = 0
    accepted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    failed_steps: int = 0
    critical_maps: int = 0
    hidden_maps: int = 0
    unmaps: int = 0
    kv_waste_bytes: int = 0
    looked_up_tokens: int = 0
    cached_tokens: int = 0
    mapped_pages: int = 0
    reusable_pages: int = 0
    cached_pages: int = 0
    evictions: int = 0
    tiers: tuple[TierFigures, ...] = ()
    loads: int = 0
    not_stored: int = 0
    online_prefill_preempt_offline: int = 0
    online_decode_preempt_offline: int = 0
    online_prefill_preempt_online: int = 0
    online_decode_preempt_online: int = 0
    offline_prefill_preempt_offline: int = 0
    offline_decode_preempt_offline: int = 0
    refusal: str | None = None
    paused: bool = False
    asleep: str = ""
    weights: str = ""
    pending: int = 0
    preempted: int = 0
    sequences: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    step_sizes: tuple[int, ...] = ()
    prefix_pages: int = 0
    block_tokens: int = 0
