"""What a manifest must say for the runtime to rely on it. Types and ranges are checked here, meaning by its readers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from xllm import typed
from xllm.artifact.seal import DIGEST, ArtifactError, unseal
from xllm.artifact.store import MAX_TABLE_BYTES, Store, read

SCHEMA = 3
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
_Id = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
_Digest = Annotated[str, msgspec.Meta(pattern=DIGEST)]


class Target(msgspec.Struct):
    name: str
    level: str
    architecture: str


class Model(msgspec.Struct):
    name: str
    vocab: _Count
    max_len: _Count
    eos_ids: list[_Id]
    bos_id: _Id | None = None


class Task(msgspec.Struct):
    """What a step gives; the fields beside `kind` are those of embeddings and scores."""

    kind: Literal["generate", "embed", "classify"]
    width: _Count = 1
    segments: _Count = 1
    labels: list[str] = []


class Limits(msgspec.Struct):
    max_len: _Count
    max_seqs: _Count
    max_batch_tokens: _Count


class Extension(msgspec.Struct):
    """A module of others that the artifact was compiled with."""

    module: str
    digest: str


class Manifest(msgspec.Struct):
    """Fields that readers rely on; what a later compiler adds beside them is covered by the digest alone."""

    schema: int
    digest: _Digest
    files: dict[str, _Digest]
    generation: dict[str, Any]
    limits: Limits
    model: Model
    special_tokens: dict[str, str]
    target: Target
    task: Task
    weights_header: _Digest
    weights_checksum: _Digest | None = None
    weight_origins: dict[str, _Digest] = {}
    extensions: dict[str, list[Extension]] = {}
    kind: Literal["step"] = "step"


class FunctionModel(msgspec.Struct):
    name: str


class FunctionManifest(msgspec.Struct):
    """The same of a function, whose limits are the largest sizes of its dims."""

    schema: int
    digest: _Digest
    kind: Literal["function"]
    files: dict[str, _Digest]
    generation: dict[str, Any]
    limits: dict[str, _Count]
    model: FunctionModel
    special_tokens: dict[str, str]
    target: Target
    weights_header: _Digest
    weights_checksum: _Digest | None = None
    weight_origins: dict[str, _Digest] = {}
    extensions: dict[str, list[Extension]] = {}


def read_manifest(store: Store) -> dict[str, Any]:
    """The verified manifest. Raises ArtifactError naming the field that is missing, wrong or changed."""
    manifest = unseal(read(store, "manifest.json", MAX_TABLE_BYTES), "manifest.json")
    schema = manifest.get("schema")
    if schema != SCHEMA:
        raise ArtifactError(
            "artifact-schema",
            f"manifest.json has schema {schema}, this xllm reads {SCHEMA}; compile the checkpoint again",
        )
    try:
        typed.convert(manifest, FunctionManifest if manifest.get("kind") == "function" else Manifest)
    except msgspec.ValidationError as error:
        raise ArtifactError("artifact-malformed", f"manifest.json: {error}") from error
    return manifest
