"""Detokenisation equals one-shot decoding whatever the tokens; stop strings are found whatever the pieces."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from tests.service.fakes import TOKENIZER, ids
from xllm.service.text import REPLACEMENT, WINDOW_TOKENS, Detokenizer, StopStrings
from xllm.service.tokenizer import TextCodec

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=60)
TEXTS = TEXTS.filter(lambda text: "<|" not in text)  # what spells a special token has no text
PIECES = ["▁", "▁the", "▁cat", "s", "▁sat", "<s>", "</s>", "é", "▁日本", ",", "."]


def sentencepiece_tokenizer(decoder: str) -> Tokenizer:
    vocab = {piece: index for index, piece in enumerate([*PIECES, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend("▁")
    if decoder == "metaspace":
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    else:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


LLAMA = sentencepiece_tokenizer("strip")
METASPACE = sentencepiece_tokenizer("metaspace")


def pieces_of(tokenizer: Tokenizer, tokens: list[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = TextCodec(tokenizer).detokenizer(skip_special_tokens)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


@given(TEXTS)
def test_behaviour_53_text_in_bytes_comes_back_without_half_characters(text):
    pieces = pieces_of(TOKENIZER, ids(text))
    assert "".join(pieces) == text
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in pieces)


@given(st.lists(st.integers(0, 299), max_size=120))
@example([127] * 200)
def test_any_bytes_equal_one_shot_decoding(tokens):
    for skip in (True, False):
        assert "".join(pieces_of(TOKENIZER, tokens, skip)) == TOKENIZER.decode(tokens, skip_special_tokens=skip)


@pytest.mark.parametrize("tokenizer", [LLAMA, METASPACE])
@given(st.data())
def test_sentencepiece_with_byte_fallback_equals_one_shot_decoding(tokenizer, data):
    """Bytes come as whole characters here: a decoder with byte fallback takes back valid characters of an invalid
    run."""
    tokens: list[int] = []
    for part in data.draw(st.lists(st.one_of(st.sampled_from(PIECES), st.sampled_from("é日😀")), max_size=30)):
        if part in PIECES:
            tokens.append(PIECES.index(part))
        else:
            tokens.extend(len(PIECES) + byte for byte in part.encode())
    pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_leaves_with_its_last_byte_and_not_before():
    assert pieces_of(TOKENIZER, ids("a😀b")) == ["a", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_leaves_at_the_end():
    assert pieces_of(TOKENIZER, ids("a😀")[:-1]) == ["a", "", "", "", REPLACEMENT]


def test_a_special_token_does_not_eat_the_space_after_it():
    tokens = [PIECES.index(piece) for piece in ("▁the", "</s>", "▁cat")]
    assert "".join(pieces_of(LLAMA, tokens)) == "the cat"


@pytest.mark.parametrize("token", [127, 40])  # a stray continuation byte for ever, and plain text
def test_the_work_per_token_is_bounded(token):
    longest = 0

    def decode(tokens):
        nonlocal longest
        longest = max(longest, len(tokens))
        return TOKENIZER.decode(tokens)

    detokenizer = Detokenizer(decode)
    for _ in range(500):
        detokenizer.push(token)
    assert longest <= WINDOW_TOKENS


def one_shot(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the first match completed while reading character by character."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4), st.data())
def test_stop_strings_do_not_depend_on_the_cuts(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    matcher = StopStrings(stops)
    shown, stopped = "", False
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        result = matcher.push(text[begin:end])
        shown += result.text
        assert one_shot(text, stops)[0].startswith(shown), "stop text leaked"
        if result.stopped:
            stopped = True
            break
    if not stopped:
        shown += matcher.finish()
    assert (shown, stopped) == one_shot(text, stops)


def test_only_a_possible_start_of_a_stop_string_is_held_back():
    matcher = StopStrings(["</end>"])
    assert [matcher.push(piece).text for piece in ("a<", "b</", "en", "x")] == ["a", "<b", "", "</enx"]
    assert matcher.held == 0


def test_token_bytes_and_text():
    codec = TextCodec(TOKENIZER)
    tokens = ids("é<|end|>")
    assert b"".join(map(codec.token_bytes, tokens)) == "é<|end|>".encode()
    assert [codec.token_text(token) for token in tokens] == ["bytes:\\xc3", "bytes:\\xa9", "<|end|>"]
    assert codec.token_bytes(400) == b""
    llama = TextCodec(LLAMA)
    assert llama.token_bytes(PIECES.index("▁the")) == b" the"
    assert llama.token_bytes(len(PIECES) + 0xE9) == b"\xe9"


def test_every_byte_has_a_token():
    codec = TextCodec(TOKENIZER)
    data = bytes(range(256))
    assert sorted(b"".join(codec.token_bytes(token) for token in range(256))) == sorted(data)


def test_behaviour_38_the_ends_come_once_and_settings_of_a_training_run_are_left_out():
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 256), ("<|end|>", 257)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32)
    codec = TextCodec.from_bytes(tokenizer.to_str().encode())
    text = ids("more than four")
    assert codec.encode("more than four", True) == [256, *text, 257]
    assert codec.encode("more than four", False) == text
    assert codec.encode("<|start|>more than four", False) == [256, *text]
