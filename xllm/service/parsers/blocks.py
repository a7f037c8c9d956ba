"""Decides where calls begin and end in a text. A call leaves when it is known to be one, so that nothing that was sent
is ever taken back: where its form shows that, with its name and the beginning of its arguments, which leave as they are
written; or else when it is complete. A block that is no call is content, as are its characters."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from xllm.service.parsers.growing import Arguments
from xllm.service.parsers.parts import Call, Content, Markers, More, Part, Tools, Trimmed

STRING_STOPS = re.compile(r'["\\\n]')  # JSON has no raw line end in a string: one that meets it was never closed


@dataclass(frozen=True)
class Found:
    """What the body of a block calls. id: the model's own, if it has one."""

    name: str
    arguments: str
    id: str | None = None


# The calls of a body and the text after them; None for a body that is no call.
Body = Callable[[str, Tools], tuple[list[Found], str] | None]


@dataclass(frozen=True)
class Shape:
    """How a family of models writes calls. A block goes from `open` to `close`, to the next marker, or to the end of
    the text. sections: markers around blocks, which mean nothing. inner: markers inside of bodies. bare: characters
    that open a block without a marker, at the very beginning of an answer. quoted: bodies are JSON, where a marker in
    a string is not one. heads: how a body begins whose arguments follow as they are, with the name."""

    open: str
    close: str
    body: Body
    sections: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    bare: str = ""
    quoted: bool = True
    heads: tuple[re.Pattern[str], ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.open, self.close, *self.sections)))


class Calls:
    """The calls of one answer: numbered, each with an id of its own."""

    def __init__(self, one: bool) -> None:
        self._one = one  # parallel calls are not wanted
        self._ids: set[str] = set()
        self.cut = False  # one of them broke off
        self._growing: Arguments | None = None  # of the last call, in the text that `grow` is given

    @property
    def ended(self) -> bool:
        return self._one and bool(self._ids) and not self.grows

    @property
    def grows(self) -> bool:
        """Whether arguments leave as they come."""
        return self._growing is not None and not (self._growing.done or self._growing.broken)

    def begin(self, found: Found, at: int) -> list[Part]:
        """A call whose arguments begin at a place of the text."""
        if self.ended:
            return []
        self._growing = Arguments(at)
        return self.take(found)

    def grow(self, text: str, final: bool = False) -> list[Part]:
        """What may leave of the arguments, of all of the text so far."""
        if self._growing is None:
            return []
        before = self._growing.at
        self._growing.push(text, final)
        self.cut |= self._growing.broken  # at once: where one call is all there may be, nobody comes to its end
        more = text[before : self._growing.at]
        return [More(len(self._ids) - 1, more)] if more else []

    def end(self) -> int | None:
        """Where the arguments of the call that grew in this text ended; None where none did."""
        growing, self._growing = self._growing, None
        self.cut |= growing is not None and not growing.done
        return growing and growing.at

    def take(self, found: Found) -> list[Part]:
        if self.ended:
            return []
        name = found.id if found.id and found.id not in self._ids else f"call_{uuid.uuid4().hex[:24]}"
        self._ids.add(name)
        return [Call(len(self._ids) - 1, name, found.name, found.arguments)]


