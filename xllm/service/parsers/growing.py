"""Decides what arguments of calls are: JSON objects that clients can read; and how much of them may leave while the
model writes them, where a tool asks for that: all that can be the beginning of one. Nothing that was sent is taken
back, so arguments that break off stay cut where they did."""

from __future__ import annotations

import re
from typing import Literal

SPACE = " \t\r\n"  # of JSON, which has less of it than Python
OUTSIDE = re.compile(r'[ \t\r\n]+|[{}\[\]:,"]|[^ \t\r\n{}\[\]:,"]+')
INSIDE = re.compile(r'(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))+')
ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")  # one that is not whole yet
SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
MAX_DEPTH = 64  # what a client's parser takes, as the depth of our own bodies
MAX_DIGITS = 400
# What may come: a key, or the end of an object that has none; a key; a colon; a value, or the end; a value; the next.
Wanted = Literal["key?", "key", ":", "value?", "value", ","]


class Arguments:
    """The text of an object, from its opening brace on, as it comes. taken: characters that may leave. done: it is
    complete. broken: what follows is not JSON."""

    def __init__(self) -> None:
        self.taken = 0
        self.done = self.broken = False
        self._held = ""  # an escape or a word that is not whole yet: at most MAX_DIGITS of it
        self._at = 0  # in the text of this push
        self._stack: list[str] = []
        self._wanted: Wanted = "value"
        self._in_string = False

    def push(self, text: str, final: bool = False) -> str:
        """What may leave now. A number may have more digits, unless nothing follows."""
        if self.done or self.broken:
            return ""
        text, self._at = self._held + text, 0
        while not (self.done or self.broken) and self._at < len(text) and self._step(text, final):
            pass
        self._held = text[self._at :]
        self.taken += self._at
        return text[: self._at]

    def _step(self, text: str, final: bool) -> bool:
        if self._in_string:
            return self._string(text)
        found = OUTSIDE.match(text, self._at)
        assert found is not None
        token = found[0]
        if token[0] in SPACE:
            pass
        elif token == '"' and self._wanted in ("key?", "key", "value?", "value"):
            self._in_string = True
        elif token in "{[" and self._wanted in ("value?", "value") and len(self._stack) < MAX_DEPTH:
            self._stack.append(token)
            self._wanted = "key?" if token == "{" else "value?"
        elif token in "}]" and self._closes(token):
            self._stack.pop()
            self.done, self._wanted = not self._stack, ","
        elif token == ":" and self._wanted == ":":
            self._wanted = "value"
        elif token == "," and self._wanted == "," and self._stack:
            self._wanted = "key" if self._stack[-1] == "{" else "value"
        elif self._wanted in ("value?", "value") and self._stack and _is_scalar(token):
            if found.end() == len(text) and not final:
                return False
            self._wanted = ","
        else:
            self.broken = found.end() < len(text) or final or token in '{}[]:,"' or len(token) > MAX_DIGITS
            return False
        self._at = found.end()
        return True

    def _string(self, text: str) -> bool:
        if found := INSIDE.match(text, self._at):
            self._at = found.end()
        if self._at == len(text):
            return False
        if text[self._at] == '"':
            self._at += 1
            self._in_string = False
            self._wanted = ":" if self._wanted in ("key?", "key") else ","
            return True
        self.broken = not ESCAPE.fullmatch(text, self._at)
        return False

    def _closes(self, token: str) -> bool:
        if not self._stack or self._stack[-1] != {"}": "{", "]": "["}[token]:
            return False
        return self._wanted in (",", "key?" if token == "}" else "value?")


def is_whole(text: str) -> bool:
    """Whether a text is the arguments of a call, and nothing but that."""
    arguments = Arguments()
    return arguments.push(text, final=True) == text and arguments.done


def _is_scalar(token: str) -> bool:
    return len(token) <= MAX_DIGITS and SCALAR.fullmatch(token) is not None
