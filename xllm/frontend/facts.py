"""What a checkpoint folder says about its model: configuration, tokens, chat template. Files are read, never fetched
or run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm.errors import CompileError
from xllm.frontend.formats import Format, formats_of, refused

_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class ModelFacts:
    """Facts a server needs that are not in the graph.

    max_len: positions the model was made for. generation: contents of generation_config.json. special_tokens: texts
    by role, as tokenizer_config.json names them ("bos_token", ...). tokenizer_path: tokenizer.json, None where none
    was asked for.
    """

    name: str
    architecture: str
    vocab_size: int
    max_len: int
    eos_ids: tuple[int, ...]
    bos_id: int | None
    generation: Mapping[str, Any]
    tokenizer_path: Path | None
    special_tokens: Mapping[str, str]
    chat_template: str | None


def facts(folder: str | Path, *, tokenizer: bool = True) -> ModelFacts:
    """Facts of the checkpoint in `folder`. Raises CompileError for missing files; tokenizer=False does without
    tokenizer.json.
    """
    folder = Path(folder)
    config = read_config(folder)
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    tokens = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    eos = generation.get("eos_token_id", None)
    bos = generation.get("bos_token_id", None)
    whole, config = config, text_config(config)
    try:
        return ModelFacts(
            name=folder.resolve().name,
            architecture=(whole.architectures or [type(whole).__name__])[0],
            vocab_size=int(config.vocab_size),
            max_len=_reach(config),
            eos_ids=_within(
                _ids(eos if eos is not None else _said(whole, "eos_token_id"), "eos_token_id"), int(config.vocab_size)
            ),
            bos_id=next(iter(_ids(bos if bos is not None else _said(whole, "bos_token_id"), "bos_token_id")), None),
            generation=generation,
            tokenizer_path=_tokenizer(folder) if tokenizer else None,
            special_tokens=_special_tokens(tokens),
            chat_template=_chat_template(folder, tokens),
        )
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise CompileError(
            f"the configuration holds a number that is none: {error}",
            code="bad-config",
            pass_name="capture",
            where="config.json",
            try_="the config.json that came with the checkpoint",
        ) from error


def text_config(config: Any) -> Any:
    """What a configuration says of the model's language part, which others (vision, audio) may stand beside."""
    return getattr(config, "text_config", None) or config


def _said(config: Any, name: str) -> Any:
    """A fact that a configuration says for all parts, or else for the language part."""
    said = getattr(config, name, None)
    return said if said is not None else getattr(text_config(config), name, None)


def _reach(config: Any) -> int:
    """Positions the model was made for; 0: not said.

    By convention max_position_embeddings stays what it was before linear and dynamic rope stretch it; yarn names the
    length it starts from, and the usual advice is to add yarn to a config and leave the rest. Configs of llama3 and
    longrope say the whole length.
    """
    positions = max(int(getattr(config, "max_position_embeddings", None) or 0), 0)  # XLNet: -1, for any length
    rope = getattr(config, "rope_parameters", None) or {}
    factor = float(rope.get("factor") or 1.0)
    match rope.get("rope_type"):
        case "linear" | "dynamic":
            return int(positions * factor)
        case "yarn":
            return max(positions, int((rope.get("original_max_position_embeddings") or positions) * factor))
    return positions


