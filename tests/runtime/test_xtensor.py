"""Real pages on the running system: contents follow the page, holes are safe, slots are independent."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest

from xllm.runtime import KVSpec, MemoryFault
from xllm.runtime import xtensor as module
from xllm.runtime.kv import KvPool
from xllm.runtime.pages import plan_pool
from xllm.runtime.store import PageStore
from xllm.runtime.xtensor import LinuxMemory, PageTicket

PAGE = 64 << 10
linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd and mmap are Linux's")


def view(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address))


@pytest.fixture
def memory():
    memory = LinuxMemory(PAGE)
    yield memory
    memory.release()


@linux
def test_a_pattern_across_page_borders_reads_back(memory):
    base = memory.reserve(8 * PAGE)
    pages = memory.create_pages(8)
    for place, page in enumerate(reversed(pages)):
        memory.map(page, base + place * PAGE)
    pattern = np.random.default_rng(0).integers(0, 256, 8 * PAGE, np.uint8)
    view(base, 8 * PAGE)[:] = pattern
    assert (view(base, 8 * PAGE) == pattern).all()
    again = memory.reserve(8 * PAGE)
    for place, page in enumerate(reversed(pages)):
        memory.map(page, again + place * PAGE)
    assert (view(again, 8 * PAGE) == pattern).all(), "one page may be mapped twice"


@linux
def test_holes_read_as_zeros_before_and_after_use(memory):
    base = memory.reserve(3 * PAGE)
    (page,) = memory.create_pages(1)
    memory.map(page, base + PAGE)
    view(base + PAGE, PAGE)[:] = 7
    assert not view(base, PAGE).any() and not view(base + 2 * PAGE, PAGE).any()
    memory.unmap(base + PAGE)
    assert not view(base, 3 * PAGE).any()
    memory.populate(base + PAGE)
    memory.map(page, base)
    assert (view(base, PAGE) == 7).all(), "the page kept its bytes"


@linux
def test_writing_a_hole_is_a_fault_not_corruption():
    code = (
        "import ctypes; from xllm.runtime.xtensor import LinuxMemory; m = LinuxMemory(65536); a = m.reserve(65536)\n"
        "ctypes.memset(a, 1, 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -11


@linux
def test_writing_where_a_page_is_shared_is_a_fault():
    code = (
        "import ctypes; from xllm.runtime.xtensor import LinuxMemory; m = LinuxMemory(65536); a = m.reserve(131072)\n"
        "(p,) = m.create_pages(1); m.map(p, a); ctypes.memset(a, 1, 65536); m.map(p, a + 65536, writable=False)\n"
        "print(ctypes.string_at(a + 65536, 2), flush=True)\n"
        "ctypes.memset(a + 65536, 2, 1)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (ran.returncode, ran.stdout) == (-11, b"b'\\x01\\x01'\n")


@linux
def test_the_start_of_a_page_is_copied_wherever_it_is_mapped(memory):
    base = memory.reserve(2 * PAGE)
    source, target = memory.create_pages(2)
    memory.map(source, base)
    view(base, PAGE)[:] = 7
    memory.unmap(base)
    memory.map(target, base + PAGE)
    memory.copy(source, base + PAGE, 1000)
    assert (view(base + PAGE, 1000) == 7).all() and not view(base + PAGE + 1000, PAGE - 1000).any()


@linux
def test_populate_keeps_bytes_with_and_without_the_kernels_help(memory, monkeypatch):
    base = memory.reserve(PAGE)
    (page,) = memory.create_pages(1)
    memory.map(page, base)
    view(base, PAGE)[:100] = 5
    memory.populate(base)
    monkeypatch.setattr(module, "_MADV_POPULATE_WRITE", 9999)
    memory.populate(base)
    assert view(base, PAGE).sum() == 500


@linux
def test_exported_pages_are_the_same_memory(memory):
    base = memory.reserve(PAGE)
    memory.create_pages(3)
    memory.map(2, base)
    other = LinuxMemory(PAGE)
    there = other.reserve(2 * PAGE)
    imported = other.import_page(memory.export_page(2))
    other.map(imported, there + PAGE)
    view(base, PAGE)[17] = 99
    assert view(there + PAGE, PAGE)[17] == 99
    memory.release()
    assert view(there + PAGE, PAGE)[17] == 99, "readable after the owner is gone"
    with pytest.raises(MemoryFault, match="cannot join"):
        other.import_page(PageTicket(0, 0, 2 * PAGE))
    other.release()


@linux
def test_release_returns_descriptors_and_mappings():
    def footprint():
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), sum("xllm-kv" in line for line in maps)

    before = footprint()
    for _ in range(20):
        memory = LinuxMemory(PAGE)
        base = memory.reserve(16 * PAGE)
        for page in memory.create_pages(8):
            memory.map(page, base + 2 * page * PAGE)
        memory.release()
        memory.release()
    assert footprint() == before


@linux
def test_faults_name_the_call_and_the_errno(memory):
    with pytest.raises(MemoryFault, match=r"mmap failed for .* bytes: ENOMEM"):
        memory.reserve(1 << 60)
    with pytest.raises(MemoryFault, match="power of two"):
        LinuxMemory(5000)


def test_other_systems_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(MemoryFault, match="unsupported_platform: the KV pool needs Linux"):
        LinuxMemory()


@linux
def test_whole_pages_of_two_mebibytes_work_with_whatever_huge_pages_there_are():
    memory = LinuxMemory()
    base = memory.reserve(4 * memory.page_bytes)
    assert base % memory.page_bytes == 0
    (page,) = memory.create_pages(1)
    memory.map(page, base + memory.page_bytes)
    memory.populate(base + memory.page_bytes)
    assert memory.huge_pages in ("hugetlb", "transparent", "none")
    assert not view(base + memory.page_bytes, memory.page_bytes).any()
    memory.release()


@linux
def test_slots_are_independent_and_the_pool_returns_to_baseline():
    plan = plan_pool(KVSpec(20_000), max_len=256, max_seqs=4, kv_bytes=24 * PAGE, page_bytes=PAGE)
    pool = KvPool(plan, PageStore(LinuxMemory(PAGE), plan.pages))
    pool.start_premapping()
    for round_ in range(5):
        slots = [pool.start(100) for _ in range(4)]
        for tokens in (60, 150, 250):
            for slot in slots:
                pool.grow(slot, tokens)
                size = plan.pages_for(tokens) * PAGE
                view(pool.base(slot), size)[:] = 10 * round_ + slot + 1
            for slot in slots:
                size = plan.pages_for(tokens) * PAGE
                assert (view(pool.base(slot), size) == 10 * round_ + slot + 1).all()
        for slot in slots:
            pool.finish(slot)
        pool.check()
    assert pool.free_pages == plan.pages
    pool.close()
