"""Numba's CUDA simulator, made fast and strict. It is switched on for a whole process: scripts/test.sh does that."""

import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def _run_block(manager: Any, grid_point: tuple[int, ...], *args: Any) -> None:
    """BlockManager.run without its polling, which takes most of the interpreter's time."""
    _finish(_start_block(manager, grid_point, *args))


def _start_block(manager: Any, grid_point: tuple[int, ...], *args: Any) -> list[Any]:
    """The running threads of a block.

    It is stricter than numba's: a barrier that not every thread of the block comes to fails the test.
    """
    from numba.cuda.simulator.kernel import BlockThread

    from numba_atomflow.ops.ptx.simulator import abort_cta

    points = list(np.ndindex(*manager._block_dim))
    barrier = threading.Barrier(len(points), timeout=600)  # a deadlock, not a busy machine

    def run() -> None:
        try:
            manager._f(*args)
        except BaseException:
            barrier.abort()
            abort_cta(manager)
            raise

    threads = [BlockThread(run, manager, grid_point, point, manager._debug) for point in points]
    for thread in threads:
        thread.syncthreads = barrier.wait
        thread.start()
    return threads


def _finish(threads: list[Any]) -> None:
    for thread in threads:
        thread.join()
    failures = [thread.exception for thread in threads if thread.exception]
    failures.sort(key=lambda failure: isinstance(failure[0], threading.BrokenBarrierError))  # consequences come last
    if failures:
        raise failures[0][0].with_traceback(failures[0][1])


def _shared_of_block(module: Any) -> Any:
    """The shared memory of the running thread's block, which is no other block's, and NaN to begin with."""
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    manager: Any = threading.current_thread()._manager  # type: ignore[attr-defined]
    with _shared_lock:
        if not hasattr(manager, "atomflow_shared"):
            manager.atomflow_shared = FakeCUDAShared(module._shared._dynshared_size)
    return manager.atomflow_shared


_shared_lock = threading.Lock()


@pytest.fixture(autouse=True, scope="session")
def _fast_and_strict_simulator() -> Iterator[None]:
    if not SIMULATED:
        pytest.skip("the CUDA simulator is switched on for a whole process: NUMBA_ENABLE_CUDASIM=1 pytest tests/sim")
    from numba.cuda.simulator import kernel, kernelapi

    patch = pytest.MonkeyPatch()
    patch.setattr(kernel.BlockManager, "run", _run_block)
    make = kernelapi.FakeCUDAShared.__init__

    def poisoned(self: Any, size: int) -> None:
        make(self, size)
        self._dynshared.fill(-1)  # every float of uninitialised shared memory is NaN

    patch.setattr(kernelapi.FakeCUDAShared, "__init__", poisoned)
    patch.setattr(kernelapi.FakeCUDAModule, "shared", property(_shared_of_block))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.05)  # lanes switch at barriers; other switches only cost time
    yield
    sys.setswitchinterval(interval)
    patch.undo()


@pytest.fixture
def all_blocks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a launch run side by side, as those that wait for each other must."""
    from numba.cuda.simulator import kernel

    running: list[Any] = []

    def run(manager: Any, grid_point: tuple[int, ...], *args: Any) -> None:
        running.extend(_start_block(manager, grid_point, *args))
        if len(running) == np.prod(manager._grid_dim) * np.prod(manager._block_dim):
            threads = running.copy()
            running.clear()
            _finish(threads)

    monkeypatch.setattr(kernel.BlockManager, "run", run)
