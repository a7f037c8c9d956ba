"""Decides where calls begin and end in a text. A call leaves when it is complete, so that nothing that was sent is ever
taken back, and a block that is no call is content, as are its characters. Of an eager tool, a call leaves with its name
and the beginning of its arguments, where its form shows them, and the rest follows as it is written."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Set
from dataclasses import dataclass

from xllm.service.parsers import values
from xllm.service.parsers.growing import Arguments, is_whole
from xllm.service.parsers.parts import Call, Content, Markers, More, Part, Tools, Trimmed

HEAD_CHARS = 512  # of a body, for what stands before the arguments; they wait for the end where it is longer
STRING_STOPS = re.compile(r'["\\\n]')  # JSON has no raw line end in a string: one that meets it was never closed


@dataclass(frozen=True)
class Found:
    """What the body of a block calls. id: the model's own, if it has one."""

    name: str
    arguments: str
    id: str | None = None


Read = tuple[list[Found], str]  # the calls of a body, and the text after them
Body = Callable[[str, Tools], Read | None]  # None for a body that is no call


@dataclass(frozen=True)
class Shape:
    """How a family of models writes calls. A block goes from `open` to `close`, to the next marker, or to the end of
    the text. sections: markers around blocks, which mean nothing. inner: markers inside of bodies. bare: characters
    that open a block without a marker, at the very beginning of an answer. quoted: bodies are JSON, where a marker in
    a string is not one. closed: only `close` shows that a body is complete. heads: how a body begins whose arguments
    follow as they are, with the name; up to a brace."""

    open: str
    close: str
    body: Body
    sections: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    bare: str = ""
    quoted: bool = True
    closed: bool = False
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
        self._growing: Arguments | None = None  # of the last call

    @property
    def ended(self) -> bool:
        return self._one and bool(self._ids) and not self.grows

    @property
    def grows(self) -> bool:
        """Whether arguments leave as they come."""
        return self._growing is not None and not (self._growing.done or self._growing.broken)

    def begin(self, found: Found) -> list[Part]:
        """A call whose arguments `grow` is given, as they come."""
        if self.ended:
            return []
        self._growing = Arguments()
        return self.take(found)

    def grow(self, text: str, final: bool = False) -> list[Part]:
        """What may leave of the arguments, with what comes next."""
        if self._growing is None:
            return []
        more = self._growing.push(text, final)
        self.cut |= self._growing.broken  # at once: where one call is all there may be, nobody comes to its end
        return [More(len(self._ids) - 1, more)] if more else []

    def end(self) -> int | None:
        """Characters of the arguments that grew since the call began; None where none did."""
        growing, self._growing = self._growing, None
        self.cut |= growing is not None and not growing.done
        return growing and growing.taken

    def take(self, found: Found) -> list[Part]:
        if self.ended:
            return []
        name = found.id if found.id and found.id not in self._ids else f"call_{uuid.uuid4().hex[:24]}"
        self._ids.add(name)
        return [Call(len(self._ids) - 1, name, found.name, found.arguments)]


