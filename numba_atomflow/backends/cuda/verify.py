"""Steps of several tokens that verify a proposal: logits after each, with the bits of single decode steps."""

from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.cuda.loaded import LoadedKernels
from numba_atomflow.backends.cuda.model import DeviceModel
from numba_atomflow.backends.cuda.persistent import PersistentStep, watchdog_error
from numba_atomflow.backends.cuda.queue import PromptStaging, StepQueue
from numba_atomflow.device.driver import call
from numba_atomflow.device.resources import Resources
from numba_atomflow.memory.device import PinnedArray
from numba_atomflow.memory.view import View
from numba_atomflow.ops.cuda.runtime.graph import time_launches
from numba_atomflow.ops.cuda.runtime.launch import Launch


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
        self._bound: _BoundSteps | None = None

    def run(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), V] after each of the tokens at the current position; valid until the next call. The
        GPU's context is current.

        The first call compiles the kernels for several tokens, or loads them from the cache.

        Raises:
            BackendError: the watchdog tripped, or the GPU failed.
        """
        if self._bound is None:
            self._bound = self._bind()
        launches, logits, fault = self._bound
        model, buffers, count = self._model, self._model.buffers, len(tokens)
        width = next(width for width in self._widths if width >= count)
        self._staging.send([*tokens, *repeat(tokens[-1], width - count)], buffers["verify.tokens"])
        launches[width].run()
        _copy_to_host(logits[:count], buffers["verify.logits"], model.stream)
        _copy_to_host(fault, buffers["persistent.fault"], model.stream)
        call("cuStreamSynchronize", model.stream)
        if fault[0]:
            self._queue.distrust()
            raise watchdog_error()
        return logits[:count]

    def seconds(self, repeats: int) -> dict[int, float]:
        """Median seconds of the kernel, by the number of tokens. The GPU's context is current.

        Raises:
            BackendError: the watchdog tripped.
        """
        if self._bound is None:
            self._bound = self._bind()
        stream, resources = self._model.stream, self._resources
        seconds = {
            width: time_launches([launch], stream, repeats, resources) for width, launch in self._bound.launches.items()
        }
        self._queue.check_watchdog()
        return seconds

    def _bind(self) -> "_BoundSteps":
        planned, buffers = self._model.kernels.planned, self._model.buffers
        self._loaded.require(planned[f"persistent_x{columns}"].spec for columns in self._widths[1:])
        own = {name: buffers[f"verify.{name}"] for name in ("tokens", "logits", "best")}
        launches = {1: self._persistent.launch(0, self._persistent.shape.ops, replaced=own)}
        launches |= {columns: self._persistent.wide_launch(columns) for columns in self._widths[1:]}
        logits = PinnedArray(buffers["verify.logits"].shape, "float32", self._resources)
        return _BoundSteps(launches, logits.array, PinnedArray((1,), "int32", self._resources).array)


class _BoundSteps(NamedTuple):
    """The steps as launches, by their width, and pinned memory for what they return.

    Attributes:
        logits: [width, V]. fault: [1], of the watchdog.
    """

    launches: dict[int, Launch]
    logits: NDArray[np.float32]
    fault: NDArray[np.int32]


def _copy_to_host(target: NDArray[np.generic], source: View, stream: object) -> None:
    """Copy the beginning of a view to pinned memory, in stream order."""
    call("cuMemcpyDtoHAsync", target.ctypes.data, source.address, target.nbytes, stream)
