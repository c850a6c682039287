"""What is measured on the CPU."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np

from numba_atomflow.backends.cpu.bind import Action
from numba_atomflow.host.threads import use_threads
from numba_atomflow.model.step import SAMPLE, Head, Op
from numba_atomflow.ops import bandwidth
from numba_atomflow.utils.progress import Progress
from numba_atomflow.utils.stats import faster_half


class Steps(Protocol):
    """What is timed: a backend's steps as actions."""

    threads: int

    def step(self, tokens: int, head: Head) -> Sequence[Op]: ...

    def bound_step(self, tokens: int, head: Head) -> Sequence[Action]: ...

    def run_in_place(self, actions: Sequence[Action]) -> None: ...


class CpuMeasurements:
    """Times decode steps at the current position, which is the same afterwards."""

    def __init__(self, backend: Steps) -> None:
        self._backend = backend

    def ceilings(self) -> dict[str, float]:
        """GB/s of reading memory with this backend's threads."""
        use_threads(self._backend.threads)
        return {"memory read": bandwidth.read_bandwidth()}

    def time_ops(self, repeats: int) -> list[tuple[Op, float]]:
        """The decode step's ops, each with its seconds in the faster half of the runs, by a clock around each."""
        ops, actions = self._backend.step(1, SAMPLE), self._backend.bound_step(1, SAMPLE)
        seconds = np.empty((repeats, len(ops)))

        def timed(i: int, run: int) -> None:
            started = time.perf_counter()
            actions[i]()
            seconds[run, i] = time.perf_counter() - started

        for run in range(repeats):
            self._backend.run_in_place([partial(timed, i, run) for i in range(len(ops))])
        return list(zip(ops, faster_half(seconds).tolist(), strict=True))

    def time_step(self, repeats: int) -> float:
        """Seconds of the decode step in the faster half of the runs."""
        actions = self._backend.bound_step(1, SAMPLE)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            self._backend.run_in_place(actions)
            seconds.append([time.perf_counter() - started])
        return float(faster_half(seconds)[0])

    def trace_step(self, repeats: int, progress: Progress | None = None) -> None:
        """None: a step is many kernels."""
