"""Log-probabilities of tokens: against plain log-softmax, and in generations"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import SMALLEST_VOCABULARY, some_tokens, tiny_geometry, write_checkpoint

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.errors import CheckpointError, OptionError
from numba_atomflow.logprobs import TopLogprob, most_likely, rank_of, token_logprobs

ROUNDING = 1e-12  # of sums in float64


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    geometry = tiny_geometry(vocabulary=SMALLEST_VOCABULARY, max_positions=1024)
    return write_checkpoint(tmp_path_factory.mktemp("random"), geometry)


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint, threads=1) as engine:
        yield engine


# --- of one row of logits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 5.0, 1e30])
def test_they_are_those_of_a_plain_log_softmax(scale: float) -> None:
    logits = (np.random.default_rng(0).standard_normal(1000) * scale).astype(np.float32)
    expected = log_softmax(logits)
    order = np.argsort(-logits, kind="stable")
    for token in (0, 17, 999, int(order[0])):
        got = token_logprobs(logits, token, top=5)
        assert got.token == token
        assert got.logprob == pytest.approx(expected[token], rel=ROUNDING, abs=ROUNDING)
        assert order[got.rank - 1] == token
        assert [likely for likely, _ in got.top] == order[:5].tolist()
        assert [logprob for _, logprob in got.top] == pytest.approx(expected[order[:5]], rel=ROUNDING, abs=ROUNDING)


def test_of_equal_logits_the_lower_token_comes_first() -> None:
    logits = np.array([1, 3, 3, -2, 3, 1], np.float32)
    assert [rank_of(logits, token) for token in range(6)] == [4, 1, 2, 6, 3, 5]
    assert most_likely(logits, 2) == [1, 2]
    assert most_likely(logits, 4) == [1, 2, 4, 0]
    assert most_likely(logits, 100) == [1, 2, 4, 0, 5, 3]
    assert most_likely(logits, 0) == []


def test_impossible_tokens_have_a_logprob_of_minus_infinity() -> None:
    got = token_logprobs(np.array([-np.inf, 0], np.float32), 0, top=2)
    assert got == (0, -np.inf, 2, (TopLogprob(1, 0.0), TopLogprob(0, -np.inf)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        token_logprobs(np.array([0, bad, 1], np.float32), 0, top=1)


# --- of generated tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("length", [1, 2, 40, 600])
def test_the_tokens_are_those_of_a_generation_without(engine: Engine, options: dict[str, float], length: int) -> None:
    """Whether they are chosen from the logits on the host or in the step, and the prompt with or without logits."""
    prompt = some_tokens(length)
    plain = engine.generate_tokens(prompt, SamplingParams(max_tokens=24, **options)).finish()
    for requested in ({"logprobs": 2}, {"prompt_logprobs": 0}):
        engine.reset()
        other = engine.generate_tokens(prompt, SamplingParams(max_tokens=24, **options, **requested)).finish()
        assert other.token_ids == plain.token_ids
        assert other.finish_reason == plain.finish_reason


def test_they_are_of_the_models_own_distribution(engine: Engine) -> None:
    prompt = some_tokens(30)
    params = SamplingParams(temperature=2.0, top_k=9, repetition_penalty=1.4, seed=1, max_tokens=10, logprobs=3)
    reply = engine.generate_tokens(prompt, params).finish()
    engine.reset()
    logits = engine.feed(prompt + reply.token_ids[:-1], all_logits=True)[len(prompt) - 1 :]
    expected = log_softmax(logits)
    assert len(reply.logprobs) == len(reply.token_ids) == 10
    for row, token, got in zip(expected, reply.token_ids, reply.logprobs, strict=True):
        assert got.token == token
        assert got.logprob == pytest.approx(row[token], abs=1e-4)  # a step of one token rounds in another order
        assert [likely for likely, _ in got.top] == np.argsort(-row)[:3].tolist()
    assert reply.prompt_logprobs == []


@pytest.mark.parametrize("length", [1, 2, 600])
def test_of_the_prompt(engine: Engine, length: int) -> None:
    prompt = some_tokens(length)
    engine.feed(prompt)  # its logits are not in the KV cache
    reply = engine.generate_tokens(prompt, SamplingParams(max_tokens=1, prompt_logprobs=2)).finish()
    assert reply.stats.reused_tokens == 0
    assert reply.logprobs == []
    engine.reset()
    expected = log_softmax(engine.feed(prompt, all_logits=True))
    assert reply.prompt_logprobs[0] is None
    assert len(reply.prompt_logprobs) == length
    for row, token, got in zip(expected, prompt[1:], reply.prompt_logprobs[1:], strict=False):
        assert got is not None
        assert got.token == token
        assert got.logprob == pytest.approx(row[token], abs=1e-9)
        assert [likely for likely, _ in got.top] == np.argsort(-row)[:2].tolist()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.3}])
def test_the_backend_computes_what_the_host_does(engine: Engine, options: dict[str, float]) -> None:
    """Without speculation and constraints the backend chooses, otherwise the host."""
    replies = []
    for speculate in ("off", "lookup"):
        engine.reset()
        params = SamplingParams(max_tokens=8, logprobs=3, speculate=speculate, ignore_eos=True, **options)
        replies.append(engine.generate_tokens(some_tokens(20), params).finish())
    assert replies[0].token_ids == replies[1].token_ids
    assert replies[0].logprobs == replies[1].logprobs
    assert len(replies[0].logprobs) == 8


def test_a_text_has_them_for_each_token(engine: Engine) -> None:
    reply = engine.generate("abc", SamplingParams(max_tokens=5, logprobs=0, ignore_eos=True)).finish()
    assert [entry.token for entry in reply.logprobs] == reply.token_ids
    assert all(entry.top == () and entry.rank == 1 for entry in reply.logprobs)


def test_a_conversation_goes_on_in_the_kv_cache(engine: Engine) -> None:
    prompt = some_tokens(20)
    reply = engine.generate_tokens(prompt, SamplingParams(max_tokens=5, ignore_eos=True, logprobs=1)).finish()
    assert engine.token_ids == prompt + reply.token_ids[:-1]
    again = engine.generate_tokens(prompt + reply.token_ids, SamplingParams(max_tokens=2, logprobs=1)).finish()
    assert again.stats.reused_tokens == 24


def test_a_full_context_ends_a_reply(checkpoint: Path) -> None:
    with Engine.load(checkpoint, max_seq_len=16, threads=1) as engine:
        reply = engine.generate_tokens(some_tokens(12), SamplingParams(ignore_eos=True, logprobs=0)).finish()
        assert (reply.finish_reason, len(reply.logprobs)) == ("context", 5)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [-1, 21, True, 1.5])
def test_numbers_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"^{name} is "):
        SamplingParams(**{name: value})
