"""A prompt of a few tokens in the persistent kernel, in the simulator: what it leaves has the bits of decode steps."""

from typing import Any

import numpy as np
import pytest
from simulated_backend import SimulatedBackend, simulate_launches
from tiny_models import tiny_geometry

from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.model.step import SAMPLE
from numba_atomflow.ops.cuda.persistent.wide_vectors import ABSENT
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY

CHIP = Chip(sms=1, shared_bytes=232448, capability=(9, 0))
TOKENS = [5, 17, 3]


@pytest.mark.slow
def test_a_prompt_leaves_what_decode_steps_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens are padded to four. The fourth's keys and values lie behind the position."""
    simulate_launches(monkeypatch)
    sizes = {"layers": 1, "hidden": 64, "heads": 1, "kv_heads": 1, "head_dim": 32, "ffn": 64, "vocabulary": 24}
    geometry = tiny_geometry(**sizes)
    kernels = ModelKernels(geometry, CHIP, dependent=False, persistent=True)
    assert kernels.prompt_columns(len(TOKENS)) == 4
    gpu = SimulatedBackend(kernels, dict(WeightArrays(RandomModel(geometry))))
    buffers = {name: gpu.array(view) for name, view in gpu.model.buffers.items()}
    buffers["verify.best"][:] = LOWEST_KEY
    buffers["verify.vectors_x4"][:] = ABSENT
    buffers["sampling.options"][:] = [0.0, 0, 1.0, 0.0, 1.0]
    cache, count = buffers["kv_cache"], len(TOKENS)

    buffers["tokens"][: count + 1] = [*TOKENS, TOKENS[-1]]
    gpu.graphs.run(count, SAMPLE)
    written, posted = cache[:, :, :count].copy(), _posted(gpu.ring[0])
    logits = gpu.model.wide_logits(0, count).host_array().copy()
    assert buffers["position"][0] == count
    assert np.isfinite(logits).all()
    assert buffers["persistent.fault"][0] == 0

    cache[:] = np.nan
    buffers["position"][0] = 0
    for index, token in enumerate(TOKENS):
        buffers["tokens"][0] = token
        gpu.graphs.run(1, SAMPLE)
        row = buffers["logits"][0]
        np.testing.assert_array_equal(logits[index].view(np.uint32), row.view(np.uint32), f"token {index}")
    np.testing.assert_array_equal(cache[:, :, :count].view(np.uint16), written.view(np.uint16))
    assert _posted(gpu.ring[count]) == posted == int(logits[-1].argmax())


def _posted(entry: Any) -> int:
    """The token of an entry of the ring."""
    return int(entry) & 0x7FFFFFFF
