"""Tensors of a checkpoint folder: safetensors only, memory mapped, one tensor at a time.

Headers are untrusted input: sizes, types and offsets are checked before anything is read, and an index cannot name a
file outside the folder. Nothing is unpickled, ever.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from xllm.errors import CompileError
from xllm.frontend.facts import read_json
from xllm.frontend.formats import PLAIN
from xllm.ir.program import Program
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
    missing,
    resolve,
    rule_sources,
)

_MAX_HEADER_BYTES = 100 << 20
# bfloat16 and eight-bit floats have no numpy type: their bits are kept as unsigned integers.
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
    "F8_E4M3": np.uint8, "F8_E8M0": np.uint8,
}  # fmt: skip
_READABLE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Entry:
    """One tensor: where its bytes are. dtype as safetensors writes it ("F32", "BF16", ...)."""

    file: int
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Checkpoint(Mapping[str, np.ndarray]):
    """Name -> float32 array. float32 tensors are views of the file; other types are converted, one tensor at a time.

    `raw` gives the stored bits instead (bfloat16 as uint16), `dtype` and `shape` the facts without reading.
    """

    def __init__(self, files: tuple[mmap.mmap, ...], entries: dict[str, Entry]) -> None:
        self._files = files
        self._entries = entries
        self._digests: dict[str, str] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Maps `model.safetensors` or, without one, the shards that its index names. Raises CompileError."""
        folder = Path(folder)
        names = _shards(folder)
        files: list[mmap.mmap] = []
        entries: dict[str, Entry] = {}
        for number, (shard, wanted) in enumerate(names.items()):
            mapped = _map(folder / shard)
            files.append(mapped)
            found = _header(mapped, shard, number)
            if wanted is None:
                entries.update(found)
                continue
            missing = sorted(wanted - set(found))
            if missing:
                raise _bad(f"the index places {missing[0]!r} in {shard}, which does not hold it", shard)
            entries.update({name: found[name] for name in sorted(wanted)})
        return cls(tuple(files), entries)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.raw(name)
        kind = self._entries[name].dtype
        if kind == "BF16":
            return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if kind not in _READABLE:
            raise CompileError(
                f"the tensor {name!r} holds {kind} values, not weights in floating point",
                code="quantised-checkpoint",
                pass_name="weights",
                where=name,
                try_=PLAIN,
            )
        return array if kind == "F32" else array.astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def raw(self, name: str) -> np.ndarray:
        """The stored values without a copy, read-only; bfloat16 as its uint16 bits."""
        entry = self._entries[name]
        count = math.prod(entry.shape)
        flat = np.frombuffer(self._files[entry.file], _DTYPES[entry.dtype], count, entry.begin)
        return flat.reshape(entry.shape)

    def dtype(self, name: str) -> str:
        """ "float32", "bfloat16", "float16", "float64", or the safetensors name of any other type."""
        kind = self._entries[name].dtype
        return _READABLE.get(kind, kind)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def check(self, program: Program) -> tuple[str, ...]:
        """Checks every weight of a stamped program against the headers, reading no data; returns the names no weight
        uses.

        Raises CompileError naming the tensors that are missing, or the first whose shape or type does not fit.
        """
        rules = {target: resolve(weight.rule, self) for target, weight in program.weights.items()}
        lacking = [name for rule in rules.values() for name in missing(rule, self)]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise CompileError(
                f"the checkpoint has no tensor {lacking[0]!r}{more}",
                code="missing-tensor",
                pass_name="weights",
                where=lacking[0],
                try_="a complete download; a base model has no output head: --task embed takes it",
            )
        used: set[str] = set()
        for target, weight in program.weights.items():
            shape = self.shape_of(rules[target], program)
            if shape != weight.shape:
                name = next((source.names[0] for source in rule_sources(rules[target])), target)
                raise CompileError(
                    f"the tensor {name!r} has shape {shape}, the configuration asks for {weight.shape}",
                    code="shape-mismatch",
                    pass_name="weights",
                    where=target,
                    try_="the config.json that belongs to these weights",
                )
            used.update(name for source in rule_sources(rules[target]) for name in source.names)
        return tuple(sorted(set(self._entries) - used))

    def digest(self, name: str) -> str:
        """blake3 of a tensor's type, shape and stored bytes."""
        if name not in self._digests:
            entry = self._entries[name]
            hasher = blake3(f"{entry.dtype} {entry.shape} ".encode())
            hasher.update(memoryview(self._files[entry.file])[entry.begin : entry.end])
            self._digests[name] = hasher.hexdigest()
        return self._digests[name]

    def release(self, name: str) -> None:
        """Says that a tensor is not needed soon: its pages leave the resident set and are read again if touched."""
        entry = self._entries[name]
        first = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = entry.end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if whole > 0:
            self._files[entry.file].madvise(mmap.MADV_DONTNEED, first, whole)

    def shape_of(self, rule: WeightRule, program: Program) -> tuple[int, ...]:
        """The shape a rule gives, from the headers alone."""
        match rule:
            case Source(names):
                name = next(name for name in names if name in self)
                if self._entries[name].dtype not in _READABLE:
                    self[name]  # raises, naming the type
                return self.shape(name)
            case Constant(name):
                return tuple(program.constants[name].shape)
            case Concat(parts, axis):
                shapes = [self.shape_of(part, program) for part in parts]
                first = shapes[0]
                for shape in shapes:
                    if len(shape) <= axis or (*shape[:axis], *shape[axis + 1 :]) != (*first[:axis], *first[axis + 1 :]):
                        return shape
                return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])
            case Stack(parts):
                shapes = [self.shape_of(part, program) for part in parts]
                odd = [shape for shape in shapes if shape != shapes[0]]
                return odd[0] if odd else (len(parts), *shapes[0])
            case Sum(parts):
                return np.broadcast_shapes(*(self.shape_of(part, program) for part in parts))
            case Shift(of, _):
                return self.shape_of(of, program)
            case Slice(of, axis, start, stop, step):
                shape = self.shape_of(of, program)
                if len(shape) <= axis:
                    return shape
                return (*shape[:axis], len(range(shape[axis])[start:stop:step]), *shape[axis + 1 :])
            case Reshape(of, shape):
                held = self.shape_of(of, program)
                return shape if math.prod(held) == math.prod(shape) else held
            case Permute(of, axes):
                shape = self.shape_of(of, program)
                return tuple(shape[axis] for axis in axes) if len(shape) == len(axes) else shape
            case Either():
                return self.shape_of(resolve(rule, self), program)
            case Dequantise(scheme=scheme):
                return scheme.shape


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """File name -> the tensors wanted from it (None: all), in the order they are first named."""
    # The whole file first, as transformers does: an index beside it was left by an earlier save.
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": None}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise _bad("the index has no weight_map", index.name)
        shards: dict[str, set[str] | None] = {}
        for name, file in places.items():
            inside = isinstance(file, str) and file == Path(file).name and "\\" not in file
            if not inside or not file.endswith(".safetensors"):
                raise _bad(f"the index names {file!r}, which is no safetensors file of this folder", index.name)
            wanted = shards.setdefault(file, set())
            assert wanted is not None
            wanted.add(name)
        return shards
    unsafe = sorted(path.name for path in folder.glob("*") if path.suffix in _UNSAFE) if folder.is_dir() else []
    if unsafe:
        raise CompileError(
            f"the weights are pickled ({unsafe[0]}); pickles run code when opened and are never read",
            code="unsafe-checkpoint",
            pass_name="weights",
            where=unsafe[0],
            try_="AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other), which writes safetensors",
        )
    raise CompileError(
        f"there are no weights in {folder.name!r}",
        code="no-weights",
        pass_name="weights",
        where=str(folder),
        try_="a folder with model.safetensors, or with shards and model.safetensors.index.json",
    )


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise _bad(f"it cannot be opened: {error}", path.name) from error


