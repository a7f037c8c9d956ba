"""Decides how much of a call's arguments may leave while the model writes them: all that can be the beginning of a JSON
object. Nothing that was sent is taken back, so arguments that break off stay cut where they did."""

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
    """The text of an object, from its opening brace at `at` on. at: where what may leave ends. done: it is complete.
    broken: what follows is not JSON."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.done = self.broken = False
        self._stack: list[str] = []
        self._wanted: Wanted = "value"
        self._in_string = False

    def push(self, text: str, final: bool = False) -> None:
        """Goes on as far as the text goes; a number may have more digits, unless it is the final text."""
        while not (self.done or self.broken) and self.at < len(text) and self._step(text, final):
            pass

    def _step(self, text: str, final: bool) -> bool:
        if self._in_string:
            return self._string(text)
        found = OUTSIDE.match(text, self.at)
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
            self.broken = found.end() < len(text) or final or token in '{}[]:,"'
            return False
        self.at = found.end()
        return True

    def _string(self, text: str) -> bool:
        if found := INSIDE.match(text, self.at):
            self.at = found.end()
        if self.at == len(text):
            return False
        if text[self.at] == '"':
            self.at += 1
            self._in_string = False
            self._wanted = ":" if self._wanted in ("key?", "key") else ","
            return True
        self.broken = not ESCAPE.fullmatch(text, self.at)
        return False

    def _closes(self, token: str) -> bool:
        if not self._stack or self._stack[-1] != {"}": "{", "]": "["}[token]:
            return False
        return self._wanted in (",", "key?" if token == "}" else "value?")


def _is_scalar(token: str) -> bool:
    return len(token) <= MAX_DIGITS and SCALAR.fullmatch(token) is not None
