"""What is measured on a GPU: ops, steps, traces, and how fast its memory can be read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from numba_atomflow.backends.cuda.graphs import StepGraphs
from numba_atomflow.backends.cuda.model import DeviceModel
from numba_atomflow.backends.cuda.queue import StepQueue
from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.device.driver import Device, call
from numba_atomflow.device.resources import DeviceResources, Resources
from numba_atomflow.errors import BackendError
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import SAMPLE, Op
from numba_atomflow.ops.cuda.runtime import bandwidth
from numba_atomflow.ops.cuda.runtime.build import build
from numba_atomflow.ops.cuda.runtime.chip import chip_of
from numba_atomflow.ops.cuda.runtime.graph import Graph, time_graph, time_launches
from numba_atomflow.ops.cuda.runtime.launch import Kernel, Launch
from numba_atomflow.utils.progress import Progress

_CEILING_BYTES = 2 << 30  # read per pass: far more than any L2 holds
_MIN_L2S = 4  # the source is at least so many times as large as L2
_CEILING_PASSES = 12


@dataclass(frozen=True)
class KernelTime:
    """A kernel of a prefill chunk: its name, launches per chunk, and typical seconds of one."""

    name: str
    launches: int
    seconds: float


class CudaMeasurements:
    """Times decode steps and chunks at the current position, which is the same afterwards."""

    def __init__(
        self, model: DeviceModel, graphs: StepGraphs, queue: StepQueue, device: Device, owner: DeviceResources
    ) -> None:
        self._model, self._graphs, self._queue = model, graphs, queue
        self._device, self._owner = device, owner
        self._traced_kernel: Kernel | None = None

    def ceilings(self) -> dict[str, float]:
        """GB/s of reading this GPU's memory, by loads and by TMA bulk copies, measured now."""
        with self._owner.current():
            return measure_ceilings(self._device, self._model.stream, self._owner.resources)

    def time_ops(self, repeats: int) -> list[tuple[Op, float]]:
        """The decode step's ops in order, each with the seconds of its kind; those of the persistent kernel with what
        each adds to a traced step.

        All others of a kind run one after the other, each with its own weights, in a graph of their own: a single op
        is shorter than what starting it by itself costs.
        """
        ops = self._model.step(1, SAMPLE)
        trace = self.trace_step(repeats)
        traced = [] if trace is None else list(zip(ops, trace.op_seconds, strict=False))
        if self._graphs.samples_in_kernel:
            return traced  # the persistent kernel is the whole step
        others = ops[len(traced) :]
        with self._queue.measuring():
            seconds = self._seconds_by_kind(others, repeats, argmax_done=trace is not None)
        return traced + [(op, seconds[op.kind]) for op in others]

    def _seconds_by_kind(self, ops: Sequence[Op], repeats: int, *, argmax_done: bool) -> dict[str, float]:
        kinds: dict[str, list[Op]] = {}
        for op in ops:
            kinds.setdefault(op.kind, []).append(op)
        seconds = {}
        for kind, members in kinds.items():
            launches = [
                launch for op in members for launch in self._graphs.bind(op, sampled=True, argmax_done=argmax_done)
            ]
            per_launch = time_launches(launches, self._model.stream, repeats, self._owner.resources)
            seconds[kind] = per_launch * len(launches) / len(members)
        return seconds

    def time_step(self, repeats: int) -> float:
        """Median seconds of the decode step's graph.

        Raises:
            BackendError: the watchdog of the persistent kernel tripped.
        """
        with self._queue.measuring():
            times = time_graph(self._graphs.decode_graph(), repeats, self._position_keeper())
            self._queue.check_watchdog()
        return float(np.median(times))

    def time_chunk(self, tokens: int, repeats: int) -> tuple[list[KernelTime], float]:
        """The kernels of a prefill chunk after the current position, and the median seconds of its graph.

        Of each kernel all launches of the chunk run one after the other, each with its own weights, in a graph of their
        own: the chunk itself may be faster, where kernels overlap. Its last part, the LM head and what follows, is not
        among them.

        Raises:
            IndexError: they do not fit behind the position.
        """
        stream, resources, count = self._model.stream, self._owner.resources, self._model.buffers.get("count")
        with self._queue.measuring(tokens):
            launches = self._graphs.chunk_launches(tokens)
            by_name: dict[str, list[Launch]] = {}
            for launch in launches:
                by_name.setdefault(launch.kernel.spec.name, []).append(launch)
            if count is not None:
                self._model.memory.write(count, np.array([tokens]))
            times = [
                KernelTime(name, len(group), time_launches(group, stream, repeats, resources))
                for name, group in by_name.items()
            ]
            with resources.scope(stream) as timing:
                whole = float(np.median(time_graph(Graph(launches, stream, timing), repeats)))
        return times, whole

    def trace_step(self, repeats: int, progress: Progress | None = None) -> StepTrace | None:
        """When each CTA of the persistent kernel did what, in that of `repeats` runs which is the median by length;
        None without that kernel. The traced kernel is compiled, or loaded from the cache, on first use.

        Raises:
            BackendError: it could not be compiled, or its watchdog tripped.
        """
        persistent, memory = self._graphs.persistent, self._model.memory
        if persistent is None:
            return None
        traces, times = [], self._model.buffers["persistent.timestamps"]
        ops = self._model.step(1, SAMPLE)
        with self._queue.measuring():
            launches = [self._traced_launch(progress), *self._graphs.launches(1, SAMPLE)[1:]]
            keep_position = self._position_keeper()
            for _ in range(repeats + 1):
                memory.write(times, np.zeros(times.shape, np.int64))
                keep_position()
                for launch in launches:
                    launch.run()
                traces.append(persistent.trace(ops, memory.read(times)))
            self._queue.check_watchdog()
        return sorted(traces[1:], key=lambda trace: trace.ends[-1])[(repeats - 1) // 2]

    def _traced_launch(self, progress: Progress | None) -> Launch:
        """The persistent kernel that also writes timestamps, for a whole step."""
        persistent = self._graphs.persistent
        assert persistent is not None  # noqa: S101
        if self._traced_kernel is None:
            spec = self._model.kernels.persistent_traced.spec
            code = build([spec], self._device.capability, progress)[spec]
            self._traced_kernel = Kernel(spec, code, self._owner.resources)
        greedy = self._graphs.samples_in_kernel
        return persistent.launch(0, persistent.shape.ops, greedy=greedy, traced=self._traced_kernel)

    def _position_keeper(self) -> Callable[[], None]:
        """Puts the device's position back to what it is now."""
        position = self._model.buffers["position"]
        value = self._model.memory.read(position)
        return lambda: self._model.memory.write(position, value)


def measure_ceilings(device: Device, stream: Any, resources: Resources) -> dict[str, float]:
    """GB/s (medians) of reading memory: by loads, and by TMA bulk copies where the GPU has them.

    Takes 2 GB of device memory for as long as it runs, or half of what is free if that is less.

    Args:
        resources: owns that memory while it is needed.

    Raises:
        BackendError: what is free is too little to be slower than L2.
    """
    chip = chip_of(device)
    free = int(call("cuMemGetInfo")[0])
    nbytes = min(_CEILING_BYTES, free // 2) // (1 << 20) * (1 << 20)
    if nbytes < _MIN_L2S * device.l2_bytes:
        needed = 2 * _MIN_L2S * device.l2_bytes
        raise BackendError(
            f"Measuring how fast the GPU's memory is takes {needed / 1e6:.0f} MB, but only {free / 1e6:.0f} MB "
            "are free; use a smaller --max-seq-len, or close other programs."
        )
    kernels = {"loads": bandwidth.read_kernel(chip.sms)}
    if chip.capability >= (9, 0):
        kernels["TMA"] = bandwidth.bulk_read_kernel(chip.sms)
    codes = build([planned.spec for planned in kernels.values()], chip.capability)
    ceilings = {}
    with resources.scope(stream) as measuring:
        address = int(measuring.call("cuMemAlloc", nbytes, undo="cuMemFree"))
        call("cuMemsetD32Async", address, 0x3C5A96E1, nbytes // 4, stream)
        source = View("ceiling.source", address, (nbytes // 4 - 1024,), "uint32")
        total = View("ceiling.total", address + nbytes - 4096, (1,), "uint32")
        arguments = bandwidth.ReadArguments(source=source, total=total)
        for name, planned in kernels.items():
            kernel = Kernel(planned.spec, codes[planned.spec], measuring)
            graph = Graph([Launch(kernel, planned.ctas, arguments, stream)], stream, measuring)
            ceilings[name] = source.nbytes / float(np.median(time_graph(graph, _CEILING_PASSES))) / 1e9
    return ceilings
