"""Steps of families beyond Llama on the GEMV kernels and on the GEMM path, in the simulator, beside the CPU backend."""

from typing import Any

import numpy as np
import pytest
from family_geometries import FIELDS
from kernel_cases import generator, relative_error
from simulated_backend import POSITIONS, SimulatedBackend, simulate_launches
from tiny_models import tiny_geometry

from numba_atomflow.backends.cpu import CpuBackend
from numba_atomflow.backends.cuda.families import sliding_window
from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.model.step import ALL_LOGITS, LAST_LOGITS, SAMPLE
from numba_atomflow.ops.cuda.runtime.chip import Chip

CHIP = Chip(sms=1, shared_bytes=30 << 10, capability=(9, 0))
LIMIT = 3e-3  # relative L2, as on a GPU
SIZES: dict[str, Any] = {
    "layers": 2,
    "hidden": 48,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 32,
    "ffn": 24,
    "vocabulary": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"layers": 1, "sliding_window": 2, "sliding_layers": (0,), "qk_norm": True, "qk_norm_of_all_heads": True},
    "gemma3_text": {"layers": 1, "sliding_window": 2, "sliding_layers": (0,), "head_dim": 48},
    "olmo2": {"layers": 1},
}


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_launches(monkeypatch)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "gemma2" else pytest.mark.slow) for name in FAMILIES]
)
def test_steps_equal_those_of_the_cpu(family: str) -> None:
    """A step of two tokens, which is padded, then one of one token, for which windows have begun to slide."""
    geometry = tiny_geometry(**(FIELDS[family] | SIZES | FAMILIES[family]))
    weights = dict(WeightArrays(RandomModel(geometry)))
    window = sliding_window(geometry, POSITIONS)
    assert (window is None) == (geometry.sliding_window is None)
    gpu = SimulatedBackend(ModelKernels(geometry, CHIP, dependent=False, window=window), weights)
    cpu = CpuBackend(geometry, weights, POSITIONS, 1)
    cpu.prepare(None)
    tokens = generator().integers(0, geometry.vocabulary, 3).tolist()
    for first, last in ((0, 2), (2, 3)):
        piece = tokens[first:last]
        gpu.prefill(piece, last_logits=False)
        cpu.prefill(piece, ALL_LOGITS)
        expected = cpu.logits(0, len(piece)).astype(np.float64)
        assert relative_error(gpu.logits(0, len(piece)), expected) <= LIMIT, last
    cpu.close()


def test_a_persistent_step_with_bias_and_head_norms_equals_that_of_the_cpu() -> None:
    """Op by op, after a step of one token on the GEMV kernels, which share weights with it."""
    geometry = tiny_geometry(**(SIZES | {"layers": 1, "qkv_bias": True, "qk_norm": True}))
    weights = dict(WeightArrays(RandomModel(geometry)))
    chip = Chip(sms=1, shared_bytes=100 << 10, capability=(9, 0))
    gpu = SimulatedBackend(ModelKernels(geometry, chip, dependent=False, persistent=True), weights)
    cpu = CpuBackend(geometry, weights, POSITIONS, 1)
    cpu.prepare(None)
    tokens = generator().integers(0, geometry.vocabulary, 2).tolist()
    gpu.prefill(tokens[:1], last_logits=False)
    cpu.prefill(tokens, LAST_LOGITS)
    gpu.array(gpu.model.buffers["tokens"])[0] = tokens[1]
    for index, op in enumerate(gpu.step(1, SAMPLE)[: gpu.kernels.persistent_shape.ops]):
        for launch in gpu.graphs.op_launches(op, index, 1, SAMPLE):
            launch.run()
    logits, expected = gpu.array(gpu.model.buffers["logits"])[0], cpu.logits(1, 2)[0].astype(np.float64)
    assert relative_error(logits, expected) <= LIMIT
    cpu.close()


EVERYTHING: dict[str, Any] = {
    "pre_norm": False,
    "post_norm": True,
    "qk_norm": True,
    "qk_norm_of_all_heads": True,
    "hidden_act": "gelu_tanh",
    "sliding_window": 5,
    "sliding_layers": (0,),
    "attention_soft_cap": 5.0,
    "logit_soft_cap": 3.0,
    "head_dim": 48,
}


@pytest.mark.slow
def test_a_chunk_equals_that_of_the_cpu() -> None:
    """On the GEMM path, padded to 16 tokens."""
    geometry = tiny_geometry(**(SIZES | {"layers": 1} | EVERYTHING))
    weights = dict(WeightArrays(RandomModel(geometry)))
    chip, window = Chip(sms=1, shared_bytes=166912, capability=(8, 0)), sliding_window(geometry, POSITIONS)
    gpu = SimulatedBackend(ModelKernels(geometry, chip, dependent=False, window=window, chunk=16), weights)
    cpu = CpuBackend(geometry, weights, POSITIONS, 1)
    cpu.prepare(None)
    tokens = generator().integers(0, geometry.vocabulary, 11).tolist()
    gpu.prefill(tokens, last_logits=False)
    cpu.prefill(tokens, LAST_LOGITS)
    expected = cpu.logits(0, len(tokens)).astype(np.float64)
    assert relative_error(gpu.logits(0, len(tokens)), expected) <= LIMIT
    cpu.close()
