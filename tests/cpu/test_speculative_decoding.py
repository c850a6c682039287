"""Generation with proposed tokens: the same tokens as without, whatever is proposed, and where they end."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from step_costs import UnmeasuredCost
from tiny_models import SMALLEST_VOCABULARY, tiny_geometry, write_hf_folder

from numba_atomflow import Engine, SamplingParams, overlapped_generation
from numba_atomflow.backends.base import Verification
from numba_atomflow.convert import convert
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.generation import TokenGeneration
from numba_atomflow.sampling import Sampler, accepted_tokens, most_likely_token
from numba_atomflow.speculation.drafter import StepResult
from numba_atomflow.speculation.prompt_lookup import PromptLookup
from numba_atomflow.speculation.step_cost import StepCost

PROMPT = [40, 50, 60, 70, 80, 40, 50, 60]
SAMPLED = {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 11}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speculation")
    write_hf_folder(folder / "hf", tiny_geometry(vocabulary=SMALLEST_VOCABULARY))
    return convert(folder / "hf", folder / "tiny.safetensors")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint, "cpu", max_seq_len=128, threads=1) as engine:  # too small to be worth two
        yield engine


@pytest.fixture
def engine(loaded: Engine) -> Engine:
    loaded.reset()
    return loaded


class Script:
    """Proposes the tokens of a known reply, with an error at each of these indices of the reply."""

    def __init__(self, prompt: Sequence[int], reply: Sequence[int], wrong: Sequence[int] = (), count: int = 99) -> None:
        self._prompt, self._reply, self._wrong, self._count = len(prompt), list(reply), set(wrong), count
        self.results: list[StepResult] = []

    def propose(self, token_ids: Sequence[int], limit: int) -> list[int]:
        done = len(token_ids) - self._prompt
        tokens = [token ^ (i in self._wrong) for i, token in enumerate(self._reply)]
        return tokens[done : done + min(limit, self._count)]

    def observe(self, result: StepResult) -> None:
        self.results.append(result)


def plain(engine: Engine, prompt: Sequence[int] = PROMPT, **options: Any) -> list[int]:
    engine.reset()
    tokens = engine.generate_tokens(prompt, SamplingParams(speculate="off", **options)).finish().token_ids
    engine.reset()
    return tokens


# --- the same tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("wrong", [(), (5, 6, 17), range(0, 60, 2), range(60)], ids=["right", "few", "half", "wrong"])
def test_a_drafter_changes_the_number_of_steps_only(engine: Engine, options: dict[str, Any], wrong: range) -> None:
    options = options | {"max_tokens": 60, "ignore_eos": True}
    expected = plain(engine, **options)
    drafter = Script(PROMPT, expected, wrong)
    reply = engine.generate_tokens(PROMPT, SamplingParams(**options), drafter=drafter).finish()
    assert reply.token_ids == expected
    assert reply.finish_reason == "max_tokens"
    stats = reply.stats
    assert stats.steps + stats.accepted == stats.tokens - 1
    assert stats.accepted <= stats.proposed <= 7 * stats.steps
    assert stats.mean_accepted_length == (stats.tokens - 1) / stats.steps
    assert (stats.steps, stats.accepted == stats.proposed) == (-(-59 // 8), True) if not wrong else stats.steps > 8
    assert engine.token_ids == [*PROMPT, *expected[:-1]]


class SamplingBackend:
    """Lets a CPU backend choose tokens in steps that verify, as a GPU does: by a copy of the sampler, while the caller
    does other things.
    """

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self._backend, self._start = engine.backend, engine.backend.start
        self.steps = 0
        monkeypatch.setattr(engine.backend, "start", self.start)
        monkeypatch.setattr(engine.backend, "launch_verification", self.launch)

    def start(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._start(copy.deepcopy(sampler))

    def launch(self, tokens: Sequence[int], *, sampled: bool) -> Callable[[], list[int]]:
        self.steps += 1
        logits = self._backend.verify(tokens)
        if not sampled:
            return lambda: accepted_tokens(tokens, lambda row: most_likely_token(logits[row]))
        sampler = copy.deepcopy(self._sampler)
        return lambda: accepted_tokens(tokens, lambda row: sampler.choose(logits[row]))


@pytest.mark.parametrize("options", [{}, SAMPLED, {"repetition_penalty": 1.3}, {"temperature": 1.0, "seed": 4}])
@pytest.mark.parametrize("wrong", [(), (5, 6, 17)], ids=["right", "few"])
def test_a_backend_that_samples_generates_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], wrong: Sequence[int]
) -> None:
    options = options | {"max_tokens": 60, "ignore_eos": True}
    expected = plain(engine, **options)
    backend = SamplingBackend(engine, monkeypatch)
    drafter = Script(PROMPT, expected, wrong)
    reply = engine.generate_tokens(PROMPT, SamplingParams(**options), drafter=drafter).finish()
    assert reply.token_ids == expected
    assert reply.stats.steps == backend.steps
    assert reply.stats.steps + reply.stats.accepted == reply.stats.tokens - 1
    assert engine.token_ids == [*PROMPT, *expected[:-1]]


@pytest.mark.parametrize("taken", [*range(1, 13), 30])
def test_a_caller_that_leaves_while_a_step_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    """The context has what was taken, and continues as if no step had been launched."""
    expected = plain(engine, max_tokens=60, ignore_eos=True)
    backend = SamplingBackend(engine, monkeypatch)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    reply = engine.generate_tokens(PROMPT, params, drafter=Script(PROMPT, expected, (5, 6, 17)))
    assert [next(reply) for _ in range(taken)] == expected[:taken]
    assert backend.steps == reply.stats.steps + (taken > 1)  # the next one runs from a step's first token on
    reply.close()
    assert engine.token_ids == [*PROMPT, *expected[: taken - 1]]
    prompt = [*PROMPT, *expected[:taken]]
    rest = engine.generate_tokens(prompt, SamplingParams(max_tokens=60 - taken, ignore_eos=True)).finish()
    assert (rest.token_ids, rest.stats.reused_tokens) == (expected[taken:], len(prompt) - 1)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_failing_drafter_loses_no_token_of_the_steps_before(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Its error comes after the tokens, and not at all to a caller that leaves before."""
    options = options | {"max_tokens": 60, "ignore_eos": True}
    expected = plain(engine, **options)
    SamplingBackend(engine, monkeypatch)

    class Failing(Script):
        def propose(self, token_ids: Sequence[int], limit: int) -> list[int]:
            return [SMALLEST_VOCABULARY] if len(self.results) == 2 else super().propose(token_ids, limit)

    def begin() -> TokenGeneration:
        engine.reset()
        return engine.generate_tokens(PROMPT, SamplingParams(**options), drafter=Failing(PROMPT, expected, (5,)))

    reply = begin()
    with pytest.raises(OptionError, match="The drafter proposed token 259"):
        reply.finish()
    assert reply.token_ids == expected[:14]  # the first, 5 of a step, and 8
    assert engine.token_ids == [*PROMPT, *expected[:13]]
    assert (reply.stats.steps, reply.stats.accepted) == (2, 11)
    leaving = begin()
    assert [next(leaving) for _ in range(14)] == expected[:14]
    leaving.close()
    assert engine.token_ids == [*PROMPT, *expected[:13]]


