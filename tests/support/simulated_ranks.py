"""Several GPUs that share a model, in numba's simulator: the driver is pretended, and kernels run when all ranks have
launched theirs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from pretended_gpu import PretendedDriver, pretend_compiler

from numba_atomflow.backends.cuda import wide_sampling
from numba_atomflow.backends.cuda.tensor_parallel import columns, rank, steps
from numba_atomflow.memory.view import View
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout, prepack_reference
from numba_atomflow.ops.cuda.runtime.launch import Kernel
from numba_atomflow.ops.cuda.runtime.upload import Uploader
from numba_atomflow.utils.repeated import RepeatedBytes

SideBySide = Callable[..., AbstractContextManager[None]]


class SimulatedGpus(PretendedDriver):
    """GPUs of one SM each, whose memory is host memory."""

    def _cuDeviceGetAttribute(self, attribute: str, device: int) -> int:  # noqa: N802
        value: int = super()._cuDeviceGetAttribute(attribute, device)
        return 1 if attribute.endswith("MULTIPROCESSOR_COUNT") else value


class _Launch:
    """In place of `Launch`: a call of the simulated kernel, to be made when every rank has launched its own."""

    waiting: dict[Any, list["_Launch"]]

    def __init__(self, kernel: Kernel, ctas: int, arguments: tuple[Any, ...], stream: Any) -> None:
        assert isinstance(arguments, kernel.spec.signature)
        self.spec, self._stream = kernel.spec, stream
        of_rows = self.spec.name.endswith("_rows")
        self._ctas = ctas if self.waits or of_rows else 1  # others take any number of CTAs
        values = zip(self.spec.element_types, arguments, strict=True)
        self._parameter = self.spec.signature(*(_plain(kind, value) for kind, value in values))

    @property
    def waits(self) -> bool:
        """Whether it waits for the other ranks' launches."""
        return self.spec.name.startswith("persistent_rank")

    def run(self) -> None:
        _Launch.waiting.setdefault(self._stream, []).append(self)

    def start(self) -> None:
        self.spec.make()[self._ctas, self.spec.threads, 0, self.spec.shared_bytes](self._parameter)


def _plain(kind: str, value: Any) -> Any:
    """An argument as a kernel sees it: a number, or a one-dimensional array."""
    if isinstance(value, int):
        return value
    return View("argument", value.address, (value.extent,), "uint8").host_array().view(kind.removesuffix("*"))


def simulate_ranks(monkeypatch: pytest.MonkeyPatch, side_by_side: SideBySide, gpus: int) -> SimulatedGpus:
    """So many GPUs, whose kernels run in the simulator. Weights are prepacked by the reference."""
    pretend_compiler(monkeypatch)
    machine = SimulatedGpus()
    machine.install(monkeypatch)
    machine.gpus = gpus
    _Launch.waiting = {}
    for module in (rank, columns, wide_sampling):
        monkeypatch.setattr(module, "Launch", _Launch)
    monkeypatch.setattr(Uploader, "projection", _prepack)
    on_all = steps.RankSteps.on_all

    def launch_and_run(self: steps.RankSteps, launch: Callable[[rank.Rank], None]) -> None:
        on_all(self, launch)
        queues = list(_Launch.waiting.values())
        while any(queues):
            first = [queue.pop(0) for queue in queues if queue]
            with side_by_side(len(first)) if first[0].waits else side_by_side(1):
                for each in first:
                    each.start()

    monkeypatch.setattr(steps.RankSteps, "on_all", launch_and_run)
    return machine


def _prepack(
    self: Uploader, layout: PrepackedLayout, stored: list[Any], words: View, progress: Any, rows: list[slice]
) -> None:
    del self, progress
    codes, scales = (part.array() if isinstance(part, RepeatedBytes) else part for part in stored)
    own = (np.concatenate([array[span] for span in rows]) for array in (codes, scales))
    packed = prepack_reference(*own, layout)
    View("words", words.address, packed.shape, "uint32").host_array()[:] = packed
