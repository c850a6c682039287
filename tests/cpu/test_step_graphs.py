"""Which graphs of a model's steps are captured, and what a step puts into the stream; over a pretended driver. Those of
the GEMM path: test_prefill_path.py.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from pretended_gpu import PretendedDriver, pretend_compiler
from tiny_models import tiny_geometry

from numba_atomflow import Engine
from numba_atomflow.backends.base import Decode, Memory
from numba_atomflow.backends.cuda.backend import CudaBackend
from numba_atomflow.backends.cuda.graphs import is_decode, split_tail
from numba_atomflow.backends.cuda.kernels import PROMPT_COLUMNS
from numba_atomflow.backends.cuda.queue import RUN_AHEAD
from numba_atomflow.errors import BackendError
from numba_atomflow.model.step import LAST_LOGITS, NO_LOGITS, SAMPLE, Advance, Head, LmHead, Op, Sample
from numba_atomflow.ops.cuda.token.logprobs import LOGPROB_RING
from numba_atomflow.sampling import Sampler, SamplingParams

pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
pytest.importorskip("numba_cuda", reason="the CUDA backend needs it; there is none for macOS")

LAYERS, MAX_SEQ_LEN = 2, 64


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_compiler(monkeypatch)


@pytest.fixture(params=["graph", "persistent"])
def decode(request: pytest.FixtureRequest) -> Decode:
    path: Decode = request.param
    return path


@pytest.fixture
def backend(pretended: PretendedDriver, decode: Decode) -> Iterator[CudaBackend]:
    geometry = tiny_geometry(layers=LAYERS)
    with Engine.random(geometry, "cuda", MAX_SEQ_LEN, decode=decode, prefill="gemv") as engine:
        assert isinstance(engine.backend, CudaBackend)
        yield engine.backend


def since(pretended: PretendedDriver, first: int) -> Counter[str]:
    """Calls of the driver that put work into a stream, or capture it."""
    calls = Counter(pretended.calls[first:])
    return Counter({name: calls[name] for name in ("cuGraphLaunch", "cuLaunchKernelEx", "cuGraphInstantiate")})


def test_few_graphs_are_captured_before_the_first_prompt(
    pretended: PretendedDriver, backend: CudaBackend, decode: Decode
) -> None:
    """Decode (with the persistent kernel: greedy or not), a whole prefill chunk, and the layers of a padded one."""
    assert pretended.counts()["executable graph"] == (4 if decode == "persistent" else 3)
    assert backend.prefill_chunk == backend.kernels.gemv_width == 8


def test_no_length_of_a_prompt_captures_another(
    pretended: PretendedDriver, backend: CudaBackend, decode: Decode
) -> None:
    for columns in backend.kernels.prompt_widths:  # captured on first use
        backend.prefill([1] * columns, SAMPLE)
        backend.seek(0)
    captured = pretended.counts()["executable graph"]
    for tokens in range(1, backend.prefill_chunk + 1):
        first = len(pretended.calls)
        backend.prefill([1] * tokens, SAMPLE)
        tail = 0 if tokens == 1 else 4  # LM head, arg-max, sampling, advance
        if decode == "persistent" and 2 <= tokens <= PROMPT_COLUMNS:
            tail = 3  # the LM head is in the kernel
        assert since(pretended, first) == Counter(cuGraphLaunch=1, cuLaunchKernelEx=tail)
        backend.seek(0)
    first = len(pretended.calls)
    backend.prefill([1] * backend.prefill_chunk, NO_LOGITS)
    assert since(pretended, first) == Counter(cuGraphLaunch=1)
    assert pretended.counts()["executable graph"] == captured


def test_the_layers_of_a_single_token_are_captured_on_first_use(
    pretended: PretendedDriver, backend: CudaBackend
) -> None:
    captured = pretended.counts()["executable graph"]
    for _ in range(2):
        backend.prefill([1], NO_LOGITS)
    assert pretended.counts()["executable graph"] == captured + 1


def test_kernels_are_loaded_when_a_step_first_needs_them(
    pretended: PretendedDriver, backend: CudaBackend, decode: Decode
) -> None:
    """With the persistent kernel, the layers of a single token are those of a prompt's last token, if at all."""
    loaded = backend._graphs._loaded
    assert ("qkv_x1" in loaded._loaded) == (decode == "graph")
    assert "lm_head_x8" not in loaded._loaded
    modules = pretended.counts()["module"]
    backend.prefill([1, 2, 3, 4, 5], SAMPLE)
    backend.decode()
    assert pretended.counts()["module"] == modules
    backend.seek(0)
    for _ in range(2):
        backend.prefill([1], NO_LOGITS)
        assert pretended.counts()["module"] == modules + (5 + 1 if decode == "persistent" else 0)
    backend.prefill([1] * 5, NO_LOGITS)
    backend.logits(0, 2)
    assert "lm_head_x8" in loaded._loaded


