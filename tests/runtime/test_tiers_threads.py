"""The tiers' thread beside others: it fails, hangs or comes too late, and nothing is lost and nobody waits for ever."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import threading
import time

import pytest

from tests.runtime.fakes import RealMemory, assert_as_alone, request
from tests.runtime.test_prefix import TEXT, ask, chain_of
from tests.runtime.test_tiers import figures, forget, settle, tiered, tiers_of
from xllm.runtime import KVSpec
from xllm.runtime.pages import PoolPlan
from xllm.runtime.store import PageStore
from xllm.runtime.tiered import TieredPool


def test_what_a_step_found_stays_until_it_has_started():
    """A load that comes in between must not evict it."""
    plan = PoolPlan(KVSpec(4096), 4096, pages=4, span_pages=4, spans=2)
    pool = TieredPool(plan, PageStore(RealMemory(4096), 4))
    chain = chain_of(0, 64)
    slot = pool.start(64)
    pool.grow(slot, 64)
    for position in range(64):
        ctypes.c_int32.from_address(pool.base(slot) + position * 256).value = position
    pool.finish(slot, chain)
    other = threading.Thread(target=pool.put_page, args=(0, chain_of(1, 64)[3:], [(0, memoryview(bytes(4096)))]))
    with pool.store.planning:
        assert pool.match(chain) == 4
        other.start()
        other.join(0.1)
        assert pool.match(chain) == 4 and pool.figures().evictions == 0
        slot = pool.start(64, chain)
    other.join()
    pool.grow(slot, 64)
    read = [ctypes.c_int32.from_address(pool.base(slot) + position * 256).value for position in range(64)]
    assert read == list(range(64))
    pool.check()
    pool.close()


def test_a_page_that_is_filled_while_its_pool_closes_is_lost_to_nobody(monkeypatch: pytest.MonkeyPatch):
    plan, store = PoolPlan(KVSpec(4096), 4096, pages=4, span_pages=4, spans=2), PageStore(RealMemory(4096), 8)
    pool, other = TieredPool(plan, store), TieredPool(plan, store)
    closing, fill = threading.Thread(target=pool.close), store.memory.copy_in

    def copy_in(page, pieces) -> None:
        closing.start()
        while not pool._closing:
            time.sleep(0.001)
        fill(page, pieces)

    monkeypatch.setattr(store.memory, "copy_in", copy_in)
    pool.put_page(0, chain_of(0, 16), [(0, memoryview(bytes(4096)))])
    closing.join(60)
    assert not pool.put_page(0, chain_of(0, 16), [(0, memoryview(bytes(4096)))]), "it is closed"
    other.check()
    assert len(store.free) == 8
    other.close()


def test_what_is_read_while_its_pool_closes_counts_for_nothing(monkeypatch: pytest.MonkeyPatch):
    """Its page may be another model's by then."""
    plan, store = PoolPlan(KVSpec(4096), 4096, pages=4, span_pages=4, spans=2), PageStore(RealMemory(4096), 8)
    pool, other = TieredPool(plan, store), TieredPool(plan, store)
    (digest,) = chain = chain_of(0, 16)
    assert pool.put_page(0, chain, [(0, memoryview(bytes(4096)))])
    read, into = store.memory.copy_out, memoryview(bytearray(4096))
    assert pool.read_group(digest, 0, into)

    def copy_out(*arguments) -> None:
        pool.close()
        read(*arguments)

    monkeypatch.setattr(store.memory, "copy_out", copy_out)
    assert not pool.read_group(digest, 0, into)
    other.close()


def test_with_threads_it_is_the_same(tmp_path):
    """The engine's own thread and the tiers' beside each other, in a pool much too small."""
    rig = tiered(40, tmp_path, 60, pages=14, max_len=200, vocab=500, premap=True)
    ended, done = [], threading.Event()

    def sink(outputs):
        rig.outputs.extend(outputs)
        ended.extend(output for output in outputs if output.finish_reason)
        if len(ended) == len(asked):
            done.set()

    rng = random.Random(3)
    asked = [request(f"r{n}", TEXT[n % 3 : rng.randint(4, 140)], 12, ignore_eos=True) for n in range(120)]
    rig.engine._sink = sink
    rig.engine.start()
    for each in asked:
        rig.engine.submit(each)
    assert done.wait(120)
    stats = rig.engine.stats()
    rig.engine.stop()
    for each in asked:
        assert_as_alone(rig, each)
    assert stats.loads > 0 and stats.evictions > 0
    assert "xllm-tiers" not in {thread.name for thread in threading.enumerate()}


def test_a_thread_that_fails_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch):
    rig = tiered(400, pages=6)
    ask(rig, "first", TEXT[:90])
    settle(rig)
    forget(rig)
    settle(rig)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    def sink(outputs):
        rig.outputs.extend(outputs)
        if outputs[-1].finish_reason:
            done.set()

    monkeypatch.setattr(tiers_of(rig)._stores[0], "get", fail)
    done = threading.Event()
    rig.engine._sink = sink
    rig.engine.start()
    rig.engine.submit(request("again", TEXT[:90], 5, ignore_eos=True))
    assert done.wait(60)
    rig.engine.stop()
    assert_as_alone(rig, request("again", TEXT[:90], 5, ignore_eos=True))


def test_a_disk_that_hangs_holds_nobody_up(tmp_path, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr("xllm.runtime.tiers.STUCK_SECONDS", 0.2)
    rig = tiered(0, tmp_path, pages=6)
    ask(rig, "first", TEXT[:90])
    settle(rig)
    forget(rig)
    settle(rig)
    hangs, done = threading.Event(), threading.Event()
    get = tiers_of(rig)._stores[0].get
    monkeypatch.setattr(tiers_of(rig)._stores[0], "get", lambda key: get(key) if hangs.wait(60) else None)

    def sink(outputs):
        rig.outputs.extend(outputs)
        if outputs[-1].finish_reason:
            done.set()

    rig.engine._sink = sink
    rig.engine.start()
    for name in ("again", "and again"):
        done.clear()
        rig.engine.submit(request(name, TEXT[:90], 5, ignore_eos=True))
        assert done.wait(30)
    rig.engine.stop()
    thread = tiers_of(rig)._thread
    assert thread is not None and thread.is_alive() and not rig.memory._ranges
    hangs.set()
    thread.join(60)
    assert not thread.is_alive() and "failed" not in caplog.text, "what comes too late finds nothing to be put into"
    for name in ("again", "and again"):
        assert_as_alone(rig, request(name, TEXT[:90], 5, ignore_eos=True))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_is_full_or_fails_turns_the_tier_off_and_serving_goes_on(number, tmp_path, monkeypatch, caplog):
    rig = tiered(0, tmp_path, pages=6)
    ask(rig, "first", TEXT[:100])
    for _ in range(3):
        tiers_of(rig).work()
    real = os.writev

    def fail(fd, pieces):
        real(fd, [pieces[0][:7]])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("xllm.runtime.disk_tier.os.writev", fail)
    settle(rig)
    assert figures(rig, "disk").off == errno.errorcode[number]
    assert not rig.engine.stats().not_stored and not tiers_of(rig)._leaving
    assert "the disk cache is off until the next start" in caplog.text
    forget(rig)
    assert ask(rig, "again", TEXT[:100]) == 0
    assert not tiers_of(rig)._leaving, "nothing is copied for a tier that is off"
    files = [file.suffix for file in (tmp_path / "kv-0a").iterdir()]
    assert sorted(files) == ["", ".kv", ".kv", ".kv"], "no half of a file"
