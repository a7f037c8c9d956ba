"""The sampler: who is sampled how, and draws, which turn a step's logits into tokens.

State (parameters, penalty history, position) lives on the native side, per slot. A token depends on its row of logits
and the slot's parameters, history, seed, sample index and position, and on nothing else: not on batch, row order,
threads or CPU level.
"""

from __future__ import annotations

import ctypes as c
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from . import Runner
from ._library import library

_INT32_MAX = 2**31 - 1
_VOCAB_MAX = 1 << 19  # sums of softmax numerators fit 64 bits, see sampling_row.h
NOTHING_ALLOWED = -3
_REFUSALS = {1: "is not one of the sampler's slots", 2: "is not attached", 3: "is named twice in one step"}


class SamplingError(ValueError):
    """A parameter that cannot be sampled with. `field` is its name."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field


class Params(Protocol):
    """What `attach` reads. Temperature 0 is greedy; off are top_k <= 0, top_p 1, min_p 0, penalties 0, 0 and 1.
    Logprobs are "raw", or "processed": of the distribution that is drawn from (of a greedy row: at temperature 1)."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def logit_bias(self) -> Mapping[int, float]: ...
    @property
    def min_tokens(self) -> int: ...
    @property
    def logprobs(self) -> int | None: ...
    @property
    def logprobs_mode(self) -> str: ...
    @property
    def allowed_token_ids(self) -> Sequence[int] | None: ...
    @property
    def bad_words(self) -> Sequence[Sequence[int]]: ...


