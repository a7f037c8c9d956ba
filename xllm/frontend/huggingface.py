"""Capture of a Hugging Face language model or encoder, from transformers' own modules, as one step over flattened
tokens.

Nothing here knows a model by name. Attention leaves through transformers' attention registry (`hooks.py`), rotary
modules become tables, layers that others stand for are skipped in place, everything else is exported as it is.
Nothing global stays changed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram

from xllm.errors import CompileError
from xllm.frontend.alike import Watch
from xllm.frontend.experts import lift_experts
from xllm.frontend.exported import Place, to_graph
from xllm.frontend.facts import check_config, read_config, text_config
from xllm.frontend.failures import explain, no_interface
from xllm.frontend.fills import join_fills
from xllm.frontend.functional import make_functional, name_plainly
from xllm.frontend.hooks import HOOK, SDPA, Session
from xllm.frontend.layers import Irregular, Stack, choose_walk, every_layer, find_stack, layer_kinds, share_tensors
from xllm.frontend.lookups import find_lookups, lift_lookups, rows_of
from xllm.frontend.names import Spellings, checkpoint_tensors
from xllm.frontend.rotary import RotaryRows, is_rotary, make_tables
from xllm.frontend.stamp import check_equal_layers, claim_between
from xllm.frontend.steps import Step, is_scored, prepare
from xllm.frontend.tasks import read_task
from xllm.frontend.tokens import check_tokens, refuse_foreign
from xllm.ir.build import prune
from xllm.ir.program import Dim, Program, Task, Weight, state_shapes
from xllm.ir.weight_rules import Constant

DEFAULT_MAX_LEN = 32768
GENERATE = Task()
_UNKNOWN_FLOATS = 1 << 40  # of state while tracing: only the trace says what layers keep; on meta it costs nothing


def capture(
    folder: str | Path,
    *,
    max_len: int | None = None,
    full: bool = False,
    max_tokens: int = 8192,
    max_seqs: int = 256,
    task: str | None = None,
) -> Program:
    """The step program of the checkpoint in `folder`, from its config.json alone: no weights are read.

    max_len: positions the program can address, which sizes the rotary tables; by default the model's own limit, at
    most 32768. full: capture every layer instead of the distinct ones (`stamp` then changes nothing). max_tokens,
    max_seqs: upper bounds of the dims T and S. task: "generate", "embed" or "classify"; by default what the
    checkpoint says. Raises CompileError for what cannot be captured.
    """
    config = read_config(folder)
    sizes = {"max_len": max_len, "max_tokens": max_tokens, "max_seqs": max_seqs}
    found = read_task(folder, config, task)
    return capture_config(config, name=Path(folder).resolve().name, full=full, task=found, **sizes)


def capture_config(
    config: Any,
    *,
    name: str,
    max_len: int | None = None,
    full: bool = False,
    max_tokens: int = 8192,
    max_seqs: int = 256,
    task: Task = GENERATE,
) -> Program:
    """As `capture`, from a transformers configuration object, which is left unchanged."""
    check_config(config)
    if max_len is not None and max_len < 1:
        raise CompileError(f"max_len is {max_len}", code="bad-option", pass_name="capture", try_="one position or more")
    text = text_config(config)
    reach = int(getattr(text, "max_position_embeddings", None) or 0)
    length = max_len or (min(reach, DEFAULT_MAX_LEN) if reach > 0 else DEFAULT_MAX_LEN)
    dims = (Dim("T", 1, max_tokens), Dim("S", 1, max_seqs))
    if full:
        return _traced(copy.deepcopy(config), name, length, dims, task, full=True)
    try:
        return _traced(copy.deepcopy(config), name, length, dims, task, full=False)
    except Irregular as found:
        program = _traced(copy.deepcopy(config), name, length, dims, task, full=True)
        program.notes += (f"every layer was captured, which costs time with depth: {found}",)
        return program


def _traced(config: Any, name: str, length: int, dims: tuple[Dim, Dim], task: Task, full: bool) -> Program:
    """`config` is changed. Raises Irregular when layers that are stood for are not like those that stand for them."""
    session = Session(whole=task.kind != "generate")
    with session.registered(), torch.no_grad():
        model = _build(config, task)
        if task.kind == "classify" and is_scored(model):
            task = replace(task, pooling="last")
        text = text_config(config)
        within = _language_path(model) if text is not config else ""
        stack = find_stack(model, within)
        kinds, counters = layer_kinds(stack, text.to_dict())
        walk = every_layer(len(stack.layers)) if full or share_tensors(stack) else choose_walk(kinds)
        spellings = Spellings.of(model)
        named = spellings.stacks(list(model.state_dict()), stack.path)
        place = Place(stack.path, {real: captured for captured, real in enumerate(walk.layers)}, named)
        tensors = checkpoint_tensors(model, place, spellings)
        length, segments = _lift_lookups(model, session, stack, text, tensors, length, task)
        task = replace(task, segments=segments)
        watch = Watch(stack, walk, counters)
        watch.skip(model.get_submodule(stack.path))
        session.experts.update(lift_experts(model, place, tensors))
        constants, notes = _lift_rotary(model, session, place, length, within)
        session.follow(stack, walk)
        prepare(model, session, task, stack)
        with session.lifted(model), session.judged():
            exported = _export(model, session, task, watch)
    watch.check()
    make_functional(exported.graph)
    name_plainly(exported.graph)
    bound = _Tensors(model, place, tensors, constants, exported.constants)
    graph, weights = to_graph(exported, place, bound)
    kv = session.kv_layers()
    program = Program(
        name=name,
        graph=graph,
        dims=dims,
        weights=weights,
        constants={},
        kv=kv,
        layers=walk.sources,
        layers_path=stack.path,
        layers_named=place.named,
        task=task,
        notes=notes,
    )
    join_fills(program)
    prune(program)
    refuse_foreign(program)
    with session.judged():
        check_tokens(program)
    used = {weight.rule.name for weight in program.weights.values() if isinstance(weight.rule, Constant)}
    program.constants = {key: bound.arrays[key] for key in sorted(used)}
    _type_state(program, dims[1].max, length)
    if len(walk.layers) < len(stack.layers):
        check_equal_layers(program, [kinds[real] for real in walk.layers])
    claim_between(program)
    return program


def _build(config: Any, task: Task, attention: str = HOOK) -> nn.Module:
    """The model on the meta device, float32, in evaluation mode."""
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )

    named = {
        "generate": (AutoModelForCausalLM, "a causal language model", "ForCausalLM"),
        "embed": (AutoModel, "an embedding model", "Model"),
        "classify": (AutoModelForSequenceClassification, "a classifier", "ForSequenceClassification"),
    }
    kind, called, ending = named[task.kind]
    if task.kind == "generate" and _architecture(config).endswith("ForConditionalGeneration"):
        kind = AutoModelForImageTextToText  # whose language part answers text alone
    config._attn_implementation = attention
    config._experts_implementation = HOOK
    config.use_cache = text_config(config).use_cache = (
        False  # not every model above a body hands on what it is called with: GraniteMoe
    )
    if task.kind == "classify" and hasattr(config, "classifier_pooling"):
        config.classifier_pooling = "cls"  # its head is given the one row that `task.pooling` makes
    try:
        with torch.device("meta"):
            model = kind.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    except KeyError as error:
        if error.args != (HOOK,):
            raise
        return _build(config, task, SDPA)  # from a table of its own, which may have torch's function
    except Exception as error:  # transformers raises anything from ImportError to ValueError here
        if attention == SDPA:
            raise no_interface(type(config).__name__, _architecture(config)) from error
        raise CompileError(
            f"transformers cannot build {_architecture(config)} as {called}: {_first_line(error)}",
            code="unsupported-model",
            pass_name="capture",
            try_=f"a checkpoint whose architecture ends in {ending}, or another --task",
        ) from error
    return model


def _language_path(model: nn.Module) -> str:
    """Where the language part of a model of several lies, with the dot behind it."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    return next((f"{path}." for path, module in model.named_modules() if path and module is decoder), "")


