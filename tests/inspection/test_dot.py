"""`xllm show --dot`: layers alike are drawn once, edges carry shapes, and the text is Graphviz whatever the names."""

from __future__ import annotations

import re

import pytest

from tests.passes.zoo import captured, planned, rewritten
from xllm.artifact import ArtifactError
from xllm.cli import main
from xllm.inspection.dot import Arrow, Box, drawn, of_program


def test_a_program_is_drawn_with_one_of_its_equal_layers() -> None:
    text = of_program(rewritten("qwen3")[0][-1])
    assert text.count("subgraph cluster_") == 2  # the first layer reads the embedding, the others the layer before
    assert '"2 layers alike: 1..2"' in text
    assert "xllm.qk_norm_rope_write" in text and "f32[T, 32]" in text
    assert "style=dashed" in text
    names = set(re.findall(r'^ *"(\w+)" \[label', text, re.M))
    assert {name for pair in re.findall(r'"(\w+)" -> "(\w+)"', text) for name in pair} <= names


def test_a_layer_alone() -> None:
    text = of_program(captured("qwen3"), layer=0)
    assert text.count("subgraph") == 1 and "lm_head" not in text
    assert of_program(planned("qwen3")[0], layer=2).count("subgraph") == 1
    with pytest.raises(ArtifactError, match="no layer 9; there are 3 from 0"):
        of_program(rewritten("qwen3")[0][-1], layer=9)
    assert main(["show", "any.xllm", "--dot", "--unfold"]) == 2


def test_names_are_quoted_and_streams_have_colours() -> None:
    boxes = [Box('a"b', ("x\\y", "two\nlines"), None, "compute", "a"), Box("c", ("c",), None, "host", "c")]
    text = drawn('m"', boxes, [Arrow('a"b', "c", "f32[T]")])
    assert '"a\\"b" -> "c" [label="f32[T]"]' in text
    assert 'label="x\\\\y\\ntwo\\nlines"' in text
    assert len(set(re.findall(r'fillcolor="(#\w+)"', text))) == 2
