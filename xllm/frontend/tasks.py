"""What a checkpoint is for: text, embeddings or label scores, and which row then stands for a sequence.

Architectures say it in config.json; the files of sentence-transformers beside it (modules.json, and the configuration
of the pooling it names) make any of them an embedding model and say how rows become one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from xllm.errors import CompileError
from xllm.frontend.facts import read_json, read_json_list
from xllm.ir.program import Task

_POOLINGS: dict[str, Literal["last", "cls", "mean"]] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_NAMED: dict[str, Literal["last", "cls", "mean"]] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}


def read_task(folder: str | Path, config: Any, wanted: str | None = None) -> Task:
    """The task of the checkpoint in `folder`; `wanted` ("generate", "embed", "classify") overrules the architecture.

    An embedding model without files of sentence-transformers gets what that library gives it: the mean of the rows, as
    it is. Raises CompileError for modules and poolings that are not computed.
    """
    folder = Path(folder)
    kind = wanted or _kind(folder, (getattr(config, "architectures", None) or [""])[0])
    if kind == "embed":
        return _embedding(folder)
    return Task("classify", _classifier_pooling(config), labels=_labels(config)) if kind == "classify" else Task()


def _kind(folder: Path, architecture: str) -> str:
    if architecture.endswith("ForSequenceClassification"):
        return "classify"
    bare = architecture.endswith("Model") and not architecture.endswith("LMHeadModel")
    if bare or architecture.endswith("ForMaskedLM") or (folder / "modules.json").is_file():
        return "embed"
    return "generate"


def _embedding(folder: Path) -> Task:
    task = Task("embed", "mean")
    if not (folder / "modules.json").is_file():
        return task
    for module in read_json_list(folder / "modules.json"):
        described = module if isinstance(module, dict) else {}
        name = str(described.get("type", "")).rpartition(".")[2]
        if name == "Pooling":
            task = replace(task, pooling=_pooling(folder, str(described.get("path", ""))))
        elif name == "Normalize":
            task = replace(task, normalize=True)
        elif name != "Transformer":
            raise _unsupported(
                f"a module {name or 'without a type'!r} behind the pooling", "modules.json", "one whose modules"
                " are Transformer, Pooling and Normalize",
            )  # fmt: skip
    return task


def _pooling(folder: Path, name: str) -> Literal["last", "cls", "mean"]:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise _unsupported("a pooling outside its folder", "modules.json", "the files as they came with the model")
    where = f"{name}/config.json"
    config = read_json(folder / name / "config.json")
    chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if isinstance(mode := config.get("pooling_mode"), str) and not chosen:
        chosen, known = [mode], _NAMED
    else:
        known = _POOLINGS
    if len(chosen) != 1 or chosen[0] not in known:
        raise _unsupported(
            f"the pooling {' and '.join(chosen) or 'of no mode'}", where, "cls, mean or last-token pooling"
        )
    return known[chosen[0]]


def _classifier_pooling(config: Any) -> Literal["cls", "mean"]:
    """What the head of an encoder reads; heads of decoders read the last row, which shows when the model is built."""
    pooling = getattr(config, "classifier_pooling", None) or "cls"
    if pooling not in ("cls", "mean"):
        raise _unsupported(f"the pooling {pooling!r} of its head", "config.json", "cls or mean")
    return pooling


def _labels(config: Any) -> tuple[str, ...]:
    names = getattr(config, "id2label", None) or {}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _unsupported(what: str, where: str, instead: str) -> CompileError:
    return CompileError(
        f"the model has {what}, which is not computed",
        code="unsupported-task",
        pass_name="capture",
        where=where,
        try_=f"a model with {instead}",
    )
