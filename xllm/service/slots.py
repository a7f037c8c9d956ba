"""Decides what /v1/sample answers: what the model would put in the place of each slot of a prompt, given all before it.
A slot is a text that is one token; nothing is generated, the places' logprobs are those of the prompt."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

import msgspec

from xllm.runtime import Request, SamplingParams
from xllm.runtime.request import PromptToken
from xllm.service.answer import report, send_whole
from xllm.service.body import SampleBody
from xllm.service.endpoint import Endpoint
from xllm.service.errors import from_output, invalid
from xllm.service.format import Usage
from xllm.service.gate import Receive, Record, Send
from xllm.service.openai import usage_body
from xllm.service.params import check_ids, check_text
from xllm.service.sampling import within

MAX_LOGPROBS = 5


@dataclass(frozen=True)
class SlotsJob:
    """`prompt` whole, the places of its slots in order, and how many tokens are wanted for each."""

    prompt: tuple[int, ...]
    places: tuple[int, ...]
    logprobs: int


class Sample(Endpoint[SlotsJob]):
    """POST /v1/sample."""

    body = SampleBody
    kind = "sample"

    def plan(self, data: bytes, entry: Record) -> SlotsJob:
        body, encode = self.parse(data, SampleBody), self.service.codec.encode
        if body.selector.type != "literal":
            text = f"selector.type is {body.selector.type[:64]!r}, allowed is literal"
            raise invalid("invalid_request", text, "selector.type")
        within("logprobs", body.logprobs, 1, MAX_LOGPROBS)
        value = body.selector.value
        if not value or len(slot := encode(value, False)) != 1:
            text = "selector.value must be a text that is one token of this model"
            raise invalid("invalid_request", text, "selector.value")
        check_text(body.prompt, "prompt", self.service.facts, encode)
        special = body.add_special_tokens is not False
        prompt = check_ids(encode(body.prompt, special), "prompt", self.service.facts)
        places = tuple([place for place, token in enumerate(prompt) if token == slot[0]])
        if len(places) != body.prompt.count(value):
            text = f"selector.value is {body.prompt.count(value)} times in the prompt, its token {len(places)} times"
            raise invalid("invalid_request", f"{text}: beside other text it is another token", "selector.value")
        return SlotsJob(prompt, places, body.logprobs or MAX_LOGPROBS)

    async def run(self, job: SlotsJob, entry: Record, receive: Receive, send: Send) -> None:
        found: list[PromptToken] = []
        if job.places and job.places[-1]:
            prompt = job.prompt[: job.places[-1] + 1]
            params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=job.logprobs)
            request = Request(uuid.uuid4().hex, prompt, params, arrival=entry.started, cache_salt=entry.tenant)
            async with self.submitted([request], receive, entry) as subscription:
                while subscription.live:
                    for _, output in await subscription.next():
                        if output.finish_reason in ("error", "cancelled"):
                            raise from_output(output.error or "shutting_down: the request was cancelled by the server")
                        found = output.prompt.tokens(prompt) if output.prompt else found
        at = {place: found[place - 1] for place in job.places if 0 < place <= len(found)}
        choices = [self._choice(index, at.get(place)) for index, place in enumerate(job.places)]
        body = {
            "id": f"sample-{uuid.uuid4().hex}",
            "object": "sample_completion",
            "created": int(time.time()),
            "model": self.service.facts.name,
            "choices": choices,
            "usage": usage_body(Usage(len(job.prompt), len(at), 0, 0)),
        }
        entry.generated_tokens = len(at)
        report(self.service.recorder, entry, [job.prompt], [choice["finish_reason"] for choice in choices])
        await send_whole(send, msgspec.json.encode(body), None, entry)

    def _choice(self, index: int, place: PromptToken | None) -> dict[str, Any]:
        """The first place of a prompt has nothing before it."""
        if place is None or not place.best:
            return {"index": index, "text": "", "logprobs": None, "finish_reason": "empty_logprobs"}
        text = self.service.codec.token_text
        token, logprob = place.best[0]
        logprobs = {
            "tokens": [text(token)],
            "token_logprobs": [logprob],
            "top_logprobs": [{text(other): chance for other, chance in place.best}],
            "token_ids": [[other for other, _ in place.best]],
        }
        return {"index": index, "text": text(token), "logprobs": logprobs, "finish_reason": "selector_match"}
