"""Decides where a prompt ends whose last message the model goes on with, in place of an answer of its own."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from xllm.service.errors import invalid

FIELD = "continue_final_message"


def continued(messages: list[dict[str, Any]], render: Callable[[list[dict[str, Any]]], str]) -> str:
    """The prompt up to the end of the last message's text: `render` makes the text of messages. A mark shows where that
    is, whatever the template writes behind it. Raises ApiError 400."""
    last = messages[-1]
    if last["role"] != "assistant" or "tool_calls" in last:
        text = f"{FIELD} needs a last message of the role assistant, with text and without calls"
        raise invalid("invalid_request", text, FIELD)
    mark = uuid.uuid4().hex
    shown = render([*messages[:-1], last | {"content": last["content"] + mark}])
    end = shown.rfind(mark)
    if end < 0:
        text = f"{FIELD} is not possible: the chat template does not show the last message as it is written"
        raise invalid("unsupported_parameter", text, FIELD)
    return shown[:end]
