"""Drawing in the native call that computes the rows."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.oracle import batch
from tests.kernels.test_sampling import FEATURES, rows_of, sample
from xllm.kernels.cpu import Call, Runner
from xllm.kernels.cpu.sampling import Sampler, SamplingError


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_draws_from_the_rows_that_it_leaves(threads: int) -> None:
    """One native call: the same tokens, logprobs and histories as rows first and drawing then."""
    runner = Runner(threads)
    vocab, params = 300, FEATURES["everything"]
    half, logits = rows_of(71, 3, vocab), np.zeros((3, vocab), np.float32)
    args = {"a": half.ctypes.data, "b": half.ctypes.data, "out": logits.ctypes.data}
    plan = runner.add_plan([Call("add.f32", args, {"width": vocab})])
    apart, together = Sampler(runner, vocab, 4, 4), Sampler(runner, vocab, 4, 4)
    for sampler in (apart, together):
        for slot in (0, 2, 3):
            sampler.attach(slot, params, [1, 5], [], slot)
    for _ in range(4):
        runner.run(plan, batch([3]))
        want = sample(apart, logits, [3, 0, 2])
        logits[:] = np.nan
        draw = together.prepare(logits.ctypes.data, np.array([3, 0, 2], np.int32))
        runner.run(plan, batch([3]), draw=draw)
        assert draw.seconds > 0 and (want.tokens >= 0).all()
        for name in ("tokens", "logprobs", "top_ids", "top_logprobs"):
            got = getattr(draw.result, name)
            assert got.tobytes() == getattr(want, name).tobytes(), name
    again = together.prepare(logits.ctypes.data, np.array([3, 0, 2], np.int32))
    seconds = runner.timed(plan, batch([3]), 0, 1, again)
    want = sample(apart, logits, [3, 0, 2])
    assert seconds[0] > 0 and again.seconds > 0
    assert again.result.tokens.tolist() == want.tokens.tolist()
    assert again.result.logprobs.tobytes() == want.logprobs.tobytes()
    with pytest.raises(SamplingError, match="is not attached"):
        runner.run(plan, batch([3]), draw=together.prepare(logits.ctypes.data, np.array([1], np.int32)))
    runner.close()
