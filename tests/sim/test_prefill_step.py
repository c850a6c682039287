"""A whole prefill step of the GEMM path in the simulator, over host memory, beside the CPU backend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from kernel_cases import generator, relative_error
from simulated_backend import POSITIONS, SimulatedBackend, simulate_launches
from tiny_models import tiny_geometry

from numba_atomflow.backends.cpu import CpuBackend
from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import LAST_LOGITS, Attention, GateUp, Op
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.validate import check, record

HOPPER, AMPERE = (Chip(sms=2, shared_bytes=size, capability=cc) for size, cc in ((232448, (9, 0)), (166912, (8, 0))))
LIMIT = 3e-3  # relative L2, as on a GPU
FP8_LIMIT = 0.25  # E4M3 rounds to 2^-4: some 0.06 over all rows, up to 0.1 in one


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_launches(monkeypatch)


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
    tokens = generator().integers(0, geometry.vocabulary, case.ends[-1]).tolist()
    cache = gpu.array(gpu.model.buffers["kv_cache"])
    first = 0
    for last in case.ends:
        piece = tokens[first:last]
        gpu.prefill(piece, last_logits=True)
        cpu.prefill(piece, LAST_LOGITS)
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