def _lift_rotary(
    model: nn.Module, session: Session, place: Place, length: int, within: str
) -> tuple[dict[str, tuple[str, np.ndarray]], tuple[str, ...]]:
    """Replaces every rotary module below `within` by rows of its tables; the tables by the path of the buffer that
    stands for them, and notes on them.

    Modules with equal tables share one constant.
    """
    constants: dict[str, tuple[str, np.ndarray]] = {}
    by_content: dict[bytes, str] = {}
    names: set[str] = set()
    notes: dict[str, None] = {}
    for path, module in list(model.named_modules()):
        if not path.startswith(within) or not is_rotary(module):
            continue
        tables = make_tables(with_buffers(model, module, path), length)
        if tables is None:
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, RotaryRows(tables, session.index, module))
        stem = re.sub(rf"^{re.escape(place.layers_path)}\.\d+\.", "", path)
        for variant, pair in tables.items():
            notes |= {pair.note: None} if pair.note else {}
            for part, table in (("cos", pair.cos), ("sin", pair.sin)):
                buffer = f"{variant}_{part}".lstrip("_")
                key = part.encode() + repr(table.shape).encode() + table.tobytes()
                if key not in by_content:
                    by_content[key] = _fresh_name(f"{stem}.{buffer}", names)
                constants[f"{path}.{buffer}"] = (by_content[key], table)
    return constants, tuple(notes)