def read_config(folder: str | Path) -> Any:
    """The transformers configuration of a local checkpoint folder, after refusing what is never captured."""
    from transformers import AutoConfig

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CompileError(
            f"there is no config.json in {Path(folder).name!r}",
            code="no-config",
            pass_name="capture",
            where=str(folder),
            try_="a folder as Hugging Face checkpoints have it: config.json, *.safetensors, tokenizer.json",
        )
    raw = read_json(path)
    if "auto_map" in raw:
        raise CompileError(
            "the checkpoint brings its own model code (auto_map), which is never run",
            code="remote-code",
            pass_name="capture",
            where="config.json",
            try_="a checkpoint of an architecture that transformers itself contains",
        )
    quantisation(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises anything from KeyError to validation errors here
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CompileError(
            f"transformers does not accept this configuration: {reason}",
            code="bad-config",
            pass_name="capture",
            where="config.json",
            node=f"model_type {raw.get('model_type')!r}",
            try_="the config.json that came with the checkpoint, or a newer transformers",
        ) from error
    check_config(config)
    return config


def check_config(config: Any) -> None:
    """Raises CompileError for configurations that are no decoder-only model over one token stream."""
    if getattr(config, "is_encoder_decoder", False):
        raise CompileError(
            f"{type(config).__name__} describes an encoder-decoder model",
            code="unsupported-model",
            pass_name="capture",
            where="config.json",
            node="is_encoder_decoder",
            try_="a decoder-only checkpoint (architecture ending in ForCausalLM)",
        )
    if "chunked_attention" in (getattr(text_config(config), "layer_types", None) or ()):
        raise CompileError(
            "layers attend within chunks, which the attention operator cannot express",
            code="unsupported-attention",
            pass_name="capture",
            where="config.json",
            node="layer_types: chunked_attention",
            try_="a model with full or sliding-window attention",
        )


def quantisation(folder: str | Path) -> tuple[Format, ...]:
    """The formats its quantised tensors may have, none for a checkpoint that says nothing of any. Raises CompileError
    for those that are not read.
    """
    raw = read_json(Path(folder) / "config.json")
    text = raw.get("text_config")
    said = raw.get("quantization_config") or (isinstance(text, Mapping) and text.get("quantization_config"))
    if not said:
        older = [Path(folder) / name for name in ("quantize_config.json", "quant_config.json")]
        said = next((read_json(path) for path in older if path.is_file()), None)
    if said and not isinstance(said, Mapping):
        raise refused("and quantization_config is not an object")
    return formats_of(said) if said else ()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of sane size. Raises CompileError naming the file."""
    return _read_json(path, dict, "object")


def read_json_list(path: Path) -> list[Any]:
    """A JSON array from a file of sane size. Raises CompileError naming the file."""
    return _read_json(path, list, "array")


def _read_json(path: Path, kind: type[Any], named: str) -> Any:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"larger than {_MAX_JSON_BYTES >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"not a JSON {named}")
    except (OSError, ValueError, RecursionError) as error:
        raise CompileError(
            f"{path.name} cannot be read: {error}",
            code="bad-json",
            pass_name="capture",
            where=path.name,
            try_="the file as it came with the checkpoint",
        ) from error
    return value


def _ids(value: Any, name: str) -> tuple[int, ...]:
    """One id, several or none, as a tuple."""
    ids = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
        raise CompileError(
            f"{name} is {value!r}, not token ids", code="bad-config", pass_name="capture", where="config.json"
        )
    return tuple(ids)


def _within(ids: tuple[int, ...], vocab: int) -> tuple[int, ...]:
    """Raises CompileError for an end of text that the model cannot say."""
    if beyond := [item for item in ids if item >= vocab]:
        raise CompileError(
            f"eos_token_id {beyond[0]} is outside the vocabulary of {vocab}",
            code="bad-config",
            pass_name="capture",
            where="generation_config.json or config.json",
            try_="the files that belong to these weights",
        )
    return ids


def _tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    if not path.is_file():
        old = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()]
        found = f"only {', '.join(old)}, an older form" if old else "and no other form of it"
        raise CompileError(
            f"there is no tokenizer.json in {folder.name!r}, {found}",
            code="no-tokenizer",
            pass_name="capture",
            where="tokenizer.json",
            try_="AutoTokenizer.from_pretrained(folder).save_pretrained(folder), which writes tokenizer.json",
        )
    return path


def _special_tokens(tokens: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in tokens.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def _chat_template(folder: Path, tokens: Mapping[str, Any]) -> str | None:
    """The default chat template: its own file first, then tokenizer_config.json (one text, or several by name)."""
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = tokens.get("chat_template")
        if isinstance(template, list):
            named = [item for item in template if isinstance(item, Mapping) and isinstance(item.get("name"), str)]
            by_name = {item["name"]: item.get("template") for item in named}
            template = by_name.get("default") or next(iter(by_name.values()), None)
        if not isinstance(template, str):
            return None
        template.encode()
    except UnicodeError as error:
        raise CompileError(
            f"the chat template is not text: {error}",
            code="bad-template",
            pass_name="capture",
            where=path.name if path.is_file() else "tokenizer_config.json",
            try_="the file as it came with the checkpoint",
        ) from error
    return template
