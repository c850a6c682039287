"""Several GPUs that share a model have the bits of one.

Two ranks share one GPU, each with half of its SMs, where all but the link between GPUs is as with two; or have one
each, where there are two. A prompt of one token runs in the persistent kernel on one GPU, too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from device_launch import capability
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.base import Memory
from numba_atomflow.device.driver import gpu_count
from numba_atomflow.errors import BackendError
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Attention, LmHead, Op
from numba_atomflow.sampling import Sampler, accepted_tokens
from numba_atomflow.speculation.drafter import StepResult
from numba_atomflow.validate import check_widths, compare_gpus, record_steps

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


# --- several tokens in a step ----------------------------------------------------------------------------------------

TEXT = [int(token) for token in np.random.default_rng(8).integers(GEOMETRY.vocabulary, size=POSITIONS)]
# The last first: padding lies behind a step, and behind the last position, too. 220: columns on both sides of the first
# change of the KV splits.
STARTS = (POSITIONS - 3, POSITIONS - 8, 300, 220, 7, 0)


class Singles(NamedTuple):
    """The steps of `TEXT` on one GPU, a token each: logits [positions, V], keys and values [positions, kv_dim] of each
    layer.
    """

    logits: np.ndarray
    cache: list[np.ndarray]


def single_steps(engine: Engine, tokens: Sequence[int]) -> Singles:
    """The steps of these tokens from position 0 on, one by one."""
    engine.reset()
    logits = []
    for position, token in enumerate(tokens):
        engine.backend.seek(position)
        logits.append(engine.backend.verify([token])[0].copy())
    engine.backend.seek(0)
    return Singles(np.array(logits), keys_and_values(engine, len(tokens)))


@pytest.fixture(scope="module")
def singles(one: Engine) -> Singles:
    return single_steps(one, TEXT)


def check_verified(engine: Engine, singles: Singles, tokens: Sequence[int], start: int, count: int) -> None:
    """A step that verifies so many of the tokens has the bits of single ones, the keys and values that it writes, too,
    and chooses as they do.
    """
    backend, proposed, where = engine.backend, list(tokens[start : start + count]), f"{count} tokens at {start}"
    with backend.memory() as memory:
        for op in (op for op in backend.step(1, NO_LOGITS) if isinstance(op, Attention)):
            for view in (op.keys, op.values):
                memory.write(view.rows(start, start + count), np.full((count, view.shape[1]), np.nan, np.float16))
    backend.seek(start)
    got, expected = backend.verify(proposed).copy(), singles.logits[start : start + count]
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32), where)
    for before, after in zip(singles.cache, keys_and_values(engine, start + count), strict=True):
        np.testing.assert_array_equal(after.view(np.uint16), before[: start + count].view(np.uint16), where)
    likely = expected.argmax(axis=1).tolist()
    assert backend.verify_greedy(proposed) == accepted_tokens(proposed, likely.__getitem__), where
    right = [proposed[0], *likely[:1]][:count]  # as far as it can be known from single steps of other tokens
    assert backend.verify_greedy(right)[0] == likely[0], where


def test_a_prompt_has_the_bits_of_single_steps_of_one_gpu(two: Engine, singles: Singles) -> None:
    """Of 1 to 20 tokens, and of as many as there are positions; rests are padded."""
    for count in (*range(1, 21), POSITIONS):
        two.reset()
        with two.backend.memory() as memory:
            for op in (op for op in two.backend.step(1, NO_LOGITS) if isinstance(op, Attention)):
                for view in (op.keys, op.values):
                    memory.write(view, np.full(view.shape, np.nan, np.float16))
        logits = two.feed(TEXT[:count], all_logits=True)
        np.testing.assert_array_equal(logits.view(np.uint32), singles.logits[:count].view(np.uint32), f"{count} tokens")
        for before, after in zip(singles.cache, keys_and_values(two, count), strict=True):
            np.testing.assert_array_equal(after.view(np.uint16), before[:count].view(np.uint16), f"{count} tokens")
        two.reset()
        np.testing.assert_array_equal(two.feed(TEXT[:count]), singles.logits[count - 1])


@pytest.mark.parametrize("count", range(1, 9))
def test_a_step_that_verifies_has_the_bits_of_single_steps_of_one_gpu(
    two: Engine, singles: Singles, count: int
) -> None:
    assert two.backend.verification.width == 8
    two.reset()
    two.feed(TEXT)
    for start in STARTS:
        check_verified(two, singles, TEXT, start, min(count, POSITIONS - start))


def test_the_text_after_a_prompt_is_that_of_one_gpu(one: Engine, two: Engine, singles: Singles) -> None:
    """The first token comes from a step of several tokens, and the position has moved by them."""
    for count in (1, 2, 3, 4, 5, 8, 9, 11, 16, 23):
        one.reset()
        one.backend.start(Sampler(SamplingParams(), GEOMETRY.vocabulary, ()))
        for position, token in enumerate(TEXT[:count]):
            one.backend.seek(position)
            one.backend.verify([token])
        one.backend.seek(count - 1)
        one.backend.prefill(TEXT[count - 1 : count], SAMPLE)
        expected = [one.backend.sampled_tokens()[0]]
        for _ in range(5):
            one.backend.decode()
            expected.append(one.backend.sampled_tokens()[0])
        assert expected[0] == singles.logits[count - 1].argmax()
        two.reset()
        params = SamplingParams(max_tokens=6, ignore_eos=True, speculate="off")
        assert two.generate_tokens(TEXT[:count], params).finish().token_ids == expected


class Scripted:
    """Proposes a known reply, with a wrong token now and then."""

    def __init__(self, prompt: Sequence[int], reply: Sequence[int], count: int) -> None:
        self._prompt, self._reply, self._count = len(prompt), reply, count
        self._rng = np.random.default_rng(count)

    def propose(self, token_ids: Sequence[int], limit: int) -> list[int]:
        done = len(token_ids) - self._prompt
        wrong = self._rng.random(self._count) < 0.15
        proposed = self._reply[done : done + min(self._count, limit)]
        return [(token + int(bad)) % GEOMETRY.vocabulary for token, bad in zip(proposed, wrong, strict=False)]

    def observe(self, result: StepResult) -> None:
        """No effect."""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.2},
        {"temperature": 0.9, "top_p": 0.95, "seed": 11},
        {"temperature": 0.8, "seed": 3, "logprobs": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 3, 7])
def test_replies_with_proposals_are_those_without(two: Engine, options: dict[str, float], count: int) -> None:
    prompt = TEXT[:13]
    params = SamplingParams(max_tokens=200, ignore_eos=True, **options)  # type: ignore[arg-type]
    two.reset()
    plain = two.generate_tokens(prompt, replace(params, speculate="off")).finish()
    cache = keys_and_values(two, 200)
    two.reset()
    speculative = two.generate_tokens(prompt, params, drafter=Scripted(prompt, plain.token_ids, count)).finish()
    assert speculative.token_ids == plain.token_ids
    if "logprobs" in options:  # computed by the host, and by the device
        for got, expected in zip(speculative.logprobs, plain.logprobs, strict=True):
            assert (got.token, got.rank) == (expected.token, expected.rank)
            assert got.logprob == pytest.approx(expected.logprob, abs=1e-6)
    assert speculative.stats.accepted > 50
    assert speculative.stats.accepted < speculative.stats.proposed
    for before, after in zip(cache, keys_and_values(two, 200), strict=True):
        np.testing.assert_array_equal(after.view(np.uint16), before.view(np.uint16))


def test_prompt_lookup_runs_when_it_is_asked_for(two: Engine) -> None:
    """A prompt that repeats itself; a reply that is asked for nothing takes no proposals."""
    prompt = TEXT[:12] * 4
    replies = []
    for how in ("off", "auto", "lookup"):
        two.reset()
        params = SamplingParams(max_tokens=100, ignore_eos=True, speculate=how)
        replies.append(two.generate_tokens(prompt, params).finish())
    assert replies[0].token_ids == replies[1].token_ids == replies[2].token_ids
    assert replies[0].stats.proposed == replies[1].stats.proposed == 0


def test_all_widths_pass_the_check_of_all_bits(two: Engine) -> None:
    report = check_widths(two.backend, GEOMETRY, TEXT[:200], range(1, 9))
    assert report.passed, report.verdict()


@pytest.mark.parametrize("rank", [0, 1])
def test_steps_of_several_tokens_after_one_that_failed_are_right(two: Engine, singles: Singles, rank: int) -> None:
    failing = two.backend._ranks[rank]  # type: ignore[attr-defined]

    def fail() -> None:
        with failing.owner.current():
            failing.memory.write(failing.buffers["persistent.fault"], np.ones(1, np.int32))

    for step in (
        lambda: two.backend.verify(TEXT[:5]),
        lambda: two.backend.verify_greedy(TEXT[:2]),
        lambda: two.feed(TEXT[:6]),
        lambda: two.generate_tokens(TEXT[:4], SamplingParams(max_tokens=1, ignore_eos=True)).finish(),
    ):
        two.reset()
        fail()
        with pytest.raises(BackendError, match="watchdog"):
            step()
        two.reset()
        np.testing.assert_array_equal(two.feed(TEXT[:15], all_logits=True), singles.logits[:15])


@pytest.mark.parametrize("gpus", [[0, 0], [0, 1]], ids=["shared GPU", "two GPUs"])
@pytest.mark.parametrize("kind", ["heads finished by attention", "wide intermediate"])
def test_other_models_have_the_bits_of_one_gpu(kind: str, gpus: list[int]) -> None:
    if max(gpus) >= gpu_count():
        pytest.skip("there is one GPU")
    geometry = {
        "heads finished by attention": tiny_geometry(
            layers=2,
            hidden=896,
            heads=14,
            kv_heads=2,
            head_dim=64,
            ffn=4864,
            vocabulary=900,
            qkv_bias=True,
            qk_norm=True,
        ),
        "wide intermediate": tiny_geometry(
            layers=2, hidden=2048, heads=8, kv_heads=8, head_dim=128, ffn=8192, vocabulary=1000
        ),
    }[kind]
    tokens = [token % geometry.vocabulary for token in TEXT[:310]]
    with Engine.random(geometry, "cuda", 320, decode="persistent", prefill="gemv") as engine:
        expected = single_steps(engine, tokens)
    with Engine.random(geometry, "cuda", 320, gpus=gpus) as engine:
        np.testing.assert_array_equal(engine.feed(tokens, all_logits=True), expected.logits)
        for start in (300, 222, 0):
            for count in (1, 2, 3, 8):
                check_verified(engine, expected, tokens, start, count)
