"""Several GPUs that share a model have the bits of one.

Two ranks share one GPU, each with half of its SMs, where all but the link between GPUs is as with two; or have one
each, where there are two. A prompt of one token runs in the persistent kernel on one GPU, too.
"""

from collections.abc import Iterator

import numpy as np
import pytest
from device_launch import capability
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.base import Memory
from numba_atomflow.device.driver import gpu_count
from numba_atomflow.errors import BackendError
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Attention, LmHead, Op
from numba_atomflow.sampling import Sampler
from numba_atomflow.validate import compare_gpus, record_steps

POSITIONS = 400
GEOMETRY = tiny_geometry(  # 8-row tiles of "o" and "down", three query heads per key, as Llama 3.2 3B has
    layers=3, hidden=1024, heads=12, kv_heads=4, head_dim=128, ffn=2048, vocabulary=4000, tied_embeddings=True
)


@pytest.fixture(autouse=True)
def _bulk_copies() -> None:
    if capability() < (9, 0):
        pytest.skip("this GPU has no TMA bulk copies (sm_90 and later have)")


@pytest.fixture(scope="module")
def one() -> Iterator[Engine]:
    with Engine.random(GEOMETRY, "cuda", POSITIONS, decode="persistent", prefill="gemv") as engine:
        yield engine


@pytest.fixture(scope="module", params=[[0, 0], [0, 1]], ids=["shared GPU", "two GPUs"])
def two(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if max(request.param) >= gpu_count():
        pytest.skip("there is one GPU")
    with Engine.random(GEOMETRY, "cuda", POSITIONS, gpus=request.param) as engine:
        yield engine


def keys_and_values(engine: Engine, positions: int) -> list[np.ndarray]:
    with engine.backend.memory() as memory:
        ops = [op for op in engine.backend.step(1, NO_LOGITS) if isinstance(op, Attention)]
        return [memory.read(view.rows(0, positions)) for op in ops for view in (op.keys, op.values)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3},
        {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": 7},
        {"temperature": 0.8, "seed": 3, "logprobs": 3},
    ],
    ids=str,
)
def test_the_same_tokens_and_the_same_cache(one: Engine, two: Engine, options: dict[str, float]) -> None:
    params = SamplingParams(max_tokens=POSITIONS - 10, ignore_eos=True, speculate="off", **options)  # type: ignore[arg-type]
    replies = []
    for engine in (one, two):
        engine.reset()
        replies.append(engine.generate_tokens([17], params).finish())
    assert replies[0].token_ids == replies[1].token_ids
    if "logprobs" in options:
        assert replies[0].logprobs == replies[1].logprobs
    for expected, got in zip(keys_and_values(one, 300), keys_and_values(two, 300), strict=True):
        np.testing.assert_array_equal(expected.view(np.uint16), got.view(np.uint16))


def test_logits_of_a_prompt(one: Engine, two: Engine) -> None:
    """Each token's, with the bits that a decode step of one GPU gives."""
    prompt = [int(token) for token in np.random.default_rng(5).integers(GEOMETRY.vocabulary, size=40)]
    one.reset()
    expected = []
    for position, token in enumerate(prompt):
        one.backend.seek(position)
        expected.append(one.backend.verify([token])[0].copy())
    one.backend.seek(0)
    two.reset()
    np.testing.assert_array_equal(two.feed(prompt, all_logits=True), np.array(expected))


def test_after_a_step_that_failed_the_next_one_is_right(two: Engine) -> None:
    two.reset()
    expected = two.feed([1, 2, 3])
    ranks = two.backend._ranks  # type: ignore[attr-defined]
    with ranks[0].owner.current():
        ranks[0].memory.write(ranks[0].buffers["persistent.fault"], np.ones(1, np.int32))
    with pytest.raises(BackendError, match="watchdog"):
        two.feed([4])
    two.reset()
    np.testing.assert_array_equal(two.feed([1, 2, 3]), expected)


class _Logits:
    """An observer that reads and puts back what each op has written, and keeps the logits."""

    row: np.ndarray

    def before(self, op: Op, memory: Memory) -> None:
        """No effect."""

    def after(self, op: Op, memory: Memory) -> None:
        for view in op.writes:
            memory.write(view, memory.read(view))
        if isinstance(op, LmHead):
            self.row = memory.read(op.logits)[0]


def test_steps_op_by_op_have_the_bits_of_whole_ones(two: Engine) -> None:
    prompt = [5, 3999, 17, 2001]
    two.reset()
    two.backend.start(Sampler(SamplingParams(), GEOMETRY.vocabulary, prompt))
    expected = two.feed(prompt, all_logits=True)
    cache = keys_and_values(two, len(prompt))
    two.backend.seek(0)
    for token, logits in zip(prompt, expected, strict=True):
        observer = _Logits()
        two.backend.observe([token], SAMPLE, observer)
        np.testing.assert_array_equal(observer.row, logits)
        assert two.backend.sampled_tokens() == (int(logits.argmax()),)
    for before, after in zip(cache, keys_and_values(two, len(prompt)), strict=True):
        np.testing.assert_array_equal(before.view(np.uint16), after.view(np.uint16))


def test_the_check_of_all_bits_passes_and_finds_a_wrong_weight(one: Engine, two: Engine) -> None:
    prompt = [int(token) for token in np.random.default_rng(6).integers(GEOMETRY.vocabulary, size=20)]
    expected = record_steps(one.backend, GEOMETRY, prompt, 40)
    assert compare_gpus(expected, record_steps(two.backend, GEOMETRY, prompt, 40)).passed
    rank = two.backend._ranks[1]  # type: ignore[attr-defined]
    with rank.owner.current():
        view = rank.weight_views["layer.1.down"]
        words = rank.memory.read(view)
        rank.memory.write(view, words ^ np.uint32(0x80))  # other signs of some weights
    report = compare_gpus(expected, record_steps(two.backend, GEOMETRY, prompt, 40))
    with rank.owner.current():
        rank.memory.write(view, words)
    assert (report.passed, report.part, report.position) == (False, "layer.2.k", 0)
