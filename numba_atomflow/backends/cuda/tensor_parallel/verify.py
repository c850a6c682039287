"""Steps of several GPUs that verify a proposal: logits after each token, with the bits of single decode steps of one
GPU; or the most likely token after each, which the kernels choose; or a token sampled from each.

All ranks choose the same tokens and have all logits; the host reads those of rank 0, which alone samples.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.cuda.posted_choices import PostedChoices
from numba_atomflow.backends.cuda.queue import StepQueue, posted_token, stream_finished
from numba_atomflow.backends.cuda.tensor_parallel.rank import Rank
from numba_atomflow.backends.cuda.tensor_parallel.steps import RankSteps
from numba_atomflow.backends.cuda.wide_sampling import WideSampling
from numba_atomflow.device.driver import call
from numba_atomflow.errors import CheckpointError
from numba_atomflow.memory.device import PinnedArray
from numba_atomflow.sampling import Sampler

TIMED = 8  # steps that are queued together, so that the host's part is hidden


class VerifyingSteps:
    """Runs steps of 1 to `RankKernels.most_columns` tokens that leave the position as it is. Kernels are bound."""

    def __init__(self, steps: RankSteps, queue: StepQueue) -> None:
        self._steps, self._queue, self._first = steps, queue, steps.ranks[0]
        self._pending = False  # a step has been launched, and the host has not seen its end
        first, resources = self._first, self._first.owner.resources
        with first.owner.current():
            self._logits = PinnedArray(first.buffers["verify.logits"].shape, "float32", resources)
            self._sampling = WideSampling(
                *(first.buffers, first.staged, first.stream, first.loaded, first.kernels.sampled_rows, resources)
            )
        self._posted_choices = PostedChoices(first.columns.choices.array, self._sampling, self._finished, self._failed)
        self._samples = False  # whether the kernels that sample are loaded

    def run(self, tokens: Sequence[int], position: int) -> NDArray[np.float32]:
        """Logits [len(tokens), V] after each of the tokens, the first at this position; valid until the next call.

        The first call for several tokens compiles the kernels of all widths, and those that sample, or loads them from
        the cache.

        Raises:
            BackendError: a watchdog tripped, or a GPU failed.
        """
        logits, first = self._logits.array[: len(tokens)], self._first
        self._start(tokens, position)
        with first.owner.current():
            source = first.buffers["verify.logits"]
            call("cuMemcpyDtoHAsync", logits.ctypes.data, source.address, logits.nbytes, first.stream)
            first.wait()
        self._pending = False
        for entry in first.columns.choices.array[: len(tokens)]:
            try:
                posted_token(int(entry))
            except CheckpointError:  # NaN or Inf are in the logits, too
                self._failed()
        return logits

    def launch(self, tokens: Sequence[int], position: int, sampler: Sampler | None) -> Callable[[], list[int]]:
        """As `LaunchVerification`, the first token at this position.

        Args:
            sampler: None takes the most likely tokens.

        Raises:
            CheckpointError: logits contain NaN or Inf; when the result is waited for.
            BackendError: as `run`; likewise.
        """
        self._end_interrupted()
        if sampler is not None:
            self._prepare_sampling()
            with self._first.owner.current():
                self._sampling.send(tokens, sampler)
        self._start(tokens, position)
        if sampler is not None:
            self._on_all(self._sample_on_first(len(tokens)))

        def wait() -> list[int]:
            chosen = self._posted_choices.accepted(tokens, sampled=sampler is not None)
            self._pending = False  # the step itself has ended; sampling of what was rejected may go on
            return chosen

        return wait

    def _sample_on_first(self, rows: int) -> Callable[[Rank], None]:
        """What samples from so many rows, on rank 0."""
        return lambda rank: self._sampling.run(rows) if rank is self._first else None

    def _finished(self) -> bool:
        """Whether rank 0, which posts the tokens, has ended all steps."""
        with self._first.owner.current():
            return stream_finished(self._first.stream)

    def _failed(self) -> None:
        """A token's logits were not finite, perhaps because a watchdog tripped, on any rank."""
        self._queue.distrust()
        self._steps.check_watchdog()

    def seconds(self, repeats: int, position: int) -> dict[int, float]:
        """Median seconds of a step at this position, by the number of its tokens: by the host's clock, over a few steps
        that are queued together. Compiles the kernels of all widths first.

        Raises:
            BackendError: a watchdog tripped.
        """
        steps, widths, seconds = self._steps, self._first.columns.widths, dict[int, float]()
        self._end_interrupted()
        steps.prepare_widths(widths)
        self._pending = True
        for width in (1, *widths):
            times = []
            for _ in range(repeats + 1):
                self._send([0] * width, position)
                steps.wait()
                begun = time.perf_counter()
                for _ in range(TIMED):
                    steps.on_all(lambda rank, width=width: rank.columns.verify(width))  # type: ignore[misc]
                steps.wait()
                times.append((time.perf_counter() - begun) / TIMED)
            seconds[width] = float(np.median(times[1:]))
        self._pending = False
        steps.check_watchdog()
        return seconds

    def _start(self, tokens: Sequence[int], position: int) -> None:
        """Launch a step of these tokens on every rank."""
        count = len(tokens)
        self._end_interrupted()
        if count > 1:
            self._steps.prepare_widths(self._first.columns.widths)
            self._prepare_sampling()
        self._first.columns.choices.array[:] = 0
        self._send(tokens, position)
        self._pending = True
        self._on_all(lambda rank: rank.columns.verify(count))

    def _on_all(self, launch: Callable[[Rank], None]) -> None:
        """Launch something on every rank. If one fails, some ranks lack it: they begin anew before the next step."""
        try:
            self._steps.on_all(launch)
        except Exception:
            self._queue.distrust()
            raise

    def _prepare_sampling(self) -> None:
        """Load what samples from several rows, unless it is; no step runs meanwhile."""
        if not self._samples:
            self._steps.wait()
            with self._first.owner.current():
                self._first.loaded.require(kernel.spec for kernel in self._first.kernels.sampled_rows.values())
            self._samples = True

    def _send(self, tokens: Sequence[int], position: int) -> None:
        for rank in self._steps.ranks:
            with rank.owner.current():
                rank.columns.send(tokens, position)

    def _end_interrupted(self) -> None:
        """Wait for a step whose result was not waited for: it may still post tokens."""
        if self._pending:
            self._steps.wait()
            self._pending = False
