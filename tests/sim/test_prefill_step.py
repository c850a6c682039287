"""A whole prefill step of the GEMM path in the simulator, over host memory, beside the CPU backend.

The plan, the binding of ops to launches, buckets, padding and `count` are those of the CUDA backend.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from kernel_cases import generator, relative_error
from numpy.typing import NDArray
from tiny_models import tiny_geometry

from numba_atomflow.backends.base import Observer
from numba_atomflow.backends.cpu import CpuBackend
from numba_atomflow.backends.cuda import bind, bind_prefill, model
from numba_atomflow.backends.cuda.graphs import StepGraphs
from numba_atomflow.backends.cuda.kernels import TOKEN_RING, ModelKernels
from numba_atomflow.backends.cuda.model import DeviceModel
from numba_atomflow.backends.cuda.plan import cuda_plan
from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.geometry import rope_inverse_frequencies
from numba_atomflow.memory.arena import HostArena
from numba_atomflow.memory.view import View, view_of
from numba_atomflow.model.step import LAST_LOGITS, NO_LOGITS, Attention, GateUp, Head, Op, Sample
from numba_atomflow.ops import rope
from numba_atomflow.ops.cuda.layout.weights import prepack_reference
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec, Planned
from numba_atomflow.ops.cuda.token.logprobs import LOGPROB_RING, RECORD_WORDS
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY
from numba_atomflow.validate import check, record

HOPPER, AMPERE = (Chip(sms=2, shared_bytes=size, capability=cc) for size, cc in ((232448, (9, 0)), (166912, (8, 0))))
POSITIONS = 64
LIMIT = 3e-3  # relative L2, as on a GPU
FP8_LIMIT = 0.25  # E4M3 rounds to 2^-4: some 0.06 over all rows, up to 0.1 in one


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
        """From the first byte of the view on."""
        for buffer in self._views.values():
            if buffer.address <= view.address < buffer.address + buffer.extent:
                end = buffer.address + buffer.extent
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
    """The steps of the CUDA backend's GEMM path, launch by launch."""

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
        tables = rope.rope_table(rope_inverse_frequencies(geometry), len(self.array(buffers["rope.cosines"])))
        self.array(buffers["rope.cosines"])[:], self.array(buffers["rope.sines"])[:] = tables
        self.array(buffers["sampling.best"])[:] = LOWEST_KEY
        self.ring = np.zeros(TOKEN_RING, np.uint64)
        loaded: Any = SimulatedKernels(kernels.planned)
        rings = view_of("ring", self.ring), view_of("logprobs", np.zeros(LOGPROB_RING * RECORD_WORDS, np.int64))
        self.graphs = StepGraphs(self.model, loaded, *rings, None, capture=False)  # type: ignore[arg-type]

    def array(self, view: View) -> NDArray[Any]:
        return view.host_array()

    def prefill(self, tokens: NDArray[np.int32], *, last_logits: bool) -> None:
        buffers = self.model.buffers
        self.array(buffers["tokens"])[: len(tokens)] = tokens
        self.array(buffers["count"])[:] = len(tokens)
        self.graphs.run(len(tokens), LAST_LOGITS if last_logits else NO_LOGITS)

    def logits(self, start: int, stop: int, observer: Observer | None = None) -> NDArray[np.float32]:
        op = self.model.head(start, stop)
        self._run(op, self.graphs.bind(op), observer)
        return self.array(op.logits).copy()

    # --- what a validation needs beside that ---

    name, device = "simulated", "the simulator"

    @property
    def prefill_chunk(self) -> int:
        return self.kernels.prefill_chunk

    def step(self, tokens: int, head: Head) -> list[Op]:
        return self.model.step(tokens, head)

    def seek(self, position: int) -> None:
        self.array(self.model.buffers["position"])[:] = position

    def observe(self, tokens: Sequence[int], head: Head, observer: Observer) -> None:
        buffers = self.model.buffers
        self.array(buffers["tokens"])[: len(tokens)] = tokens
        self.array(buffers["count"])[:] = len(tokens)
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


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "DeviceArena", BoundedArena)
    monkeypatch.setattr(model, "DeviceMemory", HostMemory)
    for module in (bind, bind_prefill):
        monkeypatch.setattr(module, "Launch", SimulatedLaunch)


