"""Decides what /v1/files takes and answers: uploads go to disk as they come, and nothing of a request names a path."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl

from xllm.service.answer import PIECE_BYTES, STALL_SECONDS
from xllm.service.endpoint import Service
from xllm.service.errors import ApiError, Hint, invalid
from xllm.service.gate import App, Receive, Scope, Send, record, send_json
from xllm.service.shelf import MAX_FILE_BYTES, Files

PATH = "/v1/files"
PURPOSES = ("batch",)
FIELD_BYTES = 1024
FORM_BYTES = 64 << 10  # around the file
UPLOAD_SECONDS = 600.0
FIELDS = ("purpose",)


def routes(service: Service, files: Files, in_use: Callable[[str, str], bool]) -> dict[str, Mapping[str, App]]:
    """The routes, by path and method. in_use: whether a batch of the tenant still reads the file."""

    async def upload(scope: Scope, receive: Receive, send: Send) -> None:
        tenant = record(scope).tenant
        with service.slot():
            files.check_room(tenant)
            part = await files.new(tenant)
            try:
                form = await _read_form(scope, receive, part, files)
                info = await files.keep(tenant, part, form.filename, form.purpose)
            finally:
                with suppress(ApiError):
                    await files.do(lambda: part.unlink(missing_ok=True))
        await send_json(send, 200, info.body())

    async def listing(scope: Scope, receive: Receive, send: Send) -> None:
        given = query(scope, ("purpose", "limit", "order", "after"))
        held = files.of(record(scope).tenant).values()
        shown = [info.body() for info in held if given.get("purpose", info.purpose) == info.purpose]
        await send_json(send, 200, page_of(shown, given, 10_000))

    async def one(scope: Scope, receive: Receive, send: Send) -> None:
        name, _, rest = scope["path"].removeprefix(f"{PATH}/").partition("/")
        if rest not in ("", "content"):
            raise ApiError(404, "unknown_route", "there is no such route")
        info = files.find(record(scope).tenant, name)
        if not rest:
            return await send_json(send, 200, info.body())
        await _send_file(send, files, files.path(record(scope).tenant, info.id), info.bytes)

    async def delete(scope: Scope, receive: Receive, send: Send) -> None:
        name, tenant = scope["path"].removeprefix(f"{PATH}/"), record(scope).tenant
        files.find(tenant, name)
        if in_use(tenant, name):
            raise ApiError(409, "file_in_use", "a batch still reads this file: cancel it, or wait for its end")
        await files.remove(tenant, name)
        await send_json(send, 200, {"id": name, "object": "file", "deleted": True})

    return {PATH: {"GET": listing, "POST": upload}, f"{PATH}/": {"GET": one, "DELETE": delete}}


def query(scope: Scope, known: Sequence[str]) -> dict[str, str]:
    """The parameters after the path, each given once. Raises ApiError 400 naming another."""
    given = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    for name, _ in given:
        if name not in known or [other for other, _ in given].count(name) > 1:
            shown = name[:64] if name.isprintable() else "of this name"
            raise invalid("invalid_request", f"the parameter {shown} is unknown here, or given twice", shown)
    return dict(given)


def page_of(items: Sequence[dict[str, Any]], given: Mapping[str, str], most: int) -> dict[str, Any]:
    """A part of a list that is kept oldest first, as OpenAI pages: `limit` items after the one called `after`."""
    limit, order = given.get("limit", str(most)), given.get("order", "desc")
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:9]) <= most:
        raise invalid("invalid_request", f"limit is a whole number from 1 to {most}", "limit")
    if order not in ("asc", "desc"):
        raise invalid("invalid_request", "order is asc or desc", "order")
    ordered = list(items) if order == "asc" else list(items)[::-1]
    if (after := given.get("after")) is not None:
        at = next((at for at, item in enumerate(ordered) if item["id"] == after), None)
        if at is None:
            raise invalid("invalid_request", "after names nothing of this list", "after")
        ordered = ordered[at + 1 :]
    shown = ordered[: int(limit)]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {}
    return {"object": "list", "data": shown, "has_more": len(shown) < len(ordered)} | ends


class Form:
    """The form of an upload: its file goes to `part` as it comes, its fields are few and short."""

    def __init__(self, boundary: bytes, part: Path) -> None:
        from python_multipart.multipart import MultipartParser

        self._part = part
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._header(1, data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._open,
                "on_part_data": lambda data, start, end: self._take(data[start:end]),
                "on_end": self._end,
            },
        )
        self._file: BinaryIO | None = None
        self._fields: dict[str, bytes] = {}
        self._size = 0
        self._whole = False
        self.filename = ""

    @property
    def purpose(self) -> str:
        return self._fields["purpose"].decode()

    def push(self, data: bytes) -> None:
        """Raises ApiError."""
        from python_multipart.exceptions import FormParserError

        try:
            self._parser.write(data)
        except FormParserError as error:
            raise invalid("invalid_multipart", f"the form can't be read: {error}") from None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def check(self) -> None:
        """Raises ApiError 400 unless all is there."""
        if not self._whole:
            raise invalid("invalid_multipart", "the form ends before its closing boundary")
        for name, there in (("file", self._file is not None), ("purpose", "purpose" in self._fields)):
            if not there:
                raise invalid("missing_parameter", f"the field `{name}` is required", name)
        if self._fields["purpose"] not in [name.encode() for name in PURPOSES]:
            raise invalid("invalid_request", f"the purpose of a file is {' or '.join(PURPOSES)}", "purpose")
        if self._size == 0:
            raise invalid("empty_file", "the file is empty", "file")

    def _begin(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._now = [b"", b""]

    def _header(self, at: int, data: bytes) -> None:
        self._now[at] += data

    def _header_end(self) -> None:
        name, value = self._now
        self._headers[name.lower()] = value
        self._now = [b"", b""]

    def _open(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == "file" and self._file is None:
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")[:255]
            self._file = self._part.open("xb")
        elif self._name in FIELDS and self._name not in self._fields:
            self._fields[self._name] = b""
        else:
            shown = self._name[:64] if self._name.isprintable() else "of this name"
            raise invalid("unsupported_parameter", f"the field `{shown}` is not supported, or given twice", shown)

    def _take(self, data: bytes) -> None:
        if self._name != "file":
            self._fields[self._name] += data
            if len(self._fields[self._name]) > FIELD_BYTES:
                raise invalid("invalid_request", f"the field has more than {FIELD_BYTES} bytes", self._name)
            return
        assert self._file is not None
        self._size += len(data)
        if self._size > MAX_FILE_BYTES:
            raise _too_large()
        self._file.write(data)

    def _end(self) -> None:
        self._whole = True


async def _read_form(scope: Scope, receive: Receive, part: Path, files: Files) -> Form:
    """The upload, with its file at `part`. Raises ApiError 400, 408, 413, 415, or 499 when the client left."""
    from python_multipart.multipart import parse_options_header

    headers = dict(scope["headers"])
    kind, options = parse_options_header(headers.get(b"content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 70:
        raise ApiError(415, "unsupported_media_type", "a file is sent as multipart/form-data, with its boundary")
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or int(declared) > MAX_FILE_BYTES + FORM_BYTES:
        raise _too_large()
    form, more = Form(boundary, part), True
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(499, "client_disconnected", "the client left before its request was complete")
                await files.do(form.push, message.get("body", b""))
                more = message.get("more_body", False)
        form.check()
    except TimeoutError:
        text = f"the file did not arrive within {UPLOAD_SECONDS:g} s"
        raise ApiError(408, "slow_upload", text, headers={"connection": "close"}) from None
    finally:
        await files.do(form.close)
    return form


def _too_large() -> ApiError:
    hint = Hint("files have a limit", "batches", "split the file: each part can be a batch of its own")
    return ApiError(413, "file_too_large", f"the file has more than {MAX_FILE_BYTES >> 20} MiB", "file", hint)


async def _send_file(send: Send, files: Files, path: Path, size: int) -> None:
    """Sends `size` bytes in pieces, as long as the client takes them."""
    file = await files.do(path.open, "rb")
    try:
        headers = [(b"content-type", b"application/octet-stream"), (b"content-length", str(size).encode())]
        headers += [(b"x-content-type-options", b"nosniff"), (b"content-disposition", b"attachment")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while size > 0:
            data = await files.do(file.read, min(size, PIECE_BYTES))
            if not data:
                break
            size -= len(data)
            async with asyncio.timeout(STALL_SECONDS):
                await send({"type": "http.response.body", "body": data, "more_body": size > 0})
    except TimeoutError:  # returning without a last piece makes the server drop the connection
        pass
    finally:
        file.close()
