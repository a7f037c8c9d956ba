"""What a request must be to be accepted, and what it becomes."""

from __future__ import annotations

from collections.abc import Iterable

from xllm.runtime.beams import BeamParams
from xllm.runtime.errors import RequestRefused
from xllm.runtime.executor import Limits
from xllm.runtime.groups import BeamGroup
from xllm.runtime.pages import PoolPlan
from xllm.runtime.request import Request
from xllm.runtime.sequence import Sequence


def new_sequence(
    request: Request, plan: PoolPlan, limits: Limits, rows: int = 1, eos_ids: Iterable[int] = ()
) -> Sequence:
    """A sequence for an acceptable request; its order is set when it is queued. A step holds `rows` of them. Raises
    RequestRefused for one that can never run."""
    prompt, wanted = len(request.prompt), request.params.max_tokens
    max_len, vocab = limits.max_len, limits.vocab
    # The last token is never fed back, so its KV needs no room.
    capacity = plan.tokens_for(plan.pages) + 1
    if prompt == 0:
        raise RequestRefused("empty_prompt", "the prompt has no tokens")
    if min(request.prompt) < 0 or max(request.prompt) >= vocab:
        bad = next(token for token in request.prompt if not 0 <= token < vocab)
        raise RequestRefused("token_out_of_range", f"token id {bad} is not in the vocabulary of {vocab}")
    params = request.params
    for field, named in (
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        *(("bad_words", word) for word in params.bad_words),
    ):
        for token in named:
            if not 0 <= token < vocab:
                raise RequestRefused("token_out_of_range", f"{field} names token {token}, the vocabulary has {vocab}")
    if prompt + (wanted or 1) > max_len:
        asked = f"{prompt} prompt tokens" + (f" and max_tokens {wanted}" if wanted else " and one to generate")
        raise RequestRefused("context_length_exceeded", f"{asked} exceed the context of {max_len} tokens")
    if prompt + (wanted or 1) > capacity:
        raise RequestRefused(
            "exceeds_capacity",
            f"{prompt} prompt tokens and {wanted or 1} to generate can never fit the KV pool of {capacity} tokens; "
            "give the engine more memory",
        )
    most = wanted or min(max_len, capacity) - prompt
    if request.beams is None:
        return Sequence(request, most)
    return _group(request, request.beams, most, plan, rows, eos_ids)


def _group(
    request: Request, beams: BeamParams, most: int, plan: PoolPlan, rows: int, eos_ids: Iterable[int]
) -> BeamGroup:
    """All beams go on in one step, so there must be room for all of them at once."""
    if request.params.prompt_logprobs is not None:
        raise RequestRefused("invalid_parameter", "prompt_logprobs are told of answers that are drawn, not of a search")
    if beams.width > rows:
        text = f"beam_width is {beams.width}, a step holds {rows} sequences; ask for fewer beams, or raise max_seqs"
        raise RequestRefused("exceeds_capacity", text)
    group = BeamGroup(request, beams, most, plan, eos_ids)
    prompt, room = group.prompt_tokens, group.tokens_in(plan, plan.pages) + 1 - group.prompt_tokens
    if room < (request.params.max_tokens or 1):
        raise RequestRefused(
            "exceeds_capacity",
            f"{beams.width} beams of {prompt} prompt tokens and {request.params.max_tokens or 1} to generate can never "
            f"fit the KV pool of {plan.pages} pages; ask for fewer beams or tokens, or give the engine more memory",
        )
    group.limit(min(most, room))
    return group
