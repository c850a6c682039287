"""The CUDA backend through the engine: against the CPU backend, against itself, and when things go wrong."""

import gc
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_launch import capability
from numpy.typing import NDArray
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.base import Decode
from numba_atomflow.backends.cpu import CpuBackend
from numba_atomflow.backends.cuda.backend import CudaBackend
from numba_atomflow.backends.cuda.queue import StepQueue
from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.errors import BackendError, CheckpointError, ContextError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Embed, Op, Qkv

LIMIT = 3e-3  # relative L2 of logits: activations are float16 (2^-11 per rounding, a few dozen of them)
MAX_SEQ_LEN = 96
ALLOCATIONS = (
    *(f"cuMemAlloc{kind}" for kind in ("", "Async", "FromPoolAsync", "Managed", "Pitch", "Host")),
    *("cuMemCreate", "cuMemHostAlloc", "cuMemHostRegister", "cuArrayCreate"),
)

pytestmark = pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPerformanceWarning")


def tokens_of(geometry: ModelGeometry, count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, geometry.vocabulary, count).tolist()  # type: ignore[no-any-return]


def relative_l2(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=["graph", "persistent"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "persistent" and capability() < (9, 0):
        pytest.skip("this GPU has no TMA bulk copies (sm_90 and later have)")
    with Engine.random(tiny_geometry(), "cuda", MAX_SEQ_LEN, decode=request.param) as engine:
        yield engine


def decode_of(engine: Engine) -> Decode:
    path = engine.backend.decode_path
    assert path is not None
    return path.name


@pytest.fixture(scope="module")
def oracle() -> Iterator[Engine]:
    with Engine.random(tiny_geometry(), "cpu", MAX_SEQ_LEN) as engine:
        yield engine


def cuda(engine: Engine) -> CudaBackend:
    assert isinstance(engine.backend, CudaBackend)
    return engine.backend


# --- against the CPU -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 13, 40])
def test_logits_are_those_of_the_cpu(engine: Engine, oracle: Engine, count: int) -> None:
    tokens = tokens_of(engine.geometry, count)
    for one in (engine, oracle):
        one.reset()
    got, expected = (one.feed(tokens, all_logits=True) for one in (engine, oracle))
    assert relative_l2(got, expected) <= LIMIT
    engine.reset()
    assert relative_l2(engine.feed(tokens), expected[-1]) <= LIMIT
    one_by_one = np.stack([engine.feed([token]) for token in tokens_of(engine.geometry, 3, seed=1)])
    assert relative_l2(one_by_one, oracle.feed(tokens_of(engine.geometry, 3, seed=1), all_logits=True)) <= LIMIT


def test_greedy_tokens_are_those_of_the_cpu(engine: Engine, oracle: Engine) -> None:
    for seed in range(4):
        prompt = tokens_of(engine.geometry, 11, seed)
        replies = [one.generate_tokens(prompt, SamplingParams(max_tokens=60)).finish() for one in (engine, oracle)]
        assert replies[0].finish_reason == replies[1].finish_reason == "max_tokens"
        got, expected = (reply.token_ids for reply in replies)
        first = next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), None)
        if first is not None:  # the two may part where the best tokens are as close as the two backends' logits
            oracle.reset()
            logits = oracle.feed(prompt + expected[:first])
            gap = logits[expected[first]] - logits[got[first]]
            assert gap <= 4 * LIMIT * np.linalg.norm(logits) / np.sqrt(len(logits)), f"token {first} of prompt {seed}"


@pytest.mark.parametrize("family", [{"qkv_bias": True}, {"qk_norm": True}, {"qkv_bias": True, "qk_norm": True}])
def test_other_families(family: dict[str, bool]) -> None:
    geometry = tiny_geometry(**family)
    tokens = tokens_of(geometry, 13)
    with Engine.random(geometry, "cuda", 32) as one, Engine.random(geometry, "cpu", 32) as other:
        assert relative_l2(one.feed(tokens, all_logits=True), other.feed(tokens, all_logits=True)) <= LIMIT
        assert relative_l2(one.feed([5]), other.feed([5])) <= LIMIT


