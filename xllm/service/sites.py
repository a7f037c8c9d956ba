"""Decides which pages may ask. A browser sends what any page tells it to, so a server without keys on a person's own
machine would answer every site that the person visits: where a request comes from is looked at before all else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from xllm.config import is_loopback
from xllm.service.errors import ApiError, Hint

ANY = "*"
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s,]+")
PREFLIGHT_SECONDS = 600
EXPOSED = "x-request-id, x-weights-version, retry-after"
Headers = Mapping[bytes, str]


def origins_of(given: Iterable[str]) -> frozenset[str]:
    """Origins as browsers write them. Raises ValueError for what no browser sends."""
    found = frozenset(text.lower().removesuffix("/") for text in given)
    if wrong := sorted(text for text in found if text != ANY and not _is_origin(text)):
        raise ValueError(f"{wrong[0]} is no origin: it is like https://chat.example.com or http://localhost:3000")
    return found


def _is_origin(text: str) -> bool:
    try:
        return ORIGIN.fullmatch(text) is not None and urlsplit(text).port != 0  # what is no address or port raises
    except ValueError:
        return False


class Sites:
    """allowed: origins whose pages may ask and read the answers, beside pages of this server's own; "*" is all. local:
    the server has no keys, and answers to this machine's own names and those of `allowed` only: any other name was made
    to lead here, so that its page counts as one of ours (DNS rebinding)."""

    def __init__(self, allowed: frozenset[str] = frozenset(), local: bool = False) -> None:
        self._allowed, self._local = allowed, local
        self._names = {urlsplit(origin).hostname for origin in allowed}

    def check(self, method: str, headers: Headers) -> None:
        """Raises ApiError 403 for a name that is not ours, and for pages of other sites. Programs send neither."""
        host = headers.get(b"host", "").lower()
        if self._local and host and not self._is_ours(host):
            shown = host[:64] if host.isprintable() else "of this name"
            text = f"this server has no API keys and is asked as localhost only, not as {shown}"
            hint = Hint("a site could give this machine its name", "xllm serve --allow-origin", f"allow http://{shown}")
            raise ApiError(403, "unknown_host", text, hint=hint)
        origin = headers.get(b"origin", "").lower()
        if origin:
            other = not self.allows(origin) and origin.partition("://")[2] != host
        else:
            other = headers.get(b"sec-fetch-site", "none") not in ("none", "same-origin")
            # Following a link to the page here is no question of the other site.
            other &= method not in ("GET", "HEAD") or headers.get(b"sec-fetch-mode") != "navigate"
        if other:
            hint = Hint(
                "only pages of this server may ask it from a browser",
                "xllm serve --allow-origin",
                "allow the origin of that page",
            )
            raise ApiError(403, "other_site", "a page of another site may not ask this server", hint=hint)

    def allows(self, origin: str) -> bool:
        return origin in self._allowed or (ANY in self._allowed and bool(origin))

    def shared(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """Headers that let the page of an allowed origin read the answer."""
        if not self._allowed:
            return []
        origin, vary = headers.get(b"origin", ""), [(b"vary", b"origin")]
        if not self.allows(origin.lower()):
            return vary
        sent = origin.encode("latin-1")
        return [*vary, (b"access-control-allow-origin", sent), (b"access-control-expose-headers", EXPOSED.encode())]

    def preflight(self, method: str, headers: Headers) -> dict[str, str] | None:
        """What a browser is told that asks whether a page of an allowed origin may send a request; None for what is no
        such question. It carries no key."""
        asked = headers.get(b"access-control-request-method")
        if method != "OPTIONS" or asked is None or not self.allows(headers.get(b"origin", "").lower()):
            return None
        return {
            "access-control-allow-methods": "GET, HEAD, POST, DELETE",
            "access-control-allow-headers": headers.get(b"access-control-request-headers", ""),
            "access-control-allow-private-network": "true",  # a public site's page asks a private address
            "access-control-max-age": str(PREFLIGHT_SECONDS),
        }

    def _is_ours(self, host: str) -> bool:
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        return is_loopback(name) or name.endswith(".localhost") or name in self._names
