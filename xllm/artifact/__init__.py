"""The artifact: data that a runtime maps and runs, as a folder or as one file. Written once, named by digests, refused
when changed.

manifest.json   what it is: target, model facts, limits, pass records, digest of every file; carries its own digest
plan.json       what to execute (see `plan.py`), with the place and digest of every weight
weights/model.safetensors   weights in the target's layout, page aligned, mapped and never copied
ir/NN-pass.ir   the program after every pass, for reading
tokenizer/      tokenizer.json and what belongs to it
signature.json  optional: who vouches for it

A file that is none of these, nor named by the manifest, is refused like a changed one.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xllm.artifact.exchange import differences
from xllm.artifact.manifest import SCHEMA
from xllm.artifact.opened import PLANNED, UNFOLDED, Artifact, Progress
from xllm.artifact.seal import ArtifactError, digest
from xllm.artifact.signature import SIGNATURE, new_key, sign
from xllm.artifact.store import MAGIC, PAGE_BYTES, is_artifact, is_packed
from xllm.artifact.weights import WEIGHTS, MappedWeights

if TYPE_CHECKING:
    from xllm.artifact.onefile import pack, unpack
    from xllm.artifact.reuse import Previous, previous_weights
    from xllm.artifact.sharing import check_apart, share
    from xllm.artifact.writer import ArtifactWriter, Blocks, Written, writing

# Who writes is imported when first used: a start only reads.
_WRITING = {
    "onefile": ("pack", "unpack"),
    "reuse": ("Previous", "previous_weights"),
    "sharing": ("check_apart", "share"),
    "writer": ("ArtifactWriter", "Blocks", "Written", "writing"),
}

__all__ = [
    "MAGIC",
    "PAGE_BYTES",
    "PLANNED",
    "SCHEMA",
    "SIGNATURE",
    "UNFOLDED",
    "WEIGHTS",
    "Artifact",
    "ArtifactError",
    "ArtifactWriter",
    "Blocks",
    "MappedWeights",
    "Previous",
    "Progress",
    "Written",
    "check_apart",
    "differences",
    "digest",
    "is_artifact",
    "is_packed",
    "new_key",
    "pack",
    "previous_weights",
    "share",
    "sign",
    "unpack",
    "writing",
]


def __getattr__(name: str) -> Any:
    for module, names in _WRITING.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
