"""The CUDA backend's steps in numba's simulator, over host memory.

The plan, the binding of ops to launches, buckets, padding and `count` are those of the CUDA backend.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from numba_atomflow.backends.base import Observer
from numba_atomflow.backends.cuda import bind, bind_prefill, model, persistent, wide_sampling
from numba_atomflow.backends.cuda.graphs import StepGraphs
from numba_atomflow.backends.cuda.kernels import TOKEN_RING, ModelKernels
from numba_atomflow.backends.cuda.model import DeviceModel
from numba_atomflow.backends.cuda.plan import cuda_plan
from numba_atomflow.memory.arena import HostArena
from numba_atomflow.memory.view import View, view_of
from numba_atomflow.model.rope_tables import rope_tables, tables_of
from numba_atomflow.model.step import LAST_LOGITS, NO_LOGITS, Head, Op, Sample
from numba_atomflow.ops.cuda.layout.weights import prepack_reference
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec, Planned
from numba_atomflow.ops.cuda.token.logprobs import LOGPROB_RING, RECORD_WORDS
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY

POSITIONS = 64


class HostMemory:
    """Access to host memory as observers have it to a device's."""

    def __init__(self, stream: Any) -> None:
        assert stream is None

    def read(self, view: View) -> NDArray[Any]:
        if view.tiling is None:
            return view.host_array().copy()
        return view.tiling.unpack(words_of(view))[: view.shape[0], : view.shape[1]]

    def write(self, view: View, values: NDArray[Any]) -> None:
        assert view.tiling is None
        view.host_array()[...] = values


class HostWrites:
    """In place of `StagedWrites`."""

    def __init__(self, _nbytes: int, stream: Any, resources: Any) -> None:
        assert stream is resources is None

    def write(self, view: View, values: Sequence[int] | NDArray[Any]) -> None:
        view.host_array().reshape(-1)[: len(values)] = values


class HostPinned:
    """In place of `PinnedArray`."""

    def __init__(self, shape: tuple[int, ...], dtype: str, resources: Any) -> None:
        assert resources is None
        self.array = np.zeros(shape, dtype)
        self.view = view_of("pinned", self.array)


