"""Numba's CUDA simulator, made fast and strict. It is switched on for a whole process: scripts/test.sh does that."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import simulated_lanes

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
COMPILING = {"CpuBackend", "CpuRunner", "Engine"}  # those that import one of these need compiled kernels


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They come last: by then the process beside this one has compiled the kernels that are not in the cache yet."""
    items.sort(key=lambda item: not COMPILING.isdisjoint(vars(item.getparent(pytest.Module).obj)))


def _run_block(manager: Any, grid_point: tuple[int, ...], *args: Any) -> None:
    """BlockManager.run without its polling, which takes most of the interpreter's time."""
    _run(_threads_of_block(manager, grid_point, *args))


def _threads_of_block(manager: Any, grid_point: tuple[int, ...], *args: Any) -> list[Any]:
    """The threads of a block, not yet running.

    It is stricter than numba's: a barrier that not every thread of the block comes to fails the test.
    """
    from numba.cuda.simulator.kernel import BlockThread

    from numba_atomflow.ops.ptx.simulator import abort_cta

    points = list(np.ndindex(*manager._block_dim))
    barrier = simulated_lanes.Barrier(len(points))

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
    return threads


def _run(threads: list[Any]) -> None:
    simulated_lanes.run(threads)
    failures = [thread.exception for thread in threads if thread.exception]
    failures.sort(key=lambda failure: isinstance(failure[0], threading.BrokenBarrierError))  # consequences come last
    if failures:
        raise failures[0][0].with_traceback(failures[0][1])


def _shared_of_block(module: Any) -> Any:
    """The shared memory of the running thread's block, which is no other block's, and NaN to begin with."""
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    manager: Any = simulated_lanes.THREADING.current_thread()._manager
    if not hasattr(manager, "atomflow_shared"):
        manager.atomflow_shared = FakeCUDAShared(module._shared._dynshared_size)
    return manager.atomflow_shared


def _calls_that_swap_once(call: Callable[..., Any]) -> Callable[..., Any]:
    """FakeCUDAKernel.__call__, which puts the simulated `cuda` into a device function's module for the time of a call.

    The module keeps it to the end of the launch: putting it there costs more than most of these functions.
    """
    from numba.cuda.simulator import kernel

    swapped: set[int] = set()  # modules, by identity of their globals
    launch = ExitStack()

    def calls(function: Any, *args: Any) -> Any:
        simulated = kernel._get_kernel_context()
        if simulated is None:
            with launch:
                swapped.clear()
                return call(function, *args)
        namespace = function.fn.__globals__
        if id(namespace) not in swapped:
            launch.enter_context(kernel.swapped_cuda_module(function.fn, simulated))
            swapped.add(id(namespace))
        return function.fn(*args)

    return calls


@pytest.fixture(autouse=True, scope="session")
def _fast_and_strict_simulator() -> Iterator[None]:
    if not SIMULATED:
        pytest.skip("the CUDA simulator is switched on for a whole process: NUMBA_ENABLE_CUDASIM=1 pytest tests/sim")
    from numba.cuda.simulator import kernel, kernelapi

    from numba_atomflow.ops.ptx import async_copy, bulk, simulated_wgmma, simulator, timing

    patch = pytest.MonkeyPatch()
    for module in (kernelapi, async_copy, simulated_wgmma, simulator):
        patch.setattr(module, "threading", simulated_lanes.THREADING)
    for module in (bulk, simulator, timing):
        patch.setattr(module, "time", simulated_lanes.TIME)
    patch.setattr(kernel.BlockManager, "run", _run_block)
    patch.setattr(kernel.FakeCUDAKernel, "__call__", _calls_that_swap_once(kernel.FakeCUDAKernel.__call__))
    make = kernelapi.FakeCUDAShared.__init__

    def poisoned(self: Any, size: int) -> None:
        make(self, size)
        self._dynshared.fill(-1)  # every float of uninitialised shared memory is NaN

    patch.setattr(kernelapi.FakeCUDAShared, "__init__", poisoned)
    patch.setattr(kernelapi.FakeCUDAModule, "shared", property(_shared_of_block))
    yield
    patch.undo()


@pytest.fixture
def all_blocks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a launch run side by side, as those that wait for each other must."""
    _collect_blocks(monkeypatch, 1, 1)


@pytest.fixture
def side_by_side() -> Callable[..., AbstractContextManager[None]]:
    """Within its context, the blocks of so many launches of one grid size run when all have been launched: each launch
    in a stream of its own, or in one of so many streams, in turns.
    """

    @contextmanager
    def collected(launches: int, streams: int = 0) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            _collect_blocks(patch, launches, streams or launches)
            yield

    return collected


def _collect_blocks(patch: pytest.MonkeyPatch, launches: int, streams: int) -> None:
    from numba.cuda.simulator import kernel

    waiting: list[list[Any]] = [[]]  # threads of each launch

    def run(manager: Any, grid_point: tuple[int, ...], *args: Any) -> None:
        threads = int(np.prod(manager._grid_dim) * np.prod(manager._block_dim))
        if len(waiting[-1]) == threads:
            waiting.append([])
        waiting[-1].extend(_threads_of_block(manager, grid_point, *args))
        if len(waiting) == launches and len(waiting[-1]) == threads:
            for before, after in zip(waiting, waiting[streams:], strict=False):
                _in_order(before, after)
            everything = [thread for launch in waiting for thread in launch]
            waiting[:] = [[]]
            _run(everything)

    patch.setattr(kernel.BlockManager, "run", run)


def _in_order(before: list[Any], after: list[Any]) -> None:
    """The threads of a launch begin when all of the one before in its stream have ended."""
    running = len(before)

    def counted(run: Callable[[], None]) -> Callable[[], None]:
        def end() -> None:
            nonlocal running
            run()
            running -= 1

        return end

    def delayed(run: Callable[[], None]) -> Callable[[], None]:
        def begin() -> None:
            while running:
                simulated_lanes.TIME.sleep(0)
            run()

        return begin

    for thread in before:
        thread.run = counted(thread.run)
    for thread in after:
        thread.run = delayed(thread.run)
