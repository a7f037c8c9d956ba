"""What one tier keeps, for how long, and where it may lie."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from xllm.runtime import RuntimeFault
from xllm.runtime.config import EngineConfig, LoadCost, TierConfig
from xllm.runtime.disk_tier import DiskTier
from xllm.runtime.host_tier import HostTier
from xllm.runtime.tier_speed import NEVER, disk_seconds, host_seconds

GROUP = 1500
KEYS = [bytes([n]) * 16 for n in range(20)]


def data(n: int, size: int = GROUP) -> memoryview:
    return memoryview(bytes([n]) * size)


MAKERS = (lambda _: HostTier(4 * GROUP + 9, GROUP), lambda folder: DiskTier(folder, 4 * 4096, GROUP, "0a"))


@pytest.mark.parametrize("make", MAKERS, ids=["host", "disk"])
def test_a_tier_keeps_to_its_bytes_and_lets_the_oldest_use_go(make: Callable[[Path], HostTier | DiskTier], tmp_path):
    tier = make(tmp_path)
    for n in range(4):
        tier.put(KEYS[n], data(n))
    tier.refresh(KEYS[:2])
    assert tier.get(KEYS[2]) == data(2)
    for n in (4, 5):
        tier.put(KEYS[n], data(n))
    assert [n for n in range(6) if KEYS[n] in tier] == [0, 2, 4, 5], "3 went, then 1, the end of what was used together"
    figures = tier.figures()
    assert (figures.stored, figures.loaded, figures.evictions) == (6, 1, 2)
    assert figures.held_bytes <= figures.limit_bytes
    if isinstance(tier, DiskTier):
        files = [file for file in (tmp_path / "kv-0a").iterdir() if file.suffix == ".kv"]
        assert len(files) == 4 and {file.stat().st_mode & 0o777 for file in files} == {0o600}
        assert (tmp_path / "kv-0a").stat().st_mode & 0o777 == 0o700
    tier.close()


def test_files_survive_a_restart_and_others_are_left(tmp_path):
    tier = DiskTier(tmp_path, 4 * 4096, GROUP, "0a")
    for n in range(4):
        tier.put(KEYS[n], data(n))
        os.utime(tier._file(KEYS[n]), (n, n))
    assert tier.get(KEYS[0]) == data(0), "used now"
    with pytest.raises(RuntimeFault, match="another server uses it"):
        DiskTier(tmp_path, 4 * 4096, GROUP, "0a")
    DiskTier(tmp_path, 4 * 4096, GROUP, "0b").close()
    tier.close()
    folder = tmp_path / "kv-0a"
    (folder / "notes.txt").write_text("mine")
    (folder / f"{KEYS[9].hex()}.part").write_text("half of a file")
    (folder / f"{KEYS[8].hex()}.kv").symlink_to(folder / "notes.txt")
    smaller = DiskTier(tmp_path, 2 * 4096, GROUP, "0a")
    assert [n for n in range(10) if KEYS[n] in smaller] == [0, 3], "the oldest went"
    assert smaller.get(KEYS[3]) == data(3)
    assert sorted(file.suffix for file in folder.iterdir()) == ["", ".kv", ".kv", ".kv", ".txt"]
    for _ in range(2):
        smaller.close()


def test_folders_and_sizes_that_can_not_do_are_refused(tmp_path):
    with pytest.raises(RuntimeFault, match="holds no group"):
        HostTier(GROUP - 1, GROUP)
    with pytest.raises(RuntimeFault, match="holds no file"):
        DiskTier(tmp_path, 4095, GROUP, "0a")
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeFault, match="can't be used"):
        DiskTier(tmp_path / "file", 1 << 20, GROUP, "0a")
    (tmp_path / "open").mkdir(mode=0o700)
    os.chmod(tmp_path / "open", 0o777)
    with pytest.raises(RuntimeFault, match="only they can write to"):
        DiskTier(tmp_path / "open", 1 << 20, GROUP, "0a")
    with pytest.raises(RuntimeFault, match="prefix_cache must be on"):
        EngineConfig(kv_bytes=1, prefix_cache=False, tiers=TierConfig())


def test_how_fast_tiers_are_is_found_out_and_nothing_stays(tmp_path) -> None:
    assert 0 < host_seconds(4096) < NEVER
    assert 0 < disk_seconds(tmp_path / "new", 4096) < NEVER
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    assert disk_seconds(tmp_path / "file", 4096) == NEVER
    assert not LoadCost(compute=1.0, disk=4096 * NEVER).pays(10_000, 0, 16), "what can't be read is never waited for"