def words_of(view: View) -> NDArray[np.uint32]:
    """All memory of a view, whatever its order, as words."""
    words: NDArray[np.uint32] = View(view.name, view.address, (view.extent // 4,), "uint32").host_array()
    return words


@dataclass(frozen=True)
class SimulatedKernel:
    spec: KernelSpec


class SimulatedKernels(Mapping[str, SimulatedKernel]):
    """Kernels by name, in place of `LoadedKernels`."""

    def __init__(self, planned: Mapping[str, Planned]) -> None:
        self._specs = {name: kernel.spec for name, kernel in planned.items()}

    def require(self, specs: Iterator[KernelSpec]) -> None:
        for spec in specs:
            assert self._specs.setdefault(spec.name, spec) == spec, "two kernels of one name"

    def __getitem__(self, name: str) -> SimulatedKernel:
        return SimulatedKernel(self._specs[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


class BoundedArena(HostArena):
    """An arena whose last instance gives a kernel what it may touch of a view: all to the end of its buffer."""

    def __init__(self, plan: Any, resources: Any) -> None:
        assert resources is None
        super().__init__(plan)
        BoundedArena.last = self

    last: "BoundedArena"

    def words(self, view: View) -> NDArray[np.uint8]:
        """From the first byte of the view on; a view of all weights ends where it says."""
        for buffer in self._views.values():
            if buffer.address <= view.address < buffer.address + buffer.extent:
                end = max(buffer.address + buffer.extent, view.address + view.extent)  # of all weights, as one array
                return View(view.name, view.address, (end - view.address,), "uint8").host_array()
        return view.host_array().view(np.uint8)  # the ring


class SimulatedLaunch:
    """In place of `Launch`: the arguments as a kernel sees them, one-dimensional arrays of its own types."""

    def __init__(self, kernel: SimulatedKernel, ctas: int, arguments: tuple[Any, ...], stream: Any) -> None:
        assert stream is None
        assert isinstance(arguments, kernel.spec.signature)
        self._spec, self._ctas, self._arguments = kernel.spec, ctas, arguments

    def run(self) -> None:
        spec = self._spec
        arguments = zip(spec.element_types, self._arguments, strict=True)
        parameter = spec.signature(*(plain(kind, value) for kind, value in arguments))
        spec.make()[self._ctas, spec.threads, 0, spec.shared_bytes](parameter)


def plain(kind: str, value: View | int) -> Any:
    if isinstance(value, int):
        assert kind == "int64"
        return value
    return BoundedArena.last.words(value).view(kind.removesuffix("*"))


class SimulatedBackend:
    """The steps of the CUDA backend, launch by launch: on the GEMM path of `kernels`, or on the GEMV kernels."""

    def __init__(self, kernels: ModelKernels, weights: Mapping[str, NDArray[Any]]) -> None:
        geometry = kernels.geometry
        plan = cuda_plan(kernels, POSITIONS)
        self.kernels = kernels
        self.model = DeviceModel(kernels, plan, None, None)  # type: ignore[arg-type]
        for name, view in self.model.weight_views.items():
            if name in weights:
                self.array(view)[:] = weights[name]
            else:
                codes, scales = weights[f"{name}.weight"], weights[f"{name}.scale"]
                self.array(view)[:] = prepack_reference(codes, scales, kernels.layout_of(name))
        buffers = self.model.buffers
        for view in buffers.values():
            if view.dtype in {"float32", "float16"}:
                view.host_array()[...] = np.nan  # nothing may be read that was not written
        for name in ("x_norm", "attn_out", "intermediate", "final_x_norm"):
            self.array(buffers[name])[...] = 0  # as after loading: the padding of K
        positions = buffers[f"{tables_of(geometry)[0]}.cosines"].shape[0]
        for name, table in rope_tables(geometry, positions, POSITIONS):
            self.array(buffers[name])[:] = table
        self.array(buffers["sampling.best"])[:] = LOWEST_KEY
        self.ring = np.zeros(TOKEN_RING, np.uint64)
        loaded: Any = SimulatedKernels(kernels.planned)
        rings = view_of("ring", self.ring), view_of("logprobs", np.zeros(LOGPROB_RING * RECORD_WORDS, np.int64))
        self.graphs = StepGraphs(self.model, loaded, *rings, None, capture=False)  # type: ignore[arg-type]

    def array(self, view: View) -> NDArray[Any]:
        return view.host_array()

    def prefill(self, tokens: Sequence[int], *, last_logits: bool) -> None:
        buffers = self.model.buffers
        self.array(buffers["tokens"])[: len(tokens)] = tokens
        self._set_count(tokens)
        self.graphs.run(len(tokens), LAST_LOGITS if last_logits else NO_LOGITS)

    def _set_count(self, tokens: Sequence[int]) -> None:
        if "count" in self.model.buffers:
            self.array(self.model.buffers["count"])[:] = len(tokens)

    def logits(self, start: int, stop: int, observer: Observer | None = None) -> NDArray[np.float32]:
        op = self.model.head(start, stop)
        self._run(op, self.graphs.bind(op), observer)
        return self.array(op.logits).copy()

    # --- what a validation needs beside that ---

    name, device = "simulated", "the simulator"

    @property
    def prefill_chunk(self) -> int:
        return self.kernels.prefill_chunk

    @property
    def observed_chunk(self) -> int:
        return self.prefill_chunk

    def step(self, tokens: int, head: Head) -> list[Op]:
        return self.model.step(tokens, head)

    def seek(self, position: int) -> None:
        self.array(self.model.buffers["position"])[:] = position

    def observe(self, tokens: Sequence[int], head: Head, observer: Observer) -> None:
        buffers = self.model.buffers
        self.array(buffers["tokens"])[: len(tokens)] = tokens
        self._set_count(tokens)
        for index, op in enumerate(self.step(len(tokens), head)):
            if not isinstance(op, Sample):
                self._run(op, self.graphs.op_launches(op, index, len(tokens), LAST_LOGITS), observer)

    def _run(self, op: Op, launches: Sequence[Any], observer: Observer | None) -> None:
        if observer:
            observer.before(op, self.model.memory)
        for launch in launches:
            launch.run()
        if observer:
            observer.after(op, self.model.memory)


def simulate_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what needs a device: the arena, access to it, and launches."""
    monkeypatch.setattr(model, "DeviceArena", BoundedArena)
    monkeypatch.setattr(model, "DeviceMemory", HostMemory)
    monkeypatch.setattr(model, "StagedWrites", HostWrites)
    monkeypatch.setattr(wide_sampling, "PinnedArray", HostPinned)
    for module in (bind, bind_prefill, persistent, wide_sampling):
        monkeypatch.setattr(module, "Launch", SimulatedLaunch)
