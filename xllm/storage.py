"""How weights, keys and values can be stored, and activations rounded, as a user says it.

A storage is one word: float32, bfloat16, or int8 and int4 with the number of inputs that share a scale, as int8.32,
int4.128, or int8.row where all inputs of an output do. What lies behind a word is for the kernels to say
(`xllm.kernels.cpu.quantised`).
"""

from __future__ import annotations

FLOATS = ("float32", "bfloat16")
INTS = ("int8", "int4")
KVS = (*FLOATS, "int8")  # of keys and values: int8 with a scale for each token and KV head, of keys and of values
GROUPS = ("32", "64", "128", "row")
ACTIVATIONS = {"bfloat16": ("bfloat16",), "int8": ("int8", "int4")}  # that rows can be rounded to, beside which weights
STORAGES = (*FLOATS, *(f"{name}.{group}" for name in INTS for group in GROUPS))


def rounds(activations: str, storage: str) -> bool:
    """Whether rows are rounded to `activations` in products with weights that are stored so."""
    return storage.partition(".")[0] in ACTIVATIONS.get(activations, ())


def full_word(name: str, group: str | None = None) -> str:
    """The word for a type and a group, or for a word: int8 and int4 alone mean groups of 32."""
    return f"{name}.{group or GROUPS[0]}" if name in INTS else name