def _header(mapped: mmap.mmap, file: str, number: int) -> dict[str, Entry]:
    """The entries of one safetensors file, after checking that each lies inside it and has the size its shape says."""
    if len(mapped) < 8:
        raise _bad("it is shorter than a header", file)
    size = int.from_bytes(mapped[:8], "little")
    if size > min(_MAX_HEADER_BYTES, len(mapped) - 8):
        raise _bad(f"its header claims {size} bytes", file)
    try:
        header = json.loads(mapped[8 : 8 + size])
    except (ValueError, RecursionError) as error:
        raise _bad(f"its header is not JSON: {error}", file) from error
    if not isinstance(header, dict):
        raise _bad("its header is not a JSON object", file)
    header.pop("__metadata__", None)
    entries = {name: _entry(name, described, 8 + size, len(mapped), number, file) for name, described in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < end:
            raise _bad(f"the tensor {name!r} overlaps another", file)
        end = entry.end
    return entries


def _entry(name: str, described: Any, base: int, size: int, number: int, file: str) -> Entry:
    try:
        dtype, shape = described["dtype"], tuple(described["shape"])
        begin, end = described["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _bad(f"the entry of tensor {name!r} is malformed", file) from error
    whole = all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in (*shape, begin, end))
    if not isinstance(dtype, str) or not whole or not begin <= end or base + end > size:
        raise _bad(f"the tensor {name!r} does not lie inside the file", file)
    if dtype in _DTYPES and end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise _bad(f"the tensor {name!r} has {end - begin} bytes, which its shape {shape} of {dtype} does not", file)
    if dtype not in _DTYPES:
        raise CompileError(
            f"the tensor {name!r} is stored as {dtype}",
            code="quantised-checkpoint",
            pass_name="weights",
            where=file,
            try_=PLAIN,
        )
    return Entry(number, dtype, shape, base + begin, base + end)


def _bad(why: str, file: str) -> CompileError:
    return CompileError(
        f"{file} is not a sound safetensors file: {why}",
        code="bad-safetensors",
        pass_name="weights",
        where=file,
        try_="downloading the checkpoint again",
    )