def test_prompts_of_a_few_tokens_run_in_the_persistent_kernel(
    pretended: PretendedDriver, backend: CudaBackend, decode: Decode
) -> None:
    loaded = backend._graphs._loaded._loaded
    if decode == "graph":
        assert backend.kernels.prompt_widths == ()
        backend.prefill([1, 2], SAMPLE)
        assert not {name for name in loaded if name.startswith("persistent")}
        return
    assert backend.kernels.prompt_widths == (2, 4)
    assert backend.prompt_lengths == [1, 2, 4, 8]

    def kernels(tokens: int, head: Head) -> list[str]:
        with backend._owner.current():
            return [launch.kernel.spec.name for launch in backend._graphs.launches(tokens, head)]

    for tokens, kernel in ((2, "persistent_x2"), (3, "persistent_x4"), (4, "persistent_x4")):
        assert kernels(tokens, SAMPLE) == [kernel, "argmax", "sample", "advance_sampled"]
        assert kernels(tokens, NO_LOGITS) == [kernel, "advance"]
    assert "persistent_x8" not in loaded
    assert kernels(5, SAMPLE)[0] == "embed_x8"


@pytest.mark.parametrize("decode", ["persistent"], indirect=True)
def test_padding_repeats_the_last_token_of_such_a_prompt(backend: CudaBackend) -> None:
    backend.prefill([7, 8, 9], NO_LOGITS)
    with backend.memory() as memory:
        assert memory.read(backend._model.buffers["tokens"])[:4].tolist() == [7, 8, 9, 9]
    assert backend._queue.position == 3


@pytest.mark.parametrize("decode", ["persistent"], indirect=True)
def test_logits_of_such_a_prompt_are_those_that_the_kernel_has_left(backend: CudaBackend) -> None:
    """Until another step runs. An observer sees the LM head by itself."""
    rows = np.arange(8 * 288, dtype=np.float32).reshape(8, 288)
    with backend.memory() as memory:
        memory.write(backend._model.buffers["verify.logits"], rows)
    backend.prefill([7, 8, 9], NO_LOGITS)
    np.testing.assert_array_equal(backend.logits(1, 3), rows[1:3])
    assert not backend.logits(1, 3, _Silent()).any()
    np.testing.assert_array_equal(backend.logits(2, 3), rows[2:3])
    backend.prefill([7] * 5, NO_LOGITS)
    assert not backend.logits(2, 3).any()
    for other in (
        backend.decode,
        lambda: backend.observe([1, 2], NO_LOGITS, _Silent()),
        lambda: backend.verify([1, 2]),
    ):
        backend.prefill([7, 8, 9], NO_LOGITS)
        other()
        assert not backend.logits(0, 1).any()
        backend.seek(0)


class _Silent:
    """An observer that looks at nothing."""

    def before(self, op: Op, memory: Memory) -> None: ...

    def after(self, op: Op, memory: Memory) -> None: ...


