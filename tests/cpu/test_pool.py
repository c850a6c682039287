"""The thread pool of the kernels: every turn of a loop runs once, by threads that a loop may use, asleep or awake."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from child_processes import run
from cli_runner import environment
from numba import get_thread_id, prange

from numba_atomflow import home
from numba_atomflow.host import pool as pool_module
from numba_atomflow.host.pool import Pool, own_pool
from numba_atomflow.host.threads import threads_in_use
from numba_atomflow.ops.jit import cpu_kernel

pytestmark = pytest.mark.skipif(not pool_module.is_available(), reason="numba's pool runs the kernels")


@cpu_kernel()
def count_turns(turns, threads):
    """turns[i] += 1, and the thread of each turn."""
    for i in prange(turns.size):
        turns[i] += 1
        threads[i] = get_thread_id()


@pytest.fixture
def pool() -> Iterator[Pool]:
    own = own_pool()
    assert own is not None
    spin = own.spin_ns
    with threads_in_use(1):
        yield own
    own.spin_ns = spin


def run_loops(size: int, count: int, loops: int) -> None:
    turns, threads = np.zeros(size, np.int64), np.zeros(size, np.int64)
    with threads_in_use(count):
        for _ in range(loops):
            count_turns(turns, threads)
    assert (turns == loops).all()
    assert ((threads >= 0) & (threads < count)).all()


@pytest.mark.parametrize("spin_ns", [0, 1_000_000])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_turn_runs_once(pool: Pool, count: int, spin_ns: int) -> None:
    """Without spinning every wait is a sleep; the threads may be more than the cores."""
    pool.spin_ns = spin_ns
    for size in (0, 1, 2, 3, 17, 1000):
        run_loops(size, count, loops=20)
    assert pool.workers() >= count


def test_two_callers_with_other_numbers_of_threads(pool: Pool) -> None:
    """One has the workers, the other runs its loop by itself: its threads index its own scratch memory."""
    pool.spin_ns = 0
    failures = []

    def caller(count: int) -> None:
        try:
            run_loops(500, count, loops=200)
        except AssertionError as error:
            failures.append(error)

    callers = [threading.Thread(target=caller, args=(count,)) for count in (2, 4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not failures


STOPPED_WORKERS = """
import numpy as np
from numba_atomflow.host.pool import own_pool
from numba_atomflow.host.threads import use_threads
from numba_atomflow.ops.bandwidth import total
own_pool()._global("workers").value = 4
use_threads(4)
print(total(np.ones(1000, np.float32)))
"""


def test_workers_that_do_not_run_delay_no_loop(tmp_path: Path) -> None:
    """As if other programs had their cores: the caller runs all pieces."""
    (tmp_path / "compiled").symlink_to(home.compiled().resolve())
    completed = run(
        [sys.executable, "-c", STOPPED_WORKERS],
        env=environment(tmp_path),
        text=True,
    )
    assert (completed.returncode, completed.stdout) == (0, "1000.0\n"), completed.stderr


SIGNALS = """
import ctypes, os, signal, numpy as np
from pathlib import Path
from numba_atomflow.host.pool import own_pool
from numba_atomflow.host.threads import use_threads
from numba_atomflow.ops.bandwidth import total
use_threads(3)
total(np.ones(1000, np.float32))
asleep = (ctypes.c_int32 * 3).from_address(own_pool()._engine.get_global_value_address("asleep"))
while list(asleep) != [0, 1, 1]:  # a thread that has not run yet has every signal blocked
    os.sched_yield()
blocked = []
for status in Path("/proc/self/task").glob("*/status"):
    mask = int(status.read_text().partition("SigBlk:")[2].split()[0], 16)
    blocked.append([bool(mask >> number - 1 & 1) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGBUS)])
print(blocked.count([True, True, False]))
"""


def test_workers_take_no_signals_but_their_own_faults(tmp_path: Path) -> None:
    """A read of a truncated file is a worker's own fault, and Ctrl-C the main thread's."""
    (tmp_path / "compiled").symlink_to(home.compiled().resolve())
    completed = run(
        [sys.executable, "-c", SIGNALS],
        env=environment(tmp_path, OPENBLAS_NUM_THREADS="1"),
        text=True,
    )
    assert (completed.returncode, completed.stdout) == (0, "2\n"), completed.stderr


@pytest.mark.parametrize(
    ("platform", "machine", "layer", "available"),
    [
        ("linux", "x86_64", "default", True),
        ("linux", "aarch64", "default", True),
        ("linux", "x86_64", "omp", False),
        ("linux", "riscv64", "default", False),
        ("darwin", "arm64", "default", False),
        ("win32", "AMD64", "default", False),
    ],
)
def test_where_numbas_pool_runs_the_kernels(
    monkeypatch: pytest.MonkeyPatch, platform: str, machine: str, layer: str, available: bool
) -> None:
    monkeypatch.setattr(pool_module.sys, "platform", platform)
    monkeypatch.setattr(pool_module.platform, "machine", lambda: machine)
    monkeypatch.setattr(pool_module.config, "THREADING_LAYER", layer)
    assert pool_module.is_available() is available
