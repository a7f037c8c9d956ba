"""The vocabulary: operators of the `xllm::` namespace, one file per family.

The torch body of an operator is its definition and its fallback. Shapes are over flattened tokens: T tokens of all
sequences of a step, S rows whose logits are wanted, H heads of width D. Everything computes in float32.
"""

from xllm.ir.dialect import activation, attention, encode, experts, linear, norm, recurrent, rope, sdpa
from xllm.ir.dialect.library import NAMESPACE, operators

__all__ = [
    "NAMESPACE", "activation", "attention", "encode", "experts", "linear", "norm", "operators", "recurrent", "rope",
    "sdpa",
]  # fmt: skip
