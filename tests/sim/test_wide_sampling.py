"""Sampling from the rows of a step of several tokens, in the simulator: the tokens of decode steps in a row."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kernel_cases import generator
from numpy.typing import NDArray
from simulated_backend import HostWrites, SimulatedBackend, simulate_launches
from tiny_models import tiny_geometry

from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.backends.cuda.model import SamplerWriter
from numba_atomflow.backends.cuda.queue import posted_token
from numba_atomflow.backends.cuda.wide_sampling import WideSampling
from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.model.step import SAMPLE
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY
from numba_atomflow.ops.cuda.token.sample_layout import SampleLayout
from numba_atomflow.sampling import Sampler, SamplingParams

CHIP = Chip(sms=1, shared_bytes=232448, capability=(9, 0))
VOCABULARY, CONTEXT, ROWS = 80, [3, 7, 9, 11, 70], 3
PARAMS = [
    pytest.param(SamplingParams(temperature=0.5, top_p=0.95, repetition_penalty=3.0, seed=2**63 + 5), id="penalty"),
    pytest.param(SamplingParams(temperature=0.0, repetition_penalty=3.0), id="greedy", marks=pytest.mark.slow),
    pytest.param(SamplingParams(temperature=1.0, top_k=20, seed=1), id="top-k", marks=pytest.mark.slow),
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedBackend:
    simulate_launches(monkeypatch)
    sizes = {"layers": 1, "hidden": 64, "heads": 1, "kv_heads": 1, "head_dim": 32, "ffn": 64, "vocabulary": VOCABULARY}
    geometry = tiny_geometry(**sizes)
    kernels = ModelKernels(geometry, CHIP, dependent=False, persistent=True)
    for name in ("sample", "sample_rows"):  # with few threads, which cost time in the simulator
        spec = kernels.planned[name].spec
        few = dict(spec.arguments) | {"threads": 32, "bins": 32, "capacity": 8}
        few |= {"row_ctas": 2} if name == "sample_rows" else {}
        small = replace(spec, arguments=tuple(few.items()), threads=32, shared_bytes=SampleLayout(32, 8).shared_bytes)
        kernels.planned[name] = replace(kernels.planned[name], spec=small, ctas=2)
    gpu = SimulatedBackend(kernels, dict(WeightArrays(RandomModel(geometry))))
    gpu.array(gpu.model.buffers["verify.best"])[:] = LOWEST_KEY
    return gpu


def plain_tokens(gpu: SimulatedBackend, logits: NDArray[np.float32], sampler: Sampler) -> list[int]:
    """The tokens that the tails of decode steps sample from rows of logits."""
    buffers = gpu.model.buffers
    SamplerWriter(HostWrites(0, None, None), gpu.model.sampling).write(sampler)  # type: ignore[arg-type]
    gpu.array(buffers["sampling.generator"])[1] = sampler.draws
    tokens = []
    for number, row in enumerate(logits):
        gpu.array(buffers["logits"])[0] = row
        for op in gpu.model.tail(1, SAMPLE)[1:]:
            for launch in gpu.graphs.bind(op, sampled=True):
                launch.run()
        tokens.append(posted_token(int(gpu.ring[number])))
    return tokens


def sampled(gpu: SimulatedBackend, sampling: WideSampling, tokens: list[int], sampler: Sampler) -> list[Any]:
    """What is posted for the rows of a step of these tokens."""
    sampling.send(tokens, sampler)
    assert [sampling.posted(row) for row in range(len(tokens))] == [None] * len(tokens)
    sampling.run(len(tokens))
    assert gpu.array(gpu.model.buffers["verify.best"]).tolist() == [LOWEST_KEY] * 8
    return [posted_token(sampling.posted(row) or 0) for row in range(len(tokens))]


@pytest.mark.parametrize("params", PARAMS)
def test_rows_are_sampled_as_in_decode_steps(gpu: SimulatedBackend, params: SamplingParams) -> None:
    row = 2 * generator(5).standard_normal(VOCABULARY)  # each time: only penalty or draw give another token
    rows = np.tile(row.astype(np.float32), (ROWS, 1))
    gpu.array(gpu.model.buffers["verify.logits"])[:ROWS] = rows
    sampler = Sampler(params, VOCABULARY, CONTEXT)
    sampler.note(20)  # the first token of the reply, sampled after the prompt
    first, second, third = plain_tokens(gpu, rows, sampler)
    model = gpu.model
    sampling = WideSampling(model.buffers, model.staged, None, gpu.graphs._loaded, gpu.kernels.planned, None)  # type: ignore[arg-type]

    assert sampled(gpu, sampling, [20, first, second], sampler) == [first, second, third]
    wrong = (first + 1) % VOCABULARY
    assert sampled(gpu, sampling, [20, wrong], sampler)[0] == first
    sampler.note(first)  # the step after that
    gpu.array(gpu.model.buffers["verify.logits"])[:2] = rows[1:]
    assert sampled(gpu, sampling, [first, second], sampler) == [second, third]