class Blocks:
    """Content and calls. Content leaves as it comes, less white space that may stand before a marker."""

    thinking = False

    def __init__(self, shape: Shape, tools: Tools, one: bool, begun: bool = False) -> None:
        self._shape, self._tools = shape, tools
        self._markers = Markers(shape.markers)
        self._calls = Calls(one)
        self._text = ""  # not decided on; inside of a block all of its body
        self._shown = Trimmed()
        self._begun = begun or not shape.bare  # whether it is known if the answer begins with a call
        self._inside = False
        self._headed = False  # whether the body's call has begun to leave
        self._scanned = 0  # characters of the body without a marker
        self._in_string = False

    @property
    def ended(self) -> bool:
        return self._calls.ended

    @property
    def cut(self) -> bool:
        return self._calls.cut

    def push(self, text: str) -> list[Part]:
        self._text += text
        parts: list[Part] = []
        while not self.ended and (self._block(parts) if self._inside else self._outside(parts)):
            pass
        return parts

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        if self.ended:
            return parts
        text, self._text = self._text, ""
        if self._inside:
            self._close(text[: len(text) - self._markers.unfinished(text)], parts, text)
        else:
            self._content(text, parts)
        if rest := self._shown.finish():
            parts.append(Content(rest))
        return parts

    def _outside(self, parts: list[Part]) -> bool:
        if not self._begun:
            begin = self._text.lstrip()
            if not begin:
                return False
            self._begun = True
            if begin[0] in self._shape.bare:
                self._content(self._text[: len(self._text) - len(begin)], parts)
                self._text = begin
                self._enter()
                return True
        marker = self._markers.find(self._text)
        end = marker.start() if marker else len(self._text) - self._markers.unfinished(self._text)
        self._content(self._text[:end], parts)
        if marker is None:
            self._text = self._text[end:]
            return False
        self._text = self._text[marker.end() :]
        if marker[0] == self._shape.open:
            self._enter()
        return True

    def _enter(self) -> None:
        self._inside, self._headed, self._scanned, self._in_string = True, False, 0, False

    def _block(self, parts: list[Part]) -> bool:
        """Looks for what ends the block."""
        while True:
            if self._in_string:
                stop = STRING_STOPS.search(self._text, self._scanned)
                if stop is None or (stop[0] == "\\" and stop.end() == len(self._text)):
                    self._scanned = stop.start() if stop else len(self._text)
                    self._grow(self._text[: self._scanned], parts)
                    return False
                self._in_string = stop[0] == "\\"
                self._scanned = stop.end() + self._in_string
                continue
            marker = self._markers.find(self._text, self._scanned, self._shape.quoted)
            if marker is None:
                unsure = self._markers.unfinished(self._text[self._scanned :])
                self._scanned = len(self._text) - unsure
                self._grow(self._text[: self._scanned], parts)
                return False
            if marker[0] != '"':
                break
            self._in_string, self._scanned = True, marker.end()
        body, self._text = self._text[: marker.start()], self._text[marker.end() :]
        self._inside = False
        self._close(body, parts)
        if marker[0] == self._shape.open:
            self._enter()
        return True

    def _grow(self, body: str, parts: list[Part], final: bool = False) -> None:
        """Lets leave what a body shows to be a call."""
        heads = () if self._headed else self._shape.heads
        if (head := next(filter(None, (head.match(body) for head in heads)), None)) and head["name"] in self._tools:
            self._headed = True
            parts += self._calls.begin(Found(head["name"], "", head.groupdict().get("id")), head.end())
        parts += self._calls.grow(body, final)

    def _close(self, body: str, parts: list[Part], otherwise: str | None = None) -> None:
        """The body as calls; or as content, for which `otherwise` may stand."""
        self._grow(body, parts, final=True)
        read, sent = self._shape.body(body, self._tools), self._calls.end()
        if sent is not None:
            self._shown.marker()
            if not self._calls.ended:
                self._behind(body, read, sent, parts)
            return
        if read is None or any(found.name not in self._tools for found in read[0]):
            self._content(self._markers.remove(body if otherwise is None else otherwise), parts)
            return
        for found in read[0]:
            parts += self._calls.take(found)
        self._shown.marker()
        if not self.ended:
            self._content(read[1], parts)

    def _behind(self, body: str, read: tuple[list[Found], str] | None, sent: int, parts: list[Part]) -> None:
        """What a body has behind a call that has left already."""
        if read is None or any(found.name not in self._tools for found in read[0]):
            self._content(self._markers.remove(body[sent:]), parts)
            return
        for found in read[0][1:]:
            parts += self._calls.take(found)
        self._content(read[1], parts)

    def _content(self, text: str, parts: list[Part]) -> None:
        if shown := self._shown.push(text):
            parts.append(Content(shown))
