"""Decides what a line of a batch is, and what becomes of it: an answer or an error, in one of two files that grow while
the batch runs and that say, after any end of the process, which lines are done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from xllm import typed

MAX_LINES = 50_000
MAX_FAULTS = 50  # that are told of one file
MAX_ID_CHARS = 256
LINE_ENDS = "\x85\u2028\u2029"  # JSON leaves them as they are, and Python's splitlines ends lines at them


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """One request: `custom_id` names it in the answers, `url` is the endpoint of the batch."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Done(msgspec.Struct):
    id: str


class _Streams(msgspec.Struct):
    stream: Any = None


class Fault(msgspec.Struct):
    """Why a batch is refused. line: from 1, None for the whole file."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Result(NamedTuple):
    """What a line got: an HTTP status with a JSON body, or `error` where it was not run. at: the place of the line
    among those that are not blank, from 0."""

    at: int
    custom_id: str
    status: int = 0
    request_id: str = ""
    body: bytes = b""
    error: dict[str, str] | None = None

    @property
    def failed(self) -> bool:
        return self.status != 200

    def data(self, batch: str) -> bytes:
        """The line in one of the two files; its id ends with its place."""
        response = {"status_code": self.status, "request_id": self.request_id, "body": msgspec.Raw(self.body)}
        line = {
            "id": f"batch_req_{batch.removeprefix('batch_')}_{self.at}",
            "custom_id": self.custom_id,
            "response": None if self.error else response,
            "error": self.error,
        }
        data = msgspec.json.encode(line)
        for end in LINE_ENDS:
            data = data.replace(end.encode(), f"\\u{ord(end):04x}".encode())
        return data + b"\n"


def check(path: Path, endpoint: str, max_bytes: int) -> tuple[int, list[Fault]]:
    """The number of lines of a file that is to be run, and what is wrong with it. max_bytes: of one line."""
    faults: list[Fault] = []
    seen: dict[str, int] = {}
    count = 0
    with path.open("rb") as file:
        for number, data in _numbered(file, max_bytes):
            count += 1
            if count > MAX_LINES:
                text = f"the file has more than {MAX_LINES} requests: split it"
                return count, [Fault("too_many_requests", text, line=number)]
            if (fault := _fault(data, endpoint, max_bytes, seen, number)) is not None:
                faults.append(fault)
                if len(faults) == MAX_FAULTS or fault.code == "line_too_large":
                    break  # what follows a line without an end is no line
    if not count:
        faults.append(Fault("empty_file", "the file has no requests"))
    return count, faults


def _numbered(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered from 1; one that is longer than max_bytes is cut above that."""
    number = 0
    while data := file.readline(max_bytes + 1):
        number += 1
        if data.strip():
            yield number, data


def _fault(data: bytes, endpoint: str, max_bytes: int, seen: dict[str, int], number: int) -> Fault | None:
    def fault(code: str, text: str, param: str | None = None) -> Fault:
        return Fault(code, f"line {number}: {text}", param, number)

    if len(data) > max_bytes:
        return fault("line_too_large", f"it has more than {max_bytes} bytes")
    try:
        line = typed.decode(data, Line)
    except msgspec.ValidationError as error:
        return fault("invalid_request", str(error))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return fault("invalid_json_line", f"it is not a JSON object: {error}")
    if not 1 <= len(line.custom_id) <= MAX_ID_CHARS:
        return fault("invalid_request", f"custom_id has 1 to {MAX_ID_CHARS} characters", "custom_id")
    if line.custom_id in seen:
        text = f"its custom_id is that of line {seen[line.custom_id]}: each must be there once"
        return fault("duplicate_custom_id", text, "custom_id")
    seen[line.custom_id] = number
    if line.method != "POST":
        return fault("invalid_method", "its method must be POST", "method")
    if line.url != endpoint:
        shown = line.url if line.url.isprintable() and len(line.url) <= 64 else "something else"
        return fault("mismatched_endpoint", f"its url is {shown}, the batch is for {endpoint}", "url")
    try:
        streams = typed.decode(line.body, _Streams).stream
    except msgspec.DecodeError:
        return fault("invalid_request", "its body is not a JSON object", "body")
    return fault("unsupported_parameter", "a batch has no streams", "body.stream") if streams else None


class Journal:
    """The two files of a batch: what was answered, and what failed. All of it touches the disk. done: a 1 for each line
    that has a result."""

    def __init__(self, batch: str, output: Path, errors: Path) -> None:
        """Opens both; a last line that a crash cut short goes. Raises OSError."""
        self.done = bytearray(MAX_LINES)
        self._batch = batch
        self.counts = [0, 0]  # answered, failed
        self._files = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600) for path in (output, errors)]
        for at, path in enumerate((output, errors)):
            whole = 0
            with path.open("rb") as file:
                for data in file:
                    if not data.endswith(b"\n"):
                        break
                    whole += len(data)
                    self.done[int(typed.decode(data, _Done).id.rpartition("_")[2])] = 1
                    self.counts[at] += 1
            os.ftruncate(self._files[at], whole)

    def write(self, results: Sequence[Result]) -> None:
        """Adds the results that are new; they are on disk when this returns. Raises OSError; then it may be called
        again."""
        for at, file in enumerate(self._files):
            mine = [result for result in results if result.failed == bool(at) and not self.done[result.at]]
            if not mine:
                continue
            before, left = os.fstat(file).st_size, memoryview(b"".join(result.data(self._batch) for result in mine))
            try:
                while left:
                    left = left[os.write(file, left) :]
                os.fsync(file)
            except OSError:
                os.ftruncate(file, before)
                raise
            self.counts[at] += len(mine)
            for result in mine:
                self.done[result.at] = 1

    def close(self) -> None:
        for file in self._files:
            os.close(file)


class Reader:
    """The lines of a checked file that are not done yet, one after the other; `mine` says which of them, all without
    it."""

    def __init__(
        self, path: Path, max_bytes: int, journal: Journal, mine: Callable[[Line], bool] = lambda line: True
    ) -> None:
        self._file = path.open("rb")
        self._lines = enumerate(_numbered(self._file, max_bytes))
        self._done, self._mine = journal.done, mine

    def next(self) -> tuple[int, Line] | None:
        """A line with its place among those that are not blank."""
        for at, (_, data) in self._lines:
            if not self._done[at] and self._mine(line := typed.decode(data, Line)):
                return at, line
        return None

    def close(self) -> None:
        self._file.close()
