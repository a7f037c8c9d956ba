"""Plans, batches and the pool: what is refused, with which words, and that a step is walked in order."""

import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.kernels.oracle import aligned, batch, pack
from xllm.kernels import cpu


@pytest.fixture(scope="module")
def runner():
    with cpu.Runner(2) as runner:
        yield runner


A, B, OUT = (np.arange(64, dtype=np.float32) for _ in range(3))


def add(a: np.ndarray = A, b: np.ndarray = B, out: np.ndarray = OUT, width=4, rows: Any = cpu.TOKENS, **changes):
    args = {"a": a.ctypes.data, "b": b.ctypes.data, "out": out.ctypes.data} | changes
    return cpu.Call("add.f32", args, {"width": width}, rows=rows)


def test_the_table_describes_every_kernel():
    table = cpu.kernels()
    assert {"linear.bf16", "attention.f32", "rms_norm.f32", "embedding.bf16"} <= table.keys()
    linear = table["linear.f32"]
    assert [(a.name, a.optional) for a in linear.args] == [
        ("x", False),
        ("weight", False),
        ("bias", True),
        ("out", False),
    ]
    assert linear.ints == ("k", "n")
    assert table["rms_norm.f32"].floats == ("eps",)


def test_levels():
    assert cpu.level() == cpu.levels()[-1]
    with pytest.raises(cpu.KernelError, match=r"level z80 does not run here; runnable: .*"):
        cpu.Runner(1, "z80")
    with pytest.raises(cpu.KernelError, match="threads must be 1 to 256"):
        cpu.Runner(0)


HEADS = {"q_heads": 4, "kv_heads": 2, "key_dim": 64, "value_dim": 64}
ATTENTION = {"layer_offset": 0, "group_bytes": 16384, **HEADS, "window": 0, "parts": 128}


def attention(ints=(), floats=()):
    address = A.ctypes.data
    return cpu.Call(
        "attention.f32",
        {"q": address, "out": address, "scratch_parts": address},
        ATTENTION | dict(ints),
        {"scale": 1.0, "softcap": 0.0} | dict(floats),
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (cpu.Call("magic.f32", {}), "kernel magic.f32: no such kernel; there are .*add.f32"),
        (cpu.Call("add.f32", {"a": 4, "out": 4}, {"width": 1}), "argument b is missing"),
        (add(b=B, bias=4), "unknown argument bias; it takes a, b, out"),
        (cpu.Call("add.f32", {"a": None, "b": 4, "out": 4}, {"width": 1}), "argument a must not be none"),
        (cpu.Call("add.f32", {"a": 0, "b": 4, "out": 4}, {"width": 1}), "argument a is a null address"),
        (cpu.Call("add.f32", {"a": 6, "b": 4, "out": 4}, {"width": 1}), "argument a is not aligned to 4 bytes"),
        (cpu.Call("add.f32", {"a": -4, "b": 4, "out": 4}, {"width": 1}), "argument a: -4 is no address"),
        (cpu.Call("add.f32", {"a": "logits", "b": 4, "out": 4}, {"width": 1}), "no input is called 'logits'"),
        (cpu.Call("add.f32", {"a": "last", "b": 4, "out": 4}, {"width": 1}), "argument a is `last`"),
        (
            cpu.Call("add.f32", {"a": "ids", "b": 4, "out": 4}, {"width": 1}, rows=cpu.LOGIT_ROWS),
            "argument a has T rows",
        ),
        (add(width=0), "width must be positive"),
        (cpu.Call("add.f32", {"a": 4, "b": 4, "out": 4}), "int width is missing"),
        (add(rows=(1, -1, 0)), "rows must not be negative"),
        (attention({"q_heads": 3}), "q_heads must be a positive multiple of kv_heads"),
        (attention({"group_bytes": 16380}), "the layer does not fit"),
        (attention({"layer_offset": 2}), "whole elements"),
        (attention({"window": -1}), "window must be 0"),
        (attention(floats={"softcap": -1.0}), "softcap must be 0"),
        (attention(floats={"softcap": float("nan")}), "softcap must be 0"),
    ],
)
def test_a_bad_call_is_refused_by_name(runner, call, message):
    with pytest.raises(cpu.KernelError, match=message) as caught:
        runner.add_plan([add(), call])
    assert str(caught.value).startswith("call 1, kernel ")


def vector(*values: int, dtype: Any = np.int32) -> np.ndarray:
    return np.array(values, dtype)


SPAN = aligned(64)


def raw_batch(**changes):
    parts = {
        "ids": vector(0, 0),
        "positions": vector(3, 4),
        "last": vector(1),
        "seq_start": vector(0, 2),
        "seq_kv": vector(SPAN.ctypes.data, dtype=np.uint64),
    }
    return cpu.Batch(**(parts | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": vector(0, 0, dtype=np.int64)}, "ids must be a contiguous int32 vector, not int64"),
        ({"positions": vector(3)}, "positions has 1 entries, not 2"),
        ({"seq_start": vector(0, 1)}, "seq_start must begin at 0 and end at T"),
        ({"seq_start": vector(0)}, "seq_start has 1 entries, not 2"),
        ({"positions": vector(3, 5)}, "positions of sequence 0 must be consecutive"),
        ({"positions": vector(-1, 0)}, "positions of sequence 0 must be consecutive and not negative"),
        ({"last": vector(2)}, r"last\[0\] is not a row of the step"),
        ({"seq_kv": vector(0, dtype=np.uint64)}, r"seq_kv\[0\] is null or not aligned"),
        ({"ids": vector(0, -1)}, "ids refer to row 0 of prev_tokens"),
        ({"ids": vector(0, -3), "prev_tokens": vector(1, 2)}, "ids refer to row 2 of prev_tokens"),
        ({"ids": vector(0, 40)}, r"ids\[1\] = 40 is outside the vocabulary"),
        ({"ids": vector(0, -1), "prev_tokens": vector(40)}, r"ids\[1\] = 40 is outside the vocabulary"),
    ],
)
def test_a_bad_batch_is_refused(runner, changes, message):
    weight, out = pack(np.zeros((40, 1), np.float32), "float32"), np.zeros(2, np.float32)
    args = {"ids": "ids", "weight": weight.ctypes.data, "out": out.ctypes.data}
    plan = runner.add_plan([cpu.Call("embedding.f32", args, {"vocab": 40, "width": 1})])
    with pytest.raises(cpu.KernelError, match=message):
        runner.run(plan, raw_batch(**changes))
    runner.run(plan, raw_batch())


