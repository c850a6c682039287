"""Log-probabilities and scores on a GPU: those of the device are the host's from copied logits; the CPU's scores."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.logprobs import token_logprobs

MAX_SEQ_LEN = 96
LIMIT = 0.03  # nats: activations are float16, and random logits are up to about 5

pytestmark = pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPerformanceWarning")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.random(tiny_geometry(), "cuda", MAX_SEQ_LEN) as engine:
        yield engine


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, tiny_geometry().vocabulary, count).tolist()


def test_a_generation_with_logprobs_and_then_one_without(engine: Engine) -> None:
    prompt, plain = some_tokens(20), SamplingParams(max_tokens=12)
    engine.reset()
    before = engine.generate_tokens(prompt, plain).finish().token_ids
    engine.reset()
    params = SamplingParams(max_tokens=12, logprobs=2, prompt_logprobs=0)
    reply = engine.generate_tokens(prompt, params).finish()
    engine.reset()
    logits = engine.feed(prompt + reply.token_ids[:-1], all_logits=True).astype(np.float64)
    rows = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    entries = [*reply.prompt_logprobs[1:], *reply.logprobs]
    for row, token, entry in zip(rows, [*prompt[1:], *reply.token_ids], entries, strict=True):
        assert entry is not None
        assert entry.logprob == pytest.approx(row[token], abs=LIMIT)
    assert all(entry.rank == 1 for entry in reply.logprobs)
    engine.reset()
    assert engine.generate_tokens(prompt, plain).finish().token_ids == before


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=24, logprobs=20),
        SamplingParams(temperature=1.3, top_k=40, seed=3, max_tokens=24, logprobs=3, repetition_penalty=1.3),
        SamplingParams(temperature=1.0, seed=4, max_tokens=24, logprobs=0),
    ],
    ids=["greedy", "filtered", "sampled"],
)
def test_the_device_computes_what_the_host_does(engine_of_each_path: Engine, params: SamplingParams) -> None:
    engine, prompt, params = engine_of_each_path, some_tokens(20), replace(params, speculate="off")
    engine.reset()
    ours = engine.generate_tokens(prompt, params).finish()
    engine.reset()
    plain = engine.generate_tokens(prompt, replace(params, logprobs=None)).finish()
    assert plain.token_ids == ours.token_ids
    engine.reset()
    logits = engine.feed(prompt + ours.token_ids[:-1], all_logits=True)[len(prompt) - 1 :]
    assert len(ours.logprobs) == len(ours.token_ids) == 24
    for row, token, entry in zip(logits, ours.token_ids, ours.logprobs, strict=True):
        expected = token_logprobs(row, token, params.logprobs or 0)  # of a chunk, which rounds in another way
        assert (entry.token, len(entry.top)) == (token, params.logprobs)
        assert entry.logprob == pytest.approx(expected.logprob, abs=LIMIT)
        ours_top, theirs_top = (np.array([likely.logprob for likely in e.top]) for e in (entry, expected))
        np.testing.assert_allclose(ours_top, theirs_top, atol=LIMIT)
        assert (np.diff(ours_top) <= 0).all()
        assert [likely.token for likely in entry.top].count(token) == (entry.rank <= len(entry.top))


def test_scores_are_those_of_the_cpu(engine: Engine) -> None:
    prompt = some_tokens(30)
    pairs = [(prompt, [5, 6, 7]), (prompt, [5, 8]), (prompt[:9], prompt[9:]), (prompt, [9])]
    with Engine.random(tiny_geometry(), "cpu", MAX_SEQ_LEN, threads=1) as cpu:
        expected = cpu.score_many(pairs)
    for score, other in zip(engine.score_many(pairs), expected, strict=True):
        assert score.logprobs == pytest.approx(other.logprobs, abs=LIMIT)
