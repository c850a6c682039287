"""Steps of several tokens that verify a proposal: logits after each, with the bits of single decode steps."""

from collections.abc import Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.cuda.model import DeviceModel
from numba_atomflow.backends.cuda.persistent import PersistentStep, watchdog_error
from numba_atomflow.backends.cuda.queue import PromptStaging, StepQueue
from numba_atomflow.device.driver import call
from numba_atomflow.device.resources import Resources
from numba_atomflow.memory.device import PinnedArray
from numba_atomflow.memory.view import View
from numba_atomflow.ops.cuda.runtime.graph import time_launches
from numba_atomflow.ops.cuda.runtime.launch import Launch
from numba_atomflow.ops.cuda.runtime.loaded import LoadedKernels


class WideSteps:
    """Runs steps of 1 to `verification.width` tokens in the persistent kernel.

    Args:
        loaded: kernels by name. resources: owns the pinned memory that logits are copied to.
    """

    def __init__(
        self,
        model: DeviceModel,
        persistent: PersistentStep,
        loaded: LoadedKernels,
        staging: PromptStaging,
        queue: StepQueue,
        resources: Resources,
    ) -> None:
        self._model, self._persistent, self._loaded = model, persistent, loaded
        self._staging, self._queue, self._resources = staging, queue, resources
        self._widths = (1, *model.kernels.wide_shapes)
        self._launches: dict[int, Launch] = {}
        shape = model.buffers["verify.logits"].shape
        self._logits = PinnedArray(shape, "float32", resources)
        self._fault = PinnedArray((1,), "int32", resources)

    def run(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), V] after each of the tokens at the current position; valid until the next call. The
        GPU's context is current.

        The first call for several tokens compiles the kernels of all widths, or loads them from the cache.

        Raises:
            BackendError: the watchdog tripped, or the GPU failed.
        """
        logits, fault = self._logits.array, self._fault.array
        buffers, stream, count = self._model.buffers, self._model.stream, len(tokens)
        width = next(width for width in self._widths if width >= count)
        self._staging.send([*tokens, *repeat(tokens[-1], width - count)], buffers["verify.tokens"])
        self._launch(width).run()
        _copy_to_host(logits[:count], buffers["verify.logits"], stream)
        _copy_to_host(fault, buffers["persistent.fault"], stream)
        call("cuStreamSynchronize", stream)
        if fault[0]:
            self._queue.distrust()
            raise watchdog_error()
        return logits[:count]

    def seconds(self, repeats: int) -> dict[int, float]:
        """Median seconds of the kernel, by the number of tokens. The GPU's context is current.

        Raises:
            BackendError: the watchdog tripped.
        """
        stream, resources = self._model.stream, self._resources
        seconds = {width: time_launches([self._launch(width)], stream, repeats, resources) for width in self._widths}
        self._queue.check_watchdog()
        return seconds

    def _launch(self, width: int) -> Launch:
        if width not in self._launches:
            planned, buffers = self._model.kernels.planned, self._model.buffers
            if width == 1:
                own = {name: buffers[f"verify.{name}"] for name in ("tokens", "logits", "best")}
                self._launches[1] = self._persistent.launch(0, self._persistent.shape.ops, replaced=own)
            else:
                self._loaded.require(planned[f"persistent_x{columns}"].spec for columns in self._widths[1:])
                self._launches[width] = self._persistent.wide_launch(width)
        return self._launches[width]


def _copy_to_host(target: NDArray[np.generic], source: View, stream: object) -> None:
    """Copy the beginning of a view to pinned memory, in stream order."""
    call("cuMemcpyDtoHAsync", target.ctypes.data, source.address, target.nbytes, stream)
