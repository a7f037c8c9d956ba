"""How a checkpoint may spell a tensor of the model: transformers' conversion mapping, read as rules.

transformers renames and merges tensors while it loads. Here nothing is loaded: each key of the model becomes the rule
that makes it from either spelling, the model's own or the converted one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from xllm.errors import CompileError
from xllm.frontend.exported import Place
from xllm.ir.program import Weight
from xllm.ir.weight_rules import Concat, Either, Permute, Slice, Source, Stack, WeightRule, renamed


@dataclass(frozen=True)
class Spellings:
    """The conversions of one model, from the names it has to the names its checkpoints have."""

    renamings: tuple[Any, ...]
    converters: tuple[Any, ...]

    @staticmethod
    def of(model: Any) -> Spellings:
        """From the mapping transformers would load and save the model by; prefixes are not part of it."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter

        given = get_model_conversion_mapping(model, add_legacy=False)
        known = [entry for entry in given if not isinstance(entry, PrefixChange)][::-1]
        back = [entry.reverse_transform() for entry in known]
        pairs = tuple((entry, there) for entry, there in zip(back, known, strict=True) if _merges(there))
        assert all(isinstance(there, WeightConverter) for _, there in pairs)
        return Spellings(tuple(entry for entry, there in zip(back, known, strict=True) if not _merges(there)), pairs)

    def rule(self, key: str, shapes: Mapping[str, Sequence[int]]) -> WeightRule:
        """The rule for the tensor `key` of the model; shapes: of every tensor of it. Raises CompileError for a
        conversion that is no rearrangement.
        """
        own = Source((key,))
        for back, there in self.converters:
            found, matched = back.rename_source_key(key)
            if matched is None:
                continue
            first = back.target_patterns[0]
            head, _, tail = found.partition(first)
            names = [f"{head}{pattern}{tail}" for pattern in back.target_patterns]
            part = list(back.source_patterns).index(matched)
            beside = [shapes.get(key.replace(matched, pattern), ()) for pattern in back.source_patterns]
            other = _merged([self._renamed(name) for name in names], there.operations, beside, part, key)
            return Either((own, other))
        renamed = self._renamed(key)
        return own if renamed == key else Source((key, renamed))

    def stacks(self, keys: Sequence[str], layers_path: str) -> tuple[str, ...]:
        """What checkpoints call the stack at `layers_path` besides: where the number of a layer stands in what becomes
        of `keys`, the state dict's.
        """
        found = dict.fromkeys(
            stack
            for key in keys
            if (inner := key.removeprefix(f"{layers_path}.0.")) != key
            for stack in _differ(*(self._renamed(f"{layers_path}.{index}.{inner}") for index in (0, 1)))
        )
        return tuple(stack for stack in found if stack != layers_path)

    def _renamed(self, name: str) -> str:
        for entry in self.renamings:
            name, _ = entry.rename_source_key(name)
        return name


def checkpoint_tensors(model: Any, place: Place, spellings: Spellings) -> dict[str, tuple[str, Weight]]:
    """Every state-dict key, to the weight it is: tied keys share one entry under the first of them, the input
    embedding first. The body of a model may have been saved under the name it has below a head.
    """
    prefix = getattr(model, "base_model_prefix", "")
    below = f"{prefix}." if prefix and not hasattr(model, prefix) else ""
    state = model.state_dict(keep_vars=True)
    embedding = model.get_input_embeddings()
    shared: dict[int, list[str]] = {}
    for key, tensor in state.items():
        shared.setdefault(id(tensor), []).append(key)
    first = {id(parameter) for parameter in embedding.parameters(recurse=False)}
    embedding_path = next((path for path, module in model.named_modules() if module is embedding), "")
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    found: dict[str, tuple[str, Weight]] = {}
    for identity, keys in shared.items():
        if identity in first:
            keys.sort(key=lambda key: not key.startswith(f"{embedding_path}."))
        rules = [spellings.rule(key, shapes) for key in keys]
        if all(isinstance(rule, Source) for rule in rules):  # tied: any spelling of any of them will do
            spelled = [rule.names for rule in rules if isinstance(rule, Source)]
            rules = [Source(tuple(dict.fromkeys(name for column in zip_longest(*spelled) for name in column if name)))]

        def names_of(names: tuple[str, ...]) -> tuple[str, ...]:
            names = tuple(place.renumber(name) for name in names)
            return names + tuple(f"{below}{name}" for name in names if below)

        weight = Weight(shapes[keys[0]], renamed(rules[0], names_of))
        name = place.renumber(keys[0])
        found.update({key: (name, weight) for key in keys})
    return found


def _differ(zero: str, one: str) -> list[str]:
    """The path before the only part of two names that is 0 in one and 1 in the other."""
    parts = list(zip(zero.split("."), one.split("."), strict=False))
    at = [i for i, pair in enumerate(parts) if pair[0] != pair[1]]
    return [".".join(part for part, _ in parts[: at[0]])] if len(at) == 1 and parts[at[0]] == ("0", "1") else []


def _merges(entry: Any) -> bool:
    return hasattr(entry, "operations")


def _merged(
    names: list[str], operations: Sequence[Any], shapes: Sequence[Sequence[int]], part: int, key: str
) -> WeightRule:
    """What `operations` make of the tensors called `names`: output `part` of those of these shapes.

    A `*` in a name counts from 0 to the first size of the result.
    """
    shape = shapes[part]
    rules: list[Any] = [
        [Source((name.replace("*", str(i)),)) for i in range(shape[0])] if "*" in name else Source((name,))
        for name in names
    ]
    for operation in operations:
        match type(operation).__name__:
            case "MergeModulelist" if operation.dim == 0 and all(isinstance(rule, list) for rule in rules):
                rules = [Stack(tuple(rule)) for rule in rules]
            case "Concatenate":
                rules = [Concat(tuple(rules), operation.dim)]
            case "Chunk" if len(rules) == 1:
                size = shape[operation.dim]
                rules = [Slice(rules[0], operation.dim, part * size, (part + 1) * size)]
            case "Split" if len(rules) == 1 and all(shapes):
                start = sum(beside[operation.dim] for beside in shapes[:part])
                rules = [Slice(rules[0], operation.dim, start, start + shape[operation.dim])]
            case "Transpose" if not operation.check_dims:
                axes = list(range(len(shape)))
                axes[operation.dim0], axes[operation.dim1] = axes[operation.dim1], axes[operation.dim0]
                rules = [Permute(rule, tuple(axes)) for rule in rules]
            case name:
                raise CompileError(
                    f"transformers loads {key} by {name}, which is no rearrangement of tensors known here",
                    code="unsupported-conversion",
                    pass_name="capture",
                    where=key,
                    try_="a checkpoint in the model's own names: save_pretrained(other, save_original_format=False)",
                )
    if len(rules) != 1 or isinstance(rules[0], list):
        raise CompileError(
            f"transformers makes {key} of {len(names)} tensors that no rule joins",
            code="unsupported-conversion",
            pass_name="capture",
            where=key,
        )
    return rules[0]
