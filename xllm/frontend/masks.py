"""What a model asks of attention by its mask: transformers' mask functions, told apart by what they are made of.

A mask that is not plain travels to the attention call as a `Mask`, where the operator's window and direction come from
it: many models name the window nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Mask:
    """window as the operators have it, 0 for none; unknown: the part of the mask that no option of theirs expresses. A
    mask without either is plain.
    """

    window: int
    causal: bool
    unknown: str = ""

    def __getitem__(self, parts: Any) -> Mask:
        """Some models cut a mask to the tokens they go on with: all of them, or what no option expresses."""
        cuts = parts if isinstance(parts, tuple) else (parts,)
        whole = all(isinstance(cut, slice) and not cut.start and (cut.stop, cut.step) == (None, None) for cut in cuts)
        return self if whole else replace(self, unknown="a cut")


def read_mask(*args: Any, mask_function: Callable[..., Any] | None = None, **kwargs: Any) -> Mask:
    """What a mask asks for, from the arguments of transformers' mask interface."""
    parts = list(_parts(mask_function)) if mask_function is not None else []
    known = {name: held for name, held in parts if name in _KNOWN}
    unknown = next((name for name, _ in parts if name not in _KNOWN), "")
    window = 0
    if "sliding_window_overlay" in known:
        window = int(known["sliding_window_overlay"]["sliding_window"])
    elif "sliding_window_bidirectional_overlay" in known:  # its window counts the last position it reaches
        window = int(known["sliding_window_bidirectional_overlay"]["sliding_window"]) + 1
    return Mask(window, "causal_mask_function" in known or mask_function is None, unknown)


_KNOWN = frozenset(
    {
        "causal_mask_function",
        "bidirectional_mask_function",
        "sliding_window_overlay",
        "sliding_window_bidirectional_overlay",
    }
)


def _parts(function: Callable[..., Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The functions whose intersection a mask is, each by the name it was made under, with what it holds on to.

    Those that keep packed sequences apart are left out: the operators do so by slots.
    """
    name = getattr(function, "__qualname__", type(function).__name__).partition(".")[0]
    code = getattr(function, "__code__", None)
    cells: tuple[Any, ...] = getattr(function, "__closure__", None) or ()
    held = {key: cell.cell_contents for key, cell in zip(code.co_freevars, cells, strict=True)} if code else {}
    if name == "and_masks":
        for part in held["mask_functions"]:
            yield from _parts(part)
    elif name == "remap_positions_for_packed_sequence":
        yield from _parts(held["mask_function"])
    elif name != "packed_sequence_mask_function":
        yield name, held
