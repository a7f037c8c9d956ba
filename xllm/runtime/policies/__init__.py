"""Scheduling policies by name: presets of plug-ins, and modifiers that go with any of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from xllm.runtime.errors import RuntimeFault
from xllm.runtime.policies.admission import any_time, gang, zero_evict
from xllm.runtime.policies.batching import fixed_chunk, matrix, mixed, one_list, prompts_first, whole_prompt
from xllm.runtime.policies.orders import ORDERS
from xllm.runtime.policies.policy import Policy

FCFS = ORDERS["fcfs"]
PRESETS = {
    policy.name: policy
    for policy in (
        Policy("chunked", FCFS, mixed, fixed_chunk, any_time, matrix),
        Policy("continuous", FCFS, prompts_first, whole_prompt, any_time, matrix),
        Policy("prefill-only", FCFS, prompts_first, fixed_chunk, any_time, matrix),
        Policy("mix", ORDERS["urgency_density"], one_list, whole_prompt, any_time, matrix, timed=True),
        Policy("zero-evict", FCFS, mixed, fixed_chunk, zero_evict, matrix),
        Policy("fixed-steps", FCFS, prompts_first, whole_prompt, gang, matrix),
    )
}
MODIFIERS = {"latency-aware": {"timed": True}, "zero-evict": {"admission": zero_evict}}
CHUNKED = PRESETS["chunked"]


def choose(scheduler: str = "chunked", order: str | None = None) -> Policy:
    """The policy of "PRESET" or "PRESET+MODIFIER..."; an order replaces the preset's own. Raises RuntimeFault
    (invalid_config) for names that are none."""
    preset, *modifiers = scheduler.split("+")
    _known("scheduler", preset, PRESETS)
    policy = PRESETS[preset]
    for name in modifiers:
        _known("modifier of the scheduler", name, MODIFIERS)
        policy = replace(policy, name=scheduler, **MODIFIERS[name])
    if order is not None:
        _known("order", order, ORDERS)
        policy = replace(policy, order=ORDERS[order])
    return policy


def _known(what: str, name: str, names: Mapping[str, object]) -> None:
    if name not in names:
        raise RuntimeFault("invalid_config", f"{what} is {name!r:.64}, there are {', '.join(names)}")
