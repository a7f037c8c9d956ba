"""Decides how a beam search is answered: whole, when the engine has found what there is."""

from __future__ import annotations

from dataclasses import replace

from xllm.runtime import TokenOutput
from xllm.service.answer import Generate, report, requests_of, send_whole
from xllm.service.errors import from_output
from xllm.service.format import Usage, Whole
from xllm.service.gate import Receive, Record, Send
from xllm.service.generation import Choice
from xllm.service.params import Job


class Searched(Generate):
    """A route that also searches."""

    async def run(self, job: Job, entry: Record, receive: Receive, send: Send) -> None:
        if job.beams is None:
            return await super().run(job, entry, receive, send)
        form, results, choices = self.format(job), [], []
        requests = [replace(one, beams=job.beams) for one in requests_of(replace(job, best_of=1), entry)]
        ends: dict[int, TokenOutput] = {}
        async with self.submitted(requests, receive, entry, form.id) as subscription:
            while len(ends) < len(requests):
                for index, output in await subscription.next():
                    if output.finish_reason in ("error", "cancelled"):
                        raise from_output(output.error or "shutting_down: the request was cancelled by the server")
                    ends[index] = output
        form.weights = ends[0].weights
        for found in (found for _, output in sorted(ends.items()) for found in output.found):
            choice, whole = Choice(self.service.codec, (), job.skip_special_tokens, job.reading), Whole()
            for output in found.outputs(job.params[0].logprobs):
                if choice.finish_reason is None:
                    form.gather(whole, choice.push(output))
            results.append(whole)
            choices.append(choice)
        usage = Usage(
            prompt_tokens=sum(map(len, job.prompts)),
            completion_tokens=sum(choice.tokens for choice in choices),
            cached_tokens=sum(output.cached_tokens for output in ends.values()),
            reasoning_tokens=sum(choice.reasoning_tokens for choice in choices),
        )
        entry.generated_tokens = usage.completion_tokens
        report(self.service.recorder, entry, job.prompts, [choice.finish_reason or "abort" for choice in choices])
        await send_whole(send, form.whole(results, usage), None, entry)
