"""Prompts on the GEMM path through the engine: against the CPU, against token by token, and against itself."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from device_launch import capability
from numpy.typing import NDArray
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.cuda.backend import CudaBackend
from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.ops.cuda.prefill.buckets import buckets_up_to
from numba_atomflow.validate import check, record

LIMIT = 3e-3  # relative L2 of logits: activations are float16 (2^-11 per rounding, a few dozen of them)
FP8_LIMIT = 0.25  # the simulator has some 0.06 with one layer over all rows, up to 0.1 in one
MAX_SEQ_LEN, CHUNK = 640, 512
EDGES = sorted({length for bucket in buckets_up_to(CHUNK) for length in (bucket - 1, bucket, bucket + 1)} | {9, 600})

pytestmark = pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPerformanceWarning")


def geometry_of(**changes: Any) -> ModelGeometry:
    return tiny_geometry(**{"max_positions": MAX_SEQ_LEN} | changes)


def tokens_of(count: int, seed: int = 0) -> list[int]:
    vocabulary = geometry_of().vocabulary
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()  # type: ignore[no-any-return]


def relative_l2(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected))


def load(geometry: ModelGeometry, backend: Any = "cuda", **options: Any) -> Engine:
    if backend == "cuda":
        options = {"prefill": "gemm", "prefill_chunk": CHUNK} | options
    return Engine.random(geometry, backend, MAX_SEQ_LEN, **options)


@pytest.fixture(scope="module", params=["graph", "persistent"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Both layouts of weights: the persistent kernel has k-tiles."""
    if request.param == "persistent" and capability() < (9, 0):
        pytest.skip("this GPU has no TMA bulk copies (sm_90 and later have)")
    with load(geometry_of(), decode=request.param) as engine:
        yield engine


@pytest.fixture(scope="module")
def oracle() -> Iterator[Engine]:
    with load(geometry_of(), "cpu") as engine:
        yield engine


@pytest.mark.parametrize("count", EDGES)
def test_logits_of_every_position_are_those_of_the_cpu(engine: Engine, oracle: Engine, count: int) -> None:
    """Two prompts of every length, the second after the first: with a start in the middle, and over its remains."""
    for one in (engine, oracle):
        one.reset()
    tokens = tokens_of(min(count, MAX_SEQ_LEN), seed=count)
    got, expected = (one.feed(tokens, all_logits=True) for one in (engine, oracle))
    assert relative_l2(got, expected) <= LIMIT
    assert relative_l2(got[-1], expected[-1]) <= LIMIT
    more = tokens_of(min(count, MAX_SEQ_LEN - count), seed=1)
    if more:
        got, expected = (one.feed(more) for one in (engine, oracle))
        assert relative_l2(got, expected) <= LIMIT


@pytest.mark.parametrize(
    "family",
    [
        {"qkv_bias": True},
        {"qk_norm": True},
        {"heads": 6, "kv_heads": 1},
        *({"head_dim": head_dim, "heads": 2, "kv_heads": 1} for head_dim in (80, 96, 128)),
        {"tied_embeddings": False},
    ],
    ids=str,
)
def test_other_geometries(family: dict[str, Any]) -> None:
    tokens = tokens_of(77)
    with load(geometry_of(**family)) as one, load(geometry_of(**family), "cpu") as other:
        for piece in (tokens[:50], tokens[50:]):
            assert relative_l2(one.feed(piece, all_logits=True), other.feed(piece, all_logits=True)) <= LIMIT


@pytest.mark.parametrize("count", [9, 16, 77, 129, 512])
def test_fp8_activations_are_close(engine: Engine, count: int) -> None:
    """E4M3 rounds to 2^-4 at most: logits differ by some per cent, and not by more."""
    if capability() != (9, 0):
        pytest.skip("FP8 activations have kernels for sm_90 only")
    tokens = tokens_of(count)
    engine.reset()
    expected = engine.feed(tokens, all_logits=True)
    with load(geometry_of(), prefill="fp8") as fp8:
        got = fp8.feed(tokens, all_logits=True)
        assert 1e-3 < relative_l2(got, expected) <= FP8_LIMIT
        assert relative_l2(fp8.feed([5]), engine.feed([5])) <= FP8_LIMIT


def test_every_probe_of_a_chunk_agrees_with_token_by_token(engine: Engine) -> None:
    prompt = tokens_of(100)
    reference = record(engine.backend, engine.geometry, prompt, 3, block=1)
    for isolate in (False, True):
        for block in (None, 37):
            report = check(engine.backend, reference, isolate=isolate, block=block)
            assert report.passed, report.verdict()
    engine.reset()


def test_greedy_text_after_a_long_prompt_is_that_of_the_cpu(engine: Engine, oracle: Engine) -> None:
    prompt = tokens_of(300)
    got, expected = (
        one.generate_tokens(prompt, SamplingParams(max_tokens=20, ignore_eos=True)).finish().token_ids
        for one in (engine, oracle)
    )
    first = next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), None)
    if first is not None:  # they may part where the best tokens are as close as the two backends' logits
        oracle.reset()
        logits = oracle.feed(prompt + expected[:first])
        gap = logits[expected[first]] - logits[got[first]]
        assert gap <= 4 * LIMIT * np.linalg.norm(logits) / np.sqrt(len(logits))


def test_a_prompt_gives_the_same_bits_again_with_and_without_graphs(engine: Engine) -> None:
    prompt = tokens_of(523)

    def bits(one: Engine) -> bytes:
        one.reset()
        return one.feed(prompt, all_logits=True).tobytes()

    expected = bits(engine)
    assert all(bits(engine) == expected for _ in range(20))
    model, path = RandomModel(engine.geometry), engine.backend.decode_path
    assert path is not None
    for options in ({"graphs": False}, {"dependent": False}):
        backend = CudaBackend(
            engine.geometry,
            WeightArrays(model),
            MAX_SEQ_LEN,
            decode=path.name,
            prefill="gemm",
            prefill_chunk=CHUNK,
            **options,  # type: ignore[arg-type]
        )
        backend.prepare(None)
        with Engine(model, backend, MAX_SEQ_LEN) as other:
            assert bits(other) == expected, options


@pytest.mark.parametrize("noise", [np.nan, 60000.0])
def test_noise_after_the_position_changes_nothing(engine: Engine, noise: float) -> None:
    prompt = tokens_of(70)
    engine.reset()
    expected = engine.feed(prompt).tobytes()
    engine.reset()
    backend = engine.backend
    assert isinstance(backend, CudaBackend)
    with backend._owner.current():
        for name in ("kv_cache", "residual", "q"):
            view = backend._model.buffers[name]
            backend._model.memory.write(view, np.full(view.shape, noise, np.float32))
    assert engine.feed(prompt).tobytes() == expected


def test_padding_writes_no_keys_or_values(engine: Engine) -> None:
    """Up to the last position of the cache, whose rows have no neighbours to spare."""
    backend = engine.backend
    assert isinstance(backend, CudaBackend)
    engine.reset()
    cache = backend._model.buffers["kv_cache"]
    with backend._owner.current():
        backend._model.memory.write(cache, np.full(cache.shape, 7.0, np.float16))
    engine.feed(tokens_of(512))
    engine.feed(tokens_of(97))
    with backend._owner.current():
        rows = backend._model.memory.read(cache)
    assert (rows[:, :, 609:] == 7).all()
    assert not (rows[:, :, :609] == 7).all(axis=-1).any()
    engine.feed(tokens_of(MAX_SEQ_LEN - 609))
    assert engine.position == MAX_SEQ_LEN
    engine.reset()