@dataclass(frozen=True)
class SampleResult:
    """One step, S rows. Fresh arrays, so that a result may be read while the next step runs.

    tokens int32[S]: -1 for a row that holds a NaN or +inf, or nothing above -inf; NOTHING_ALLOWED for one of which
    masks, allowed ids and bad words leave nothing. logprobs float32[S]: of the chosen token in the raw distribution, or
    the one that it was drawn from; NaN where the slot asked for none. top_ids int32[S, W], top_logprobs float32[S, W]:
    the best tokens of that distribution, by falling logit, then id; W is the most that a slot of this step asked for;
    unused cells are -1 and -inf.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


class Draw:
    """Rows to draw from, prepared, for the run of the plan that computes them or for `Sampler.draw`. `result` then has
    what was drawn."""

    __slots__ = ("_c", "_slots", "result")

    def __init__(self, sampler: int, logits_address: int, slots: np.ndarray, width: int) -> None:
        rows = len(slots)
        self._slots = slots
        self.result = SampleResult(
            np.empty(rows, np.int32),
            np.empty(rows, np.float32),
            np.empty((rows, width), np.int32),
            np.empty((rows, width), np.float32),
        )
        given = (sampler, logits_address, rows, width, slots.ctypes.data)
        made = (self.result.tokens, self.result.logprobs, self.result.top_ids, self.result.top_logprobs)
        self._c = _CDraw(*given, *(array.ctypes.data for array in made))

    @property
    def address(self) -> int:
        return c.addressof(self._c)

    @property
    def seconds(self) -> float:
        """What drawing took."""
        return self._c.seconds

    def check(self, refused: int) -> None:
        """Raises SamplingError for what the native side says of the slots, if anything."""
        if refused:
            raise SamplingError("slots", f"{self._slots.tolist()}: one {_REFUSALS[refused]}")


@dataclass(frozen=True)
class Scores:
    """Of given tokens, R rows: float32[R] logprobs (NaN: the row holds a NaN, +inf, or nothing above -inf), int32[R]
    ranks, 1 where no token is more likely; the best ones int32[R, W] and float32[R, W] as in SampleResult."""

    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


class _CParams(c.Structure):
    _fields_ = (
        ("seed", c.c_uint64),
        ("top_p", c.c_double),
        ("temperature", c.c_float),
        ("min_p", c.c_float),
        ("presence", c.c_float),
        ("frequency", c.c_float),
        ("repetition", c.c_float),
        ("top_k", c.c_int32),
        ("sample_index", c.c_int32),
        ("min_tokens", c.c_int32),
        ("logprobs", c.c_int32),
        ("processed", c.c_int32),
        ("bias_count", c.c_int32),
        ("suppress_count", c.c_int32),
        ("prompt_count", c.c_int32),
        ("generated_count", c.c_int32),
        ("allowed_count", c.c_int32),
        ("bad_count", c.c_int32),
        ("bias_ids", c.c_void_p),
        ("bias", c.c_void_p),
        ("suppress_ids", c.c_void_p),
        ("prompt_ids", c.c_void_p),
        ("generated_ids", c.c_void_p),
        ("allowed_ids", c.c_void_p),
        ("bad_ids", c.c_void_p),
        ("bad_ends", c.c_void_p),
        ("mask", c.c_void_p),
    )


class _CDraw(c.Structure):
    _fields_ = (
        ("sampler", c.c_void_p),
        ("logits", c.c_void_p),
        ("rows", c.c_int32),
        ("top_width", c.c_int32),
        ("slots", c.c_void_p),
        ("tokens", c.c_void_p),
        ("logprobs", c.c_void_p),
        ("top_ids", c.c_void_p),
        ("top_logprobs", c.c_void_p),
        ("seconds", c.c_double),
    )


class Sampler:
    """Samples rows of `vocab` float32 logits for up to `max_slots` sequences, in parallel on the runner's threads.

    Calls for different slots may overlap. Calls for one slot, and two draws, those of a `Runner.run` too, must be
    ordered by the caller.
    """

    def __init__(self, runner: Runner, vocab: int, max_slots: int, max_logprobs: int = 20) -> None:
        _integer("vocab", vocab, 1, _VOCAB_MAX)
        _integer("max_slots", max_slots, 1, _INT32_MAX)
        _integer("max_logprobs", max_logprobs, 0, _INT32_MAX)
        self.vocab, self.max_slots, self.max_logprobs = vocab, max_slots, max_logprobs
        self._runner = runner
        self._wanted = np.zeros(max_slots, np.int32)
        self._masks: dict[int, np.ndarray] = {}  # by slot; the native side reads them
        self._library = _typed(library())
        self._handle = self._library.xk_sampler_new(vocab, max_slots, runner.threads)
        if not self._handle:
            raise MemoryError(f"the sampler of {max_slots} slots over a vocabulary of {vocab} does not fit in memory")
        self._close = weakref.finalize(self, self._library.xk_sampler_free, self._handle)

    def attach(
        self,
        slot: int,
        params: Params,
        prompt_ids: Sequence[int] | np.ndarray,
        generated_ids: Sequence[int] | np.ndarray = (),
        sample_index: int = 0,
        suppress_ids: Sequence[int] | np.ndarray = (),
        mask: np.ndarray | None = None,
    ) -> None:
        """Starts, or after a preemption resumes, a sequence in `slot`, replacing what was there.

        The next draw has position len(generated_ids). `suppress_ids` (EOS and stop ids) are never drawn before
        `params.min_tokens` tokens exist, unless masks leave nothing else. `mask` is uint32[ceil(vocab / 32)], written
        by the caller between draws: token t may be drawn where bit t % 32 of word t // 32 is set; the distribution is
        that of the tokens left, raw logprobs stay those of all. Raises SamplingError naming the field.
        """
        _integer("slot", slot, 0, self.max_slots - 1)
        if params.seed is None:
            raise SamplingError("seed", "must be chosen before a sequence is attached")
        wanted = -1 if params.logprobs is None else _integer("logprobs", params.logprobs, 0, self.max_logprobs)
        bias_ids = self._ids("logit_bias", list(params.logit_bias))
        bias = np.array([_real("logit_bias", v, -math.inf, math.inf) for v in params.logit_bias.values()], np.float32)
        suppress = self._ids("suppress_ids", suppress_ids)
        prompt, generated = self._ids("prompt_ids", prompt_ids), self._ids("generated_ids", generated_ids)
        allowed = self._ids("allowed_token_ids", params.allowed_token_ids or ())
        bad = self._ids("bad_words", [token for word in params.bad_words for token in word])
        if not all(params.bad_words):
            raise SamplingError("bad_words", "holds a word without tokens")
        ends = np.cumsum([len(word) for word in params.bad_words], dtype=np.int32)
        repetition = _real("repetition_penalty", params.repetition_penalty, 0, math.inf)
        if repetition == 0:
            raise SamplingError("repetition_penalty", "must be above 0")
        if mask is not None and (mask.dtype, mask.shape) != (np.uint32, (-(-self.vocab // 32),)):
            raise SamplingError("mask", f"is {mask.dtype}{list(mask.shape)}, it must be uint32[{-(-self.vocab // 32)}]")
        native = _CParams(
            seed=_integer("seed", params.seed, -(2**63), 2**64 - 1) & (2**64 - 1),
            top_p=_real("top_p", params.top_p, 0, 1),
            temperature=_real("temperature", params.temperature, 0, math.inf),
            min_p=_real("min_p", params.min_p, 0, 1),
            presence=_real("presence_penalty", params.presence_penalty, -math.inf, math.inf),
            frequency=_real("frequency_penalty", params.frequency_penalty, -math.inf, math.inf),
            repetition=repetition,
            top_k=max(0, min(_integer("top_k", params.top_k, -math.inf, math.inf), _INT32_MAX)),
            sample_index=_integer("sample_index", sample_index, 0, _INT32_MAX),
            min_tokens=_integer("min_tokens", params.min_tokens, 0, _INT32_MAX),
            logprobs=wanted,
            processed=params.logprobs_mode == "processed",
            bias_count=len(bias_ids),
            suppress_count=len(suppress),
            prompt_count=len(prompt),
            generated_count=len(generated),
            allowed_count=len(allowed),
            bad_count=len(ends),
            bias_ids=bias_ids.ctypes.data,
            bias=bias.ctypes.data,
            suppress_ids=suppress.ctypes.data,
            prompt_ids=prompt.ctypes.data,
            generated_ids=generated.ctypes.data,
            allowed_ids=allowed.ctypes.data,
            bad_ids=bad.ctypes.data,
            bad_ends=ends.ctypes.data,
            mask=None if mask is None else mask.ctypes.data,
        )
        if self._library.xk_sampler_attach(self._open(), slot, c.byref(native)):
            raise MemoryError(f"the history of slot {slot} does not fit in memory")
        self._wanted[slot] = max(wanted, 0)
        self._masks.pop(slot, None)
        if mask is not None:
            self._masks[slot] = mask

    def detach(self, slot: int) -> None:
        """Frees the slot; sampling it raises until it is attached again."""
        _integer("slot", slot, 0, self.max_slots - 1)
        self._library.xk_sampler_detach(self._open(), slot)
        self._wanted[slot] = 0
        self._masks.pop(slot, None)

    def prepare(self, logits_address: int, slots: np.ndarray) -> Draw:
        """Of row j of float32[S, vocab] at `logits_address` for slot slots[j] (int32[S], distinct). What slots ask for
        is as it is now. Raises SamplingError for a slot that is unknown."""
        slots = np.ascontiguousarray(slots, np.int32)
        if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < self.max_slots:
            raise SamplingError("slots", f"{slots.tolist()} must be 0 to {self.max_slots - 1}")
        return Draw(self._open(), logits_address, slots, int(self._wanted[slots].max(initial=0)))

    def draw(self, draw: Draw) -> SampleResult:
        """Draws from the rows as they are.

        A token joins its slot's history; a row that gives -1 leaves its slot as it was. The logits are edited during
        the call and restored to the same bits. Raises SamplingError, nothing being sampled, for a slot that is detached
        or named twice. Releases the GIL.
        """
        self._open()
        draw.check(self._library.xk_sampler_sample(self._runner.pool, draw.address))
        return draw.result

    def sample(self, logits_address: int, slots: np.ndarray) -> SampleResult:
        """Prepares and draws at once."""
        return self.draw(self.prepare(logits_address, slots))

    def score(self, logits_address: int, tokens: np.ndarray, width: int) -> Scores:
        """What row j of float32[R, vocab] at `logits_address` gives to token tokens[j], and its `width` best; no slot
        is looked at. Raises SamplingError for a token that is none. Releases the GIL."""
        tokens = self._ids("tokens", tokens)
        rows, width = len(tokens), _integer("width", width, 0, self.max_logprobs)
        floats, wide = np.empty(rows, np.float32), np.empty((rows, width), np.float32)
        scores = Scores(floats, np.empty(rows, np.int32), np.empty((rows, width), np.int32), wide)
        outputs = (floats.ctypes.data, scores.ranks.ctypes.data, width, scores.top_ids.ctypes.data, wide.ctypes.data)
        self._library.xk_sampler_score(
            self._open(), self._runner.pool, logits_address, rows, tokens.ctypes.data, *outputs
        )
        return scores

    def close(self) -> None:
        """Frees the native side. Later calls raise."""
        self._handle = None
        self._close()

    def _open(self) -> int:
        if not self._handle:
            raise ValueError("the sampler is closed")
        return self._handle

    def _ids(self, field: str, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        wide = np.asarray(ids, dtype=np.int64) if len(ids) else np.empty(0, np.int64)
        if len(wide) and not 0 <= int(wide.min()) <= int(wide.max()) < self.vocab:
            bad = wide[(wide < 0) | (wide >= self.vocab)][0]
            raise SamplingError(field, f"holds token {bad}, which is outside 0 to {self.vocab - 1}")
        return wide.astype(np.int32)


def _integer(field: str, value: int, low: float, high: float) -> int:
    if not isinstance(value, int | np.integer) or not low <= value <= high:
        raise SamplingError(field, f"is {value!r}, allowed are whole numbers from {low} to {high}")
    return int(value)


def _real(field: str, value: float, low: float, high: float) -> float:
    # As float32: the native side must see neither an infinity nor a NaN.
    if not isinstance(value, int | float | np.number) or not low <= value <= high or not abs(value) <= 3.4e38:
        raise SamplingError(field, f"is {value!r}, allowed are finite numbers from {low} to {high}")
    return float(value) if abs(value) >= 1.2e-38 else 0.0


def _typed(native: c.CDLL) -> c.CDLL:
    pointer, number = c.c_void_p, c.c_int32
    for name, result, arguments in (
        ("xk_sampler_new", pointer, [number, number, number]),
        ("xk_sampler_free", None, [pointer]),
        ("xk_sampler_attach", number, [pointer, number, pointer]),
        ("xk_sampler_detach", None, [pointer, number]),
        ("xk_sampler_score", None, [*[pointer] * 3, number, *[pointer] * 3, number, *[pointer] * 2]),
        ("xk_sampler_sample", number, [pointer] * 2),
    ):
        function = getattr(native, name)
        function.restype, function.argtypes = result, arguments
    return native
