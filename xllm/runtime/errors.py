"""Errors of the runtime. Each carries a stable `code` that clients and the service may rely on, and one sentence that
names the cause and the knob. Faults inside a step are values by the time a client sees them (`TokenOutput.error`).
"""

from __future__ import annotations


class RuntimeFault(Exception):
    """Base of every typed error here: `code` is stable, `message` is for the person who must act."""

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class RequestRefused(RuntimeFault):
    """A request that was not accepted; nothing was allocated for it.

    Codes: invalid_parameter, empty_prompt, token_out_of_range, context_length_exceeded, exceeds_capacity, queue_full,
    duplicate_request, asleep, shutting_down, engine_failed; of an order (see orders):
    engine_busy; of other weights: weights_unusable, checksum_mismatch, weights_incompatible; of
    those that should be read again: weights_changed.
    """


class StepError(RuntimeFault):
    """A step (or the preparation of one sequence for it) failed on the device; its requests end with this code."""


class MemoryFault(RuntimeFault):
    """The memory provider could not do what was asked.

    Codes: unsupported_platform, memory_unavailable (the system call and errno are in the message), pool_too_small.
    """


class InvariantBroken(RuntimeFault):
    """`check()` found state that must never exist; the engine stops instead of answering from it."""

    def __init__(self, message: str):
        super().__init__("internal_error", message)
