"""How much memory an artifact takes in this process, decided before anything is made: what can never fit is refused
with both numbers and the knob."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xllm.artifact import Artifact, ArtifactError
from xllm.runtime.encoding import state_bytes
from xllm.runtime.executor import KVSpec, Limits
from xllm.runtime.pages import PoolPlan, plan_pool
from xllm.targets import host

# Python, libraries, tokenizer tables and the buffers of requests, measured with Qwen3-0.6B's vocabulary.
PROCESS_BYTES = 160 << 20
DEFAULT_KV_TOKENS = 32768
PAGE_BYTES = 2 << 20


@dataclass(frozen=True)
class Ledger:
    """Where memory goes, in bytes. `weights` are mapped from the artifact and shared between processes; `pool` is what
    the engine makes, never more than its sequences can hold together."""

    weights: int
    arena: int
    pool: PoolPlan
    process: int
    prefix_cache: bool = True  # asked for
    host_cache: int = 0  # memory for texts that the pool evicts

    @property
    def kv(self) -> int:
        return self.pool.pages * self.pool.page_bytes

    @property
    def kv_tokens(self) -> int:
        return self.pool.tokens_for(self.pool.pages)

    @property
    def total(self) -> int:
        return self.weights + self.arena + self.kv + self.host_cache + self.process

    def table(self) -> str:
        token_bytes = self.pool.kv.group_bytes // self.pool.kv.group_tokens
        note = f"{self.kv_tokens:,} tokens of {token_bytes:,} bytes"
        rows = [("KV pages", self.kv, note)]
        if self.host_cache:
            rows.append(("host cache", self.host_cache, f"{self.host_cache // token_bytes:,} tokens, beside --memory"))
        table = _table(self.weights, self.arena, rows, self.process)
        return f"{table}\n  prefix cache: {self.prefix_note()}"

    def prefix_note(self) -> str:
        """Whether prompts start on what others computed, or why they do not."""
        if not self.prefix_cache:
            return "off, as asked"
        kv = self.pool.kv
        if kv.fixed_bytes:
            return f"off, {kv.fixed_bytes:,} bytes of each sequence are state of its whole text: nothing to share"
        return f"on, in the KV pages that nobody uses, {kv.group_tokens} tokens at a time"


@dataclass(frozen=True)
class RowsLedger:
    """As `Ledger`, of an artifact that gives rows: `state` is what the largest step keeps."""

    weights: int
    arena: int
    state: int
    process: int

    @property
    def total(self) -> int:
        return self.weights + self.arena + self.state + self.process

    def table(self) -> str:
        return _table(self.weights, self.arena, [("state of a step", self.state, "")], self.process)


def plan_memory(
    artifact: Artifact,
    memory_bytes: int | None,
    max_seqs: int | None = None,
    prefix_cache: bool = True,
    host_cache: int = 0,
) -> Ledger:
    """Divides `memory_bytes` (None: room for DEFAULT_KV_TOKENS, within half of what the machine has free). `host_cache`
    comes on top; models that have no prefix cache have none.

    Raises ArtifactError with the number and the knob when not even one sequence of full length fits.
    """
    plan, limits = artifact.plan, artifact.manifest["limits"]
    spec = KVSpec(plan.kv.group_bytes, plan.kv.group_tokens, plan.kv.fixed_bytes)
    seqs = min(max_seqs or limits["max_seqs"], limits["max_seqs"])
    fixed = artifact.weight_bytes + plan.arena_bytes + PROCESS_BYTES
    free = _available_bytes()
    if 0 < host_cache < spec.group_bytes:
        raise ArtifactError(
            "host-cache-too-small",
            f"--host-cache {host_cache} holds no {spec.group_tokens} tokens: give {spec.group_bytes} bytes or more",
        )
    host_cache = 0 if spec.fixed_bytes else host_cache // spec.group_bytes * spec.group_bytes

    def pages(tokens: int) -> int:
        return -(-spec.bytes_for(tokens) // PAGE_BYTES) * PAGE_BYTES

    one = pages(limits["max_len"])
    if memory_bytes is None:
        wanted = pages(min(DEFAULT_KV_TOKENS, limits["max_len"] * seqs))
        kv = max(one, min(wanted, (free - fixed - host_cache) // 2))
    else:
        kv = memory_bytes - fixed
    if kv < one:
        raise ArtifactError(
            "memory-too-small",
            f"--memory leaves {_mib(max(kv, 0))} for KV pages, one sequence of {limits['max_len']} tokens needs"
            f" {_mib(one)}: give --memory {_mib(fixed + one)} or more, or compile with a smaller --max-len",
        )
    pool = plan_pool(spec, limits["max_len"], seqs, kv)
    ledger = Ledger(artifact.weight_bytes, plan.arena_bytes, pool, PROCESS_BYTES, prefix_cache, host_cache)
    if ledger.total > free + artifact.weight_bytes:
        knob = "give a smaller --memory" if memory_bytes else "free some, or compile with a smaller --max-len"
        knob = "give a smaller --host-cache" if host_cache else knob
        raise ArtifactError(
            "memory-too-large",
            f"{_mib(ledger.total)} are needed, {_mib(ledger.kv)} of them for KV pages, and the machine has {_mib(free)}"
            f" free: {knob}",
        )
    return ledger


def plan_rows_memory(artifact: Artifact, limits: Limits, kv: KVSpec, memory_bytes: int | None) -> RowsLedger:
    """What an artifact that gives rows takes. Raises ArtifactError when `memory_bytes` (None: the machine) is less."""
    ledger = RowsLedger(artifact.weight_bytes, artifact.plan.arena_bytes, state_bytes(limits, kv), PROCESS_BYTES)
    room = _available_bytes() + artifact.weight_bytes if memory_bytes is None else memory_bytes
    if ledger.total > room:
        raise ArtifactError(
            "memory-too-small",
            f"{_mib(ledger.total)} are needed, {_mib(room)} are there: give more, or compile with a smaller"
            " --max-batch-tokens or --max-len",
        )
    return ledger


def _table(weights: int, arena: int, states: Sequence[tuple[str, int, str]], process: int) -> str:
    rows: Sequence[tuple[str, int, str]] = (
        ("weights (mapped, shared)", weights, ""),
        ("arena", arena, ""),
        *states,
        ("process", process, "estimate"),
        ("total", weights + arena + sum(size for _, size, _ in states) + process, ""),
    )
    return "\n".join(f"  {name:<26}{size / 2**20:>10,.1f} MiB  {note}".rstrip() for name, size, note in rows)


def _mib(size: int) -> str:
    return f"{-(-size // 2**20)}MiB"


def _available_bytes() -> int:
    """Memory that may be taken without swapping, within this process's control group."""
    free = 1 << 34
    with contextlib.suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    left = host.memory_left()
    return free if left is None else min(free, left)
