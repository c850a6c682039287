"""Scores of continuations: what is computed for many of them, their values, and what is refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import SMALLEST_VOCABULARY, some_tokens, tiny_geometry, tiny_tokenizer, write_checkpoint
from tokenizers import Tokenizer
from toy_tokenizers import byte_level, sentencepiece

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.errors import ContextError, OptionError
from numba_atomflow.scoring import Target, TokenPair, plan
from numba_atomflow.text.codec import TextAssets, TextCodec

CLOSE = 2e-5  # sums of float32 in another order, for chunks of one or two tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    geometry = tiny_geometry(vocabulary=SMALLEST_VOCABULARY, max_positions=1024)
    return write_checkpoint(tmp_path_factory.mktemp("random"), geometry)


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint, threads=1) as engine:
        yield engine


def naive(engine: Engine, prompt: list[int], continuation: list[int]) -> tuple[list[float], bool]:
    """Log-probabilities and whether each token is the most likely one, from the logits of everything."""
    engine.reset()
    logits = engine.feed(prompt + continuation, all_logits=True)[len(prompt) - 1 : -1].astype(np.float64)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return logprobs[np.arange(len(continuation)), continuation].tolist(), logits.argmax(axis=1).tolist() == continuation


# --- what is computed --------------------------------------------------------------------------------------------

PAIRS = st.lists(
    st.builds(
        TokenPair,
        st.lists(st.integers(0, 1), min_size=1, max_size=4),
        st.lists(st.integers(0, 1), min_size=1, max_size=4),
    ),
    max_size=12,
)


@given(PAIRS)
@settings(max_examples=300, deadline=None)
def test_each_token_is_fed_once_and_each_target_read_once(pairs: list[TokenPair]) -> None:
    branches = plan(pairs)
    targets = [target for branch in branches for row in branch.targets.values() for target in row]
    assert sorted(targets) == [Target(i, k) for i, pair in enumerate(pairs) for k in range(len(pair.continuation))]
    for branch in branches:
        for row, found in branch.targets.items():
            for pair, place in found:  # the row follows just the tokens that stand before the target
                prompt, continuation = pairs[pair]
                assert branch.tokens[: row + 1] == (prompt + continuation[:place])
    fed, cached = list[tuple[int, ...]](), list[int]()
    for branch in branches:
        shared = 0
        while shared < len(cached) and shared < len(branch.tokens) and cached[shared] == branch.tokens[shared]:
            shared += 1
        assert shared <= min(branch.targets)  # what is in the KV cache needs no logits any more
        assert max(branch.targets) == len(branch.tokens) - 1
        fed += [tuple(branch.tokens[: end + 1]) for end in range(shared, len(branch.tokens))]
        cached = branch.tokens
    assert len(fed) == len(set(fed))


def test_choices_after_one_prompt_compute_it_once() -> None:
    prompt = [5, 6, 7]
    pairs = [TokenPair(prompt, [1, 2]), TokenPair(prompt, [3]), TokenPair(prompt, [1, 4]), TokenPair(prompt, [1, 2])]
    first, second = plan(pairs)
    assert (first.tokens, sorted(first.targets)) == (prompt, [2])
    assert (second.tokens, sorted(second.targets)) == ([*prompt, 1], [3])


def test_the_backend_runs_each_token_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, fed = some_tokens(600), list[int]()
    prefill = engine.backend.prefill
    monkeypatch.setattr(engine.backend, "prefill", lambda tokens, head: (fed.extend(tokens), prefill(tokens, head)))
    engine.score_many([(prompt, [choice, 9, choice]) for choice in (3, 4, 5, 6)])
    assert len(fed) == len(prompt) + 4 * 2
    engine.score(prompt, [7, 7])
    assert len(fed) == len(prompt) + 4 * 2 + 1 + 1  # the logits after the prompt are not in the KV cache


# --- values ------------------------------------------------------------------------------------------------------


def test_scores_of_many_equal_those_of_one_after_the_other(engine: Engine) -> None:
    shots, question = some_tokens(500), some_tokens(40, seed=1)
    pairs = [
        (shots + question, [10, 11, 12]),
        (shots, [13]),
        (shots + question, [10, 12]),
        (question, some_tokens(30, seed=2)),
        (shots[:3], shots[3:400]),
        (shots[:1], [14]),
        (shots + question, [10, 11, 12]),
    ]
    scores = engine.score_many(pairs)
    assert [list(score.token_ids) for score in scores] == [continuation for _, continuation in pairs]
    for (prompt, continuation), score in zip(pairs, scores, strict=True):
        expected, greedy = naive(engine, prompt, continuation)
        assert score.logprobs == pytest.approx(expected, abs=CLOSE)
        assert score.logprob == pytest.approx(sum(expected), abs=CLOSE * len(expected))
        assert score.is_greedy == greedy
        assert engine.score(prompt, continuation).logprobs == pytest.approx(expected, abs=CLOSE)


def test_a_greedy_continuation_is_recognised(engine: Engine) -> None:
    prompt = some_tokens(20)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    continuation = engine.generate_tokens(prompt, params).finish().token_ids
    assert engine.score(prompt, continuation).is_greedy
    for place in range(6):
        other = list(continuation)
        other[place] = 3 if other[place] != 3 else 4
        assert not engine.score(prompt, other).is_greedy


def test_a_pair_may_end_one_token_after_the_kv_cache(checkpoint: Path) -> None:
    with Engine.load(checkpoint, max_seq_len=8, threads=1) as engine:
        assert len(engine.score([3] * 6, [4, 5, 6]).logprobs) == 3
        with pytest.raises(ContextError, match=r"prompt with its continuation has 9 tokens.* holds 8"):
            engine.score([3] * 6, [4, 5, 6, 7])


def test_progress_goes_from_none_to_all(engine: Engine) -> None:
    calls = []
    engine.score_many([([3], [4]), ([5], [6]), ([3], [7])], lambda *call: calls.append(call))
    assert calls == [("scoring", 0, 2), ("scoring", 1, 2)]
    assert engine.score_many([]) == []


# --- texts -------------------------------------------------------------------------------------------------------


def test_texts_are_scored_as_their_tokens(engine: Engine) -> None:
    def ids(text: str) -> list[int]:
        return tiny_tokenizer().encode(text).ids

    assert engine.score("abc", " de") == engine.score(ids("abc"), ids(" de"))
    moved = engine.score("abc  ", "de")  # white space begins the continuation
    assert list(moved.token_ids) == ids("  de")


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_tokens_at_the_seam_are_those_of_lm_eval(kind: Callable[[], tuple[Tokenizer, Any]]) -> None:
    """The prompt by itself, then those of both texts from its length on, wherever the text is cut."""
    codec = TextCodec(TextAssets(tokenizer_json=kind()[0].to_str().encode()))
    text = "The lighthouse keeper  climbed the stairs"
    whole, reached_over = codec.encode(text), 0
    for cut in range(1, len(text)):
        prompt, continuation = text[:cut], text[cut:]
        first = codec.encode(prompt.rstrip())
        if len(first) >= len(whole):
            with pytest.raises(OptionError, match="no tokens of its own"):
                codec.encode_pair(prompt, continuation)
            continue
        assert codec.encode_pair(prompt, continuation) == (first, whole[len(first) :])
        reached_over += whole[: len(first)] != first
    assert reached_over > 0


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "continuation", "message"),
    [
        ([], [3], "prompt is empty"),
        ([3], [], "continuation is empty"),
        ([3], [SMALLEST_VOCABULARY], "does not exist"),
        ([-1], [3], "does not exist"),
        ([3], 4, "flat list"),
        ("a", [3], "both be texts"),
        ([3], "a", "both be texts"),
        ("", "a", "prompt is empty, and the model has no BOS"),
        ("a", "", "has no tokens of its own"),
    ],
)
def test_bad_pairs_are_refused(engine: Engine, prompt: object, continuation: object, message: str) -> None:
    engine.feed([5, 6])
    with pytest.raises(OptionError, match=message):
        engine.score(prompt, continuation)
    assert engine.token_ids == [5, 6]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("ab", "takes pairs"),
        (None, "takes pairs"),
        (["ab"], "A pair to score is"),
        ([([5], [6]), ([5],)], "A pair to score is"),
        ([([5], [6], [7])], "A pair to score is"),
        ([5], "A pair to score is"),
    ],
)
def test_what_is_no_list_of_pairs_is_refused(engine: Engine, pairs: Any, message: str) -> None:
    engine.feed([5, 6])
    with pytest.raises(OptionError, match=message):
        engine.score_many(pairs)
    assert engine.token_ids == [5, 6]
