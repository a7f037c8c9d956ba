"""Decides how a beam search is answered: step by step through the engine, then whole."""

from __future__ import annotations

from dataclasses import replace

from xllm.runtime.beams import BeamSearch
from xllm.service.answer import Generate, report, requests_of, send_whole
from xllm.service.errors import ApiError, from_output
from xllm.service.format import Usage, Whole
from xllm.service.gate import Receive, Record, Send
from xllm.service.generation import Choice
from xllm.service.params import Job


class Searched(Generate):
    """A route that also searches."""

    async def run(self, job: Job, entry: Record, receive: Receive, send: Send) -> None:
        if job.beams is None:
            return await super().run(job, entry, receive, send)
        first = requests_of(replace(job, best_of=1), entry)
        searches = [BeamSearch(request, job.beams, self.service.facts.eos_ids) for request in first]
        form, results, choices = self.format(job), [], []
        while live := [search for search in searches if search.live]:
            weights = await self._step(live, receive, entry, form.id)
            if form.weights not in ("", weights):
                text = "the weights were updated in the middle of the search; ask again"
                raise ApiError(503, "weights_updated", text, headers={"retry-after": "1"})
            form.weights = weights
        for found in (found for search in searches for found in search.results()):
            choice, whole = Choice(self.service.codec, (), job.skip_special_tokens, job.reading), Whole()
            for output in found.outputs(job.params[0].logprobs):
                if choice.finish_reason is None:
                    form.gather(whole, choice.push(output))
            results.append(whole)
            choices.append(choice)
        usage = Usage(
            prompt_tokens=sum(map(len, job.prompts)),
            completion_tokens=sum(choice.tokens for choice in choices),
            cached_tokens=sum(search.cached_tokens for search in searches),
            reasoning_tokens=sum(choice.reasoning_tokens for choice in choices),
        )
        entry.generated_tokens = usage.completion_tokens
        report(self.service.recorder, entry, job.prompts, [choice.finish_reason or "abort" for choice in choices])
        await send_whole(send, form.whole(results, usage), None, entry)

    async def _step(self, searches: list[BeamSearch], receive: Receive, entry: Record, name: str) -> str:
        """One token more for every beam of these. Returns the version of the weights that gave them."""
        asked = [search.requests() for search in searches]
        requests = [request for of_search in asked for request in of_search]
        ends = {}
        async with self.submitted(requests, receive, entry, name) as subscription:
            while len(ends) < len(requests):
                for _, output in await subscription.next():
                    if output.finish_reason in ("error", "cancelled"):
                        raise from_output(output.error or "shutting_down: the request was cancelled by the server")
                    ends[output.request_id] = output
        for search, of_search in zip(searches, asked, strict=True):
            search.advance([ends[request.id] for request in of_search])
        return next(iter(ends.values())).weights