@pytest.mark.parametrize("tied", [True, False])
def test_a_float16_head(tied: bool) -> None:
    geometry = tiny_geometry(tied_embeddings=tied)
    model = RandomModel(geometry)
    weights = dict(WeightArrays(model))
    head = "embedding" if tied else "vocabulary"
    del weights[f"{head}.scale"]
    values = np.random.default_rng(0).standard_normal((geometry.vocabulary, geometry.hidden))
    weights[f"{head}.weight"] = values.astype(np.float16)
    backends: list[Any] = [CudaBackend(geometry, weights, 32), CpuBackend(geometry, weights, 32)]
    logits = []
    for backend in backends:
        backend.prepare(None)
        backend.seek(0)
        backend.prefill(tokens_of(geometry, 6), NO_LOGITS)
        logits.append(backend.logits(0, 6))
        backend.close()
    assert relative_l2(*logits) <= LIMIT


def test_a_seed_gives_the_same_text_again_and_options_matter(engine: Engine) -> None:
    prompt = tokens_of(engine.geometry, 5)

    def sampled(**options: Any) -> list[int]:
        engine.reset()  # else the prompt is found in the cache, and its last token takes kernels that round otherwise
        return engine.generate_tokens(prompt, SamplingParams(max_tokens=40, **options)).finish().token_ids

    first = sampled(temperature=0.9, top_p=0.9, seed=7)
    assert sampled(temperature=0.9, top_p=0.9, seed=7) == first
    assert sampled(temperature=0.9, top_p=0.9, seed=8) != first
    assert sampled(temperature=5.0, top_k=1) == sampled()


# --- against itself --------------------------------------------------------------------------------------------------


