"""An artifact opened for reading: everything it gives was checked against a digest in the same breath."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm.artifact.manifest import read_manifest
from xllm.artifact.seal import ArtifactError, changed, checksum, digest
from xllm.artifact.signature import SIGNATURE, check_signature
from xllm.artifact.store import MAX_READ_BYTES, MAX_TABLE_BYTES, Store, digest_of, open_store, read
from xllm.artifact.weights import WEIGHTS, MappedWeights, regions
from xllm.plan import Plan

Progress = Callable[[str, int, int], None]  # what, done bytes, total bytes
TOKENIZER, CHAT_TEMPLATE = "tokenizer/tokenizer.json", "tokenizer/chat_template.jinja"
PLANNED, UNFOLDED = "planned", ".unfolded"  # the last dump, and the suffix of its form with every layer written out


@dataclass(frozen=True)
class Artifact:
    """An opened artifact. `manifest` and `plan` are verified; weights are verified by `map_weights`. vouched: a
    signature was required and is there."""

    store: Store
    manifest: Mapping[str, Any]
    plan: Plan
    vouched: bool = False

    @staticmethod
    def open(
        path: str | os.PathLike[str],
        require_signature: str | os.PathLike[str] | None = None,
        *,
        ignore_signature: bool = False,
    ) -> Artifact:
        """Reads and checks everything but the weights, of a folder or a packed file.

        require_signature: the public key file of who must have signed it. ignore_signature: one that is there may be of
        another manifest, for who signs anew. Raises ArtifactError naming what is missing, changed or too much.
        """
        store = open_store(path)
        manifest = read_manifest(store)
        if not ignore_signature:
            check_signature(store, manifest["digest"], require_signature)
        if "plan.json" not in manifest["files"]:
            raise ArtifactError("artifact-incomplete", "manifest.json names no plan.json; compile the checkpoint again")
        for name, claimed in manifest["files"].items():
            if digest_of(store, name) != claimed:
                raise changed(name)
        try:
            plan = Plan.from_json(_verified(store, "plan.json", manifest["files"]["plan.json"], MAX_TABLE_BYTES))
            plan.check()
        except (ValueError, RecursionError) as error:
            raise ArtifactError("artifact-malformed", f"plan.json: {error}") from error
        if plan.is_function != (manifest.get("kind") == "function"):
            raise ArtifactError("artifact-malformed", "manifest.json and plan.json are not of one kind")
        artifact = Artifact(store, manifest, plan, require_signature is not None)
        end = max((weight.offset + weight.bytes for weight in plan.weights.values()), default=0)
        if artifact.weight_bytes < max(end, 1):
            raise ArtifactError("artifact-incomplete", f"{WEIGHTS} is cut short; compile the checkpoint again")
        if extra := sorted(store.names() - members(manifest)):
            raise ArtifactError("artifact-changed", f"{extra[0]} is no part of the artifact; remove it")
        return artifact

    @property
    def path(self) -> Path:
        return self.store.path

    @property
    def name(self) -> str:
        return self.manifest["model"]["name"]

    @property
    def task(self) -> str:
        """What a step gives: "generate", "embed" or "classify"; "function" where there are no steps."""
        return "function" if self.plan.is_function else self.manifest["task"]["kind"]

    @property
    def generation(self) -> Mapping[str, Any]:
        """Contents of the checkpoint's generation_config.json; empty where it has none."""
        return self.manifest["generation"]

    @property
    def tokenizer(self) -> bytes | None:
        """Contents of tokenizer.json; None where the checkpoint had none."""
        return self.read(TOKENIZER) if TOKENIZER in self.manifest["files"] else None

    @property
    def chat_template(self) -> str | None:
        if CHAT_TEMPLATE not in self.manifest["files"]:
            return None
        try:
            return self.read(CHAT_TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise ArtifactError("artifact-malformed", f"{CHAT_TEMPLATE} is not UTF-8: {error}") from error

    @property
    def special_tokens(self) -> Mapping[str, str]:
        return self.manifest["special_tokens"]

    @property
    def weight_bytes(self) -> int:
        return self.store.place(WEIGHTS).size

    def read(self, name: str) -> bytes:
        """A file that the manifest names, checked again. Raises ArtifactError when it changed."""
        return _verified(self.store, name, self.manifest["files"][name])

    def stages(self) -> dict[str, str]:
        """Names of the program dumps, to `read`, by stage name in pipeline order."""
        dumps = sorted(name for name in self.manifest["files"] if name.startswith("ir/"))
        return {name.split("-", 1)[1].removesuffix(".ir"): name for name in dumps}

    def map_weights(
        self, verify: bool = True, progress: Progress | None = None, *, start_threads: int = 0
    ) -> MappedWeights:
        """Maps the weight file read-only and, unless told not to, checks every byte of it against the digests.

        start_threads: for a start, check every byte on so many threads against the manifest's checksum instead, as
        fast as memory is read: it finds accidents, which is all that is asked where no signature is required. Where one
        is, or where the checksum is another, the digests are checked. The mapping is shared: processes serving one
        artifact hold one copy. Raises ArtifactError naming the first weight whose bytes changed.
        """
        mapped = MappedWeights(self.store.place(WEIGHTS))
        if verify:
            self.check_weights(mapped, progress, start_threads=start_threads)
        return mapped

    def check_weights(self, mapped: MappedWeights, progress: Progress | None = None, *, start_threads: int = 0) -> None:
        """Reads every byte of the mapped weights and checks them, as `map_weights` says."""
        size, expected = len(mapped.bytes), self.manifest.get("weights_checksum")
        summed = start_threads and expected and not self.vouched
        if summed and checksum(mapped.bytes, start_threads) == expected:
            return
        for name, start, stop, claimed in regions(self.plan, self.manifest["weights_header"], size):
            if digest(mapped.bytes[start:stop]) != claimed:
                raise changed(f"{name} in {WEIGHTS}")
            if progress is not None:
                progress(name, stop, size)


def members(manifest: Mapping[str, Any]) -> frozenset[str]:
    """The names of all that may be in an artifact."""
    return frozenset(("manifest.json", WEIGHTS, SIGNATURE, *manifest["files"]))


def _verified(store: Store, name: str, claimed: str, limit: int = MAX_READ_BYTES) -> bytes:
    raw = read(store, name, limit)
    if digest(raw) != claimed:
        raise changed(name)
    return raw
