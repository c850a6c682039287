"""Steps of several tokens that verify a proposal: logits after each, with the bits of single decode steps; or the most
likely token after each, which the kernel chooses; or a token sampled from each.

Of the host a step takes one copy to the device and one launch, and those of sampling. Tokens are posted to pinned
memory, which the host polls; logits are copied to the host.
"""

from collections.abc import Callable, Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.cuda.model import DeviceModel
from numba_atomflow.backends.cuda.persistent import PersistentStep, WideViews, watchdog_error
from numba_atomflow.backends.cuda.posted_choices import PostedChoices
from numba_atomflow.backends.cuda.queue import StepQueue, stream_finished
from numba_atomflow.backends.cuda.wide_sampling import KERNELS, WideSampling
from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.device.driver import call
from numba_atomflow.device.resources import Resources
from numba_atomflow.memory.device import PinnedArray, copy_to_device
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import SAMPLE
from numba_atomflow.ops.cuda.runtime.graph import time_launches
from numba_atomflow.ops.cuda.runtime.launch import Kernel, Launch
from numba_atomflow.ops.cuda.runtime.loaded import LoadedKernels
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY
from numba_atomflow.sampling import Sampler


class WideSteps:
    """Runs steps of 1 to `verification.width` tokens in the persistent kernel.

    Args:
        loaded: kernels by name. resources: owns the pinned memory.
    """

    def __init__(
        self,
        model: DeviceModel,
        persistent: PersistentStep,
        loaded: LoadedKernels,
        queue: StepQueue,
        resources: Resources,
    ) -> None:
        self._model, self._persistent, self._loaded = model, persistent, loaded
        self._queue, self._resources = queue, resources
        self._widths = (1, *model.kernels.wide_shapes)
        self._launches: dict[int, Launch] = {}
        self._pending = False  # a step has been launched, and the host has not seen its end
        width, step = self._widths[-1], model.buffers["verify.step"]
        self._step = PinnedArray(step.shape, "int64", resources)  # position, tokens posted, tokens
        self._tokens = self._step.array[2:].view(np.int32)
        self._choices = PinnedArray((width,), "uint64", resources)
        self._posted = View("verify.posted", step.address + 8, (1,), "int64")
        self._views = WideViews(
            View("verify.position", step.address, (1,), "int64"),
            View("verify.tokens", step.address + 16, (width,), "int32"),
            self._choices.view,
        )
        self._logits = PinnedArray(model.buffers["verify.logits"].shape, "float32", resources)
        self._fault = PinnedArray((1,), "int32", resources)
        self._sampling = WideSampling(
            *(model.buffers, model.staged, model.stream, loaded, model.kernels.planned, resources)
        )
        self._posted_choices = PostedChoices(
            self._choices.array, self._sampling, lambda: stream_finished(model.stream), self._failed
        )
        no_penalty = np.ones(model.buffers["verify.options"].shape)
        model.memory.write(model.buffers["verify.options"], no_penalty)
        persistent.clear_vectors()
        self._reset_best()

    def run(self, tokens: Sequence[int], position: int) -> NDArray[np.float32]:
        """Logits [len(tokens), V] after each of the tokens, the first at this position; valid until the next call. The
        GPU's context is current.

        The first call for several tokens compiles the kernels of all widths, and those that sample, or loads them from
        the cache.

        Raises:
            BackendError: the watchdog tripped, or the GPU failed.
        """
        logits, fault = self._logits.array, self._fault.array
        buffers, stream, count = self._model.buffers, self._model.stream, len(tokens)
        self._start(tokens, position)
        _copy_to_host(logits[:count], buffers["verify.logits"], stream)
        _copy_to_host(fault, buffers["persistent.fault"], stream)
        call("cuStreamSynchronize", stream)
        self._pending = False
        if fault[0]:
            self._distrust()
            raise watchdog_error()
        return logits[:count]

    def launch(self, tokens: Sequence[int], position: int, sampler: Sampler | None) -> Callable[[], list[int]]:
        """As `LaunchVerification`, the first token at this position. The GPU's context is current, also when the result
        is waited for.

        Args:
            sampler: None takes the most likely tokens.

        Raises:
            CheckpointError: logits contain NaN or Inf; when the result is waited for.
            BackendError: as `run`; likewise.
        """
        self._end_interrupted()
        if sampler is not None:
            self._sampling.send(tokens, sampler)
        self._start(tokens, position)
        if sampler is not None:
            self._sampling.run(len(tokens))

        def wait() -> list[int]:
            chosen = self._posted_choices.accepted(tokens, sampled=sampler is not None)
            self._pending = False  # the step itself has ended; sampling of what was rejected may go on
            return chosen

        return wait

    def seconds(self, repeats: int, position: int) -> dict[int, float]:
        """Median seconds of the kernel at this position, by the number of tokens. The GPU's context is current.

        Raises:
            BackendError: the watchdog tripped.
        """
        stream, resources, seconds = self._model.stream, self._resources, {}
        self._end_interrupted()
        self._send([], position)
        for width in self._widths:
            launch = self._launch(width) if width > 1 else self._bind(width, in_place=True)
            seconds[width] = time_launches([launch], stream, repeats, resources)
        self._reset_best()
        self._queue.check_watchdog()
        return seconds

    def traces(self, repeats: int, position: int) -> dict[int, StepTrace]:
        """When each CTA of the kernel did what, by the number of tokens: of `repeats` runs the median by length. The
        traced kernels are compiled first. The GPU's context is current.

        Raises:
            BackendError: the watchdog tripped.
        """
        kernels, memory, times = self._model.kernels, self._model.memory, self._model.buffers["persistent.timestamps"]
        ops, median = self._model.step(1, SAMPLE), {}
        traced = [kernels.persistent_traced, *(kernels.wide_traced(width) for width in self._widths[1:])]
        built = self._loaded.build_apart([kernel.spec for kernel in traced])
        self._end_interrupted()
        self._send([], position)
        for width, kernel in zip(self._widths, built, strict=True):
            launch, traces = self._bind(width, kernel, in_place=True), []
            for _ in range(repeats + 1):
                memory.write(times, np.zeros(times.shape, np.int64))
                launch.run()
                traces.append(self._persistent.trace(ops, memory.read(times)))
            median[width] = sorted(traces[1:], key=lambda trace: trace.ends[-1])[(repeats - 1) // 2]
        self._reset_best()
        self._queue.check_watchdog()
        return median

    def _start(self, tokens: Sequence[int], position: int) -> None:
        """Launch a step of these tokens."""
        self._end_interrupted()
        self._choices.array[:] = 0
        self._pending = True
        width = next(width for width in self._widths if width >= len(tokens))
        self._send([*tokens, *repeat(tokens[-1], width - len(tokens))], position)
        self._launch(width).run()

    def _end_interrupted(self) -> None:
        """Wait for a step whose result was not waited for (Ctrl-C, or a reply that its caller has left): it may still
        read its tokens, and post others. It may have ended between its arg-max and its end.
        """
        if self._pending:
            call("cuStreamSynchronize", self._model.stream)
            self._reset_best()
            self._pending = False

    def _send(self, tokens: Sequence[int], position: int) -> None:
        """Copy a step's tokens and position to the device. The copy before has ended: the host waits for each step."""
        self._step.array[:2] = position, 0
        self._tokens[: len(tokens)] = tokens
        copy_to_device(self._views.position.address, self._step.array, self._model.stream)

    def _launch(self, width: int) -> Launch:
        if width not in self._launches:
            if width > 1:
                planned = self._model.kernels.planned
                names = [*(f"persistent_x{columns}" for columns in self._widths[1:]), *KERNELS]
                self._loaded.require(planned[name].spec for name in names)
            self._launches[width] = self._bind(width)
        return self._launches[width]

    def _bind(self, width: int, traced: Kernel | None = None, *, in_place: bool = False) -> Launch:
        """The kernel for so many tokens, or `traced`, with its views. in_place: that for one token does not move the
        position, nor does it post a token or clear `verify.best`.
        """
        if width > 1:
            return self._persistent.wide_launch(width, self._views, traced)
        views, buffers = self._views, self._model.buffers
        own = {name: buffers[f"verify.{name}"] for name in ("logits", "best", "seen", "options")}
        own |= {"tokens": views.tokens, "position": views.position}
        own |= {"token_ring": views.choices, "tokens_posted": self._posted}
        end = self._persistent.shape.ops
        return self._persistent.launch(0, end, greedy=not in_place, traced=traced, replaced=own)

    def _failed(self) -> None:
        """A token's logits were not finite, perhaps because the watchdog tripped."""
        self._distrust()
        self._queue.check_watchdog()

    def _distrust(self) -> None:
        """A step has failed."""
        self._queue.distrust()
        self._reset_best()

    def _reset_best(self) -> None:
        best = self._model.buffers["verify.best"]
        self._model.memory.write(best, np.full(best.shape, LOWEST_KEY, np.int64))


def _copy_to_host(target: NDArray[np.generic], source: View, stream: object) -> None:
    """Copy the beginning of a view to pinned memory, in stream order."""
    call("cuMemcpyDtoHAsync", target.ctypes.data, source.address, target.nbytes, stream)
