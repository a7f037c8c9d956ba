"""What untrusted bytes reach, one function each: it takes any bytes and either works or raises an error of ours.

Anything else that escapes is a finding. `SEEDS` are small sound inputs that mutation starts from.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from tests.artifacts import write_small
from xllm.artifact import Artifact, ArtifactError, pack
from xllm.errors import CompileError
from xllm.frontend.facts import facts, read_config
from xllm.frontend.weights import Checkpoint
from xllm.service.errors import ApiError
from xllm.service.template import ChatTemplate
from xllm.service.tokenizer import TextCodec

Target = Callable[[bytes], None]


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="xllm-fuzz-"))


def safetensors(data: bytes) -> None:
    """A weight file of a checkpoint: its header, and every tensor read."""
    root = _folder() / "safetensors"
    root.mkdir(exist_ok=True)
    (root / "model.safetensors").write_bytes(data)
    with suppress(CompileError):
        held = Checkpoint.open(root)
        for name in held:
            held.raw(name)
            held.digest(name)
            with suppress(CompileError):  # a type that is no weight
                assert held[name].shape == held.shape(name)


def artifact(data: bytes) -> None:
    """A packed artifact: header, manifest, plan, weights."""
    file = _folder() / "fuzzed.pack"
    file.write_bytes(data)
    with suppress(ArtifactError):
        Artifact.open(file).map_weights()
        assert data == SEEDS["artifact"][0], "a changed artifact was accepted"


def tokenizer(data: bytes) -> None:
    """A tokenizer.json, then text through it."""
    try:
        codec = TextCodec.from_bytes(data)
    except ValueError:
        return
    ids = codec.encode("ab c\n\u00e9", True)
    codec.decode(ids)
    for token in (*ids, 0, 1 << 20):
        codec.token_bytes(token)
        codec.token_text(token)


def config(data: bytes) -> None:
    """A config.json, read as for a compile but for the capture; generation and tokenizer settings with it."""
    root = _folder() / "config"
    root.mkdir(exist_ok=True)
    (root / "config.json").write_bytes(data)
    for name in ("generation_config.json", "tokenizer_config.json"):
        (root / name).write_bytes(data)
    (root / "tokenizer.json").write_text("{}")
    with suppress(CompileError):
        read_config(root)
        facts(root)


def template(data: bytes) -> None:
    """A chat template, compiled and rendered under its budget."""
    try:
        made = ChatTemplate(data.decode("utf-8", "surrogatepass"), {"eos_token": "</s>"})
    except ValueError as error:
        assert type(error) in (ValueError, UnicodeDecodeError), repr(error)
        return
    with suppress(ApiError):
        made.render([{"role": "user", "content": "hi"}], {}).encode()


TARGETS: Mapping[str, Target] = {each.__name__: each for each in (safetensors, artifact, tokenizer, config, template)}


def _safetensors_seed() -> bytes:
    entries = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
               "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}  # fmt: skip
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(range(22))


def _artifact_seed() -> bytes:
    with tempfile.TemporaryDirectory() as place:
        pack(write_small(Path(place) / "small.xllm"), Path(place) / "small.pack")
        return (Path(place) / "small.pack").read_bytes()


def _tokenizer_seed() -> bytes:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "c": 3}, merges=[("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made.to_str().encode()


_CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 20, "intermediate_size": 48, "eos_token_id": 1,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "chat_template": "{{ messages }}", "eos_token": "</s>",
}  # fmt: skip
SEEDS: Mapping[str, tuple[bytes, ...]] = {
    "safetensors": (_safetensors_seed(),),
    "artifact": (_artifact_seed(),),
    "tokenizer": (_tokenizer_seed(),),
    "config": (json.dumps(_CONFIG).encode(),),
    "template": (
        b"{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}{% endfor %}{{ eos_token }}",
        b"{%- set ns = namespace(x=1) %}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ '%5d' % ns.x }}",
        "{{ '\ud800' ~ messages[0].content }}".encode("utf-8", "surrogatepass"),
        b"{{ '\\ud800' ~ messages[0].content }}",
    ),
}