def test_a_hundred_repeats_are_the_same_bit_for_bit(engine: Engine) -> None:
    prompt = tokens_of(engine.geometry, 19)
    results = set()
    for _ in range(100):
        engine.reset()
        engine.feed(prompt[:12])
        results.add(engine.feed(prompt[12:], all_logits=True).tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("options", [{"graphs": False}, {"dependent": False}], ids=str)
def test_eager_and_dependent_launches_change_no_bit(engine: Engine, options: dict[str, bool]) -> None:
    prompt = tokens_of(engine.geometry, 21)

    def outcome(one: Engine) -> tuple[bytes, list[int]]:
        one.reset()
        logits = one.feed(prompt, all_logits=True).tobytes()
        return logits, one.generate_tokens(prompt, SamplingParams(max_tokens=50)).finish().token_ids

    model = RandomModel(engine.geometry)
    backend = CudaBackend(engine.geometry, WeightArrays(model), MAX_SEQ_LEN, decode=decode_of(engine), **options)
    backend.prepare(None)
    with Engine(model, backend, MAX_SEQ_LEN) as other:
        assert outcome(other) == outcome(engine)


@pytest.mark.parametrize("noise", [np.nan, 60000.0])
def test_noise_after_the_position_changes_nothing(engine: Engine, noise: float) -> None:
    prompt, params = tokens_of(engine.geometry, 10), SamplingParams(max_tokens=30)
    expected = engine.generate_tokens(prompt, params).finish().token_ids
    engine.reset()
    backend = cuda(engine)
    cache = backend._model.buffers["kv_cache"]
    with backend._owner.current():
        backend._model.memory.write(cache, np.full(cache.shape, noise, np.float16))
    assert engine.generate_tokens(prompt, params).finish().token_ids == expected


def test_a_generation_that_stops_early_has_no_effect_on_the_next(engine: Engine) -> None:
    """Steps queued ahead are still running when a generation ends; the next one is not affected."""
    prompt = tokens_of(engine.geometry, 9)
    whole = engine.generate_tokens(prompt, SamplingParams(max_tokens=20)).finish().token_ids
    for stop_after in (1, 2, 5):
        engine.reset()
        first = engine.generate_tokens(prompt, SamplingParams(max_tokens=stop_after)).finish().token_ids
        rest = engine.generate_tokens(prompt + first, SamplingParams(max_tokens=20 - stop_after)).finish()
        assert first + rest.token_ids == whole
        assert rest.stats.reused_tokens >= len(prompt) + stop_after - 1


def test_ctrl_c_between_a_launch_and_counting_it_spoils_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, params = tokens_of(engine.geometry, 20), SamplingParams(max_tokens=12)
    engine.reset()
    expected = engine.generate_tokens(prompt, params).finish().token_ids
    count = StepQueue.count
    for interrupted in (1, 2, 3, 6):
        calls = iter(range(1, 100))

        def interrupting(*arguments: Any, at: int = interrupted, calls: Iterator[int] = calls) -> None:
            if next(calls) == at:
                raise KeyboardInterrupt
            count(*arguments)

        engine.reset()
        monkeypatch.setattr(StepQueue, "count", interrupting)
        with pytest.raises(KeyboardInterrupt):
            engine.generate_tokens(prompt, params).finish()
        monkeypatch.undo()
        assert engine.generate_tokens(prompt, params).finish().token_ids == expected


def test_the_end_of_the_context_is_reached_and_not_passed(engine: Engine) -> None:
    prompt = tokens_of(engine.geometry, MAX_SEQ_LEN - 3)
    reply = engine.generate_tokens(prompt).finish()
    assert (reply.finish_reason, reply.stats.tokens) == ("context", 4)
    with pytest.raises(ContextError):
        engine.feed(tokens_of(engine.geometry, MAX_SEQ_LEN))


def test_observing_changes_nothing(engine: Engine) -> None:
    class Watcher:
        def __init__(self) -> None:
            self.seen: dict[str, NDArray[Any]] = {}

        def before(self, op: Op, memory: Any) -> None:
            if isinstance(op, Embed):
                self.seen["tokens"] = memory.read(op.tokens)

        def after(self, op: Op, memory: Any) -> None:
            if isinstance(op, Qkv):
                self.seen[op.name] = memory.read(op.x_norm)

    prompt = tokens_of(engine.geometry, 6)
    engine.reset()
    engine.feed(prompt)
    expected = cuda(engine).logits(0, 6)
    watcher = Watcher()
    engine.reset()
    cuda(engine).observe(prompt, NO_LOGITS, watcher)
    np.testing.assert_array_equal(cuda(engine).logits(0, 6), expected)
    assert watcher.seen["tokens"].tolist() == prompt
    rows = watcher.seen["layer.1.qkv"].astype(np.float64)
    assert rows.shape == (6, engine.geometry.hidden)
    assert np.sqrt(np.mean(rows**2, axis=1)) == pytest.approx(np.ones(6), rel=0.1)  # norms are near 1
    engine.reset()


# --- memory ----------------------------------------------------------------------------------------------------------


def test_nothing_is_allocated_after_loading(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver

    calls: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(driver, name)

        def wrapper(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        return wrapper

    for name in ALLOCATIONS:
        monkeypatch.setattr(driver, name, counted(name))
    replayed = 0
    for i in range(26):
        params = SamplingParams(max_tokens=41, seed=i, temperature=float(i % 2), ignore_eos=True)
        replayed += engine.generate_tokens(tokens_of(engine.geometry, 8), params).finish().stats.tokens - 1
    assert replayed >= 1000
    backend = cuda(engine)
    engine.reset()
    with backend._owner.current():
        for launch in backend._graphs.launches(1, SAMPLE):
            launch.run()  # eager
        backend._graphs._graphs.clear()
        backend._graphs.run(3, NO_LOGITS)  # a capture
    backend._queue._exact = False  # the eager steps have moved the position
    engine.reset()
    assert calls == []
    with Engine.random(tiny_geometry(), "cuda", 8, decode=decode_of(engine)):
        pass
    assert calls.count("cuMemAlloc") == 1


def test_two_engines_at_once_and_memory_comes_back(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the driver's calls: how much is free depends on what other processes do."""
    from cuda.bindings import driver

    allocate, free = driver.cuMemAlloc, driver.cuMemFree
    live: set[int] = set()

    def allocated(size: int) -> Any:
        status, address = allocate(size)
        live.add(int(address))
        return status, address

    def freed(address: int) -> Any:
        live.remove(int(address))
        return free(address)

    monkeypatch.setattr(driver, "cuMemAlloc", allocated)
    monkeypatch.setattr(driver, "cuMemFree", freed)
    prompt, params = tokens_of(engine.geometry, 9), SamplingParams(max_tokens=12)
    expected = engine.generate_tokens(prompt, params).finish().token_ids
    with Engine.random(tiny_geometry(), "cuda", MAX_SEQ_LEN, decode=decode_of(engine)) as second:
        assert second.generate_tokens(prompt, params).finish().token_ids == expected
        assert len(live) == 1
    second.close()  # twice is fine
    assert not live
    forgotten = Engine.random(tiny_geometry(), "cuda", MAX_SEQ_LEN)
    assert len(live) == 1
    del forgotten
    gc.collect()
    assert not live, "an engine that was not closed keeps its memory"
    assert engine.generate_tokens(prompt, params).finish().token_ids == expected


def test_engines_may_decode_at_the_same_time(engine: Engine) -> None:
    """Also where each takes every SM for itself: one waits until the other's step is done."""
    prompt, params = tokens_of(engine.geometry, 9), SamplingParams(max_tokens=60, ignore_eos=True)
    expected = engine.generate_tokens(prompt, params).finish().token_ids

    def replies(one: Engine) -> list[list[int]]:
        return [one.generate_tokens(prompt, params).finish().token_ids for _ in range(20)]

    with (
        Engine.random(tiny_geometry(), "cuda", MAX_SEQ_LEN, decode=decode_of(engine)) as second,
        ThreadPoolExecutor(2) as pool,
    ):
        for found in pool.map(replies, (engine, second), timeout=120):
            assert found == [expected] * 20


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(engine: Engine) -> None:
    huge = tiny_geometry(layers=40, kv_heads=4, max_positions=10**9)
    with pytest.raises(BackendError, match=r"needs \d+\.\d\d GB on the GPU \(weights .*only .* are free; use"):
        Engine.random(huge, "cuda", 10**8)
    prompt = tokens_of(engine.geometry, 3)
    assert len(engine.generate_tokens(prompt, SamplingParams(max_tokens=3)).finish().token_ids) == 3


# --- when things go wrong --------------------------------------------------------------------------------------------


def test_a_model_that_computes_nan_says_so() -> None:
    geometry = tiny_geometry()
    weights = dict(WeightArrays(RandomModel(geometry)))
    weights["layer.1.ffn_norm"] = np.full_like(weights["layer.1.ffn_norm"], np.nan)
    backend = CudaBackend(geometry, weights, 32)
    backend.prepare(None)
    backend.prefill([1, 2, 3], SAMPLE)
    with pytest.raises(CheckpointError, match="Logits contain NaN or Inf"):
        backend.sampled_tokens()
    backend.close()


def test_after_an_error_of_the_gpu_the_process_can_go_on() -> None:
    """In a process of its own: CUDA refuses the GPU to a process after that."""
    program = Path(__file__).with_name("failing_run.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"The GPU failed in \w+: .* \(CUDA_ERROR_ILLEGAL_ADDRESS\); start a new process", done.stdout)
    assert done.stdout.endswith("on the CPU all is well\n")
