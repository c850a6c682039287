"""The number of kernel threads: cores, affinity, and CPU quotas of containers."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from child_processes import run
from cli_runner import environment

from numba_atomflow import home
from numba_atomflow.errors import OptionError
from numba_atomflow.host import threads
from numba_atomflow.host.cores import count_cores
from numba_atomflow.host.cpu_quota import cpu_quota

V2_MOUNT = "30 23 0:28 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "33 31 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "34 31 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def version_2(root: Path, own: str, limits: dict[str, str], shown: str = "/") -> Path:
    write(root, {"proc/self/cgroup": f"0::{own}", "proc/self/mountinfo": V2_MOUNT.format(root=shown)})
    return write(root, {f"sys/fs/cgroup/{group}/cpu.max": limit for group, limit in limits.items()})


def version_1(root: Path, own: str, limits: dict[str, tuple[int, int]], shown: str = "/") -> Path:
    groups = f"9:name=systemd:/\n4:memory:/elsewhere\n2:cpu,cpuacct:{own}\n0::/"
    write(root, {"proc/self/cgroup": groups, "proc/self/mountinfo": f"{V1_MEMORY}\n{V1_MOUNT.format(root=shown)}"})
    for group, (quota, period) in limits.items():
        folder = f"sys/fs/cgroup/cpu,cpuacct/{group}"
        write(root, {f"{folder}/cpu.cfs_quota_us": str(quota), f"{folder}/cpu.cfs_period_us": str(period)})
    return root


@pytest.mark.parametrize(
    ("own", "limits", "quota"),
    [
        ("/", {}, None),
        ("/", {".": "max 100000"}, None),
        ("/", {".": "100000 100000"}, 1.0),
        ("/", {".": "150000"}, 1.5),
        ("/a/b", {"a/b": "max 100000", "a": "200000 100000"}, 2.0),
        ("/a/b", {"a/b": "400000 100000", "a": "max 100000", ".": "50000 100000"}, 0.5),
        ("/a/b", {"a/b": "400000 100000", "a/c": "50000 100000"}, 4.0),
        ("/", {".": "nonsense here"}, None),
        ("/../../other", {".": "300000 100000"}, 3.0),
    ],
)
def test_the_least_quota_of_nested_groups_counts(
    tmp_path: Path, own: str, limits: dict[str, str], quota: float | None
) -> None:
    assert cpu_quota(version_2(tmp_path, own, limits)) == quota


@pytest.mark.parametrize(
    ("own", "shown", "limits", "quota"),
    [
        ("/", "/", {".": (-1, 100000)}, None),
        ("/", "/", {".": (250000, 100000)}, 2.5),
        ("/a/b", "/", {"a/b": (-1, 100000), "a": (50000, 50000)}, 1.0),
        ("/docker/0123", "/docker/0123", {".": (100000, 100000)}, 1.0),  # no name space of its own
        ("/docker/0123/in", "/docker/0123", {"in": (300000, 100000), ".": (400000, 100000)}, 3.0),
    ],
)
def test_quotas_of_version_1(
    tmp_path: Path, own: str, shown: str, limits: dict[str, tuple[int, int]], quota: float | None
) -> None:
    assert cpu_quota(version_1(tmp_path, own, limits, shown)) == quota


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    mount = V2_MOUNT.format(root="/").replace("/sys/fs/cgroup", "/sys/fs/my\\040groups")
    write(tmp_path, {"proc/self/cgroup": "0::/a", "proc/self/mountinfo": mount})
    write(tmp_path, {"sys/fs/my groups/a/cpu.max": "100000 200000"})
    assert cpu_quota(tmp_path) == 0.5


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(("limit", "expected"), [("max 100000", 8), ("50000 100000", 1), ("390000 100000", 3)])
def test_the_default_is_the_quota_in_whole_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    monkeypatch.setattr(threads, "max_threads", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert threads.default_threads(version_2(tmp_path, "/", {".": limit})) == expected


def test_the_default_respects_an_affinity_set_after_the_import_of_numba(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "max_threads", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert threads.default_threads(tmp_path) == 1


CORES = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
CAPACITY = "sys/devices/system/cpu/cpu{}/cpu_capacity"
PAIRS = {CORES.format(cpu): f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}  # cpu 0 and 4 are hyper-threads of a core
HYBRID = {CORES.format(cpu): f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}" for cpu in range(4)} | {
    "sys/devices/cpu_core/cpus": "0-3",
    "sys/devices/cpu_atom/cpus": "4-7",
}
BIG_LITTLE = {CAPACITY.format(cpu): "1024" if cpu > 5 else "430" for cpu in range(8)}
TURBO = {CAPACITY.format(cpu): "1024" if cpu == 7 else "980" for cpu in range(8)}


@pytest.mark.parametrize(
    ("files", "cpus", "count"),
    [
        ({}, range(8), 8),
        (PAIRS, range(8), 4),
        (PAIRS, {0, 4}, 1),
        (PAIRS, {0, 4, 5}, 2),
        (HYBRID, range(8), 2),
        (HYBRID, range(4, 8), 4),  # the slow ones, where there are no others
        (BIG_LITTLE, range(8), 2),
        (BIG_LITTLE, range(3), 3),
        (TURBO, range(8), 8),
        ({CORES.format(0): "nonsense", CAPACITY.format(0): ""}, range(2), 2),
        ({}, (), 1),
    ],
)
def test_one_thread_per_core_and_only_fast_cores(
    tmp_path: Path, files: dict[str, str], cpus: Iterable[int], count: int
) -> None:
    assert count_cores(set(cpus), write(tmp_path, files)) == count


def test_more_threads_than_the_quota_may_be_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "max_threads", lambda: 8)
    monkeypatch.setattr(threads, "cpu_quota", lambda *_: 1.5)
    assert threads.choose_threads(None) == 1
    assert threads.choose_threads(8) == 8
    with pytest.raises(OptionError, match=r"^threads is 9; this machine allows 1 to 8\.$"):
        threads.choose_threads(9)
    assert threads.describe_threads(1, None) == "1 thread (CPU quota of 1.5)"
    assert threads.describe_threads(2, None) == "2 threads"  # of more than 2: not the quota, but hyper-threads
    assert threads.describe_threads(1, 1) == "1 thread"


TWO_THREADS = """
import threading
import numpy as np
from numba_atomflow.ops.bandwidth import total
from numba_atomflow.host.threads import kernel_turn
data = np.ones(1 << 16, np.float32)
total(data)
def run():
    for _ in range(300):
        with kernel_turn():
            total(data)
threads = [threading.Thread(target=run) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core runs no two threads at the same time")
def test_threads_take_turns_with_a_pool_that_is_not_thread_safe(tmp_path: Path) -> None:
    """Without the lock, numba's workqueue layer ends this process by SIGABRT."""
    (tmp_path / "compiled").symlink_to(home.compiled().resolve())
    completed = run(
        [sys.executable, "-c", TWO_THREADS],
        env=environment(tmp_path, NUMBA_THREADING_LAYER="workqueue", NUMBA_NUM_THREADS="2"),
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