def with_buffers(model: nn.Module, module: nn.Module, path: str) -> nn.Module:
    """A copy of a module of the meta-device model with its own buffers filled, on the CPU, as loading a checkpoint
    would.
    """
    filled = copy.copy(module)
    buffers = {
        name: torch.full(part.shape, float("nan") if part.is_floating_point() else 0, dtype=part.dtype, device="cpu")
        for name, part in module.named_buffers(recurse=False)
    }
    filled.__dict__ = {**module.__dict__, "_buffers": buffers}
    try:
        _owner(model, path)._init_weights(filled)
    except Exception as error:
        raise _unknown_buffer(module, path, _first_line(error)) from error
    for name, part in buffers.items():
        if part.is_floating_point() and part.isnan().any():
            raise _unknown_buffer(module, f"{path}.{name}", "transformers has no rule that fills it")
    return filled


def _owner(model: nn.Module, path: str) -> Any:
    """The innermost model around the module at `path`: parts of a model fill buffers by rules of their own."""
    around = (model.get_submodule(path[:end]) for end in range(len(path), 0, -1) if f"{path}."[end] == ".")
    return next((module for module in around if hasattr(module, "_init_weights")), model)


def _lift_lookups(
    model: nn.Module,
    session: Session,
    stack: Stack,
    config: Any,
    tensors: dict[str, tuple[str, Weight]],
    length: int,
    task: Task,
) -> tuple[int, int]:
    """Makes tables of learned positions and segments (see `lookups.py`), where the model would not read them by the
    positions it is given; the positions the program then has, and the segments its tokens may be of.
    """

    def positions() -> Tensor:
        assert session.inputs is not None
        return session.inputs.positions

    pad = getattr(config, "pad_token_id", None)
    try:
        found = find_lookups(model, stack.layers[0], pad)
    except CompileError:
        if task.kind != "generate":
            raise
        return length, 1  # embeddings of another use, which stay as they are
    rows = rows_of(model, found.positions, length + found.offset) - found.offset
    length = min(length, rows)
    if task.kind == "generate" and found.segments is None and (found.positions is None or found.follows):
        return length, 1
    paired = task.kind == "classify"
    lift_lookups(model, found, tensors, length, positions, paired)
    session.segmented = found.segments is not None
    return length, rows_of(model, found.segments, 1) if paired else 1


