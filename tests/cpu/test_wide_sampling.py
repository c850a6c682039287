"""Steps of several tokens whose tokens are sampled on the device: what is sent, launched and read; over a pretended
driver, whose kernels do nothing: their tokens are posted beforehand. The tokens themselves: tests/sim.
"""

from collections.abc import Iterator

import numpy as np
import pytest
from pretended_gpu import PretendedDriver, pretend_compiler
from tiny_models import tiny_geometry

pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
pytest.importorskip("numba_cuda", reason="the CUDA backend needs it; there is none for macOS")

from numba_atomflow import Engine
from numba_atomflow.backends.cuda.backend import CudaBackend
from numba_atomflow.backends.cuda.verify import WideSteps
from numba_atomflow.errors import BackendError, CheckpointError
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY
from numba_atomflow.sampling import Sampler, SamplingParams

VOCABULARY, NOT_A_NUMBER = 288, 1 << 31
PENALTY = SamplingParams(temperature=1.0, repetition_penalty=1.5, seed=2**64 - 3)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_compiler(monkeypatch)


@pytest.fixture
def backend(pretended: PretendedDriver) -> Iterator[CudaBackend]:
    assert pretended.gpus == 1
    with Engine.random(tiny_geometry(), "cuda", 64, decode="persistent", prefill="gemv") as engine:
        assert isinstance(engine.backend, CudaBackend)
        yield engine.backend


def wide_steps(backend: CudaBackend) -> WideSteps:
    steps = backend._wide_steps
    assert steps is not None
    return steps


def post(backend: CudaBackend, *entries: int) -> None:
    """Let the next step sample these tokens, one for each row."""
    sampling = wide_steps(backend)._sampling
    number = (sampling._step + 1) % (1 << 22) * 1024 + 1
    sampling._ring.array[: len(entries)] = [number << 32 | entry for entry in entries]


def verify_sampled(backend: CudaBackend, tokens: list[int]) -> list[int]:
    launch = backend.launch_verification
    assert launch is not None
    return launch(tokens, sampled=True)()


def start(backend: CudaBackend, params: SamplingParams) -> Sampler:
    sampler = Sampler(params, VOCABULARY, (1, 40))
    backend.start(sampler)
    return sampler


def test_only_steps_of_several_tokens_sample(pretended: PretendedDriver) -> None:
    assert pretended.gpus == 1
    with Engine.random(tiny_geometry(), "cuda", 64, decode="graph", prefill="gemv") as engine:
        assert engine.backend.launch_verification is None


def test_tokens_up_to_the_first_that_was_not_proposed(pretended: PretendedDriver, backend: CudaBackend) -> None:
    start(backend, SamplingParams(temperature=1.0, seed=1))
    for sampled, accepted in (([6, 7, 9], [6, 7, 9]), ([6, 8, 9], [6, 8]), ([0, 7, 9], [0])):
        post(backend, *sampled)
        first = len(pretended.calls)
        assert verify_sampled(backend, [5, 6, 7]) == accepted
        # The step, arg-max, sampling and the post; copies of tokens, random numbers and the numbers of tokens.
        assert pretended.calls[first:].count("cuLaunchKernelEx") == 4
        assert pretended.calls[first:].count("cuMemcpyHtoDAsync") == 3
        assert "cuStreamSynchronize" not in pretended.calls[first:]
    assert backend._queue.position == 0


def test_the_first_step_of_several_tokens_loads_all_that_such_steps_need(
    pretended: PretendedDriver, backend: CudaBackend
) -> None:
    """So that after `Engine.warm_up` no request waits for them."""
    backend.verify([1, 2])
    modules = pretended.counts()["module"]
    start(backend, PENALTY)
    for count in range(1, 9):
        post(backend, *[0] * count)
        verify_sampled(backend, [1] * count)
    assert pretended.counts()["module"] == modules


def test_each_row_has_its_draw_and_the_tokens_before_it(backend: CudaBackend) -> None:
    sampler = start(backend, PENALTY)
    sampler.note(5)
    post(backend, 100, 101)
    verify_sampled(backend, [5, 100])
    with backend.memory() as memory:
        generators = memory.read(backend._model.buffers["verify.generators"])[:2]
        rows = memory.read(backend._model.buffers["verify.seen_rows"])[:2]
    np.testing.assert_array_equal(generators, np.array([[2**64 - 3, 1], [2**64 - 3, 2]], np.uint64))
    seen = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little")
    assert [np.flatnonzero(row).tolist() for row in seen] == [[1, 5, 40], [1, 5, 40, 100]]
    assert sampler.draws == 1


def test_a_token_of_an_earlier_step_is_not_read(backend: CudaBackend) -> None:
    """Rows behind a rejected token are posted late. After 2^22 steps the numbers begin again."""
    start(backend, PENALTY)
    post(backend, 6, 7)
    assert verify_sampled(backend, [5, 9]) == [6]
    sampling, sampler = wide_steps(backend)._sampling, start(backend, PENALTY)
    with backend._owner.current():
        sampling.send([5, 9], sampler)
        assert [sampling.posted(row) for row in range(2)] == [None, None]
        sampling._step = (1 << 22) - 2
        sampling.send([5, 9], sampler)
        assert sampling._ring.array.any()
        sampling.send([5, 9], sampler)
        assert not sampling._ring.array.any()


@pytest.mark.parametrize("of_kernel", [True, False])
@pytest.mark.parametrize("watchdog", [True, False])
def test_logits_that_are_not_finite(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch, of_kernel: bool, watchdog: bool
) -> None:
    """Those of a row that is read: the kernel's own arg-max shows it, or the one after a penalty."""
    start(backend, PENALTY)
    steps = wide_steps(backend)
    run = steps._sampling.run

    def failing(rows: int) -> None:
        run(rows)
        steps._choices.array[:] = 1 << 32 | (NOT_A_NUMBER if of_kernel else 0)
        with backend.memory() as memory:
            memory.write(backend._model.buffers["persistent.fault"], np.full(1, watchdog, np.int32))

    monkeypatch.setattr(steps._sampling, "run", failing)
    post(backend, 6 if of_kernel else NOT_A_NUMBER)
    with pytest.raises(BackendError if watchdog else CheckpointError):
        verify_sampled(backend, [5])


def test_a_gpu_that_posts_nothing_is_an_error(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba_atomflow.backends.cuda.verify.stream_finished", lambda _stream: True)
    start(backend, PENALTY)
    with pytest.raises(BackendError, match="without its tokens"):
        verify_sampled(backend, [5, 6])
    post(backend, 6, 7)
    assert verify_sampled(backend, [5, 6]) == [6, 7]


def test_an_interrupted_step_leaves_no_largest_logit_behind(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the arg-max of a penalised row and the kernel that clears it."""
    start(backend, PENALTY)
    best = backend._model.buffers["verify.best"]

    def interrupted(_rows: int) -> None:
        with backend.memory() as memory:
            memory.write(best, np.full(best.shape, 1 << 40))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wide_steps(backend)._sampling, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            verify_sampled(backend, [5, 6])
    post(backend, 6, 7)
    assert verify_sampled(backend, [5, 6]) == [6, 7]
    with backend.memory() as memory:
        assert memory.read(best).tolist() == [LOWEST_KEY] * best.shape[0]


def test_too_many_tokens_are_refused(backend: CudaBackend) -> None:
    start(backend, PENALTY)
    with pytest.raises(IndexError):
        verify_sampled(backend, [1] * 9)
    with pytest.raises(IndexError):
        verify_sampled(backend, [VOCABULARY])
