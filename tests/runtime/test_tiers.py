"""Tiers below the pool: what comes back from them is what was computed, whatever happens to it on the way."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.runtime.fakes import BOTH_LOOPS, RealMemory, Rig, assert_as_alone, request
from tests.runtime.test_prefix import TEXT, ask, chain_of
from xllm.runtime import KVSpec
from xllm.runtime.config import LoadCost, TierConfig, TierFigures
from xllm.runtime.host_tier import HostTier
from xllm.runtime.pages import PoolPlan
from xllm.runtime.store import PageStore
from xllm.runtime.tiered import TieredPool
from xllm.runtime.tiers import Tiers

GROUP = 1500


def tiered(host: int = 0, disk: Path | None = None, disk_groups: int = 1000, **settings) -> Rig:
    """A rig on the system's memory; `host` and `disk_groups` count groups."""
    group_bytes = settings.pop("group_bytes", GROUP)
    held = str(disk) if disk else None
    blocks = -(-(group_bytes + 64) // 4096) * 4096
    tiers = TierConfig(host * group_bytes, held, disk_groups * blocks, "0a")
    return Rig(real_memory=True, group_bytes=group_bytes, tiers=tiers, admit_below=1.0, **settings)


def tiers_of(rig: Rig) -> Tiers:
    assert rig.engine._tiers is not None
    return rig.engine._tiers


def settle(rig: Rig) -> None:
    """Let the background have done all it has to do."""
    while tiers_of(rig).work():
        pass


def figures(rig: Rig, name: str = "host") -> TierFigures:
    return next(tier for tier in rig.engine.stats().tiers if tier.name == name)


def forget(rig: Rig) -> None:
    """Make the pool's cache empty, by a text that needs all of it."""
    plan = rig.engine.pool.plan
    tokens = min(rig.max_len, plan.tokens_for(plan.pages)) - 2
    prompt = tuple(random.Random(rig.now).choices(range(41, rig.vocab), k=tokens))
    rig.engine.submit(request(f"all of it {rig.now}", prompt, 1))
    rig.finish()


@BOTH_LOOPS
@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("group_bytes", [300, 1500, 4096, 10_000])
def test_what_the_pool_evicted_is_loaded(group_bytes, where, overlap, tmp_path):
    host, disk = (400, None) if where == "host" else (0, tmp_path / "kv")
    pages = -(-16 * group_bytes // 4096)
    rig = tiered(host, disk, group_bytes=group_bytes, pages=pages, async_scheduling=overlap)
    assert ask(rig, "first", TEXT[:200]) == 0
    settle(rig)
    forget(rig)
    settle(rig)
    assert rig.engine.stats().evictions > 0
    assert ask(rig, "again", TEXT[:200]) == 192, "what is found counts as cached"
    assert ask(rig, "longer", TEXT[:230]) >= 192
    assert figures(rig, where).loaded >= 10 and rig.engine.stats().loads >= 1


@pytest.mark.parametrize("where", ["host", "disk"])
def test_a_corrupt_group_is_a_miss(where, tmp_path):
    rig = tiered(400 if where == "host" else 0, tmp_path if where == "disk" else None, pages=6)
    ask(rig, "first", TEXT[:200])
    settle(rig)
    store = tiers_of(rig)._stores[0]
    middle = list(store._held)[6]
    if isinstance(store, HostTier):
        store._slot(store._held[middle][0])[GROUP - 1] ^= 1
    else:
        file = store._file(middle)
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    forget(rig)
    cached = ask(rig, "again", TEXT[:200])
    assert cached == 96, "up to the corrupt one"
    assert figures(rig, where).corrupt == 1
    settle(rig)
    forget(rig)
    assert ask(rig, "once more", TEXT[:200]) == 192, "it was computed and stored again"


def test_tenants_and_models_share_nothing_in_tiers(tmp_path):
    rig = tiered(400, tmp_path, pages=6)
    for salt, name in (("", "a"), ("x", "b")):
        assert ask(rig, name, TEXT[:200], salt=salt) == 0
        settle(rig)
    forget(rig)
    assert ask(rig, "c", TEXT[:200], salt="y") == 0
    rig.engine.stop()
    for identity, cached in (("0b", 0), ("0a", 192)):
        tiers = TierConfig(disk=str(tmp_path), disk_bytes=1 << 20, identity=identity)
        other = Rig(real_memory=True, group_bytes=GROUP, tiers=tiers)
        assert ask(other, "first", TEXT[:200]) == cached, "files of another model are left alone"
        other.engine.stop()


def test_the_text_of_a_preempted_sequence_is_loaded_rather_than_computed():
    recomputed = []
    for host in (1, 400):  # of one group, as good as none
        rig = tiered(host, pages=12)
        asked = [request(f"r{n}", (*TEXT[:n], *TEXT[:60]), 150, ignore_eos=True) for n in range(4)]
        for each in asked:
            rig.engine.submit(each)
        while rig.busy:
            rig.turn()
            settle(rig)
        for each in asked:
            assert_as_alone(rig, each)
        stats = rig.engine.stats()
        assert stats.preemptions > 0
        recomputed.append(stats.recomputed_tokens / stats.preemptions)
    assert recomputed[1] < recomputed[0] / 2


def test_others_run_while_one_waits_for_its_load():
    rig = tiered(400, pages=6)
    ask(rig, "first", TEXT[:100])
    settle(rig)
    forget(rig)
    settle(rig)
    rig.engine.submit(request("running", 20, 30, ignore_eos=True))
    rig.turn()
    rig.engine.submit(request("again", TEXT[:100], 3, ignore_eos=True))
    rig.engine.submit(request("behind it", 10, 3, ignore_eos=True))
    for _ in range(10):
        rig.turn()
    assert rig.tokens("running") and rig.end("behind it") and not rig.tokens("again")
    settle(rig)
    rig.finish()
    assert rig.end("again").cached_tokens == 96
    for asked in (request("running", 20, 30, ignore_eos=True), request("again", TEXT[:100], 3, ignore_eos=True)):
        assert_as_alone(rig, asked)


def test_a_cancelled_load_leaves_nothing_behind():
    rig = tiered(400, pages=6)
    ask(rig, "first", TEXT[:100])
    settle(rig)
    forget(rig)
    settle(rig)
    rig.engine.submit(request("again", TEXT[:100], 3))
    rig.turn()
    assert rig.engine._core.parked
    rig.engine.cancel("again")
    rig.turn()
    assert rig.end("again").finish_reason == "cancelled" and not rig.busy
    loaded = figures(rig).loaded
    settle(rig)
    assert figures(rig).loaded == loaded, "nobody wants it any more"
    rig.assert_baseline()


def test_a_load_that_does_not_pay_is_not_made():
    cost = LoadCost(compute=2e-3, host=1e-4, disk=1e-3, wait=40e-3)
    assert not cost.pays(16, 16, 0) and cost.pays(32, 32, 0)
    assert not cost.pays(32, 0, 32) and cost.pays(48, 0, 48)
    assert not LoadCost(compute=1e-3, disk=2e-3).pays(10_000, 0, 10_000), "a disk slower than computing never does"
    rig = tiered(400, pages=6)
    tiers_of(rig)._cost = replace(cost, wait=0.3)
    ask(rig, "first", TEXT[:200])
    settle(rig)
    forget(rig)
    assert ask(rig, "short", TEXT[:150]) == 0 and rig.engine.stats().loads == 0
    forget(rig)
    assert ask(rig, "long", TEXT[:200]) == 192


def spoil(rig: Rig, rng: random.Random) -> None:
    """Break one group somewhere: flip a bit, cut a file, remove it, or overwrite it with another."""
    store = rng.choice(tiers_of(rig)._stores)
    keys = list(store._held)
    if not keys:
        return
    key, other = rng.choice(keys), rng.choice(keys)
    if isinstance(store, HostTier):
        slot = store._slot(store._held[key][0])
        slot[rng.randrange(len(slot))] ^= 1 << rng.randrange(8)
        return
    file = store._file(key)
    if not file.exists():
        return
    held = bytearray(file.read_bytes())
    way = rng.randrange(4)
    if way == 0:
        held[rng.randrange(len(held))] ^= 1 << rng.randrange(8)
        file.write_bytes(held)
    elif way == 1:
        file.write_bytes(held[: rng.randrange(len(held))])
    elif way == 2:
        file.unlink()
    elif store._file(other).exists():
        file.write_bytes(store._file(other).read_bytes())


@BOTH_LOOPS
@pytest.mark.parametrize("seed", range(12))
def test_random_texts_with_corruption_are_answered_as_if_computed_anew(seed, overlap, tmp_path):
    rng = random.Random(seed)
    host, disk = rng.choice([(60, None), (0, tmp_path), (12, tmp_path), (1, tmp_path)])
    group_bytes = rng.choice([700, 1500, 4096, 6000])
    rig = tiered(
        host, disk, rng.choice([20, 100]), max_tokens_per_step=rng.choice([24, 64]), max_chunk=rng.choice([5, 16, 64]),
        max_len=200, vocab=500, pages=1 + rng.choice([8, 10, 14]) * group_bytes // 4096, group_bytes=group_bytes,
        async_scheduling=overlap,
    )  # fmt: skip
    rig.executor.fail_steps = {rng.randint(5, 60)} if seed % 2 else set()
    asked = []
    for n in range(40):
        text = TEXT[rng.choice([0, 0, 0, 1, 2]) :]
        prompt = (*text[: rng.randint(1, 120)], *([n] * rng.randint(0, 3)))
        tokens = min(rng.randint(1, 40), rig.engine.pool.plan.tokens_for(rig.pages) - len(prompt))
        if tokens < 1:
            continue
        asked.append(request(f"r{n}", prompt, tokens, ignore_eos=True))
        rig.engine.submit(asked[-1])
        for _ in range(rng.randint(0, 12)):
            rig.turn()
            rig.engine.pool.premap()
            for _ in range(rng.randint(0, 4)):
                tiers_of(rig).work()
            if rng.random() < 0.1:
                spoil(rig, rng)
        if n % 7 == 3:
            rig.engine.cancel(asked[rng.randrange(len(asked))].id)
    rig.finish()
    ended = [rig.end(each.id).finish_reason for each in asked]
    for each, reason in zip(asked, ended, strict=True):
        if reason == "length":
            assert_as_alone(rig, each)
    assert ended.count("length") > 10
    stats = rig.engine.stats()
    assert stats.loads > 0 and stats.evictions > 0 and sum(tier.loaded for tier in stats.tiers) > 0
    rig.assert_baseline()
    settle(rig)
    rig.engine.pool.check()
    rig.engine.stop()


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
