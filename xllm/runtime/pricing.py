"""What work that waits will take, by the cost model: seconds until the prompts that are ahead have their first tokens,
beside those that decode. No clock and no thread: who admits asks, and so may who routes or simulates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from xllm.runtime.policies.state import ASSUMED_TOKENS, StepCost, TokenCost

NO_MODEL = TokenCost()


class Work(NamedTuple):
    """Prompts without a first token: how many, their tokens, and what their rows add to the sizes of steps."""

    prompts: int = 0
    tokens: int = 0
    sizes: tuple[float, ...] = ()

    def plus(self, other: Work) -> Work:
        return Work(self.prompts + other.prompts, self.tokens + other.tokens, _sum(self.sizes, other.sizes))

    def less(self, other: Work) -> Work:
        """Without `other`, which is in it."""
        left = self.prompts - other.prompts
        return Work(left, self.tokens - other.tokens, _sum(self.sizes, other.sizes, -1)) if left else Work()


class Steps(NamedTuple):
    """So many steps (not a whole number) of so many seconds each; a step of those that decode alone takes `after`.
    wait_for_slots: there are so many because sequences have to end first, not because of prompts' tokens."""

    count: float
    seconds: float
    after: float
    wait_for_slots: bool = False

    def share(self, whole: Work, left: Work) -> float:
        """Of these steps, which were for `whole`: the part of those that started since, when `left` still waits."""
        if self.wait_for_slots:
            return (whole.prompts - left.prompts) / whole.prompts
        return (whole.tokens - left.tokens) / whole.tokens


@dataclass(frozen=True)
class Prices:
    """cost: of steps. step_tokens: prompt tokens that a step takes; beside_decodes: those of one that also decodes.
    slots: sequences at a time. kv_tokens: those that the KV pages hold, 0 where they do not count. answer: tokens of an
    answer until some have ended, 0 where a prompt gets a row."""

    cost: StepCost = NO_MODEL
    step_tokens: int = 512
    beside_decodes: int = 512
    slots: int = 256
    kv_tokens: int = 0
    answer: float = ASSUMED_TOKENS

    def of(self, prompt: int) -> Work:
        """A prompt of so many tokens, in chunks, none of it cached."""
        most = self.step_tokens
        rows = [(start, min(most, prompt - start)) for start in range(0, prompt, most)]
        return Work(1, prompt, tuple(self.cost.sizes(rows)))

    def steps(self, ahead: Work, running: int, context: float, answer: float) -> Steps:
        """Until all that is ahead has started beside `running` sequences that decode. context: tokens of a sequence;
        answer: of one, which holds its slot as long.

        Prompts share steps as long as their tokens fit, and each step also has a row of everybody who decodes. Where
        more want slots than there are, one ends in every `answer` / slots steps. The step that is under way when they
        come is none of theirs.
        """
        if not ahead.prompts:
            return Steps(0.0, 0.0, self._decodes(running, context)[1])
        slots = self.slots
        if self.kv_tokens:
            slots = max(1, min(slots, int(self.kv_tokens / (context + answer / 2))))
        turns = max(max(0, running + ahead.prompts - slots) * answer, ahead.prompts) / slots
        least = max(1.0, ahead.tokens / self.step_tokens, turns)
        alone = 0.0 if running else min(ahead.tokens / ahead.prompts, ahead.tokens)  # until somebody decodes
        slow = max(least, alone / self.step_tokens + (ahead.tokens - alone) / self.beside_decodes)
        decoding = self._decoding(ahead.prompts, running, slots, least, answer)
        count = slow if decoding >= 1 else least
        decoding = self._decoding(ahead.prompts, running, slots, count, answer)
        decodes, after = self._decodes(decoding, context + answer / 2)
        each = self.cost.of([size / count + beside for size, beside in zip(ahead.sizes, decodes, strict=True)])
        return Steps(count, each, after if running else 0.0, count <= turns)

    @staticmethod
    def _decoding(prompts: int, running: int, slots: int, steps: float, answer: float) -> float:
        """Sequences that decode in the mean of so many steps. Who runs ends meanwhile, half way through its answer; who
        starts decodes until its own ends."""
        begun = (prompts - 1) * (1 - 1 / steps) * min(0.5, max(0.0, answer - 1) / steps)
        return min(slots, running * min(1.0, answer / (2 * steps)) + begun)

    def _decodes(self, rows: float, context: float) -> tuple[tuple[float, ...], float]:
        """What so many rows add to the sizes of a step, and seconds of a step of them alone."""
        sizes = tuple([size * rows for size in self.cost.sizes([(int(context), 1)])])
        return sizes, self.cost.of(sizes) if rows else 0.0


def _sum(ours: Sequence[float], theirs: Sequence[float], sign: int = 1) -> tuple[float, ...]:
    return tuple([one + sign * other for one, other in zip(ours or (0.0,) * len(theirs), theirs, strict=True)])
