"""Decides how every failure looks to a client: one exception, one table from code to status and type, one body."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    499: "cancelled",
    500: "server_error",
    501: "server_error",
    503: "service_unavailable",
    504: "timeout_error",
}

# Where Anthropic's clients expect another type than OpenAI's.
ANTHROPIC_TYPES = {
    409: "invalid_request_error",
    413: "request_too_large",
    500: "api_error",
    501: "api_error",
    503: "overloaded_error",
}

GONE = "client_disconnected"  # the code of who gets no answer any more

# Codes of the engine: what the client did, what passes by itself, what is our fault.
ENGINE_STATUS = {
    "invalid_parameter": 400,
    "empty_prompt": 400,
    "token_out_of_range": 400,
    "context_length_exceeded": 400,
    "exceeds_capacity": 400,
    "grammar_failed": 400,
    "nothing_allowed": 400,
    "queue_full": 429,
    "duplicate_request": 409,
    "engine_busy": 409,
    "checksum_mismatch": 409,
    "weights_incompatible": 409,
    "weights_unusable": 400,
    "request_aborted": 499,
    "asleep": 503,
    "shutting_down": 503,
    "engine_failed": 503,
}


@dataclass(frozen=True)
class Hint:
    """What a person can do: why it happened, the setting that decides it, the change that helps."""

    cause: str
    knob: str
    fix: str


@dataclass
class ApiError(Exception):
    """A failure with an HTTP status. `code` is stable, `param` names the field of the request, if one is at fault."""

    status: int
    code: str
    message: str
    param: str | None = None
    hint: Hint | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status} {self.code}: {self.message}"

    def body(self, request_id: str) -> dict[str, Any]:
        error: dict[str, Any] = {
            "message": self.message,
            "type": TYPES.get(self.status, "server_error"),
            "param": self.param,
            "code": self.code,
            "request_id": request_id,
        }
        if self.hint is not None:
            error["hint"] = {"cause": self.hint.cause, "knob": self.hint.knob, "fix": self.hint.fix}
        return {"error": error}

    def anthropic_body(self, request_id: str) -> dict[str, Any]:
        """The same for clients of the Messages API."""
        kind = ANTHROPIC_TYPES.get(self.status) or TYPES.get(self.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": request_id}


def invalid(code: str, message: str, param: str | None = None) -> ApiError:
    """400 with its code."""
    return ApiError(400, code, message, param)


def renamed(error: ApiError, names: Sequence[tuple[re.Pattern[str], str]]) -> ApiError:
    """The same for clients of another API: its field, and those the hint names, as that API calls them."""

    def as_asked(text: str) -> str:
        for name, own in names:
            text = name.sub(own, text)
        return text

    if error.param is not None and (param := as_asked(error.param)) != error.param:
        error = replace(error, message=error.message.replace(error.param, param, 1), param=param)
    return replace(error, hint=replace(error.hint, fix=as_asked(error.hint.fix))) if error.hint else error


def busy(message: str, hint: Hint | None = None, seconds: float = 1) -> ApiError:
    """429; `seconds` from now it may be worth while to ask again."""
    return ApiError(429, "too_many_requests", message, hint=hint, headers={"retry-after": f"{seconds:.0f}"})


def draining() -> ApiError:
    return ApiError(
        503, "draining", "the server is shutting down and takes no new requests", headers={"retry-after": "5"}
    )


def from_engine(code: str, message: str) -> ApiError:
    """The answer for a refusal or a fault of the engine."""
    status = ENGINE_STATUS.get(code, 500)
    headers = {"retry-after": "1"} if status in (429, 503) else {}
    return ApiError(status, code, message, headers=headers)


def from_output(error: str | None) -> ApiError:
    """The answer for a request that ended with `TokenOutput.error`, which is "code: message"."""
    code, _, message = (error or "internal_error: the engine gave no reason").partition(": ")
    return from_engine(code, message or code)
