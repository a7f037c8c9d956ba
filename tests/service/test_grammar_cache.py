"""What compiled grammars may take in memory."""

from __future__ import annotations

import pytest

from tests.service.fakes import EOS, VOCAB, byte_tokenizer
from xllm.service import grammar
from xllm.service.forms import Form
from xllm.service.grammar import Grammars
from xllm.service.tokenizer import TextCodec


@pytest.mark.parametrize("large", [False, True])
def test_the_grammars_used_last_stay_within_their_bytes(monkeypatch, large):
    monkeypatch.setattr(grammar, "MAX_CACHED_BYTES", 1 << 20)
    grammars = Grammars(TextCodec(byte_tokenizer()), VOCAB, (EOS,))
    words = ["".join(f"{at}x{k}" for k in range(1000 if large else 1)) for at in range(9)]
    made = [grammars.compile(Form("choice", [word], "choice")) for word in words]
    assert 0 < grammars.cached_bytes <= 1 << 20
    assert grammars.compile(Form("choice", [words[-1]], "choice")) is made[-1]
    assert grammars.compile(Form("choice", [words[0]], "choice")) is not made[0], "the one that was not used longest"
    assert grammars.cached_bytes <= 1 << 20
