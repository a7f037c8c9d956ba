"""Decides what the messages of one answer are in the format of gpt-oss, where each has a header that names its channel
and, for a call, whom it is for: analysis is reasoning, a call of a tool is a call, all else is content."""

from __future__ import annotations

import re

from xllm.service.parsers import values
from xllm.service.parsers.blocks import Calls, Found
from xllm.service.parsers.parts import Content, Markers, Part, Reasoning, Tools

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKERS = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
CLOSE_ANALYSIS = f"<|end|>{START}assistant{CHANNEL}final{MESSAGE}"
OPEN_CALLS = f"{CHANNEL}commentary{MESSAGE}"
HEADER_CHARS = 512  # more is no header, whatever it is
TOOL = re.compile(r"to=(?:functions\.)?([\w.-]+)", re.ASCII)
ANALYSIS = re.compile(r"<\|channel\|>\s*analysis")
# A header that the end of the text cut off: it says nothing.
HEADER = re.compile(rf"(?:{re.escape(START)}\w*)?(?:\s*to=\S*)?(?:{re.escape(CHANNEL)}\w*)?\s*(?:to=\S*)?\s*")


class Harmony:
    """All three kinds of parts at once."""

    def __init__(self, tools: Tools, one: bool, begun: bool = False) -> None:
        self._tools, self._calls = tools, Calls(one)
        self._marks, self._body_ends = Markers(MARKERS), Markers((*ENDS, START, CHANNEL))
        self._text = ""  # not decided on; of a call all of its body
        self._scanned = 0  # characters of a call without a marker
        self._tool: str | None = None
        self._begun = False  # whether its call has begun to leave
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
        self._text += text
        parts: list[Part] = []
        while not self.ended and (self._header(parts) if self._state == "header" else self._body(parts)):
            pass
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
            self._call(text[: len(text) - self._body_ends.unfinished(text)], parts)
        else:
            self._show(self._state, text, parts)
        return parts

    def _header(self, parts: list[Part]) -> bool:
        end = self._text.find(MESSAGE, 0, HEADER_CHARS + len(MESSAGE))
        if end < 0:
            if len(self._text) < HEADER_CHARS + len(MESSAGE):
                return False
            self._show("content", self._marks.remove(self._text[:HEADER_CHARS]), parts)
            self._state, self._text = "content", self._text[HEADER_CHARS:]
            return True
        header, self._text = self._text[:end], self._text[end + len(MESSAGE) :]
        tool = TOOL.search(header)
        self._tool = tool[1] if tool and tool[1] in self._tools else None
        self._state = "call" if self._tool else "reasoning" if ANALYSIS.search(header) and not tool else "content"
        return True

    def _body(self, parts: list[Part]) -> bool:
        marker = self._body_ends.find(self._text, self._scanned)
        end = marker.start() if marker else len(self._text) - self._body_ends.unfinished(self._text)
        if self._state == "call":
            self._scanned = 0 if marker else end
            self._grow(self._text[:end], parts)
            if marker is None:
                return False
            self._call(self._text[:end], parts)
        else:
            self._show(self._state, self._text[:end], parts)
        # What begins a message belongs to its header.
        self._text = self._text[marker.end() if marker and marker[0] in ENDS else end :]
        if marker:
            self._state = "header"
        return marker is not None

    def _grow(self, body: str, parts: list[Part]) -> None:
        if self._tool and not self._begun and body.lstrip()[:1] == "{":
            self._begun = True
            parts += self._calls.begin(Found(self._tool, ""), values.skip(body, 0))
        parts += self._calls.grow(body)

    def _call(self, body: str, parts: list[Part]) -> None:
        self._grow(body, parts)
        parts += self._calls.grow(body, final=True)
        self._begun = False
        if (sent := self._calls.end()) is not None:
            if not self._calls.ended and body[sent:].strip():
                self._show("content", body[sent:], parts)
        elif self._tool and values.is_object(body):
            parts += self._calls.take(Found(self._tool, body.strip()))
        else:
            self._show("content", body, parts)

    def _show(self, state: str, text: str, parts: list[Part]) -> None:
        if text:
            parts.append(Reasoning(text) if state == "reasoning" else Content(text))
