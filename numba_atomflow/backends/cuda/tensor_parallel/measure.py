"""What is measured of several GPUs: whole steps, and how fast their memories are together."""

import time
from typing import NoReturn

import numpy as np

from numba_atomflow.backends.cuda.measure import measure_ceilings
from numba_atomflow.backends.cuda.queue import StepQueue
from numba_atomflow.backends.cuda.tensor_parallel.steps import RankSteps
from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.errors import BackendError
from numba_atomflow.model.step import SAMPLE, Op
from numba_atomflow.utils.progress import Progress

_STEPS_PER_RUN = 8  # queued at once, so that the host's part is hidden


class RankMeasurements:
    """Times decode steps at the current position, which is the same afterwards."""

    def __init__(self, steps: RankSteps, queue: StepQueue) -> None:
        self._steps, self._queue = steps, queue

    def ceilings(self) -> dict[str, float]:
        """GB/s of reading the memories of all GPUs, each measured by itself, now."""
        total: dict[str, float] = {}
        measured: dict[int, dict[str, float]] = {}
        for rank in self._steps.ranks:
            ordinal = rank.device.ordinal
            if ordinal not in measured:
                with rank.owner.current():
                    measured[ordinal] = measure_ceilings(rank.device, rank.stream, rank.owner.resources)
        for found in measured.values():
            total = {way: total.get(way, 0.0) + speed for way, speed in found.items()}
        return total

    def time_step(self, repeats: int) -> float:
        """Median seconds of a decode step, by the host's clock over a few steps that are queued together."""
        seconds = []
        for _ in range(repeats + 1):
            with self._queue.measuring(_STEPS_PER_RUN):
                self._steps.wait()
                begun = time.perf_counter()
                for _ in range(_STEPS_PER_RUN):
                    self._steps.run(1, SAMPLE)
                self._steps.wait()
                seconds.append((time.perf_counter() - begun) / _STEPS_PER_RUN)
                self._queue.check_watchdog()
        return float(np.median(seconds[1:]))

    def time_ops(self, repeats: int) -> list[tuple[Op, float]]:
        """Not possible yet.

        Raises:
            BackendError: always.
        """
        _one_gpu_only()

    def trace_step(self, repeats: int, progress: Progress | None = None) -> StepTrace | None:
        """Not possible yet.

        Raises:
            BackendError: always.
        """
        _one_gpu_only()


def _one_gpu_only() -> NoReturn:
    raise BackendError("Single ops are timed on one GPU only; leave out --gpus.")
