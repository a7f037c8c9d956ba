"""How much memory the artifacts of this process take, decided before anything is made: what can never fit is refused
with both numbers and the knob. All that generate share their KV pages."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xllm.artifact import Artifact, ArtifactError
from xllm.runtime.encoding import state_bytes
from xllm.runtime.executor import KVSpec
from xllm.runtime.pages import PoolPlan, plan_pool
from xllm.runtime.xtensor import choose_page_bytes
from xllm.targets import host

# Python, libraries, tokenizer tables and the buffers of requests, measured with Qwen3-0.6B's vocabulary.
PROCESS_BYTES = 160 << 20
MODEL_BYTES = 88 << 20  # of each further model: what of these is not there for a model with few words too
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
    def own(self) -> int:
        """All but KV pages."""
        return self.weights + self.arena + self.host_cache + self.process

    @property
    def total(self) -> int:
        return self.own + self.kv

    @property
    def sizes(self) -> dict[str, int]:
        """For those who watch: by what it is for."""
        return {
            "total_memory": self.total,
            "weight": self.weights,
            "total_kv_cache": self.kv,
            "total_activation": self.arena,
        }

    def rows(self) -> list[tuple[str, int, str]]:
        token_bytes = self.pool.kv.group_bytes // self.pool.kv.group_tokens
        rows = _fixed(self.weights, self.arena)
        if self.host_cache:
            rows.append(("host cache", self.host_cache, f"{self.host_cache // token_bytes:,} tokens, beside --memory"))
        return rows

    def table(self) -> str:
        return MemoryPlan((self,), self.pool.pages, self.pool.page_bytes).table([""])

    def kv_note(self) -> str:
        token_bytes = self.pool.kv.group_bytes // self.pool.kv.group_tokens
        return f"{self.kv_tokens:,} tokens of {token_bytes:,} bytes"

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
    def own(self) -> int:
        return self.weights + self.arena + self.state + self.process

    @property
    def total(self) -> int:
        return self.own

    @property
    def sizes(self) -> dict[str, int]:
        return {"total_memory": self.total, "weight": self.weights, "total_activation": self.arena + self.state}

    def rows(self) -> list[tuple[str, int, str]]:
        return [*_fixed(self.weights, self.arena), ("state of a step", self.state, "")]


@dataclass(frozen=True)
class MemoryPlan:
    """Of all artifacts of a process, in their order: `pages` KV pages of `page_bytes` for all together (0 where none
    generates)."""

    ledgers: tuple[Ledger | RowsLedger, ...]
    pages: int = 0
    page_bytes: int = PAGE_BYTES

    @property
    def kv(self) -> int:
        return self.pages * self.page_bytes

    @property
    def total(self) -> int:
        return sum(ledger.own for ledger in self.ledgers) + self.kv

    def table(self, names: Sequence[str]) -> str:
        generating = [(name, one) for name, one in zip(names, self.ledgers, strict=True) if isinstance(one, Ledger)]
        one = len(names) == 1
        lines = []
        for name, ledger in zip(names, self.ledgers, strict=True):
            lines += [f"  {name}"] if not one else []
            lines += [_line(*row) for row in ledger.rows()]
        lines += ["  all together"] if not one else []
        if generating:
            notes = (ledger.kv_note() if one else f"{name} {ledger.kv_note()}" for name, ledger in generating)
            lines.append(_line("KV pages", self.kv, "; or ".join(notes)))
        lines.append(_line("process", sum(ledger.process for ledger in self.ledgers), "estimate"))
        lines.append(_line("total", self.total, ""))
        notes = [f"  prefix cache: {note}" for note in dict.fromkeys(ledger.prefix_note() for _, ledger in generating)]
        return "\n".join(lines + notes)


def plan_memory(
    artifact: Artifact,
    memory_bytes: int | None,
    max_seqs: int | None = None,
    prefix_cache: bool = True,
    host_cache: int = 0,
) -> Ledger:
    """As `plan_models`, of one artifact that generates."""
    [ledger] = plan_models([artifact], memory_bytes, max_seqs, prefix_cache, host_cache).ledgers
    assert isinstance(ledger, Ledger)
    return ledger


def plan_models(
    artifacts: Sequence[Artifact],
    memory_bytes: int | None,
    max_seqs: int | None = None,
    prefix_cache: bool = True,
    host_cache: int = 0,
) -> MemoryPlan:
    """Divides `memory_bytes` (None: room for DEFAULT_KV_TOKENS of each, within half of what the machine has free).
    `host_cache` comes on top, in equal parts; models that have no prefix cache have none. max_seqs: of each.

    A page is as large as the artifact likes it that likes the largest; each is kept room for one sequence of full
    length. Raises ArtifactError with the number and the knob where not even that fits.
    """
    free = _available_bytes()
    rows = {at: _rows_ledger(artifact, at) for at, artifact in enumerate(artifacts) if artifact.task != "generate"}
    found = [_Generating(at, one, max_seqs) for at, one in enumerate(artifacts) if one.task == "generate"]
    weights = sum(artifact.weight_bytes for artifact in artifacts)
    fixed = sum(ledger.own for ledger in rows.values()) + sum(one.fixed for one in found)
    cached = [one for one in found if not one.spec.fixed_bytes]
    for one in cached:
        one.host_cache = _host_cache(one.spec, host_cache, len(cached))
    kept = sum(one.host_cache for one in found)
    least = sum(one.pages(one.max_len) for one in found)
    if memory_bytes is None:
        wanted = sum(one.pages(min(DEFAULT_KV_TOKENS, one.max_len * one.seqs)) for one in found)
        kv = max(least, min(wanted, (free - fixed - kept) // 2))
    else:
        kv = memory_bytes - fixed
    room = free + weights if memory_bytes is None else memory_bytes
    if not found and fixed > room:
        raise ArtifactError(
            "memory-too-small",
            f"{_mib(fixed)} are needed, {_mib(room)} are there: give more, or compile with a smaller"
            " --max-batch-tokens or --max-len",
        )
    if kv < least:
        whose = " and ".join(f"one sequence of {one.max_len} tokens" for one in found)
        raise ArtifactError(
            "memory-too-small",
            f"--memory leaves {_mib(max(kv, 0))} for KV pages, {whose} need{'s' * (len(found) == 1)} {_mib(least)}:"
            f" give --memory {_mib(fixed + least)} or more, or compile with a smaller --max-len",
        )
    spans = sum(one.seqs for one in found)
    liked = (choose_page_bytes(kv, one.spec.bytes_for(one.max_len), spans) for one in found)
    page_bytes = max(liked, default=PAGE_BYTES)
    ledgers = rows | {one.at: one.ledger(kv, page_bytes, prefix_cache) for one in found}
    pools = [ledger.pool for ledger in ledgers.values() if isinstance(ledger, Ledger)]
    pages = min(kv // page_bytes, sum(pool.span_pages * pool.spans for pool in pools))
    plan = MemoryPlan(tuple([ledgers[at] for at in range(len(artifacts))]), pages, page_bytes)
    if plan.total > free + weights and found:
        knob = "give a smaller --memory" if memory_bytes else "free some, or compile with a smaller --max-len"
        knob = "give a smaller --host-cache" if host_cache else knob
        raise ArtifactError(
            "memory-too-large",
            f"{_mib(plan.total)} are needed, {_mib(plan.kv)} of them for KV pages, and the machine has {_mib(free)}"
            f" free: {knob}",
        )
    return plan


class _Generating:
    """An artifact that generates, number `at`, and what it takes beside KV pages."""

    def __init__(self, at: int, artifact: Artifact, max_seqs: int | None) -> None:
        plan, limits = artifact.plan, artifact.manifest["limits"]
        self.at, self.artifact = at, artifact
        self.spec = KVSpec(plan.kv.group_bytes, plan.kv.group_tokens, plan.kv.fixed_bytes)
        self.max_len: int = limits["max_len"]
        self.seqs: int = min(max_seqs or limits["max_seqs"], limits["max_seqs"])
        self.process = MODEL_BYTES if at else PROCESS_BYTES
        self.fixed = artifact.weight_bytes + plan.arena_bytes + self.process
        self.host_cache = 0

    def pages(self, tokens: int) -> int:
        """Bytes of the pages of one sequence."""
        return -(-self.spec.bytes_for(tokens) // PAGE_BYTES) * PAGE_BYTES

    def ledger(self, kv: int, page_bytes: int, prefix_cache: bool) -> Ledger:
        pool = plan_pool(self.spec, self.max_len, self.seqs, kv, page_bytes)
        arena = self.artifact.plan.arena_bytes
        return Ledger(self.artifact.weight_bytes, arena, pool, self.process, prefix_cache, self.host_cache)


def _rows_ledger(artifact: Artifact, at: int) -> RowsLedger:
    from xllm.targets.cpu.executor import kv_of, limits_of

    state = state_bytes(limits_of(artifact), kv_of(artifact.plan))
    process = MODEL_BYTES if at else PROCESS_BYTES
    return RowsLedger(artifact.weight_bytes, artifact.plan.arena_bytes, state, process)


def _host_cache(spec: KVSpec, given: int, models: int) -> int:
    """One model's part, in whole groups of tokens."""
    if 0 < given < spec.group_bytes * models:
        raise ArtifactError(
            "host-cache-too-small",
            f"--host-cache {given} holds no {spec.group_tokens} tokens: give {spec.group_bytes * models} bytes or more",
        )
    return given // models // spec.group_bytes * spec.group_bytes


def _fixed(weights: int, arena: int) -> list[tuple[str, int, str]]:
    return [("weights (mapped, shared)", weights, ""), ("arena", arena, "")]


def _line(name: str, size: int, note: str) -> str:
    return f"  {name:<26}{size / 2**20:>10,.1f} MiB  {note}".rstrip()


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