@pytest.mark.parametrize("decode", ["persistent"], indirect=True)
@pytest.mark.parametrize("read", [lambda backend: backend.sampled_tokens(), lambda backend: backend.logits(0, 1)])
def test_the_watchdog_of_such_a_prompt_is_looked_at(backend: CudaBackend, read: Callable[[CudaBackend], Any]) -> None:
    backend.prefill([7, 8, 9], SAMPLE)
    with backend.memory() as memory:
        memory.write(backend._model.buffers["persistent.fault"], np.ones(1, np.int32))
    backend._ring._pinned.array[0] = 1 << 32  # the token is there
    with pytest.raises(BackendError, match="watchdog"):
        read(backend)
    backend.seek(0)  # what comes next is another step
    backend.prefill([7, 8, 9], NO_LOGITS)
    backend.logits(0, 1)


@pytest.mark.parametrize("tokens", [5, 8])
@pytest.mark.parametrize("head", [NO_LOGITS, LAST_LOGITS, SAMPLE])
def test_a_chunk_takes_the_same_launches_with_and_without_graphs(backend: CudaBackend, tokens: int, head: Head) -> None:
    launches = backend._graphs.launches(tokens, head)
    layers, tail = split_tail(backend.step(tokens, head))
    assert len(layers) == 1 + 5 * LAYERS
    expected = [launch.kernel for op in layers for launch in backend._graphs.bind(op)]
    expected += [launch.kernel for op in tail for launch in backend._graphs.bind(op, sampled=head.sample)]
    assert [launch.kernel for launch in launches] == expected


def test_only_one_token_that_samples_one_is_a_decode_step() -> None:
    assert is_decode(1, SAMPLE)
    assert not is_decode(2, SAMPLE)
    assert not is_decode(1, LAST_LOGITS)


def test_ops_after_the_layers(backend: CudaBackend) -> None:
    kinds = {
        head: [type(op) for op in split_tail(backend.step(3, head))[1]] for head in (NO_LOGITS, LAST_LOGITS, SAMPLE)
    }
    assert kinds == {NO_LOGITS: [Advance], LAST_LOGITS: [LmHead, Advance], SAMPLE: [LmHead, Sample, Advance]}


def test_decode_steps_are_queued_ahead(pretended: PretendedDriver, backend: CudaBackend) -> None:
    backend.prefill([1, 2], SAMPLE)
    for steps in (1 + RUN_AHEAD, 1, 1):
        first = len(pretended.calls)
        backend.decode()
        assert since(pretended, first)["cuGraphLaunch"] == steps


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_part_of_the_steps_that_sample(
    pretended: PretendedDriver, backend: CudaBackend, temperature: float
) -> None:
    def kernels(tokens: int) -> list[str]:
        with backend._owner.current():
            return [launch.kernel.spec.name for launch in backend._graphs.launches(tokens, SAMPLE)]

    def sampler(logprobs: int | None) -> Sampler:
        return Sampler(SamplingParams(temperature, logprobs=logprobs), tiny_geometry().vocabulary, ())

    backend.start(sampler(None))
    plain = {tokens: kernels(tokens) for tokens in (1, 3)}
    backend.start(sampler(5))
    for tokens in plain:
        assert kernels(tokens)[-3:] == ["sample", "logprobs", "advance_sampled"]
    for expected in (1, 0):  # captured once
        first = len(pretended.calls)
        backend.prefill([1], SAMPLE)
        backend.decode()
        assert since(pretended, first)["cuGraphInstantiate"] == expected
        backend.seek(0)
    backend.start(sampler(None))
    assert {tokens: kernels(tokens) for tokens in plain} == plain


def test_the_ring_of_logprobs_is_longer_than_the_host_is_behind() -> None:
    assert LOGPROB_RING > RUN_AHEAD + 1
