"""What a configuration says of how weights were quantised: the formats its tensors may have, or why they are refused.

Which tensors are quantised is not read here: lists of modules that are (or are not) say in four ways of matching names
what the tensors themselves show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xllm.errors import CompileError

PLAIN = "the float32, float16 or bfloat16 checkpoint it was made from"


@dataclass(frozen=True)
class Format:
    """One way a tensor may be stored: `packing` and `bits` of a `Scheme`, columns and rows that share a scale (0: all).

    symmetric: whether zeros beside it mean nothing. ordered: whether it says of each column which group that is in.
    """

    method: str
    packing: str
    bits: int
    columns: int
    rows: int = 1
    symmetric: bool = False
    ordered: bool = False

    @property
    def text(self) -> str:
        """As a person would say it: "GPTQ int4 group 128"."""
        kind = "float8" if self.packing == "float8" else f"int{self.bits}"
        if self.rows != 1:
            shared = f"blocks of {self.rows}x{self.columns}" if self.rows else "per tensor"
        else:
            shared = f"group {self.columns}" if self.columns else "per channel"
        return f"{self.method} {kind} {shared}{' in order of activation' if self.ordered else ''}"


def formats_of(said: Mapping[str, Any]) -> tuple[Format, ...]:
    """Every format a `quantization_config` names, or the quantize_config.json (quant_config.json) of older tools.

    Raises CompileError, naming it, for one that is not read.
    """
    method = said.get("quant_method") or ("awq" if "w_bit" in said else "gptq" if "bits" in said else None)
    reader = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed, "fp8": _fp8}.get(str(method))
    if reader is None:
        raise refused(_named(method, said), "a checkpoint in GPTQ, AWQ (gemm), compressed-tensors or fp8 form")
    return tuple(dict.fromkeys(reader(said)))


def refused(why: str, instead: str = PLAIN, where: str = "config.json") -> CompileError:
    """A checkpoint that is quantised in a way that is not read."""
    advice = instead if instead == PLAIN else f"{instead}, or {PLAIN}"
    return CompileError(
        f"the checkpoint is quantised, {why}",
        code="quantised-checkpoint",
        pass_name="weights",
        where=where,
        node="quantization_config",
        try_=advice,
    )


def _named(method: Any, said: Mapping[str, Any]) -> str:
    if method == "bitsandbytes":
        kind = said.get("bnb_4bit_quant_type", "fp4") if said.get("load_in_4bit") else "int8"
        return f"by bitsandbytes ({kind}), whose tensors only it reads"
    return f"by {method!r}, which is not read" if method else "and its configuration does not say how"


def _gptq(said: Mapping[str, Any]) -> Iterator[Format]:
    form = said.get("checkpoint_format") or said.get("format") or "gptq"
    if said.get("is_marlin_format"):
        form = "marlin"
    if form not in ("gptq", "gptq_v2"):
        raise refused(f"as {form!r}, a layout of GPTQ for one kernel", "saving it as gptq or gptq_v2")
    if said.get("pack_dtype", "int32") != "int32":
        raise refused(f"with codes packed in {said['pack_dtype']!r}", "packing in int32")
    others = _mapping(said, "dynamic")
    for given in (said, *({**said, **_mapping(others, key)} for key in others if not key.startswith("-"))):
        yield Format(
            "GPTQ", form, _bits(given, "bits"), _group(given, "group_size"), ordered=bool(given.get("desc_act"))
        )


def _awq(said: Mapping[str, Any]) -> Iterator[Format]:
    form = str(said.get("version") or said.get("checkpoint_format") or said.get("format") or "gemm").lower()
    if form != "gemm":
        raise refused(f"by AWQ as {form!r}, a layout for one kernel", "saving it as gemm")
    bits = _bits(said, "bits" if "bits" in said else "w_bit")
    if bits != 4:
        raise refused(f"by AWQ in {bits} bits, where gemm has 4", "4 bits")
    yield Format("AWQ", "awq", bits, _group(said, "group_size" if "group_size" in said else "q_group_size"))


def _compressed(said: Mapping[str, Any]) -> Iterator[Format]:
    sparsity = _mapping(said, "sparsity_config").get("format") or "dense"
    if sparsity != "dense":
        raise refused(f"and sparse ({sparsity!r})", "compressing it without sparsity")
    if _mapping(said, "transform_config").get("config_groups"):
        raise refused("and its activations are transformed (transform_config)", "quantising without transforms")
    groups = _mapping(said, "config_groups")
    for name in groups:
        group = _mapping(groups, name)
        weights = _mapping(group, "weights")
        if not weights:
            continue
        for side in ("input_activations", "output_activations"):
            activations = _mapping(group, side)
            if activations and activations.get("dynamic") is not True:
                raise refused(f"with static scales for activations ({side} of {name})", "dynamic activations (or none)")
        yield _compressed_weights(weights, group.get("format") or said.get("format"))


def _compressed_weights(weights: Mapping[str, Any], form: Any) -> Format:
    """Of one group of modules."""
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    packings = {
        ("pack-quantized", "int"): "packed",
        ("int-quantized", "int"): "int8",
        ("naive-quantized", "int"): "int8",
        ("float-quantized", "float"): "float8",
        ("naive-quantized", "float"): "float8",
    }
    packing = packings.get((form, kind)) if isinstance(form, str) and isinstance(kind, str) else None
    if packing is None or (packing == "float8" and bits != 8):
        raise refused(
            f"by compressed-tensors as {form!r} ({kind} of {bits} bits)",
            "pack-quantized or int-quantized integers, or float-quantized in 8 bits",
        )
    method, bits = "compressed-tensors", _bits(weights, "num_bits", 8)
    symmetric = packing == "float8" or weights.get("symmetric", True) is True
    match weights.get("strategy") or ("group" if (weights.get("group_size") or 0) != 0 else "tensor"):
        case "group":
            return Format(method, packing, bits, _group(weights, "group_size"), symmetric=symmetric)
        case "channel":
            return Format(method, packing, bits, 0, symmetric=symmetric)
        case "tensor":
            return Format(method, packing, bits, 0, 0, symmetric=symmetric)
        case "block" if packing == "float8":
            rows, columns = _block(weights.get("block_structure"), "block_structure")
            return Format(method, packing, bits, columns, rows, symmetric=True)
        case strategy:
            raise refused(f"by compressed-tensors with scales by {strategy!r}", "scales by group, channel or tensor")


def _fp8(said: Mapping[str, Any]) -> Iterator[Format]:
    if said.get("fmt", "e4m3") != "e4m3":
        raise refused(f"as fp8 {said['fmt']!r}", "e4m3")
    if said.get("activation_scheme", "dynamic") != "dynamic":
        raise refused("with static scales for activations (activation_scheme)", "dynamic activations")
    block = said.get("weight_block_size")
    rows, columns = (0, 0) if block is None else _block(block, "weight_block_size")
    yield Format("FP8", "float8", 8, columns, rows, symmetric=True)


def _mapping(said: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    held = said.get(name)
    if held is None:
        return {}
    if not isinstance(held, Mapping):
        raise refused(f"and {name} is {held!r:.60}, not an object")
    return held


def _bits(said: Mapping[str, Any], name: str, default: int = 0) -> int:
    bits = said.get(name, default)
    if type(bits) is not int or bits not in (2, 4, 8):
        raise refused(f"with {name} {bits!r:.60}", "2, 4 or 8 bits")
    return bits


def _group(said: Mapping[str, Any], name: str) -> int:
    size = said.get(name, -1)
    if type(size) is not int or not (size == -1 or 1 <= size < 1 << 31):
        raise refused(f"with {name} {size!r:.60}, which is no size of a group")
    return max(size, 0)


def _block(said: Any, name: str) -> tuple[int, int]:
    sizes = said.split("x") if isinstance(said, str) else said
    try:
        rows, columns = (int(size) for size in sizes)
    except (TypeError, ValueError, OverflowError) as error:
        raise refused(f"with {name} {said!r:.60}, which is no block of a matrix") from error
    if not (1 <= rows < 1 << 31 and 1 <= columns < 1 << 31):
        raise refused(f"with {name} {said!r:.60}, which is no block of a matrix")
    return rows, columns
