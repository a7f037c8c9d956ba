"""Which torch operators an artifact can call: those that make values from values."""

import pytest

from xllm.artifact import ArtifactError
from xllm.targets.fallback import find_operator


@pytest.mark.parametrize("name", ["aten.add.Tensor", "aten.silu.default", "aten.silu", "xllm.rms_norm"])
def test_operators_are_found_by_name(name: str) -> None:
    assert callable(find_operator(name))


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default", "aten.add_.Tensor", "aten.add.out", "aten.copy_.default", "aten.set_.source_Storage",
        "aten._unsafe_index.Tensor", "aten.no_such_thing.default", "prim.device.default", "torch.load",
        "aten.segment_reduce.default", "aten.manual_seed.default", "aten._print.default", "aten.empty.memory_format",
        "aten.native_batch_norm.default", "aten.rand.default", "aten.save.default", "aten.dropout.default",
        "aten.__class__", "aten.add.__call__", "xllm.kv_write",
    ],
)  # fmt: skip
def test_everything_else_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError) as refused:
        find_operator(name)
    assert refused.value.code == "unknown-operator"
