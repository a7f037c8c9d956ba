"""`xllm compile`: capture, rewrite, stamp, plan, pack, write. The order of this file is the order of the work.

Nothing is decided here but the order; choices are made by passes and targets, and each is on record in the report.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm.artifact import PLANNED, UNFOLDED, ArtifactWriter, check_apart, previous_weights, share, writing
from xllm.errors import CompileError
from xllm.pipeline import (
    Pipeline,
    check_activations,
    fallback_lines,
    made_by,
    module_lines,
    modules_of,
    pass_lines,
    pipeline_of,
    sized,
)  # fmt: skip
from xllm.storage import ACTIVATIONS, FLOATS, INTS, KVS, STORAGES, full_word
from xllm.targets.predicted import TUNING

if TYPE_CHECKING:
    from xllm.targets.cpu.tuning import Tuning

Progress = Callable[[str, int, int], None]  # stage or item, done, total


@dataclass(frozen=True)
class CompileOptions:
    """What a user may choose. None means: by the checkpoint.

    weights: storage of product weights, a word of `xllm.storage` (int8 and int4 alone mean groups of 32). head: the
    same of embeddings and the head, by default as weights. kv: storage of keys and values, one of KVS, by default as
    weights in floating point, bfloat16 beside integers. activations: what rows are rounded to in products with weights
    of a type that it fits, one of ACTIVATIONS or none. max_seqs: sequences decoded together; max_len: tokens of one
    sequence; max_batch_tokens: tokens of one step. disable: passes to leave out. pass_modules, kernel_modules: files of
    others (see `xllm.extensions`). traffic: (tokens of a step, weight) pairs the buckets are chosen for. tuning: a
    machine's figures that times are predicted from, and its level; they go into the artifact. task: one of TASKS, by
    default what the checkpoint says. debug: the XLLM_DEBUG ladder, 0 to 5.
    """

    target: str = "cpu"
    weights: str | None = None
    head: str | None = None
    kv: str | None = None
    activations: str | None = None
    max_seqs: int = 64
    max_len: int | None = None
    max_batch_tokens: int = 512
    disable: tuple[str, ...] = ()
    pass_modules: tuple[str, ...] = ()
    kernel_modules: tuple[str, ...] = ()
    traffic: tuple[tuple[int, float], ...] = ()
    tuning: Tuning | None = None
    task: str | None = None
    debug: int = 0

    def __post_init__(self) -> None:
        stored = (*INTS, *STORAGES)
        allowed_values = {
            "weights": stored, "head": stored, "kv": KVS, "activations": ACTIVATIONS, "target": ("cpu",), "task": TASKS,
        }  # fmt: skip
        for name, allowed in allowed_values.items():
            value = getattr(self, name)
            if value not in (None, *allowed):
                raise CompileError(f"{name} is {value!r}", code="bad-option", try_="one of " + ", ".join(allowed))
        for name in ("max_seqs", "max_batch_tokens", "max_len"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 1 << 20:
                raise CompileError(f"{name} is {value}", code="bad-option", try_=f"a {name} from 1 to {1 << 20}")


TASKS = ("generate", "embed", "classify")
DEFAULT_MAX_LEN = 4096


@dataclass(frozen=True)
class Fallback:
    """An operator that serving will run in torch: where, why, and the bytes it moves per token of a step."""

    node: str
    op: str
    why: str
    token_bytes: int


@dataclass(frozen=True)
class Report:
    """What a compile did: pass records, operators left to torch, sizes, seconds per stage, peak memory in bytes."""

    artifact: Path
    records: tuple[Any, ...]
    fallbacks: tuple[Fallback, ...]
    weight_bytes: int
    arena_bytes: int
    token_bytes: int
    buckets: tuple[tuple[int, int], ...]
    modules: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    weights: int = 0
    comparison: Mapping[str, Any] = field(default_factory=dict)  # of the buckets, as `account` makes it
    reused: int = field(default=0, compare=False)
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    peak_bytes: int = field(default=0, compare=False)

    def text(self) -> str:
        """The report as lines for a person."""
        lines = [f"wrote {self.artifact}"]
        lines += pass_lines(self.records)
        lines.append(
            f"  weights {self.weight_bytes / 1e6:,.1f} MB · arena {self.arena_bytes / 1e6:,.1f} MB"
            f" · KV {self.token_bytes:,} bytes a token · buckets {' '.join(str(T) for T, _ in self.buckets)}"
        )
        lines += [f"  note: {note}" for note in self.notes]
        lines += self._padding_lines()
        if self.reused:
            lines.append(f"  reused {self.reused} of {self.weights} weights of an earlier artifact, the rest is packed")
        lines += module_lines(self.modules, "serving needs --kernel-module {}")
        lines += fallback_lines([(item.node, item.op, item.why, item.token_bytes) for item in self.fallbacks])
        lines += self._unused_lines()
        spent = " · ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        lines.append(f"  {spent} · peak memory {self.peak_bytes / 1e6:,.0f} MB")
        return "\n".join(lines)

    def _unused_lines(self) -> list[str]:
        """Tensors of the checkpoint that the program does not read; those of one part, as a vision tower, on a line."""
        parts: dict[str, list[str]] = {}
        for name in self.unused:
            parts.setdefault(".".join(name.split(".")[:2]), []).append(name)
        many = "  unused of the checkpoint: {} tensors below {}"
        return [
            many.format(len(names), part) if len(names) > 1 else f"  unused tensor of the checkpoint: {names[0]}"
            for part, names in parts.items()
        ]

    def _padding_lines(self) -> list[str]:
        """What the buckets waste under the traffic they were chosen for, beside powers of two."""
        held = self.comparison
        if held.get("traffic") != "given":
            return []
        unless = "" if held["pads"] else "; if shapes were fixed: kernels of this target take any size and pad none"
        return [
            f"  expected padding under this traffic {held['padding']:.1%} in {len(self.buckets)} shapes, with powers of"
            f" two {held['ladder_padding']:.1%} in {len(held['ladder'])}{unless}"
        ]


def compile_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    options: CompileOptions | None = None,
    progress: Progress | None = None,
    *,
    reuse: str | Path | None = None,
    share_weights: str | Path | None = None,
) -> Report:
    """Compiles the checkpoint folder into the artifact `out`, whole or not at all. Raises CompileError or
    ArtifactError.

    reuse: an artifact whose weights are taken where all that they are made from is the same (None: the one at `out`);
    the result is the same bytes as without it. share_weights: a folder that keeps the weight file, for every artifact
    with the same weights to share.
    """
    options, tell, clock = options or CompileOptions(), progress or (lambda *_: None), _Stopwatch()
    previous = previous_weights(out if reuse is None else reuse)
    if reuse is not None and previous is None:
        raise CompileError(
            f"{reuse} is no sound artifact", code="bad-option", try_="--reuse with an artifact that `xllm show` opens"
        )
    if share_weights is not None:
        check_apart(out, share_weights)
    with writing(out) as writer:
        tell("loading the compiler", 0, 0)
        from xllm.frontend.facts import facts as read_facts
        from xllm.frontend.facts import quantisation
        from xllm.frontend.huggingface import capture
        from xllm.frontend.quantised import Quantised
        from xllm.frontend.stamp import stamp
        from xllm.frontend.weights import Checkpoint
        from xllm.packing import blocks, origin
        from xllm.passes import Context, run_pipeline
        from xllm.passes.account import account
        from xllm.passes.debug import Ladder, dump_planned
        from xllm.passes.emit import emit_plan, emit_task, reach
        from xllm.targets import cpu

        pipeline = chosen_passes(options)
        clock.lap("imports")
        facts = read_facts(checkpoint)
        tensors = Checkpoint.open(checkpoint)
        quantised = Quantised(tensors, quantisation(checkpoint))
        kept = {tensors.dtype(name) for name in tensors} | quantised.dtypes
        asked, options = options.max_len, resolved(options, facts.max_len, kept)
        check_activations(options.activations or "", str(options.weights), str(options.head))
        target = cpu.host_target(options.tuning)
        storages = str(options.weights), str(options.head), str(options.kv), options.activations or ""
        context = Context(target, *storages, options.traffic, pipeline.providers)
        tell("capturing", 0, 0)
        program = capture(
            checkpoint,
            max_len=options.max_len,
            max_tokens=options.max_batch_tokens,
            max_seqs=options.max_seqs,
            task=options.task,
        )
        task = emit_task(program)
        options = replace(options, max_len=reach(program, task, asked))
        clock.lap("capture")
        ladder = Ladder(options.debug, target.name, lambda name, text: writer.write(f"ir/{name}.ir", text))
        ladder.captured(program)
        tell("rewriting", 0, 0)
        program, rewrites = run_pipeline(program, pipeline.rewrites, context, ladder.observe)
        program = quantised.bound(stamp(program))
        unused = tuple(name for name in tensors.check(program) if name not in quantised.read)
        tell("planning", 0, 0)
        program, plans = run_pipeline(program, pipeline.plans, context, ladder.observe)
        plan = emit_plan(program)
        for suffix, text in dump_planned(program, plan, target.name).items():
            writer.write(f"ir/{ladder.count:02d}-{PLANNED}{suffix and UNFOLDED}.ir", text)
        clock.lap("passes")
        written = writer.write_weights(
            sized(plan),
            lambda weight: blocks(program, weight, tensors),
            lambda name, done, total: tell("packing weights", done, total),
            lambda weight: origin(program, weight, tensors),
            previous,
        )
        plan = written.plan
        if share_weights is not None:
            share(writer.root, written, share_weights)
        clock.lap("weights")
        writer.write("plan.json", plan.to_json())
        if options.tuning is not None:
            writer.write(TUNING, options.tuning.to_json())
        accounted = account(program, context)
        writer.write("report.json", json.dumps(accounted, separators=(",", ":"), sort_keys=True))
        _copy_tokenizer(writer, facts)
        records = (*rewrites, *plans)
        writer.finish(
            {
                "model": {
                    "name": facts.name,
                    "architecture": facts.architecture,
                    "vocab": facts.vocab_size,
                    "max_len": options.max_len,
                    "trained_len": facts.max_len,
                    "eos_ids": list(facts.eos_ids),
                    "bos_id": facts.bos_id,
                },
                "task": task,
                "generation": dict(facts.generation),
                "special_tokens": dict(facts.special_tokens),
                "limits": {
                    "max_len": options.max_len,
                    "max_seqs": options.max_seqs,
                    "max_batch_tokens": options.max_batch_tokens,
                },
                "kv_dtype": options.kv,
                **made_by(program, pipeline, records, written, context, "transformers"),
            }
        )
    return Report(
        artifact=Path(out),
        records=records,
        fallbacks=tuple(
            Fallback(node, choice.operation.op, choice.why, choice.lowering.cost.bytes.at({"T": 1, "S": 1}))
            for node, choice in program.plans["kernels"].items()
            if choice.provider == "torch"
        ),
        weight_bytes=sum(weight.bytes for weight in plan.weights.values()),
        arena_bytes=plan.arena_bytes,
        token_bytes=plan.kv.token_bytes,
        buckets=tuple((bucket.T, bucket.S) for bucket in plan.buckets),
        modules=modules_of(plan),
        unused=unused,
        notes=program.notes,
        comparison=accounted["buckets"],
        seconds=clock.laps,
        reused=len(written.reused),
        weights=len(plan.weights),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def chosen_passes(options: CompileOptions) -> Pipeline:
    """THE list, see `pipeline_of`."""
    from xllm.passes import REWRITES

    return pipeline_of(REWRITES, options.disable, options.pass_modules, options.kernel_modules)


def resolved(options: CompileOptions, trained_len: int, dtypes: set[str]) -> CompileOptions:
    """Options with every None replaced: storage follows the checkpoint, length the model, at most DEFAULT_MAX_LEN."""
    weights = full_word(options.weights or ("bfloat16" if "bfloat16" in dtypes else "float32"))
    max_len = options.max_len or min(trained_len or DEFAULT_MAX_LEN, DEFAULT_MAX_LEN)
    if trained_len and max_len > trained_len:
        raise CompileError(
            f"max_len {max_len} is beyond the {trained_len} positions of the model",
            code="bad-option",
            try_=f"--max-len {trained_len} or less",
        )
    kv = options.kv or (weights if weights in FLOATS else "bfloat16")
    return replace(options, weights=weights, head=full_word(options.head or weights), kv=kv, max_len=max_len)


def _copy_tokenizer(writer: ArtifactWriter, facts: Any) -> None:
    if facts.tokenizer_path is not None:
        writer.write("tokenizer/tokenizer.json", quick_to_load(facts.tokenizer_path.read_bytes()))
    if facts.chat_template is not None:
        writer.write("tokenizer/chat_template.jinja", facts.chat_template)


def quick_to_load(tokenizer: bytes) -> bytes:
    """The same tokenizer.json, of which every start reads less: of BPE, each merge as one text, and no white space. The
    library then takes three quarters of the time and half of the memory. Any other is left as it is."""
    try:
        facts = json.loads(tokenizer)
        model = facts["model"]
        if model["type"] != "BPE":  # a score's last bit would hang on how its number is written
            return tokenizer
        texts = [" ".join(pair) for pair in model["merges"] if not isinstance(pair, str)]
        # The library splits a text at its space, and takes one that begins so for the head of a merges.txt.
        plain = [text for text in texts if text.count(" ") == 1 and not text.startswith("#version")]
        if len(plain) == len(model["merges"]):
            model["merges"] = plain
        return json.dumps(facts, ensure_ascii=False, separators=(",", ":")).encode()
    except (ValueError, LookupError, TypeError, RecursionError):  # the library says what is wrong with it
        return tokenizer


class _Stopwatch:
    """Seconds between laps, by stage name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage] = now - self._since
        self._since = now
