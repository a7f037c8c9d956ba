"""Decides what text a token has: wraps the `tokenizers` library (text to ids, ids to text) and knows the exact bytes of
one token, which clients need for logprobs of tokens that are only a part of a character."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from os import PathLike, fspath

import tokenizers

from xllm.service.errors import invalid
from xllm.service.text import Detokenizer

REMEMBERED_TOKENS = 1 << 14  # whose text and bytes are looked up once; logprobs ask for the same ones over and over
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextCodec:
    """Text to ids and back for one model. Thread-safe: the wrapped tokenizer is never changed after construction."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_padding()  # settings of a training run that some tokenizer files carry
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, facts in added.items() if facts.special)
        self._added = {token: facts.content for token, facts in added.items()}
        self._byte_level = _has_decoder(tokenizer, "ByteLevel")
        self._token = lru_cache(REMEMBERED_TOKENS)(self._look_up)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> TextCodec:
        """Reads a tokenizer.json. Raises ValueError with a sentence when it can't be used."""
        with _refusing():
            return cls(tokenizers.Tokenizer.from_file(fspath(path)))

    @classmethod
    def from_bytes(cls, data: bytes) -> TextCodec:
        """As `from_file`, of contents that were read already."""
        with _refusing():
            return cls(tokenizers.Tokenizer.from_buffer(data))

    @classmethod
    def from_artifact(cls, data: bytes | None, where: PathLike[str]) -> TextCodec:
        """The codec of an artifact at `where`. Raises ValueError when it has no tokenizer, or none that can be used."""
        if data is None:
            raise ValueError(
                f"{fspath(where)} has no tokenizer: its checkpoint had no tokenizer.json, and text needs one"
            )
        return cls.from_bytes(data)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Raises ApiError for a text that the tokenizer has no tokens for."""
        return self._encoding(text, None, add_special_tokens).ids

    def encode_pair(self, text: str, other: str, stride: int = 0) -> list[int]:
        """Both texts as one sequence, joined by the special tokens the tokenizer puts between them; `stride` is added
        to the ids of the second.
        """
        return self.encode_within(None, text, other, stride)

    def encode_within(
        self, limit: int | None, text: str, other: str | None = None, stride: int = 0, add_special_tokens: bool = True
    ) -> list[int]:
        """As `encode`, or `encode_pair`, less the last tokens of the last text where there are more than `limit` in
        all. Raises ValueError when none of that text would be left."""
        found = self._encoding(text, other, add_special_tokens)
        ids = [token + stride * segment for token, segment in zip(found.ids, found.type_ids, strict=True)]
        excess = len(ids) - limit if limit is not None else 0
        if excess <= 0:
            return ids
        last = [at for at, sequence in enumerate(found.sequence_ids) if sequence == (other is not None)]
        if excess >= len(last):
            raise ValueError(f"{len(ids) - len(last)} of the tokens are not of the text that may be cut")
        cut = set(last[-excess:])
        return [token for at, token in enumerate(ids) if at not in cut]

    def _encoding(self, text: str, other: str | None, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            with _refusing("the text has no tokens under this tokenizer"):
                # A batch of one: unlike `encode`, it lets other threads run meanwhile.
                given = text if other is None else (text, other)
                return self._tokenizer.encode_batch([given], add_special_tokens=add_special_tokens)[0]
        except ValueError as error:
            raise invalid("untokenizable_text", str(error)) from None

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, skip_special_tokens: bool, shown: Sequence[str] = ()) -> Detokenizer:
        """`shown`: texts of special tokens that are not skipped, whatever is said."""
        kept = [token for token in self._special if self._added[token] in shown]
        if skip_special_tokens and not kept:
            return Detokenizer(self._tokenizer.decode, self._textless)
        hidden = (lambda token: self._textless(token) and token not in kept) if skip_special_tokens else self._unknown
        return Detokenizer(lambda tokens: self._tokenizer.decode(tokens, skip_special_tokens=False), hidden)

    def _unknown(self, token: int) -> bool:
        """Models pad the vocabulary, and a sampler may draw a padding row."""
        return self._tokenizer.id_to_token(token) is None

    def _textless(self, token: int) -> bool:
        return token in self._special or self._unknown(token)

    def vocabulary(self, size: int) -> list[bytes]:
        """The bytes of every token below `size`; none for rows that pad the vocabulary."""
        return [self._bytes_of(token) for token in range(size)]

    @property
    def special_ids(self) -> list[int]:
        return sorted(self._special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; joined over an answer they are its text in UTF-8 (up to a leading space some models
        drop)."""
        return self._token(token)[0]

    def token_text(self, token: int) -> str:
        """The token as text on its own; a part of a character shows as `bytes:\\xe4\\xbd`, as OpenAI's does."""
        return self._token(token)[1]

    def _look_up(self, token: int) -> tuple[bytes, str]:
        data = self._bytes_of(token)
        if not data:
            return data, f"token_id:{token}"  # rows that pad the vocabulary have no text, but must be told apart
        try:
            return data, data.decode()
        except UnicodeDecodeError:
            return data, "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes_of(self, token: int) -> bytes:
        if (content := self._added.get(token)) is not None:
            return content.encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            table = _byte_of_character()
            return b"".join(bytes((table[char],)) if char in table else char.encode() for char in piece)
        if match := BYTE_TOKEN.fullmatch(piece):
            return bytes((int(match[1], 16),))
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


@contextmanager
def _refusing(what: str = "tokenizer.json can't be read") -> Iterator[None]:
    """Whatever the library raises as a ValueError: bare Exception, and for some a panic, which is none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {error}") from None


def _has_decoder(tokenizer: tokenizers.Tokenizer, kind: str) -> bool:
    if tokenizer.decoder is None:
        return False
    facts = json.loads(tokenizer.decoder.__getstate__())
    return any(part.get("type") == kind for part in [facts, *facts.get("decoders", [])])


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The byte each printable stand-in of a byte-level vocabulary means (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    table = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}
