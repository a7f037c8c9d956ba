"""Compiles a grammar for the first time, in a process of its own: one that never ends, wants too much memory or
overflows the stack ends this process, not the server. A line of JSON in, the grammar; a line out, why it is refused.

Run as a script; the server imports the limits, so that both compile the same.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import threading
import time
from typing import Any

CPU_SECONDS = 2
MEMORY_BYTES = 512 << 20
STACK_BYTES = 1 << 20  # less than a thread of the server has


def limits() -> Any:
    """What one grammar may cost: symbols of its rules; work and states of its lexer, to start with and for each token.
    A unit of lexer fuel is some ten nanoseconds."""
    import llguidance

    return llguidance.LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


class Bytes:
    """The smallest vocabulary that can spell everything."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*(bytes((byte,)) for byte in range(256)), b"<end>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def compiled(table: Any, grammar: str) -> Any:
    """An llguidance matcher whose first mask is made. Raises ValueError with the reason for one that is refused."""
    import llguidance

    matcher = llguidance.LLMatcher(table, grammar, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(matcher.get_error().replace("<non-verbose/>", "").strip())
    return matcher


def main() -> None:
    import llguidance

    table = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), n_vocab=257, eos_token=[256], slices=[])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    threading.stack_size(STACK_BYTES)
    for line in sys.stdin:
        answer = [""]

        def attempt(grammar: str, answer: list[str] = answer) -> None:
            try:
                compiled(table, grammar)
            except ValueError as error:
                answer[0] = str(error) or "it cannot be compiled"

        until = math.ceil(time.process_time()) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))
        thread = threading.Thread(target=attempt, args=(json.loads(line),))
        thread.start()
        thread.join()
        print(json.dumps(answer[0]), flush=True)


if __name__ == "__main__":
    main()
