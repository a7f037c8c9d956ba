"""What a process may use, read from machines made of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xllm.kernels import cpu
from xllm.targets import host


def machine(root: Path, own: str, mounts: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": own, "proc/self/mountinfo": mounts, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 23 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "33 23 0:29 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)


def test_the_narrowest_of_nested_groups_counts(tmp_path: Path) -> None:
    place = "sys/fs/cgroup/a.slice/b.scope"
    files = {f"{place}/cpu.max": "max 100000\n", "sys/fs/cgroup/a.slice/cpu.max": "150000 100000\n"}
    root = machine(tmp_path, "0::/a.slice/b.scope\n", V2, files)
    assert host.cpu_quota(root) == 1.5
    (root / place / "cpu.max").write_text("50000 100000\n")
    assert host.cpu_quota(root) == 0.5
    found = host.threads(None, root)
    assert found.count == 1 and "CPU quota of 0.5" in found.why


def test_more_cores_than_a_plan_runner_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "usable_cores", lambda: 384)
    assert host.threads(None, tmp_path).count == host.MOST_THREADS
    cpu.Runner(host.MOST_THREADS).close()
    with pytest.raises(ValueError, match="threads must be 1 to 256"):
        cpu.Runner(host.MOST_THREADS + 1)


def test_groups_of_version_1(tmp_path: Path) -> None:
    place = "sys/fs/cgroup/cpu,cpuacct"
    files = {
        f"{place}/cpu.cfs_quota_us": "-1\n", f"{place}/cpu.cfs_period_us": "100000\n",
        f"{place}/x/cpu.cfs_quota_us": "250000\n", f"{place}/x/cpu.cfs_period_us": "100000\n",
        f"{place}/x/y/cpu.cfs_quota_us": "-1\n", f"{place}/x/y/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "1000\n",
        "sys/fs/cgroup/memory/x/memory.stat": "rss 1\ntotal_rss 300\ntotal_shmem 100\ntotal_cache 500\n",
    }  # fmt: skip
    own = "5:memory:/x\n4:cpu,cpuacct:/x/y\n3:cpuset:/\n"
    root = machine(tmp_path, own, V1, files)
    assert host.cpu_quota(root) == 2.5
    assert host.memory_left(root) == 600


def test_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    """The mount begins at the container's own group, and so does what the process is told."""
    mounts = V2.replace("0:26 / ", "0:26 /docker/abc ")
    root = machine(tmp_path, "0::/docker/abc/inner\n", mounts, {
        "sys/fs/cgroup/cpu.max": "300000 100000\n", "sys/fs/cgroup/inner/cpu.max": "200000 100000\n",
    })  # fmt: skip
    assert host.cpu_quota(root) == 2
    root = machine(tmp_path / "other", "0::/elsewhere\n", mounts, {"sys/fs/cgroup/cpu.max": "300000 100000\n"})
    assert host.cpu_quota(root) == 3, "a group outside the mount is read where the mount is"


def test_memory_is_the_limit_less_what_can_not_be_dropped(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory.max": "1000\n",
        "sys/fs/cgroup/memory.stat": "anon 300\nfile 500\nshmem 100\n",
        "sys/fs/cgroup/in/memory.max": "max\n",
    }
    root = machine(tmp_path, "0::/in\n", V2, files)
    assert host.memory_left(root) == 600
    (root / "sys/fs/cgroup/in/memory.max").write_text("10\n")
    assert host.memory_left(root) == 10


@pytest.mark.parametrize("text", ["", "garbage\n", "0:100000\n", "0 0\n"])
def test_no_limit_is_said_where_none_can_be_read(tmp_path: Path, text: str) -> None:
    root = machine(tmp_path, "0::/\n", V2, {"sys/fs/cgroup/cpu.max": text})
    assert host.cpu_quota(root) is None and host.memory_left(root) is None
    assert host.threads(None, root).count == host.usable_cores()
    assert host.cpu_quota(tmp_path / "nowhere") is None


def test_what_was_asked_for_is_used_and_told(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n", V2, {"sys/fs/cgroup/cpu.max": "100000 100000\n"})
    found = host.threads(3, root)
    assert found.count == 3 and "--threads" in found.why and "wait for each other" in found.why
    assert "wait" not in host.threads(1, root).why


def test_affinity_limits_threads_and_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5})
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    nodes = "sys/devices/system/node"
    root = machine(tmp_path, "", "", {f"{nodes}/node{n}/cpulist": text for n, text in enumerate(("0-3", "4,5", "6-7"))})
    assert host.threads(None, root) == host.Threads(2, "2 of 8 cores, no CPU quota")
    assert host.numa_nodes(root) == (0, 1)
