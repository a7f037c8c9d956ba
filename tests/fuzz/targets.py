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

import numpy as np
import onnx
import torch.fx as fx
from onnx import TensorProto, helper
from safetensors.torch import save_file

from tests.artifacts import write_small
from tests.quantised import awq, float8, gptq, int8, packed
from xllm.artifact import Artifact, ArtifactError, pack
from xllm.errors import CompileError
from xllm.frontend.facts import facts, quantisation, read_config
from xllm.frontend.onnx import import_onnx
from xllm.frontend.quantised import Quantised
from xllm.frontend.weights import Checkpoint
from xllm.ir import Program, Source
from xllm.ir.grids import grid
from xllm.ir.program import Weight
from xllm.ir.verify import verify
from xllm.ir.weight_rules import Dequantise, evaluate
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
    try:
        ids = codec.encode("ab c\n\u00e9", True)
    except ApiError:  # no token for some of it
        ids = []
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


def quantisation_config(data: bytes) -> None:
    """What a config.json says of quantised weights, and the weights read by it."""
    root = _folder() / "quantised"
    if not root.exists():
        root.mkdir()
        generator = np.random.default_rng(0)
        makers = (gptq(4, 32), gptq(8, -1), awq(32), packed(4, 32), int8(), float8((16, 16)))
        made = [maker(f"{name}.weight", (32, 64), generator)[0] for name, maker in zip("abcdef", makers, strict=True)]
        save_file({name: tensor for tensors in made for name, tensor in tensors.items()}, root / "model.safetensors")
    (root / "config.json").write_bytes(data)
    opened, graph = Checkpoint.open(root), fx.Graph()
    graph.output(())
    for name in "abcdef":
        weights = {"w": Weight((32, 64), Source((f"{name}.weight",)))}
        program = Program("one weight", graph, (), weights, {}, ())
        with suppress(CompileError):
            rule = Quantised(opened, quantisation(root)).bound(program).weights["w"].rule
            if isinstance(rule, Dequantise) and opened.shape_of(rule, program) == (32, 64):
                read = {part: opened.raw(part) for part in opened if part.startswith(f"{name}.")}
                assert evaluate(rule, read, {}).shape == (32, 64)
                grid(rule, read, 3, 20)


def template(data: bytes) -> None:
    """A chat template, compiled and rendered under its budget."""
    try:
        made = ChatTemplate(data.decode("utf-8", "surrogatepass"), {"eos_token": "</s>"})
    except ValueError as error:
        assert type(error) in (ValueError, UnicodeDecodeError), repr(error)
        return
    with suppress(ApiError):
        made.render([{"role": "user", "content": "hi"}], {}).encode()


def onnx_model(data: bytes) -> None:
    """A model file: read, checked, and every node told in operators of the program."""
    with suppress(CompileError):
        imported(data)


def imported(data: bytes) -> Program:
    root = _folder() / "onnx"
    root.mkdir(exist_ok=True)
    (root / "model.onnx").write_bytes(data)
    (root / "w.bin").write_bytes(bytes(64))
    program, tensors = import_onnx(root / "model.onnx", {"n": 5})
    verify(program)
    assert all(tensors[name].shape == tensors.shape(name) for name in tensors)
    return program


TARGETS: Mapping[str, Target] = {
    each.__name__: each
    for each in (safetensors, artifact, tokenizer, config, quantisation_config, template, onnx_model)
}


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


def _onnx_seed(opset: int, *nodes: onnx.NodeProto, **tensors: onnx.TensorProto) -> bytes:
    """A model from x [n, 4] to y, with a tensor w [4, 4] outside of the file."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    for name, tensor in tensors.items():
        tensor.name = name
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", "64")):
        outside.external_data.add(key=key, value=value)
    graph = helper.make_graph(nodes, "g", [x], [y], initializer=[outside, *tensors.values()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return model.SerializeToString()


def _numbers(*values: int) -> onnx.TensorProto:
    return helper.make_tensor("", TensorProto.INT64, [len(values)], values)


def _ones() -> onnx.TensorProto:
    return helper.make_tensor("", TensorProto.FLOAT, [4], [1.0] * 4)


def _onnx_seeds() -> tuple[bytes, ...]:
    node = helper.make_node
    return (
        _onnx_seed(
            18, node("MatMul", ["x", "w"], ["a"]), node("LayerNormalization", ["a", "s", "s"], ["b"], epsilon=1e-5),
            node("Shape", ["b"], ["c"]), node("Reshape", ["b", "d"], ["e"]), node("Softmax", ["e"], ["f"], axis=-1),
            node("Reshape", ["f", "c"], ["y"]), s=_ones(), d=_numbers(0, 2, -1),
        ),
        _onnx_seed(
            23, node("Gemm", ["x", "w", "s"], ["a"], transB=1), node("RMSNormalization", ["a", "s"], ["b"]),
            node("Unsqueeze", ["b", "d"], ["q"]), node("Attention", ["q", "q", "q"], ["e"], q_num_heads=2,
            kv_num_heads=2), node("Squeeze", ["e", "d"], ["y"]), s=_ones(), d=_numbers(0),
        ),
        _onnx_seed(
            20, node("Slice", ["x", "i", "j", "j"], ["a"]), node("Transpose", ["x"], ["t"], perm=[1, 0]),
            node("Gather", ["t", "i"], ["g"]), node("Transpose", ["g"], ["h"]), node("Concat", ["a", "h"], ["k"],
            axis=1),
            node("ReduceMean", ["k", "j"], ["m"]), node("Mul", ["x", "m"], ["y"]), i=_numbers(0), j=_numbers(1),
        ),
    )  # fmt: skip


_CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 20, "intermediate_size": 48, "eos_token_id": 1,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "chat_template": "{{ messages }}", "eos_token": "</s>",
}  # fmt: skip
_GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
_QUANTISED = (
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "dynamic": {"-:.*c": {}}},
    {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    {"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "ue8m0"},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
     "config_groups": {"group_0": {"targets": ["Linear"], "weights": _GROUP}}},
    {"quant_method": "compressed-tensors", "format": "int-quantized",
     "config_groups": {"group_0": {"weights": {**_GROUP, "num_bits": 8, "strategy": "channel", "group_size": None}}}},
)  # fmt: skip
SEEDS: Mapping[str, tuple[bytes, ...]] = {
    "safetensors": (_safetensors_seed(),),
    "artifact": (_artifact_seed(),),
    "tokenizer": (_tokenizer_seed(),),
    "config": (json.dumps(_CONFIG).encode(),),
    "quantisation_config": tuple(json.dumps({"quantization_config": held}).encode() for held in _QUANTISED),
    "onnx_model": _onnx_seeds(),
    "template": (
        b"{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}{% endfor %}{{ eos_token }}",
        b"{%- set ns = namespace(x=1) %}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ '%5d' % ns.x }}",
        "{{ '\ud800' ~ messages[0].content }}".encode("utf-8", "surrogatepass"),
        b"{{ '\\ud800' ~ messages[0].content }}",
    ),
}
