"""Decides which characters of a generated sequence are final and may be shown. Two pure state machines: token ids to
text that never ends inside a character, and text to text that never shows a stop string. Both hold back as little as
correctness allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

# A UTF-8 character has at most four bytes, so a fourth token either completes it or proves it invalid, and of the
# trailing replacement characters at most three can still turn into something else. (Byte-level decoders show one for an
# unfinished character; byte-fallback decoders show one for each of its bytes and of all bytes in a row before it.)
UNFINISHED = 3
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Only a stream of invalid bytes never reaches a character border; it is cut by force so that the cost of a token stays
# constant.
WINDOW_TOKENS = 32
KEEP_TOKENS = 8


class Detokenizer:
    """Ids one by one to text; the pieces joined equal `decode(all ids)`.

    Keeps a window of the last few ids: those of the previous final piece (decoders look one token back, for the leading
    space) and those not final yet. `decode` is the one-shot decoder (ids -> str). `hidden` tells ids that have no text
    at all (skipped special tokens, padding rows of the vocabulary): they never enter the window, where they would cut
    the context of the token after them.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], hidden: Callable[[int], bool] = lambda token: False
    ) -> None:
        self._decode = decode
        self._hidden = hidden
        self._window: list[int] = []
        self._context = 0  # tokens of the window whose text is final
        self._shown = 0  # characters of decode(window) already returned

    @property
    def pending(self) -> bool:
        """Whether ids were pushed whose text is not final yet."""
        return self._context < len(self._window)

    def push(self, token: int) -> str:
        """The text that became final with this token; often "" inside a character."""
        if self._hidden(token):
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        final = len(text.rstrip(REPLACEMENT))
        if len(self._window) - self._context > UNFINISHED:
            final = max(final, len(text) - UNFINISHED)
        piece = text[self._shown : final]
        self._shown = max(self._shown, final)
        if final == len(text):
            self._advance(len(text))
        elif len(self._window) >= WINDOW_TOKENS:
            self._cut(text)
        return piece

    def finish(self) -> str:
        """What is left when no more tokens come: the replacement characters of an unfinished character, or ""."""
        piece = self._decode(self._window)[self._shown :]
        self._window.clear()
        self._context = self._shown = 0
        return piece

    def _advance(self, length: int) -> None:
        """All text is final: the tokens of the newest piece become the context, older context goes."""
        recent = self._window[self._context :]
        shown = len(self._decode(recent)) if self._context else length
        if shown:  # a context without text would make the decoder treat the next token as the first of all
            self._window = recent
            self._shown = shown
        elif len(self._window) >= WINDOW_TOKENS:
            del self._window[1:]  # the rest has no text: the first visible token alone is the same context
            self._shown = len(self._decode(self._window))
        self._context = len(self._window)

    def _cut(self, text: str) -> None:
        for keep in range(KEEP_TOKENS, UNFINISHED, -1):
            head, tail = self._window[:-keep], self._window[-keep:]
            before = self._decode(head)
            if before + self._decode(tail) == text and len(before) <= self._shown:
                self._window = tail
                self._context = 0
                self._shown -= len(before)
                return


class StopResult(NamedTuple):
    text: str  # may be shown now
    stopped: str | None  # the stop string that was completed: nothing follows


class StopStrings:
    """Cuts text before the first stop string, whatever the pieces it arrives in.

    The match that is completed first wins, and of several completed by the same character the one that starts first:
    this is the only rule that gives the same answer for every way of cutting the text. Holds back only what may be the
    start of a match.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    @property
    def held(self) -> int:
        """Characters held back now."""
        return len(self._held)

    def push(self, piece: str) -> StopResult:
        if not self._stops or not piece:
            return StopResult(piece, None)
        text = self._held + piece
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self._held = ""
            _, at, stop = min(matches)
            return StopResult(text[:at], stop)
        keep = max(overlap(text, stop) for stop in self._stops)
        cut = len(text) - keep
        self._held = text[cut:]
        return StopResult(text[:cut], None)

    def finish(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a proper beginning of stop."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
