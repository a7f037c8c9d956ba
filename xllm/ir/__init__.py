"""The compiler's one data structure: an FX graph over aten and the `xllm::` dialect, its weights and its state.

Read in this order: `program.py` (what a program is), `dialect/` (what the operators mean), `effects.py` (what they
touch), `build.py` (how nodes are made), `verify.py` (what is legal), `show.py` (how it prints), `interpret.py` (how it
runs in torch).
"""

from xllm.ir import dialect
from xllm.ir.program import (
    Concat,
    Constant,
    Dim,
    Either,
    KVLayer,
    LayerSource,
    Permute,
    Program,
    Reshape,
    Shift,
    Slice,
    Source,
    Stack,
    Sum,
    Task,
    Weight,
    WeightRule,
)

__all__ = [
    "Concat",
    "Constant",
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
