"""Tiers below the pool: what comes back from them is what was computed, whatever happens to it on the way."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.runtime.fakes import BOTH_LOOPS, Rig, assert_as_alone, request
from tests.runtime.test_prefix import TEXT, ask
from xllm.runtime.config import LoadCost, TierConfig, TierFigures
from xllm.runtime.host_tier import HostTier
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
