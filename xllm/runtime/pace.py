"""Decides how many prompt tokens may join sequences that decode, so that a step of both takes the time it may: by what
such steps have taken of late on this machine, whatever a cost model says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from xllm.runtime.policies.state import DEFAULT_TOKEN_SECONDS, Budget, Scaled, StepCost, TokenCost

FEWEST = 16  # prompt tokens that may always join; steps of fewer do not tell what one costs
NEWEST = 0.25  # weight of the last step
MOST = 2.0  # times as long as a cost model says, at most


class Pace:
    """Follows one engine. seconds: what a step with decodes should take; None leaves the budget as it is."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._of_token = 0.0
        self._factor = 1.0

    def cost(self, model: StepCost | None) -> StepCost:
        """What steps take: as the model says, or longer where they did; without a model, as far as it is known."""
        if model is None:
            return TokenCost(self._of_token or DEFAULT_TOKEN_SECONDS)
        return model if self._factor == 1.0 else Scaled(model, self._factor)

    def compare(self, expected: float, seconds: float) -> None:
        """A step was to take so long by `cost`, and took `seconds`; 0 of either: not known. A model that says too much
        wastes little, so it is believed; one that says too little would make every step late."""
        if expected > 0 and seconds > 0:
            self._factor = min(max(1.0, self._factor * (seconds / expected) ** NEWEST), MOST)

    def follow(self, budget: Budget, tokens: Sequence[int], seconds: float) -> Budget:
        """The budget after a step of so many tokens of each sequence, and seconds (0: not known). Decodes alone say
        nothing: what they read is not shared by as many. Prompts alone tell what a token takes, but not how many decode
        beside the next ones."""
        decodes = sum(count == 1 for count in tokens)
        if self._seconds is None or seconds <= 0 or sum(tokens) - decodes < FEWEST:
            return budget
        cost = seconds / sum(tokens)
        self._of_token += (NEWEST if self._of_token else 1.0) * (cost - self._of_token)
        allowed = min(max(FEWEST, int(self._seconds / self._of_token) - decodes), budget.tokens)
        if not decodes or 0 <= allowed - budget.beside_decodes <= budget.beside_decodes // 8:
            return budget  # near enough, or nobody waits; of fewer, sequences wait too long now
        return replace(budget, beside_decodes=allowed)