@pytest.mark.parametrize(("pause", "slope"), [(0.01, 0.1), (3.0, UnmeasuredCost().slope)], ids=["fast", "slow"])
def test_a_slow_caller_is_not_taken_for_slow_steps(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, pause: float, slope: float
) -> None:
    """Else later replies would propose nothing. A step of n tokens takes 0.9 + 0.1 n seconds of a clock of its own."""
    backend, now = SamplingBackend(engine, monkeypatch), 0.0
    launch, cost = backend.launch, StepCost()

    def launch_timed(tokens: Sequence[int], *, sampled: bool) -> Callable[[], list[int]]:
        choose, end = launch(tokens, sampled=sampled), now + 0.9 + 0.1 * len(tokens)

        def wait() -> list[int]:
            nonlocal now
            now = max(now, end)
            return choose()

        return wait

    monkeypatch.setattr(engine.backend, "launch_verification", launch_timed)
    monkeypatch.setattr(overlapped_generation, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(engine, "_step_cost", cost)
    params = SamplingParams(max_tokens=100, ignore_eos=True, speculate="lookup")
    reply = engine.generate_tokens(PROMPT, params)
    for _ in reply:
        now += pause
    assert reply.stats.accepted > 20
    assert cost.slope == pytest.approx(slope)


def test_the_token_of_a_step_that_fails_is_not_in_the_context(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys and values may be missing or wrong."""
    expected = plain(engine, max_tokens=60, ignore_eos=True)
    backend = SamplingBackend(engine, monkeypatch)
    launch = backend.launch

    def launch_failing(tokens: Sequence[int], *, sampled: bool) -> Callable[[], list[int]]:
        def fail() -> list[int]:
            raise BackendError("a test")

        wait = launch(tokens, sampled=sampled)
        return wait if backend.steps < 3 else fail

    monkeypatch.setattr(engine.backend, "launch_verification", launch_failing)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    reply = engine.generate_tokens(PROMPT, params, drafter=Script(PROMPT, expected, (5,)))
    with pytest.raises(BackendError, match="a test"):
        reply.finish()
    assert reply.token_ids == expected[:14]
    assert engine.token_ids == [*PROMPT, *expected[:13]]


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [1, 2, 9, 10, 16, 17])
def test_no_step_is_launched_beyond_the_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], length: int
) -> None:
    """Of max_tokens, at EOS, and where the context is full."""
    expected = plain(engine, max_tokens=120, ignore_eos=True, **options)
    backend = SamplingBackend(engine, monkeypatch)

    def reply(**end: Any) -> TokenGeneration:
        engine.reset()
        backend.steps = 0
        params = SamplingParams(**{"ignore_eos": True} | options | end)
        return engine.generate_tokens(PROMPT, params, drafter=Script(PROMPT, expected, (5, 6, 17))).finish()

    found = reply(max_tokens=length)
    assert (found.token_ids, found.finish_reason, found.stats.steps) == (
        expected[:length],
        "max_tokens",
        backend.steps,
    )
    first = expected.index(expected[length])
    text = replace(engine.checkpoint.text, eos_ids=(expected[length],))
    monkeypatch.setattr(engine.checkpoint, "text", text)
    found = reply(max_tokens=60, ignore_eos=False)
    assert (found.token_ids, found.finish_reason, found.stats.steps) == (expected[: first + 1], "eos", backend.steps)
    full = reply(max_tokens=None)
    assert (len(full.token_ids), full.finish_reason) == (128 - len(PROMPT) + 1, "context")
    assert (full.token_ids[:120], full.stats.steps) == (expected, backend.steps)


@pytest.mark.parametrize("options", [{"logprobs": 2}, {"prompt_logprobs": 0}])
def test_what_needs_logits_is_not_sampled_by_the_backend(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    options = options | {"temperature": 1.0, "seed": 4, "max_tokens": 10}
    expected = plain(engine, **options)
    backend = SamplingBackend(engine, monkeypatch)
    drafter = Script(PROMPT, expected)
    reply = engine.generate_tokens(PROMPT, SamplingParams(**options), drafter=drafter).finish()
    assert (reply.token_ids, backend.steps) == (expected, 0)
    assert len(reply.prompt_logprobs) == (len(PROMPT) if "prompt_logprobs" in options else 0)


def test_the_kv_cache_after_rejections_is_that_of_single_steps(engine: Engine) -> None:
    expected = plain(engine, max_tokens=40, ignore_eos=True)
    engine.generate_tokens(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True, speculate="off")).finish()
    logits = engine.feed([expected[-1]])
    engine.reset()
    drafter = Script(PROMPT, expected, wrong=(3, 11, 12, 30))
    engine.generate_tokens(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True), drafter=drafter).finish()
    np.testing.assert_array_equal(engine.feed([expected[-1]]), logits)


def test_prompt_lookup_proposes_where_a_text_repeats(engine: Engine) -> None:
    """A loop of a tiny random model: greedy decoding repeats itself."""
    expected = plain(engine, max_tokens=100, ignore_eos=True)
    params = SamplingParams(max_tokens=100, ignore_eos=True, speculate="lookup")
    drafter = PromptLookup(UnmeasuredCost())  # the engine's own measures time
    reply = engine.generate_tokens(PROMPT, params, drafter=drafter).finish()
    assert reply.token_ids == expected
    assert reply.stats.accepted > 0
    engine.reset()
    assert engine.generate_tokens(PROMPT, params).finish().token_ids == expected
    off = engine.generate_tokens(PROMPT, SamplingParams(max_tokens=10, speculate="off")).finish()
    assert (off.stats.proposed, off.stats.steps) == (0, off.stats.tokens - 1)
    assert off.stats.mean_accepted_length == 1


def test_log_probabilities_are_those_of_single_steps(engine: Engine) -> None:
    options: dict[str, Any] = {**SAMPLED, "max_tokens": 30, "ignore_eos": True, "logprobs": 3}
    expected = engine.generate_tokens(PROMPT, SamplingParams(**options, speculate="off")).finish()
    engine.reset()
    drafter = Script(PROMPT, expected.token_ids, wrong=(4, 9, 10))
    reply = engine.generate_tokens(PROMPT, SamplingParams(**options), drafter=drafter).finish()
    assert reply.logprobs == expected.logprobs
    assert reply.stats.accepted > 15


def test_a_call_between_two_tokens_of_a_step_changes_nothing(engine: Engine) -> None:
    """`unembed` computes logits where the step has put its own."""
    expected = plain(engine, max_tokens=30, ignore_eos=True, **SAMPLED)
    rows = np.random.default_rng(0).normal(size=(20, engine.geometry.hidden))
    params = SamplingParams(max_tokens=30, ignore_eos=True, **SAMPLED)
    reply = engine.generate_tokens(PROMPT, params, drafter=Script(PROMPT, expected, wrong=(9,)))
    assert next(reply) == expected[0]
    for token in expected[1:]:
        engine.unembed(rows)
        engine.snapshot()
        assert next(reply) == token
    assert reply.stats.accepted > 15


# --- where they end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 15])
def test_max_tokens_within_accepted_tokens(engine: Engine, count: int) -> None:
    expected = plain(engine, max_tokens=20, ignore_eos=True)
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    reply = engine.generate_tokens(PROMPT, params, drafter=Script(PROMPT, expected)).finish()
    assert (reply.token_ids, reply.finish_reason) == (expected[:count], "max_tokens")
    assert engine.position == len(PROMPT) + count - 1
    assert reply.stats.accepted == reply.stats.proposed  # no token was checked that could not be generated


def test_the_end_of_the_context_within_accepted_tokens(engine: Engine) -> None:
    expected = plain(engine, ignore_eos=True)
    assert len(expected) == 128 - len(PROMPT) + 1
    for limit in (7, 3):
        engine.reset()
        drafter = Script(PROMPT, expected, count=limit)
        reply = engine.generate_tokens(PROMPT, SamplingParams(ignore_eos=True), drafter=drafter).finish()
        assert (reply.token_ids, reply.finish_reason) == (expected, "context")
        assert engine.position == 128


def with_eos(engine: Engine, monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    monkeypatch.setattr(engine.checkpoint, "text", _Text(engine.checkpoint.text, (token,)))


class _Text:
    """A checkpoint's text with other tokens that end a reply."""

    def __init__(self, text: Any, eos_ids: tuple[int, ...]) -> None:
        self._text, self.eos_ids = text, eos_ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._text, name)


def test_eos_within_accepted_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain(engine, max_tokens=20, ignore_eos=True, **SAMPLED)
    end = next(i for i in range(4, 20) if expected[i] not in expected[:i])
    with_eos(engine, monkeypatch, expected[end])
    drafter = Script(PROMPT, expected)
    reply = engine.generate_tokens(PROMPT, SamplingParams(max_tokens=20, **SAMPLED), drafter=drafter).finish()
    assert (reply.token_ids, reply.finish_reason) == (expected[: end + 1], "eos")
    assert reply.stats.proposed == reply.stats.accepted  # neither EOS nor what follows was checked


def test_a_stop_string_within_accepted_tokens(engine: Engine) -> None:
    options: dict[str, Any] = {**SAMPLED, "max_tokens": 40, "ignore_eos": True}
    text = engine.generate(PROMPT, SamplingParams(speculate="off", **options)).finish()
    stop = text.text[len(text.text) // 2 :][:2]
    engine.reset()
    expected = engine.generate(PROMPT, SamplingParams(speculate="off", stop=stop, **options)).finish()
    position = engine.position
    engine.reset()
    drafter = Script(PROMPT, text.token_ids)
    reply = engine.generate(PROMPT, SamplingParams(stop=stop, **options), drafter=drafter).finish()
    assert (reply.text, reply.token_ids, reply.finish_reason) == (expected.text, expected.token_ids, "stop")
    assert reply.stats.accepted > 0
    assert engine.position == position


def test_a_reply_that_is_closed_within_accepted_tokens_can_be_continued(engine: Engine) -> None:
    expected = plain(engine, max_tokens=30, ignore_eos=True)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    reply = engine.generate_tokens(PROMPT, params, drafter=Script(PROMPT, expected))
    first = [next(reply) for _ in range(5)]
    reply.close()
    assert first == expected[:5]
    assert engine.token_ids == [*PROMPT, *expected[:4]]
    rest = engine.generate_tokens([*PROMPT, *first], SamplingParams(max_tokens=25, ignore_eos=True)).finish()
    assert rest.token_ids == expected[5:]
    assert rest.stats.reused_tokens == len(PROMPT) + 4


# --- what a drafter is told and may do -------------------------------------------------------------------------------


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_drafter_hears_of_every_step_but_the_last(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, overlapped: bool
) -> None:
    expected = plain(engine, max_tokens=20, ignore_eos=True)
    if overlapped:
        SamplingBackend(engine, monkeypatch)
    drafter = Script(PROMPT, expected, wrong=(2,), count=3)
    engine.generate_tokens(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True), drafter=drafter).finish()
    assert [(result.proposed, result.accepted) for result in drafter.results] == [(3, 1), *[(3, 3)] * 4]
    assert overlapped or all(result.seconds > 0 for result in drafter.results)


class Fixed:
    """Proposes the same tokens each time."""

    def __init__(self, *tokens: Any) -> None:
        self._tokens = tokens

    def propose(self, token_ids: Sequence[int], limit: int) -> Sequence[int]:
        return self._tokens

    def observe(self, result: StepResult) -> None:
        pass


def test_tokens_beyond_the_limit_are_dropped(engine: Engine) -> None:
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    reply = engine.generate_tokens(PROMPT, params, drafter=Fixed(*range(3, 100))).finish()
    assert reply.token_ids == plain(engine, max_tokens=10, ignore_eos=True)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (SMALLEST_VOCABULARY, "The drafter proposed token 259; the vocabulary has 259 tokens."),
        (-1, "The drafter proposed token -1"),
        ("x", "a token of the drafter"),
    ],
)
def test_a_proposed_token_that_does_not_exist_is_refused(engine: Engine, token: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        engine.generate_tokens(PROMPT, drafter=Fixed(token)).finish()
    assert engine.generate_tokens(PROMPT, SamplingParams(max_tokens=2)).finish().stats.tokens == 2


@pytest.mark.parametrize("proposal", [None, 5])
def test_a_proposal_that_is_no_list_is_refused(engine: Engine, proposal: Any) -> None:
    drafter = Fixed()
    drafter.propose = lambda *_: proposal  # type: ignore[method-assign]
    with pytest.raises(OptionError, match=f"The drafter proposed {proposal}; it must return token ids"):
        engine.generate_tokens(PROMPT, drafter=drafter).finish()


@pytest.mark.parametrize("drafter", [3, "lookup", PromptLookup])
def test_what_is_no_drafter_is_refused(engine: Engine, drafter: Any) -> None:
    with pytest.raises(OptionError, match=r"drafter is .*; it must be an object with methods"):
        engine.generate_tokens(PROMPT, drafter=drafter)


def test_contradictions_are_refused(engine: Engine) -> None:
    with pytest.raises(OptionError, match='There is a drafter, but speculate is "off"'):
        engine.generate_tokens(PROMPT, SamplingParams(speculate="off"), drafter=Fixed())
    with pytest.raises(OptionError, match=r'speculate is .often.; it must be "auto", "off", "lookup" or "draft"'):
        SamplingParams(speculate="often")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="speculate is 7"):
        SamplingParams(speculate=7)  # type: ignore[arg-type]


def test_a_backend_that_cannot_verify_says_why(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(engine.backend), "verification", Verification(1, "it is a test"))
    automatic = engine.generate_tokens(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True)).finish()
    assert automatic.stats.proposed == 0
    with pytest.raises(OptionError, match=r'speculate is "lookup", but this backend cannot .*, because it is a test;'):
        engine.generate_tokens(PROMPT, SamplingParams(speculate="lookup"))
    with pytest.raises(OptionError, match="There is a drafter, but this backend cannot"):
        engine.generate_tokens(PROMPT, drafter=Fixed(5))


def test_speculation_that_is_not_automatic_needs_to_be_asked_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(engine.backend), "verification", Verification(8, automatic=False))
    expected = plain(engine)
    automatic = engine.generate_tokens(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True)).finish()
    assert automatic.stats.proposed == 0
    drafter = Fixed(*expected[1:9])
    asked = engine.generate_tokens(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True), drafter=drafter).finish()
    assert asked.stats.proposed > 0
    assert asked.token_ids == automatic.token_ids