def inputs(ops: Sequence[Op]) -> list[View]:
    """The inputs of the projections of a step, in order."""
    views: list[View] = []
    for op in ops:
        match op:
            case GateUp():  # the norm before it has replaced the one before QKV
                views += [op.x_norm, op.y]
            case Attention():
                views.append(op.attn_out)
    return views


@dataclass(frozen=True)
class StepCase:
    """Chunks of one prompt.

    Attributes:
        family: of the model.
        ends: of the chunks.
        fp8: activations are rounded to FP8.
    """

    family: dict[str, Any]
    ends: tuple[int, ...]
    fp8: bool = False
    chip: Chip = HOPPER  # with wgmma; others have mma.sync


CASES = {
    "llama": StepCase({"heads": 1}, (9, 18)),
    "qwen, mma.sync": StepCase({"qk_norm": True, "qkv_bias": True, "ffn": 96}, (17,), chip=AMPERE),  # padded to 32
    "FP8 activations": StepCase({"heads": 1, "head_dim": 128}, (9,), fp8=True),  # attention writes FP8 itself
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if name == "llama" else pytest.mark.slow) for name, case in CASES.items()],
)
def test_chunks_equal_those_of_the_cpu(case: StepCase) -> None:
    """Chunks are padded to 16 or 32; keys and values behind the last stay as they are."""
    sizes = {"layers": 1, "hidden": 128, "heads": 2, "kv_heads": 1, "ffn": 64, "vocabulary": 24}
    geometry = tiny_geometry(**(sizes | case.family))
    weights = dict(WeightArrays(RandomModel(geometry)))
    kernels = ModelKernels(geometry, case.chip, dependent=False, chunk=32, fp8_activations=case.fp8)
    limit = FP8_LIMIT if case.fp8 else LIMIT
    gpu = SimulatedBackend(kernels, weights)
    cpu = CpuBackend(geometry, weights, POSITIONS, 1)
    cpu.prepare(None)
    tokens = generator().integers(0, geometry.vocabulary, case.ends[-1]).astype(np.int32)
    cache = gpu.array(gpu.model.buffers["kv_cache"])
    first = 0
    for last in case.ends:
        piece = tokens[first:last]
        gpu.prefill(piece, last_logits=True)
        cpu.prefill(piece.tolist(), LAST_LOGITS)
        expected = cpu.logits(0, len(piece)).astype(np.float64)
        last_row = gpu.array(gpu.model.buffers["logits"])[:1]
        assert relative_error(last_row, expected[-1:]) <= limit
        if last == case.ends[-1]:
            assert relative_error(gpu.logits(0, len(piece)), expected) <= limit
        steps = (backend.step(len(piece), LAST_LOGITS) for backend in (gpu.model, cpu))
        for actual, probed in zip(*map(inputs, steps), strict=True):
            rows = gpu.model.memory.read(actual)  # tiled on the GPU; an observer sees rows
            assert relative_error(rows, probed.host_array().astype(np.float64)) <= limit, actual.name
        assert int(gpu.array(gpu.model.buffers["position"])[0]) == last
        keys = cpu._buffers["kv_cache"].host_array()[:, :, :last].astype(np.float64)
        assert relative_error(cache[:, :, :last].astype(np.float64), keys) <= limit
        assert np.isnan(cache[:, :, last:]).all()
        first = last
    cpu.close()


@pytest.mark.slow
def test_every_probe_of_a_chunk_agrees_with_the_cpu() -> None:
    """A chunk through the validator, its layer on the CPU's input: observers read and write what kernels do."""
    geometry = tiny_geometry(layers=1, hidden=128, heads=1, kv_heads=1, ffn=64, vocabulary=24)
    weights = dict(WeightArrays(RandomModel(geometry)))
    cpu = CpuBackend(geometry, weights, POSITIONS, 1)
    cpu.prepare(None)
    prompt = generator().integers(0, geometry.vocabulary, 9).tolist()
    reference = record(cpu, geometry, prompt, 0)
    gpu: Any = SimulatedBackend(ModelKernels(geometry, HOPPER, dependent=False, chunk=32), weights)
    report = check(gpu, reference, isolate=True, block=9)
    assert report.passed, report.verdict()
    cpu.close()
