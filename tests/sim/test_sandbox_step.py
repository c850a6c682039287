"""A whole step of the sandbox's GPU runner in the simulator, over host memory, beside the same step on the CPU."""

import ctypes
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kernel_cases import generator, relative_error
from numpy.typing import NDArray
from tiny_models import tiny_geometry

from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.geometry import rope_inverse_frequencies
from numba_atomflow.memory.arena import HostArena
from numba_atomflow.memory.view import View
from numba_atomflow.ops import rope
from numba_atomflow.ops.cuda.layout.weights import prepack_reference
from numba_atomflow.ops.cuda.prefill.buckets import bucket_for
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.ops.cuda.token.order import token_of
from numba_atomflow.sandbox import gpu_runner
from numba_atomflow.sandbox.cpu_runner import CpuRunner
from numba_atomflow.sandbox.gpu_kernels import CHUNK_INPUTS, STEP_INPUTS, SandboxKernels
from numba_atomflow.sandbox.gpu_runner import GpuRunner
from numba_atomflow.sandbox.requests import Request
from numba_atomflow.sandbox.runner import CacheSizes
from numba_atomflow.sandbox.scheduler import Batch, Chunk

GEOMETRY = tiny_geometry(layers=1, hidden=128, heads=2, kv_heads=1, ffn=128, vocabulary=48)
SIZES = CacheSizes(slots=96, block_sizes=(8,), sequences=3, longest=32)
CHIP = Chip(sms=1, shared_bytes=232448, capability=(8, 0))
LIMIT = 3e-3  # relative L2, as on a GPU


class SimulatedRunner(GpuRunner):
    """A runner whose device memory is the host's, and whose launches run in the simulator."""

    def __init__(self, weights: WeightArrays) -> None:
        self.geometry, self.sizes, self.block_size = GEOMETRY, SIZES, 8
        self.kernels = SandboxKernels(GEOMETRY, CHIP, SIZES)
        self.max_batched_tokens, self._head, self._stream = self.kernels.widths[-1], "vocabulary", None
        self.prefill_chunk = self.kernels.prefill_chunk
        self._step: Any = SimpleNamespace(array=np.zeros((len(STEP_INPUTS), self.max_batched_tokens), np.int64))
        self._chunk_inputs: Any = SimpleNamespace(array=np.zeros(len(CHUNK_INPUTS), np.int64))
        self._chunk_tokens: Any = SimpleNamespace(array=np.zeros(self.prefill_chunk, np.int32))
        parts = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
        vectors = [name for name in weights if not name.endswith((".weight", ".scale"))]
        plan = self.kernels.plan({name: len(weights[name]) for name in vectors}, parts)
        self._arena: Any = HostArena(plan)  # type: ignore[assignment]
        for name in vectors:
            self.array(name)[:] = weights[name]
        for part in parts:
            codes, scales = weights[f"{part}.weight"], weights[f"{part}.scale"]
            self.array(part)[:] = prepack_reference(codes, scales, self.kernels.layout_of(part))
        tables = rope.rope_table(rope_inverse_frequencies(GEOMETRY), SIZES.longest)
        self.array("cosines")[:], self.array("sines")[:] = tables
        self.array("options")[:] = 0.0, 0.0, 1.0, 0.0, 1.0

    def array(self, name: str) -> NDArray[Any]:
        return self._arena[name].host_array()  # type: ignore[no-any-return]

    def _launch_planned(self, planned: Planned, arguments: tuple[Any, ...]) -> Any:
        spec = planned.spec
        arrays = [plain(view, kind) for kind, view in zip(spec.element_types, arguments, strict=True)]
        parameter = spec.signature(*arrays)

        def run() -> None:
            spec.make()[planned.ctas, spec.threads, 0, spec.shared_bytes](parameter)

        return run

    def _require(self, planned: Iterable[Planned]) -> None:
        assert [kernel.spec.name for kernel in planned]

    def _clear_best(self) -> None:
        self.array("best")[:] = -1

    def step(self, batch: Batch, layout: Any) -> None:
        width = self._upload_batch(batch, self._padding_slot(layout))
        for launch in self._step_launches(width, layout, True):
            launch()

    def chunk(self, batch: Batch) -> None:
        self._upload_chunk(batch)
        for launch in self._chunk_launches(bucket_for(batch.token_count)) + self._head_launches(
            1, batch.token_count - 1
        ):
            launch()


def copy_in_memory(address: int, values: NDArray[Any], stream: Any) -> None:
    assert stream is None
    ctypes.memmove(address, values.ctypes.data, values.nbytes)


