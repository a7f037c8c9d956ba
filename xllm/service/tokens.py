"""Decides what /tokenize and /detokenize answer; they ask the tokenizer and not the model, whatever its task is."""

from __future__ import annotations

from typing import Any

import msgspec

from xllm.service.answer import send_whole
from xllm.service.body import DetokenizeBody, TokenizeBody
from xllm.service.endpoint import Endpoint
from xllm.service.errors import invalid
from xllm.service.gate import Receive, Record, Send
from xllm.service.params import check_range, messages

MAX_CHARS = 1 << 20  # of a text, and ids of a list: they may be more than the context holds, to be counted


class TextEndpoint(Endpoint[bytes]):
    """A route that answers with what was planned, which may be many times the question."""

    tasks = ("generate", "embed", "classify")
    queues = False

    def check_size(self, given: str | list[int], name: str) -> None:
        """Refuses what would take the memory of many requests."""
        if len(given) > MAX_CHARS:
            what = "characters" if isinstance(given, str) else "ids"
            raise invalid("invalid_request", f"{name} has {len(given)} {what}, at most {MAX_CHARS} are taken", name)

    def plan(self, data: bytes, entry: Record) -> bytes:
        return msgspec.json.encode(self.answer(data))

    def answer(self, data: bytes) -> dict[str, Any]:
        """What is answered to a body; runs in the pool. Raises ApiError."""
        raise NotImplementedError

    async def run(self, job: bytes, entry: Record, receive: Receive, send: Send) -> None:
        await send_whole(send, job, None, entry)


class Tokenize(TextEndpoint):
    """POST /tokenize."""

    body = TokenizeBody
    kind = "tokenize"

    def answer(self, data: bytes) -> dict[str, Any]:
        body, codec = self.parse(data, TokenizeBody), self.service.codec
        if (body.prompt is None) == (body.messages is None):
            raise invalid("missing_parameter", "give either `prompt` or `messages`", "prompt")
        if body.messages is not None:
            arguments, opened = body.chat_template_kwargs or {}, body.add_generation_prompt is not False
            text = self.service.render(messages(body.messages), arguments, opened)
            self.check_size(text, "messages")
            tokens = codec.encode(text, body.add_special_tokens is True)  # the template writes its own
        else:
            for name in ("chat_template_kwargs", "add_generation_prompt"):
                if getattr(body, name) is not None:
                    raise invalid("invalid_request", f"{name} needs messages", name)
            self.check_size(body.prompt or "", "prompt")
            tokens = codec.encode(body.prompt or "", body.add_special_tokens is not False)
        answer = {"tokens": tokens, "count": len(tokens), "max_model_len": self.service.facts.max_len}
        return answer | ({"token_strs": [*map(codec.token_text, tokens)]} if body.return_token_strs else {})


class Detokenize(TextEndpoint):
    """POST /detokenize: the text of all tokens, special ones too."""

    body = DetokenizeBody
    kind = "detokenize"

    def answer(self, data: bytes) -> dict[str, Any]:
        body = self.parse(data, DetokenizeBody)
        self.check_size(body.tokens, "tokens")
        check_range(body.tokens, "tokens", self.service.facts.vocab)
        return {"prompt": self.service.codec.decode(body.tokens, skip_special_tokens=False)}
