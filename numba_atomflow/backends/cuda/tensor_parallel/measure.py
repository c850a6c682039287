"""What is measured of several GPUs: steps, traces of all GPUs together, and how fast their memories are."""

import time

import numpy as np

from numba_atomflow.backends.cuda.measure import measure_ceilings
from numba_atomflow.backends.cuda.persistent import step_trace
from numba_atomflow.backends.cuda.queue import StepQueue
from numba_atomflow.backends.cuda.tensor_parallel.steps import RankSteps
from numba_atomflow.backends.cuda.tensor_parallel.views import ModelViews
from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.model.step import SAMPLE, Op
from numba_atomflow.utils.progress import Progress

_STEPS_PER_RUN = 8  # queued at once, so that the host's part is hidden; fewer where the KV cache ends


class RankMeasurements:
    """Times decode steps at the current position, which is the same afterwards."""

    def __init__(self, steps: RankSteps, queue: StepQueue, views: ModelViews, max_seq_len: int) -> None:
        self._steps, self._queue, self._views, self._max_seq_len = steps, queue, views, max_seq_len
        self._trace_ready = False

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
        seconds, count = [], max(1, min(_STEPS_PER_RUN, self._max_seq_len - self._queue.position))
        for _ in range(repeats + 1):
            with self._queue.measuring(count):
                self._steps.wait()
                begun = time.perf_counter()
                for _ in range(count):
                    self._steps.run(1, SAMPLE)
                self._steps.wait()
                seconds.append((time.perf_counter() - begun) / count)
                self._queue.check_watchdog()
        return float(np.median(seconds[1:]))

    def time_ops(self, repeats: int) -> list[tuple[Op, float]]:
        """The ops of the persistent kernel, each with the seconds that it adds to a traced step of all ranks."""
        trace = self.trace_step(repeats)
        return list(zip(self._views.step(1, SAMPLE), trace.op_seconds, strict=False))

    def trace_step(self, repeats: int, progress: Progress | None = None) -> StepTrace:
        """When each CTA of all ranks did what, rank after rank, by one clock, in the run of median length of
        `repeats`. The traced kernel is compiled, or loaded from the cache, on first use.

        Raises:
            BackendError: it could not be compiled, or its watchdog tripped.
        """
        if not self._trace_ready:
            self._steps.prepare_trace(progress)
            self._trace_ready = True
        ops, position, traces = self._views.step(1, SAMPLE), self._queue.position, []
        with self._queue.measuring():
            for _ in range(repeats + 1):
                self._steps.set_position(position)
                traces.append(step_trace(ops, self._steps.trace()))
            self._queue.check_watchdog()
        return sorted(traces[1:], key=lambda trace: trace.ends[-1])[(repeats - 1) // 2]