def plain(view: View | int, kind: str) -> Any:
    """A view as a kernel sees it: one dimension, of the kernel's own type; or a number."""
    if isinstance(view, int):
        return view
    return view.host_array().reshape(-1).view(kind.removesuffix("*"))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", ["paged", "static"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_step_equals_that_of_the_cpu(layout: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences with 20, 9 and no cached positions, in a step of width four; or the first one alone."""
    monkeypatch.setattr(gpu_runner, "copy_to_device", copy_in_memory)
    rng = generator(count)
    weights = WeightArrays(RandomModel(GEOMETRY))
    gpu, cpu = SimulatedRunner(weights), CpuRunner(GEOMETRY, dict(weights), SIZES, threads=1)
    noise = rng.standard_normal(gpu.array("paged_kv").shape).astype(np.float16)
    gpu.array("paged_kv")[:] = noise
    cpu._cache[:] = noise[:, :, : SIZES.slots]
    block_table = rng.permutation(12).reshape(3, 4).astype(np.int32)
    gpu.array("block_table")[:3], cpu.block_table[:] = block_table, block_table
    gpu.array("block_table")[3, 0] = 12  # the block of padding tokens
    positions, rows = np.array([20, 9, 0])[:count], np.arange(count)
    slots = rows * SIZES.capacity + positions
    if layout == "paged":
        slots = block_table[rows, positions // 8].astype(np.int64) * 8 + positions % 8
    tokens = rng.integers(0, GEOMETRY.vocabulary, count).astype(np.int32)
    chunks = [Chunk(Request(row, [1], 1), 0, 1, []) for row in range(count)]
    batch = Batch(chunks, tokens, positions, positions, rows, slots, list(range(count)), [])
    gpu.step(batch, layout)
    cpu._run(batch, cpu._attend_paged if layout == "paged" else cpu._attend_static)
    expected = cpu._array("logits")[:count].astype(np.float64)
    assert relative_error(gpu.array("logits")[:count], expected) <= LIMIT
    best = [token_of(int(key)) for key in gpu.array("best")[:count]]
    assert best == gpu.array("logits")[:count].argmax(axis=1).tolist()
    written = gpu.array("paged_kv")[:, :, slots].astype(np.float64)
    assert relative_error(written, cpu._cache[:, :, slots].astype(np.float64)) <= LIMIT
    others = np.setdiff1d(np.arange(SIZES.slots), slots)
    np.testing.assert_array_equal(gpu.array("paged_kv")[:, :, others], noise[:, :, others])


@pytest.mark.parametrize("position", [0, 11])
def test_a_chunk_of_a_prompt_equals_a_step_of_the_cpu(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirteen tokens of one sequence on the GEMM path, after those that its KV blocks hold."""
    monkeypatch.setattr(gpu_runner, "copy_to_device", copy_in_memory)
    rng, count, row = generator(position), 13, 1
    weights = WeightArrays(RandomModel(GEOMETRY))
    gpu, cpu = SimulatedRunner(weights), CpuRunner(GEOMETRY, dict(weights), SIZES, threads=1)
    noise = rng.standard_normal(gpu.array("paged_kv").shape).astype(np.float16)
    gpu.array("paged_kv")[:] = noise
    cpu._cache[:] = noise[:, :, : SIZES.slots]
    block_table = rng.permutation(12).reshape(3, 4).astype(np.int32)
    gpu.array("block_table")[:3], cpu.block_table[:] = block_table, block_table
    positions, rows = np.arange(position, position + count), np.full(count, row)
    slots = block_table[row, positions // 8].astype(np.int64) * 8 + positions % 8
    tokens = rng.integers(0, GEOMETRY.vocabulary, count).astype(np.int32)
    chunks = [Chunk(Request(row, [1], 1), position, position + count, [])]
    batch = Batch(chunks, tokens, positions, np.full(count, position), rows, slots, [count - 1], [])
    gpu.chunk(batch)
    (best,) = cpu.run(batch)
    expected = cpu._array("logits")[0].astype(np.float64)
    assert relative_error(gpu.array("logits")[0], expected) <= LIMIT
    assert token_of(int(gpu.array("best")[0])) == gpu.array("logits")[0].argmax()
    assert best == expected.argmax()
    written = gpu.array("paged_kv")[:, :, slots].astype(np.float64)
    assert relative_error(written, cpu._cache[:, :, slots].astype(np.float64)) <= LIMIT
    others = np.setdiff1d(np.arange(SIZES.slots), slots)
    np.testing.assert_array_equal(gpu.array("paged_kv")[:, :, others], noise[:, :, others])
