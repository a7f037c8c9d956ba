"""No call of a plan reaches outside the memory it names, however the file came to say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models import EXPERTS, FAMILIES, HYBRIDS, MLA, build
from xllm.artifact import Artifact, ArtifactError
from xllm.compiler import CompileOptions
from xllm.kernels import cpu
from xllm.plan import Plan
from xllm.targets.cpu.bounds import INDICES, check_bounds, is_output, reach
from xllm.targets.cpu.executor import CpuExecutor

VOCAB, MAX_LEN = FAMILIES["qwen3"]["vocab_size"], 128
Change = Callable[[dict[str, Any]], None]
# What says how, not how much: with any value nothing further is read. Kernels refuse, when a plan is bound, CHOICES
# beyond those they have.
CHOICES = ("act", "scoring", "groups", "top_groups", "group_top")
NO_SIZES = {"window", "interleaved", "renormalise", *CHOICES}
# Plans with kernels that qwen3 has not, or not by itself.
OTHERS = {
    "latent": (MLA["deepseek-v3"], ()), "moe": (EXPERTS["gpt-oss"], ()), "experts": (EXPERTS["mixtral"], ("fuse-moe",)),
    "recurrent": (HYBRIDS["qwen3-next"], ()), "gates": (FAMILIES["qwen3"], ("fuse-gated-linear",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bounds")
    return build(folder, FAMILIES["qwen3"], options=CompileOptions(max_len=MAX_LEN, kv="bfloat16"))[1]


@pytest.fixture(scope="module")
def plan(artifact: Path) -> Plan:
    return Artifact.open(artifact).plan


def test_every_kernel_is_described() -> None:
    for name, info in cpu.kernels().items():
        rows, once = reach(name, {size: 32 if size == "group" else 1 for size in info.ints})
        index = INDICES.get(name.partition(".")[0], ("", ()))[0]
        missing = {arg.name for arg in info.args} - rows.keys() - once.keys() - {index, "table"}
        assert not missing, name
        writes_state_only = name.partition(".")[0] in ("kv_write", "latent_write")
        assert any(is_output(arg.name) for arg in info.args) != writes_state_only, name


@pytest.mark.parametrize("kernel", [name for name, info in cpu.kernels().items() if "layer_offset" in info.ints])
def test_kernels_and_bounds_agree_on_the_state_of_a_layer(kernel: str) -> None:
    info, memory = cpu.kernels()[kernel], np.zeros(64, np.float32)
    some = {"layer_offset": 0, "kv_heads": 1 if "latent" in kernel else 2, "key_dim": 24, "rotary_dim": 0}
    ints = {name: some.get(name, 16) for name in info.ints}
    args = {arg.name: memory.ctypes.data for arg in info.args if not arg.optional}
    size, floats = reach(kernel, ints)[1]["state"], dict.fromkeys(info.floats, 1.0)
    with cpu.Runner(1) as runner:
        runner.add_plan([cpu.Call(kernel, args, ints | {"group_bytes": size}, floats)])
        with pytest.raises(cpu.KernelError, match="the layer does not fit"):
            runner.add_plan([cpu.Call(kernel, args, ints | {"group_bytes": size - 4}, floats)])


def test_a_compiled_plan_stays_inside(plan: Plan) -> None:
    check_bounds(plan, VOCAB, MAX_LEN)


def of(kernel: str, field: str, **values: Any) -> Change:
    def change(raw: dict[str, Any]) -> None:
        call = next(call for call in raw["calls"] if call["kernel"].startswith(kernel))
        call[field].update(values)

    return change


def grown(kernel: str) -> list[tuple[Change, str]]:
    """Every size of a kernel, far too large."""
    return [(of(kernel, "ints", **{size: 1 << 40}), "call ") for size in ints_of(kernel) if size not in NO_SIZES]


def ints_of(kernel: str) -> tuple[str, ...]:
    return next(info.ints for name, info in cpu.kernels().items() if name.startswith(kernel))


def state(raw: dict[str, Any]) -> None:
    raw["kv"]["group_tokens"] = 8


def shrunk(raw: dict[str, Any]) -> None:
    """What does not grow ends before the groups its calls count back from."""
    raw["kv"]["fixed_bytes"] = 24128


@pytest.mark.parametrize(
    ("change", "why"),
    [
        *grown("embedding."), *grown("rows."), *grown("linear."), *grown("rms_norm."), *grown("add_rms_norm."),
        *grown("qk_norm_rope_write."), *grown("attention."), *grown("gated_linear."),
        (of("linear.", "ints", k=73), "weight needs 46720 bytes"),
        (of("linear.", "ints", k=-1), "a size is negative"),
        (of("linear.", "args", bias="@model.layers.0.self_attn.k_norm.weight"), "bias needs 640 bytes"),
        (of("linear.", "args", x="$ids"), "x needs .* has 0"),
        (of("rms_norm.", "args", out="@model.norm.weight"), "writes"),
        (of("rows.", "args", index="$ids"), "index is '[$]ids'"),
        (of("gated_linear.", "ints", n=105), "out needs"),
        (of("rows.", "args", table="@model.norm.weight"), "table needs 8192 bytes"),
        (of("attention.", "ints", group_bytes=1 << 20), "not group_bytes"),
        (of("attention.", "ints", layer_offset=8000), "its layer ends at 10048"),
        (state, "groups of 8, not 16 tokens"),
    ],
)  # fmt: skip
def test_a_plan_that_reaches_further_is_refused(plan: Plan, change: Change, why: str) -> None:
    raw = json.loads(plan.to_json())
    change(raw)
    with pytest.raises(ValueError, match=why):
        check_bounds(Plan.from_json(json.dumps(raw)), VOCAB, MAX_LEN)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    made = {}
    for name, (config, disable) in OTHERS.items():
        options = CompileOptions(max_len=MAX_LEN, disable=disable)
        made[name] = Artifact.open(build(tmp_path_factory.mktemp(name), config, options=options)[1])
    return made


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        *(("latent", *case) for case in grown("heads_linear.")),
        *(("latent", *case) for case in grown("latent_write.")),
        *(("latent", *case) for case in grown("latent_attention.")),
        *(("moe", *case) for case in grown("moe.")),
        *(("moe", *case) for case in grown("attention.")),
        *(("experts", *case) for case in grown("experts.")),
        *(("gates", *case) for case in grown("gated_silu.")),
        ("gates", of("gated_silu.", "ints", width=105), "out needs"),
        *(("recurrent", *case) for case in grown("causal_conv_silu.")),
        *(("recurrent", *case) for case in grown("gated_delta.")),
        ("recurrent", of("causal_conv_silu.", "ints", back=0), "its state ends at 1920, 0 bytes lie before the groups"),
        ("recurrent", of("gated_delta.", "ints", back=8000), "its state ends at 8064, 8000 bytes lie before"),
        ("recurrent", of("gated_delta.", "ints", back=1 << 16), "it goes back 65536 bytes, 24192 do not grow"),
        ("recurrent", of("gated_delta.", "ints", back=8066), "it goes back 8066 bytes, 24192 do not grow"),
        ("recurrent", of("gated_delta.", "ints", v_stride=0, v_start=161), "v needs"),
        ("recurrent", shrunk, "it goes back 24192 bytes, 24128 do not grow"),
        ("latent", of("heads_linear.", "args", weight="@model.norm.weight"), "weight needs .* bytes"),
        ("latent", of("latent_attention.", "ints", layer_offset=1 << 13), "its layer ends at"),
        ("moe", of("moe.", "args", router="@model.norm.weight"), "router needs .* bytes"),
        ("moe", of("moe.", "args", down="@model.norm.weight"), "down needs .* bytes"),
        ("moe", of("moe.", "args", up_bias="@model.norm.weight"), "up_bias needs .* bytes"),
        ("moe", of("moe.", "args", scratch_pairs="@model.norm.weight"), "writes"),
        ("moe", of("attention.", "args", sinks="$ids"), "sinks needs .* has 0"),
        ("experts", of("experts.", "args", index="$ids"), "index needs .* has 0"),
    ],
)  # fmt: skip
def test_other_plans_that_reach_further_are_refused(
    others: dict[str, Artifact], name: str, change: Change, why: str
) -> None:
    plan = others[name].plan
    check_bounds(plan, VOCAB, MAX_LEN)
    raw = json.loads(plan.to_json())
    change(raw)
    with pytest.raises(ValueError, match=why):
        check_bounds(Plan.from_json(json.dumps(raw)), VOCAB, MAX_LEN)


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        *(("moe", of("moe.", "ints", **{choice: 1 << 40}), choice) for choice in CHOICES),
        ("experts", of("experts.", "ints", act=4), "act"),
        ("experts", of("experts.", "ints", top_k=0), "top_k"),
        ("latent", of("latent_attention.", "ints", key_dim=32), "shorter than their keys"),
        ("latent", of("heads_linear.", "ints", heads=0), "heads"),
    ],
)
def test_kernels_refuse_what_they_cannot_do_when_a_plan_is_bound(
    others: dict[str, Artifact], name: str, change: Change, why: str
) -> None:
    opened = others[name]
    raw = json.loads(opened.plan.to_json())
    change(raw)
    hostile = Artifact(opened.store, opened.manifest, Plan.from_json(json.dumps(raw)))
    with pytest.raises(ArtifactError, match=why) as refused:
        CpuExecutor(hostile, 1)
    assert refused.value.code == "artifact-malformed"


def test_limits_beyond_the_tables_are_refused(plan: Plan) -> None:
    with pytest.raises(ValueError, match="table needs"):
        check_bounds(plan, VOCAB, MAX_LEN + 1)
    with pytest.raises(ValueError, match="are read of each"):
        check_bounds(plan, VOCAB + 1, MAX_LEN)


def test_the_executor_refuses_it_before_it_runs_anything(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    limits = {**opened.manifest["limits"], "max_len": 1 << 20}
    hostile = Artifact(opened.store, {**opened.manifest, "limits": limits}, opened.plan)
    with pytest.raises(ArtifactError, match="table needs") as refused:
        CpuExecutor(hostile, 1)
    assert refused.value.code == "artifact-malformed"


def test_sizes_that_overflow_or_never_end_are_refused() -> None:
    ints = dict.fromkeys(cpu.kernels()["copy.f32"].ints, 0) | {"n0": 1 << 32, "n1": 1 << 32, "n2": 1}
    rows, _ = reach("copy.f32", ints)
    assert rows["out"] >= 4 << 64
    memory = np.zeros(16, np.float32)
    args = {"x": memory.ctypes.data, "out": memory.ctypes.data}
    with cpu.Runner(1) as runner, pytest.raises(cpu.KernelError, match="more than a row can have"):
        runner.add_plan([cpu.Call("copy.f32", args, ints)])
    with cpu.Runner(1) as runner, pytest.raises(cpu.KernelError, match="64 bits do not hold"):
        runner.add_plan([cpu.Call("copy.f32", args, ints | {"n0": (1 << 64) + 5})])


def test_factors_of_the_decay_come_together() -> None:
    memory = np.zeros(64, np.float32)
    info = cpu.kernels()["gated_delta.f32"]
    args = {arg.name: memory.ctypes.data for arg in info.args if arg.name != "dt_bias"}
    ints = dict.fromkeys(info.ints, 1) | {"back": 64, "offset": 0, "q_start": 0, "k_start": 0, "v_start": 0}
    with cpu.Runner(1) as runner, pytest.raises(cpu.KernelError, match="come together"):
        runner.add_plan([cpu.Call("gated_delta.f32", args, ints, dict.fromkeys(info.floats, 1.0))])
