"""Operators: what they promise on fake values is what they give on real ones, and misfits are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xllm.ir.dialect import operators

T, HQ, HKV, D = 5, 4, 2, 6
FLOATS = torch.Generator().manual_seed(3)


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=FLOATS)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


POSITIONS, SLOTS = ints(0, 1, 2, 0, 1), ints(0, 0, 0, 1, 1)
STATE = (2, 3, 8, HKV * 2 * D)
# Of 4 experts of inner width 7: gate, up and down, each with its bias; what stands between the products.
EXPERTS = (floats(4, 7, 8), floats(4, 7), floats(4, 7, 8), floats(4, 7), floats(4, 8, 7), floats(4, 8))
BETWEEN = ("silu", 1.7, 7.0, 1.0)
GOOD: dict[str, tuple[Any, ...]] = {
    "linear": (floats(T, 8), floats(3, 8), floats(3)),
    "heads_linear": (floats(T, HQ, 8), floats(HQ, 3, 8)),
    "embedding": (ints(1, 0, 2), floats(4, 8)),
    "rows": (floats(6, 8), ints(5, 0)),
    "rms_norm": (floats(T, HQ, 8), floats(8), 1e-6),
    "add_rms_norm": (floats(T, 8), floats(T, 8), floats(8), 1e-6),
    "layer_norm": (floats(T, HQ, 8), floats(HQ, 8), floats(HQ, 8), 1e-6),
    "rope": (floats(T, HQ, D), floats(T, 4), floats(T, 4), 4, False),
    "gated_act": (floats(T, 8), "silu"),
    "gated_linear": (floats(T, 6), floats(8, 6), floats(8), "gelu"),
    "kv_write": (floats(*STATE), floats(T, HKV, D), floats(T, HKV, D), POSITIONS, SLOTS, 1),
    "attention": (floats(*STATE), floats(T, HQ, D), POSITIONS, SLOTS, floats(HQ), 1, HKV, D, 0.4, 2, 30.0),
    "latent_write": (floats(*STATE), floats(T, 8), floats(T, 2), POSITIONS, SLOTS, 1),
    "latent_attention": (floats(*STATE), floats(T, HQ, 8), floats(T, HQ, 2), POSITIONS, SLOTS, 1, 0.4, 2, 30.0),
    "qk_norm_rope_write": (
        floats(*STATE), floats(T, (HQ + 2 * HKV) * D), floats(D), floats(D), floats(T, 4), floats(T, 4), POSITIONS,
        SLOTS, 1, HQ, HKV, D, 4, False, 1e-6,
    ),
    "causal_conv": (floats(2, 3, 100), floats(T, 8), floats(8, 4), floats(8), POSITIONS, SLOTS, 1, 16, "silu"),
    "gated_delta": (
        floats(2, 3, 100), floats(T, HKV, 3), floats(T, HKV, 3), floats(T, HQ, D), floats(T, HQ), floats(T, HQ),
        POSITIONS, SLOTS, 1, 16, 0.5, 1e-6,
    ),
    "gated_delta_mixed": (
        floats(2, 3, 100), floats(T, 2 * HKV * 3 + HQ * D), floats(T, HQ), floats(T, HQ), floats(HQ), floats(HQ),
        POSITIONS, SLOTS, 1, 16, HKV, 3, 0.5, 1e-6, 2.0,
    ),
    "experts": (floats(T, 8), torch.randint(0, 4, (T, 2)), floats(T, 2), *EXPERTS, *BETWEEN),
    "moe": (
        floats(T, 8), floats(4, 8), floats(4), floats(4), *EXPERTS, 2, "sigmoid", 2, 1, "sum2", True, 1e-20, 2.5,
        *BETWEEN,
    ),
    "encode_attention": (floats(T, HQ, D), floats(T, HKV, D), floats(T, HKV, 3), POSITIONS, SLOTS, 0.4, 2, 30.0),
    "first_rows": (floats(T, 8), POSITIONS, ints(2, 4)),
    "mean_rows": (floats(T, 8), POSITIONS, ints(2, 4)),
    "l2_normalize": (floats(T, 8), 1e-12),
    "sdpa": (floats(2, HQ, 3, D), floats(2, HKV, T, D), floats(2, HKV, T, 4), floats(3, T), 0.4, 30.0, True, False),
}  # fmt: skip
BAD: list[tuple[str, int, Any]] = [
    ("causal_conv", 2, floats(7, 4)),
    ("causal_conv", 4, ints(0)),
    ("causal_conv", 7, 77),
    ("causal_conv", 8, "swish"),
    ("gated_delta", 1, floats(T, 3, 3)),
    ("gated_delta", 2, floats(T, HKV, 4)),
    ("gated_delta", 4, floats(T, HKV)),
    ("gated_delta", 9, 29),
    ("gated_delta_mixed", 1, floats(T, 2 * HKV * 3 + HQ * D - 1)),
    ("gated_delta_mixed", 3, floats(T, HKV)),
    ("gated_delta_mixed", 4, floats(1)),
    ("gated_delta_mixed", 9, 29),
    ("gated_delta_mixed", 10, 3),
    ("experts", 0, floats(T, HQ, 2)),
    ("experts", 2, floats(T, 1)),
    ("experts", 3, floats(4, 8, 7)),
    ("experts", 3, None),
    ("experts", 5, floats(4, 7, 9)),
    ("experts", 7, floats(4, 7, 8)),
    ("experts", 8, floats(8)),
    ("experts", 9, "tanh"),
    ("experts", 10, 0.0),
    ("moe", 1, floats(3, 8)),
    ("moe", 2, floats(3)),
    ("moe", 3, floats(1)),
    ("moe", 10, 3),
    ("moe", 11, "softplus"),
    ("moe", 12, 3),
    ("moe", 13, 3),
    ("moe", 14, "mean"),
    ("linear", 1, floats(3, 7)),
    ("linear", 2, floats(4)),
    ("heads_linear", 1, floats(HQ, 3, 7)),
    ("heads_linear", 1, floats(HKV, 3, 8)),
    ("rms_norm", 1, floats(1)),
    ("rms_norm", 1, floats(HQ, 8)),
    ("add_rms_norm", 1, floats(1, 8)),
    ("add_rms_norm", 2, floats(1)),
    ("layer_norm", 1, floats(7)),
    ("layer_norm", 2, floats(8)),
    ("rope", 0, floats(T, HQ * D)),
    ("rope", 1, floats(T, 2)),
    ("rope", 2, floats(1, 4)),
    ("rope", 3, 3),
    ("gated_act", 0, floats(T, 7)),
    ("gated_act", 1, "swish"),
    ("gated_linear", 1, floats(8, 7)),
    ("gated_linear", 1, floats(7, 6)),
    ("gated_linear", 3, "swish"),
    ("kv_write", 2, floats(T, HQ, D)),
    ("kv_write", 3, ints(0)),
    ("attention", 1, floats(T, 3, D)),
    ("attention", 3, ints(0)),
    ("attention", 4, floats(HKV)),
    ("encode_attention", 0, floats(T, 3, D)),
    ("encode_attention", 1, floats(T, HKV, D + 1)),
    ("encode_attention", 2, floats(T - 1, HKV, D)),
    ("encode_attention", 4, ints(0)),
    ("first_rows", 0, floats(T, HQ, 8)),
    ("mean_rows", 1, ints(0)),
    ("latent_write", 2, floats(T, 1, 2)),
    ("latent_write", 4, ints(0)),
    ("latent_attention", 2, floats(T, HKV, 2)),
    ("latent_attention", 4, ints(0)),
    ("qk_norm_rope_write", 1, floats(T, HQ * D)),
    ("qk_norm_rope_write", 2, floats(HQ * D)),
    ("qk_norm_rope_write", 4, None),
    ("qk_norm_rope_write", 10, 3),
]


def test_every_operator_is_covered() -> None:
    assert set(GOOD) == set(operators())


@pytest.mark.parametrize("name", GOOD)
def test_fake_and_real_agree(name: str) -> None:
    args = GOOD[name]
    real = operators()[name](*(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args))
    fake = operators()[name](*(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args))
    for one, other in zip(_parts(real), _parts(fake), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize(("name", "place", "value"), BAD, ids=lambda part: part if isinstance(part, str) else None)
def test_misfits_are_refused(name: str, place: int, value: Any) -> None:
    args = list(GOOD[name])
    args[place] = value
    with pytest.raises((ValueError, RuntimeError)):
        operators()[name](*(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args))


def _parts(value: Any) -> tuple[torch.Tensor, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)
