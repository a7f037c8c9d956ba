"""Training goes on where it was stopped."""

from pathlib import Path

import torch

from xllm.embedded.muon import Muon
from xllm.embedded.train import load_state, new_model, save_state


def run() -> tuple:
    torch.manual_seed(0)
    model = new_model(64, 1, 2)
    muon = Muon([p for p in model.model.layers.parameters() if p.dim() == 2])
    adam = torch.optim.AdamW([model.model.embed_tokens.weight], lr=1e-2)
    return model, adam, muon


def advance(model, adam, muon, steps: int) -> None:
    for step in range(steps):
        ids = torch.arange(8)[None] + step
        model(input_ids=ids, labels=ids).loss.backward()
        adam.step()
        muon.step(1e-2)
        model.zero_grad(set_to_none=True)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, adam, muon = run()
    advance(model, adam, muon, 2)
    save_state(tmp_path / "state.safetensors", model, adam, muon, 2)
    advance(model, adam, muon, 2)
    again, adam_again, muon_again = run()
    assert load_state(tmp_path / "state.safetensors", again, adam_again, muon_again) == 2
    advance(again, adam_again, muon_again, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
