"""The walk over layers: short, and every layer is stood for by one that has the same kind and the same neighbours."""

from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.frontend.layers import choose_walk


def _contexts(kinds: list[str]) -> list[tuple[str, ...]]:
    padded = ["^", *kinds, "$"]
    return [tuple(padded[i : i + 3]) for i in range(len(kinds))]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=24))
def test_every_layer_is_stood_for_in_its_context(kinds: list[str]) -> None:
    walk = choose_walk(kinds)
    contexts = _contexts(kinds)
    assert sorted(real for source in walk.sources for real in source.stands_for) == list(range(len(kinds)))
    for source in walk.sources:
        assert {contexts[real] for real in source.stands_for} <= {contexts[walk.layers[source.index]]}
    assert _contexts([kinds[i] for i in walk.layers]) == [contexts[i] for i in walk.layers]


def test_equal_layers_need_three() -> None:
    assert choose_walk(["a"] * 64).layers == (0, 1, 63)


def test_alternating_layers_need_four() -> None:
    assert choose_walk(["a", "b"] * 20).layers == (0, 1, 38, 39)


def test_dense_layers_before_expert_layers() -> None:
    assert choose_walk([*"dd", *"e" * 30]).layers == (0, 1, 2, 3, 31)
