"""What the gate of experts computes is found by probing it, also far outside the numbers weights make likely."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from xllm.errors import CompileError
from xllm.frontend.experts import Form, _form


class Clamped(nn.Module):
    """silu(gate) * up, both cut off at a limit."""

    has_gate = True

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def _apply_gate(self, value: Tensor) -> Tensor:
        gate, up = value.chunk(2, dim=-1)
        return nn.functional.silu(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


@pytest.mark.parametrize("limit", [7.0, 100.0, 3000.0])
def test_a_limit_is_seen_however_far(limit: float) -> None:
    assert _form(Clamped(limit), "mlp.experts") == Form("silu", limit=limit)


def test_a_limit_that_is_not_symmetric_is_refused() -> None:
    class OneSided(Clamped):
        def _apply_gate(self, value: Tensor) -> Tensor:
            gate, up = value.chunk(2, dim=-1)
            return nn.functional.silu(gate) * torch.clamp(up, max=self.limit)

    with pytest.raises(CompileError, match="none of the dialect's"):
        _form(OneSided(100.0), "mlp.experts")