def test_negative_ids_take_the_previous_step_s_tokens(runner):
    table, out = np.arange(30, dtype=np.float32)[:, None], np.zeros(5, np.float32)
    weight = pack(table, "float32")
    args = {"ids": "ids", "weight": weight.ctypes.data, "out": out.ctypes.data}
    plan = runner.add_plan([cpu.Call("embedding.f32", args, {"vocab": 30, "width": 1})])
    step = raw_batch(
        ids=vector(7, -1, -3, 8, -2),
        positions=np.arange(5, dtype=np.int32),
        seq_start=vector(0, 5),
        prev_tokens=vector(21, -1, 29),
    )
    runner.run(plan, step)
    assert out.tolist() == [7, 21, 29, 8, 0], "a poisoned row (-1) reads token 0"


def test_calls_run_in_order_and_in_ranges(runner):
    """Each call doubles the previous one's result; stages of one unit and of many alternate."""
    rows, width, count = 64, 1024, 12
    arrays = [np.ones((rows, width), np.float32) for _ in range(count + 1)]
    calls = [
        cpu.Call("add.f32", {"a": x.ctypes.data, "b": x.ctypes.data, "out": y.ctypes.data}, {"width": w}, rows=r)
        for i, (x, y) in enumerate(pairwise(arrays))
        for w, r in [(width, cpu.TOKENS) if i % 3 else (1, cpu.LOGIT_ROWS)]
    ]
    plan, step = runner.add_plan(calls), batch([rows], last=[0])
    for repeat in range(50):
        for x in arrays[1:]:
            x[:] = 0
        if repeat % 2:
            runner.run(plan, step)
        else:
            runner.run(plan, step, 0, 5)
            runner.run(plan, step, 5)
        value, whole = 1.0, 1.0
        for i, y in enumerate(arrays[1:]):
            value, whole = 2 * value, (2 * whole if i % 3 else 0)
            assert y[0, 0] == value
            assert y[-1, -1] == whole
    for begin, end in ((-1, 2), (3, 2), (0, count + 1)):
        with pytest.raises(cpu.KernelError, match="range of the plan's calls"):
            runner.run(plan, step, begin, end)
    with pytest.raises(cpu.KernelError, match="no such plan"):
        runner.run(99_999, step)


def test_timed_runs_compute_the_same_and_give_every_call_a_time(runner):
    """Of one stage and of two, of one unit and of many, and of none."""
    x = np.ones((64, 1024), np.float32)
    outs = [np.zeros_like(x) for _ in range(3)]
    none = add(a=x, b=x, out=outs[2], width=1024, rows=(0, 1, 0))
    plan = runner.add_plan([add(a=x, b=x, out=outs[0], width=1024), none, add(a=outs[0], b=x, out=outs[1], width=1024)])
    step = batch([64], last=[])
    seconds = runner.timed(plan, step, 0, 3)
    assert seconds.shape == (3,) and (seconds >= 0).all() and seconds[0] > 0 and seconds[2] > 0
    assert (outs[1] == 3).all() and not outs[2].any()
    assert runner.timed(plan, step, 1, 2).shape == (1,)
    assert runner.timed(plan, batch([]), 0, 3).shape == (3,)
    with pytest.raises(cpu.KernelError, match="range of the plan's calls"):
        runner.timed(plan, step, 0, 4)


def test_an_empty_step_does_nothing(runner):
    plan = runner.add_plan([add()])
    OUT[:] = -1
    runner.run(plan, batch([]))
    runner.run(runner.add_plan([]), batch([1]))
    assert (OUT == -1).all()


def test_steps_from_many_python_threads_are_served_one_by_one(runner):
    x = np.ones((64, 1024), np.float32)
    outs = [np.zeros_like(x) for _ in range(4)]
    plans = [
        runner.add_plan([add(a=x, b=x, out=out, width=1024), add(a=out, b=x, out=out, width=1024)]) for out in outs
    ]
    threads = [threading.Thread(target=lambda p=p: [runner.run(p, batch([64])) for _ in range(30)]) for p in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((out == 3).all() for out in outs)


def test_more_threads_than_cores(rng):
    x = rng.standard_normal((640, 1024), np.float32)
    out = np.zeros_like(x)
    with cpu.Runner(7) as many:
        plan = many.add_plan([add(a=x, b=x, out=out, width=1024)])
        for _ in range(20):
            out[:] = 0
            many.run(plan, batch([640]))
            assert np.array_equal(out, x + x)


def test_a_closed_runner_says_so():
    runner = cpu.Runner(1)
    runner.close()
    runner.close()
    with pytest.raises(cpu.KernelError, match="the runner is closed"):
        runner.add_plan([add()])
    with pytest.raises(cpu.KernelError, match="the runner is closed"):
        runner.run(0, batch([1]))


def test_the_ceilings_can_be_measured(runner):
    assert runner.read_bandwidth(1 << 20, 1) > 0
    assert runner.fma_peak(1000, 1) > 0
