"""Facts of a checkpoint folder, and what is refused before anything is built."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.frontend import zoo
from xllm.errors import CompileError
from xllm.frontend.facts import facts, read_config


def _write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def _config(**changes: Any) -> dict[str, Any]:
    return {**zoo.CONFIGS["llama"]().to_dict(), "architectures": ["LlamaForCausalLM"], **changes}


def test_facts_of_a_whole_folder(tmp_path: Path) -> None:
    tokens = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None, "chat_template": "old"}
    generation = {"eos_token_id": [2, 7], "temperature": 0.6}
    _write(tmp_path, config=_config(), generation_config=generation, tokenizer_config=tokens, tokenizer={})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    found = facts(tmp_path)
    assert (found.name, found.architecture, found.vocab_size) == (tmp_path.name, "LlamaForCausalLM", zoo.VOCAB)
    assert (found.max_len, found.eos_ids, found.bos_id) == (64, (2, 7), 1)
    assert found.generation == generation
    assert found.tokenizer_path == tmp_path / "tokenizer.json"
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert found.chat_template == "{{ messages }}"


def test_facts_of_a_bare_folder(tmp_path: Path) -> None:
    found = facts(_write(tmp_path, config=_config()), tokenizer=False)
    assert (found.eos_ids, found.chat_template, found.tokenizer_path, found.generation) == ((2,), None, None, {})


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 64),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}, 64),
    ],
)  # fmt: skip
def test_a_stretched_rope_reaches_further(tmp_path: Path, scaling: dict[str, Any], length: int) -> None:
    config = _config(max_position_embeddings=64, rope_theta=10000.0, rope_scaling=scaling)
    del config["rope_parameters"]
    assert facts(_write(tmp_path, config=config), tokenizer=False).max_len == length


def test_named_chat_templates(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    _write(tmp_path, config=_config(), tokenizer_config={"chat_template": templates})
    assert facts(tmp_path, tokenizer=False).chat_template == "d"


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"no tokenizer\.json") as refused:
        facts(_write(tmp_path, config=_config()))
    assert refused.value.code == "no-tokenizer"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ("{", "bad-json"),
        ("[]", "bad-json"),
        ({"model_type": "nothing-of-the-kind"}, "bad-config"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "remote-code"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantised-checkpoint"),
        ({"eos_token_id": "two"}, "bad-config"),
        ({"eos_token_id": 10**6}, "bad-config"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, config: Any, code: str) -> None:
    _write(tmp_path, config=config if isinstance(config, str) else {**_config(), **config})
    with pytest.raises(CompileError) as refused:
        facts(tmp_path, tokenizer=False)
    assert refused.value.code == code


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as refused:
        read_config(tmp_path)
    assert refused.value.code == "no-config"


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_that_is_no_text_is_refused_by_file(tmp_path: Path, where: str) -> None:
    _write(tmp_path, config=_config(), tokenizer={})
    text = b"\xff" if where.endswith("jinja") else json.dumps({"chat_template": "\ud800"}).encode()
    (tmp_path / where).write_bytes(text)
    with pytest.raises(CompileError, match="the chat template is not text") as caught:
        facts(tmp_path)
    assert (caught.value.code, caught.value.where) == ("bad-template", where)


def test_a_factor_without_bounds_is_refused(tmp_path: Path) -> None:
    text = json.dumps(_config(rope_parameters={"rope_type": "linear", "factor": float("inf"), "rope_theta": 1e4}))
    _write(tmp_path, config=text, tokenizer={})
    with pytest.raises(CompileError) as caught:
        facts(tmp_path)
    assert caught.value.code == "bad-config"


def test_the_language_part_of_several_says_what_tokens_are(tmp_path: Path) -> None:
    text = {"model_type": "qwen3_5_text", "vocab_size": 77, "max_position_embeddings": 48, "eos_token_id": 5}
    whole = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text}
    found = facts(_write(tmp_path, config=whole), tokenizer=False)
    assert (found.vocab_size, found.max_len, found.eos_ids) == (77, 48, (5,))
    assert found.architecture == "Qwen3_5ForConditionalGeneration"


def test_a_model_for_any_length_has_no_limit(tmp_path: Path) -> None:
    from xllm.frontend.facts import _reach

    assert _reach(type("Config", (), {"max_position_embeddings": -1})()) == 0