class Blocks:
    """Content and calls. Content leaves as it comes, less white space that may stand before a marker. eager: tools
    whose arguments leave as they are written. The work of a push does not depend on how much came before."""

    thinking = False

    def __init__(
        self, shape: Shape, tools: Tools, one: bool, begun: bool = False, eager: Set[str] = frozenset()
    ) -> None:
        self._shape, self._tools, self._eager = shape, tools, eager
        self._markers = Markers(shape.markers)
        self._calls = Calls(one)
        self._text = ""  # not decided on, from `_at` on
        self._at = 0
        self._shown = Trimmed()
        self._begun = begun or not shape.bare  # whether it is known if the answer begins with a call
        self._inside = False
        self._body: list[str] = []  # of this block, as far as it has no marker
        self._size = 0  # of these
        self._head: int | None = None  # where the arguments of its call begin, which leave already
        self._in_string = False

    @property
    def ended(self) -> bool:
        return self._calls.ended

    @property
    def cut(self) -> bool:
        return self._calls.cut

    def push(self, text: str) -> list[Part]:
        self._text, self._at = self._text + text, 0
        parts: list[Part] = []
        while not self.ended and (self._block(parts) if self._inside else self._outside(parts)):
            pass
        self._text = "" if self.ended else self._text[self._at :]
        return parts

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        if self.ended:
            return parts
        text, self._text = self._text, ""
        if self._inside:
            # What may be the beginning of `close` belongs to no body; where the text goes on behind a call, it is text.
            closes = bool(self._shape.close)
            self._keep(text[: len(text) - closes * self._markers.unfinished(text)], parts)
            body = "".join(self._body)
            whole = body + text[len(self._body[-1]) :]
            self._close(body[: len(body) - closes * self._markers.unfinished(body)], parts, "", whole)
        else:
            self._content(text, parts)
        if rest := self._shown.finish():
            parts.append(Content(rest))
        return parts

    def _outside(self, parts: list[Part]) -> bool:
        text = self._text
        if not self._begun:
            begin = values.skip(text, self._at)
            self._content(text[self._at : begin], parts)
            self._at = begin
            if text[begin : begin + 1] in tuple(self._shape.bare):
                self._enter()
                return True
        marker = self._markers.find(text, self._at)
        end = marker.start() if marker else len(text) - self._markers.unfinished(text[self._at :])
        self._begun |= end > self._at
        self._content(text[self._at : end], parts)
        self._at = marker.end() if marker else end
        if marker and marker[0] == self._shape.open:
            self._enter()
        return marker is not None

    def _enter(self) -> None:
        self._inside = self._begun = True
        self._body, self._size, self._head, self._in_string = [], 0, None, False

    def _block(self, parts: list[Part]) -> bool:
        """Looks for what ends the block."""
        text, at = self._text, self._at
        marker, end = None, len(text)
        while True:
            if self._in_string:
                stop = STRING_STOPS.search(text, at)
                if stop is None or (stop[0] == "\\" and stop.end() == len(text)):
                    end = stop.start() if stop else end
                    break
                self._in_string = stop[0] == "\\"
                at = stop.end() + self._in_string
                continue
            marker = self._markers.find(text, at, self._shape.quoted)
            if marker is None or marker[0] != '"':
                end = marker.start() if marker else end - self._markers.unfinished(text[at:])
                break
            self._in_string, at, marker = True, marker.end(), None
        self._keep(text[self._at : end], parts)
        if marker is None:
            self._at = end
            return False
        self._at, self._inside = marker.end(), False
        self._close("".join(self._body), parts, marker[0])
        if marker[0] == self._shape.open:
            self._enter()
        return True

    def _keep(self, piece: str, parts: list[Part]) -> None:
        """The next piece of a body. What it shows to be a call of an eager tool may leave."""
        self._body.append(piece)
        if self._eager and self._head is None and self._size < HEAD_CHARS and "{" in piece:
            body = "".join(self._body)
            head = next(filter(None, (head.match(body[:HEAD_CHARS]) for head in self._shape.heads)), None)
            if head and head["name"] in self._eager:
                self._head, piece = head.end(), body[head.end() :]
                parts += self._calls.begin(Found(head["name"], "", head.groupdict().get("id")))
        self._size += len(piece)
        parts += self._calls.grow(piece)

    def _close(self, body: str, parts: list[Part], by: str, otherwise: str | None = None) -> None:
        """The body as calls, when a marker or the end of the text closes it; or as content, for which `otherwise` may
        stand."""
        parts += self._calls.grow("", final=True)
        read = self._read(body) if by == self._shape.close or not self._shape.closed else None
        sent = self._calls.end()
        if sent is not None:
            self._shown.marker()
            if self._calls.ended:
                return
            otherwise = body[(self._head or 0) + sent :]  # the call has left already
        if read is None:
            self._content(self._markers.remove(body if otherwise is None else otherwise), parts)
            return
        for found in read[0][sent is not None :]:
            parts += self._calls.take(found)
        self._shown.marker()
        if not self.ended:
            self._content(read[1], parts)

    def _read(self, body: str) -> Read | None:
        """The calls of a body, where all of them are calls of these tools that a client can read."""
        read = self._shape.body(body, self._tools)
        if read and all(found.name in self._tools and is_whole(found.arguments) for found in read[0]):
            return read
        return None

    def _content(self, text: str, parts: list[Part]) -> None:
        if shown := self._shown.push(text):
            parts.append(Content(shown))
