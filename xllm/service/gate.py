"""Decides who gets in and what every answer has: the request id, the look at where a request comes from, the key check
that covers all routes but the named public ones, the error body for whatever goes wrong inside, one log line."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from xllm.service.errors import GONE, ApiError, Hint
from xllm.service.metrics import Front
from xllm.service.sites import Sites

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PUBLIC = ("/health", "/livez", "/ready", "/readyz")
PAGE = ("/", *(f"/ui/{name}" for name in ("page.css", "api.js", "chat.js", "engine.js", "icon.svg")))  # just files
OPEN = frozenset(PUBLIC + PAGE)
CONTROL = ("/pause", "/resume", "/sleep", "/wakeup", "/wake_up", "/is_sleeping", "/update_weights")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")

log = logging.getLogger("xllm.request")


@dataclass
class Record:
    """What is known about one HTTP request; the handler fills in the lower half. Never holds text of prompts or
    answers."""

    id: str
    started: float
    status: int = 0
    kind: str = ""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finish_reasons: str = ""
    tenant: str = ""  # digest of the API key
    admin: bool = False
    offline: bool = False  # of a batch: gives way to everybody who waits for an answer


def record(scope: Scope) -> Record:
    return scope["xllm.record"]


class Keys:
    """API keys, kept as digests so that a comparison takes the same time whatever the length and the content."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __contains__(self, key: str) -> bool:
        given = hashlib.sha256(key.encode()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]  # all of them, always
        return any(matches)


@dataclass(frozen=True)
class Access:
    """Who may ask. `keys` None: no key is needed. admin: keys that open the control routes, and all others; None:
    nobody controls. origins: other sites whose pages may ask. control_port: where the control routes are, and nowhere
    else; without `admin`, all who reach it control."""

    keys: Keys | None = None
    admin: Keys | None = None
    origins: frozenset[str] = frozenset()
    control_port: int | None = None


EVERYBODY = Access()


class Gate:
    """The outermost application; `control` where it is that of the control port."""

    def __init__(self, app: App, front: Front, access: Access, control: bool = False) -> None:
        self._app, self._front, self._control, self._admin = app, front, control, access.admin
        self._keys = access.admin if control else access.keys
        self._orders = CONTROL if control or access.control_port is None else ()  # that are routes here
        self._sites = Sites(access.origins, local=self._keys is None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        request_id = headers.get(b"x-request-id", "")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = f"req-{uuid.uuid4().hex}"
        entry = scope["xllm.record"] = Record(request_id, time.monotonic())

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                own = (b"x-request-id", request_id.encode())
                message["headers"] = [*message.get("headers", []), own, *self._sites.shared(headers)]
            await send(message)

        self._front.requests_in += 1
        code = ""
        try:
            self._sites.check(scope["method"], headers)
            if (answer := self._sites.preflight(scope["method"], headers)) is not None:
                await send_data(send_with_id, 200, b"", b"text/plain", answer)
                return
            self._authorize(scope, headers, entry)
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            failure = api_error(error)
            if entry.status == 0 and failure.code != GONE:
                of_messages = scope["path"].startswith("/v1/messages")
                body = failure.anthropic_body(request_id) if of_messages else failure.body(request_id)
                await send_json(send_with_id, failure.status, body, failure.headers)
            entry.status, code = failure.status, failure.code
        finally:
            self._front.status(entry.status, code)
            _write_log(scope, entry)

    def _authorize(self, scope: Scope, headers: dict[bytes, str], entry: Record) -> None:
        """Notes who asks. The tenant is a digest of the key, empty where none is needed. Raises ApiError 401, 403."""
        scheme, _, bearer = headers.get(b"authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else headers.get(b"x-api-key", "")
        entry.admin = key in self._admin if self._admin is not None else self._control
        known = self._keys is not None and key in self._keys
        controls = scope["path"] in self._orders
        public = scope["path"] in OPEN and scope["method"] in ("GET", "HEAD")
        if (self._keys is not None and not public) or (controls and self._admin is not None):
            if not key:
                message = "an API key is needed: Authorization: Bearer KEY, or x-api-key: KEY"
                raise ApiError(401, "missing_api_key", message, headers={"www-authenticate": "Bearer"})
            if not (known or entry.admin):
                message = "the API key is not valid"
                raise ApiError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})
        if controls and not entry.admin:
            cause = (
                "this key is not for control" if self._admin is not None else "this server was started without control"
            )
            hint = Hint(cause, "xllm serve --admin-key-file", "use a key of that file")
            raise ApiError(403, "control_refused", f"{cause}; control routes need an admin's key", hint=hint)
        if self._keys is not None and not public:
            entry.tenant = hashlib.sha256(key.encode()).hexdigest()


async def send_json(send: Send, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
    await send_data(send, status, msgspec.json.encode(body), b"application/json", headers)


async def send_data(send: Send, status: int, data: bytes, kind: bytes, headers: dict[str, str] | None = None) -> None:
    """A whole answer whose media type is `kind`."""
    pairs = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    pairs += [(b"content-type", kind), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": data})


def api_error(error: Exception) -> ApiError:
    """What is answered for it; a fault of the server goes to the log."""
    if isinstance(error, ApiError):
        return error
    logging.getLogger("xllm.service").error("a request failed by a fault of the server", exc_info=error)
    return ApiError(500, "internal_error", "the server failed to handle this request; its log has the reason")


def _write_log(scope: Scope, entry: Record) -> None:
    quiet = scope["path"] in PUBLIC or scope["path"] == "/metrics" or scope["path"].startswith("/ui/")
    level = logging.DEBUG if quiet else logging.INFO
    if not log.isEnabledFor(level):
        return
    facts = {
        "id": entry.id,
        "method": scope["method"],
        "path": scope["path"][:128],
        "status": entry.status,
        "ms": round((time.monotonic() - entry.started) * 1e3, 1),
    }
    if entry.prompt_tokens:
        facts["prompt_tokens"] = entry.prompt_tokens
        facts["generated_tokens"] = entry.generated_tokens
        facts["finish"] = entry.finish_reasons
    log.log(level, msgspec.json.encode(facts).decode())
