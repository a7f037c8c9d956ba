"""Decides what the messages of one answer are in the format of gpt-oss, where each has a header that names its channel
and, for a call, whom it is for: analysis is reasoning, a call of a tool is a call, all else is content."""

from __future__ import annotations

import re
from collections.abc import Set

from xllm.service.parsers import values
from xllm.service.parsers.blocks import Calls, Found
from xllm.service.parsers.growing import is_whole
from xllm.service.parsers.parts import Content, Markers, Part, Reasoning, Tools

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKERS = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
CLOSE_ANALYSIS = f"<|end|>{START}assistant{CHANNEL}final{MESSAGE}"
OPEN_CALLS = f"{CHANNEL}commentary{MESSAGE}"
HEADER_CHARS = 512  # more is no header, whatever it is
TOOL = re.compile(r"to=(?:functions\.)?([\w.-]+)", re.ASCII)
ANALYSIS = re.compile(r"<\|channel\|>\s*analysis")
# What stands before the markers of a header: a role, or whom it is for. All else there is text.
LEAD = re.compile(r"(?:assistant)?\s*(?:to=\S*)?\s*")
# A header that the end of the text cut off: it says nothing.
HEADER = re.compile(rf"(?:{re.escape(START)}\w*)?(?:\s*to=\S*)?(?:{re.escape(CHANNEL)}\w*)?\s*(?:to=\S*)?\s*")


class Harmony:
    """All three kinds of parts at once. eager: tools whose arguments leave as they are written."""

    def __init__(self, tools: Tools, one: bool, begun: bool = False, eager: Set[str] = frozenset()) -> None:
        self._tools, self._eager, self._calls = tools, eager, Calls(one)
        self._marks, self._body_ends = Markers(MARKERS), Markers((*ENDS, START, CHANNEL))
        self._text = ""  # not decided on, from `_at` on
        self._at = 0
        self._tool = ""  # that this message calls
        self._call: list[str] = []  # its body so far
        self._waits = False  # for the brace of arguments that may leave
        self._head = 0  # white space before it
        self._state = (
            "content" if begun else "header"
        )  # or what the body of this message is: "content", "reasoning", "call"

    @property
    def thinking(self) -> bool:
        return self._state == "reasoning"

    @property
    def ended(self) -> bool:
        return self._calls.ended

    @property
    def cut(self) -> bool:
        return self._calls.cut

    def push(self, text: str) -> list[Part]:
        self._text, self._at = self._text + text, 0
        parts: list[Part] = []
        while not self.ended and (self._header(parts) if self._state == "header" else self._body(parts)):
            pass
        self._text = "" if self.ended else self._text[self._at :]
        return parts

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        text, self._text = self._text, ""
        if self.ended:
            return parts
        if self._state == "header":
            if not HEADER.fullmatch(text):
                self._show("content", self._marks.remove(text), parts)
        elif self._state == "call":
            end = len(text) - self._body_ends.unfinished(text)
            self._keep(text[:end], parts)
            self._end(parts, text[end:])
        else:
            self._show(self._state, text, parts)
        return parts

    def _header(self, parts: list[Part]) -> bool:
        most = self._at + HEADER_CHARS
        end = self._text.find(MESSAGE, self._at, most + len(MESSAGE))
        if end < 0:
            if len(self._text) < most + len(MESSAGE):
                return False
            most -= self._marks.unfinished(self._text[self._at : most])
            self._show("content", self._marks.remove(self._text[self._at : most]), parts)
            self._state, self._at = "content", most
            return True
        header, self._at = self._text[self._at : end], end + len(MESSAGE)
        marker = self._marks.find(header, 0)
        lead = header[: marker.start()] if marker else header
        if not LEAD.fullmatch(lead):
            self._show("content", lead, parts)
        tool = TOOL.search(header)
        self._tool = tool[1] if tool and tool[1] in self._tools else ""
        self._call, self._waits, self._head = [], self._tool in self._eager, 0
        self._state = "call" if self._tool else "reasoning" if ANALYSIS.search(header) and not tool else "content"
        return True

    def _body(self, parts: list[Part]) -> bool:
        text, begin = self._text, self._at
        marks = self._body_ends if self._state == "call" else self._marks
        marker = marks.find(text, begin)
        end = marker.start() if marker else len(text) - marks.unfinished(text[begin:])
        if marker and marker[0] in (MESSAGE, CONSTRAIN):  # they mean nothing here
            self._show(self._state, text[begin:end], parts)
            self._at = marker.end()
            return True
        # What begins a message belongs to its header.
        self._at = marker.end() if marker and marker[0] in ENDS else end
        if self._state == "call":
            self._keep(text[begin:end], parts)
            if marker:
                self._end(parts)
        else:
            self._show(self._state, text[begin:end], parts)
        if marker:
            self._state = "header"
        return marker is not None

    def _keep(self, piece: str, parts: list[Part]) -> None:
        """The next piece of a call."""
        self._call.append(piece)
        if self._waits:
            begin = piece.lstrip()
            self._head += len(piece) - len(begin)
            self._waits, piece = not begin, begin
            if begin[:1] == "{":
                parts += self._calls.begin(Found(self._tool, ""))
        parts += self._calls.grow(piece)

    def _end(self, parts: list[Part], unfinished: str = "") -> None:
        """All of a call is there; behind it what may be the beginning of a marker."""
        body = "".join(self._call)
        parts += self._calls.grow("", final=True)
        if (sent := self._calls.end()) is not None:
            if not self._calls.ended and (rest := body[self._head + sent :]).strip():
                self._show("content", rest, parts)
        elif values.is_object(body) and is_whole(body.strip()):
            parts += self._calls.take(Found(self._tool, body.strip()))
        else:
            self._show("content", body + unfinished, parts)

    def _show(self, state: str, text: str, parts: list[Part]) -> None:
        if text:
            parts.append(Reasoning(text) if state == "reasoning" else Content(text))