def _export(model: nn.Module, session: Session, task: Task, watch: Watch) -> ExportedProgram:
    tokens, rows = ExportDim("T", min=2), ExportDim("S", min=2)

    # Sizes that no dimension of the model has, so that none is taken for another; small, for loops over tokens.
    dimensions = {size for part in model.parameters() for size in part.shape}
    count, wanted = [size for size in (53, 59, 61, 67, 71, 73, 79, 83, *range(97, 9973)) if size not in dimensions][:2]
    arguments = [torch.zeros(size, dtype=torch.int32, device="meta") for size in (count, count, count, wanted)]
    state = (torch.zeros(1, 1, 1, 1, device="meta"), torch.zeros(1, 1, _UNKNOWN_FLOATS, device="meta"))
    shapes = ({0: tokens}, {0: tokens}, {0: tokens}, {0: rows}, None, None)
    step = Step(model, session, task)
    try:
        with dynamo.patch(fake_tensor_cache_enabled=False):  # with symbolic sizes it costs a sixth more than it saves
            return torch.export.export(step, (*arguments, *state), dynamic_shapes=shapes, strict=False)
    except Irregular:
        raise
    except Exception as error:
        if watch.explains(error):
            raise Irregular(str(error)) from error
        raise explain(error, model) from error


class _Tensors:
    """Names the parameters, buffers and lifted constants of the exported step; collects the arrays of those made
    here.
    """

    def __init__(
        self,
        model: nn.Module,
        place: Place,
        checkpoint: Mapping[str, tuple[str, Weight]],
        rotary: Mapping[str, tuple[str, np.ndarray]],
        lifted: Mapping[str, Any],
    ) -> None:
        self.model = model
        self.place = place
        self.checkpoint = checkpoint
        self.rotary = rotary
        self.lifted = lifted
        self.arrays: dict[str, np.ndarray] = {}

    def __call__(self, path: str) -> tuple[str, Weight]:
        """Name in the program and weight of the tensor at `path`, a module path or the name of a lifted constant."""
        if path in self.checkpoint:
            return self.checkpoint[path]
        if path in self.rotary:
            return self._constant(*self.rotary[path])
        if path in self.lifted:
            return self._constant(path, self._array(self.lifted[path], path))
        owner, _, name = path.rpartition(".")
        filled = with_buffers(self.model, self.model.get_submodule(owner), owner)
        return self._constant(self.place.renumber(path), self._array(getattr(filled, name), path))

    def _constant(self, name: str, array: np.ndarray) -> tuple[str, Weight]:
        self.arrays[name] = array
        return name, Weight(tuple(array.shape), Constant(name))

    def _array(self, value: Tensor, path: str) -> np.ndarray:
        if value.is_meta:
            raise CompileError(
                "a tensor made while tracing has no value", code="unknown-buffer", pass_name="capture", where=path
            )
        return value.detach().float().numpy() if value.is_floating_point() else value.detach().numpy()


def _type_state(program: Program, max_seqs: int, length: int) -> None:
    """Gives the state inputs the types the dialect states; one that nothing is kept in goes."""
    shapes = state_shapes(program, max_seqs, length)
    for state in program.states():
        if str(state.target) in shapes:
            state.meta["val"] = state.meta["val"].new_empty(shapes[str(state.target)])
        else:
            program.graph.erase_node(state)


def _unknown_buffer(module: nn.Module, path: str, why: str) -> CompileError:
    return CompileError(
        f"{type(module).__name__} keeps a buffer that is in no checkpoint and whose value is not known: {why}",
        code="unknown-buffer",
        pass_name="capture",
        where=path,
        try_="an architecture whose _init_weights fills its buffers, as transformers' loading does",
    )


def _architecture(config: Any) -> str:
    return (getattr(config, "architectures", None) or [type(config).__name__])[0]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _fresh_name(wanted: str, names: set[str]) -> str:
    name, count = wanted, 0
    while name in names:
        count += 1
        name = f"{wanted}_{count}"
    names.add(name)
    return name
