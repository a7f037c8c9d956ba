"""The compiler's one data structure: an FX graph over aten and the `xllm::` dialect, its weights and its state.

Read in this order: `program.py` (what a program is), `weight_rules.py` (what its weights are made of), `dialect/` (what
the operators mean), `effects.py` (what they touch), `build.py` (how nodes are made), `verify.py` (what is legal),
`show.py` (how it prints), `interpret.py` (how it runs in torch).
"""

from xllm.ir import dialect
from xllm.ir.program import Dim, KVLayer, LayerSource, Program, Task, Weight
from xllm.ir.weight_rules import (
    Concat,
    Constant,
    Dequantise,
    Either,
    Permute,
    Reshape,
    Shift,
    Slice,
    Source,
    Stack,
    Sum,
    WeightRule,
)

__all__ = [
    "Concat",
    "Constant",
    "Dequantise",
    "Dim",
    "Either",
    "KVLayer",
    "LayerSource",
    "Permute",
    "Program",
    "Reshape",
    "Shift",
    "Slice",
    "Source",
    "Stack",
    "Sum",
    "Task",
    "Weight",
    "WeightRule",
    "dialect",
]
