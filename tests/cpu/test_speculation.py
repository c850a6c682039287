"""What proposes tokens: the n-gram index, how many tokens pay, and when nothing is proposed."""

import random
from collections.abc import Iterator, Sequence

import pytest

from numba_atomflow.speculation.acceptance_rates import AcceptanceRates
from numba_atomflow.speculation.draft_cost import DraftCost
from numba_atomflow.speculation.draft_length import Balance, best_length, expected_tokens
from numba_atomflow.speculation.draft_model import DraftModel, GreedyTokens, ModelDrafter
from numba_atomflow.speculation.drafter import StepResult
from numba_atomflow.speculation.ngram_index import LENGTHS, Match, NgramIndex
from numba_atomflow.speculation.prompt_lookup import PromptLookup
from numba_atomflow.speculation.recent_rate import RecentRate
from numba_atomflow.speculation.step_cost import StepCost

# --- the index -------------------------------------------------------------------------------------------------------


def index_of(tokens: list[int]) -> NgramIndex:
    index = NgramIndex()
    index.update(tokens)
    return index


def test_a_match_is_the_longest_ngram_at_its_latest_earlier_place() -> None:
    short, long = [7, 8, 9], [4, 5, 6, 7, 8, 9]
    match = index_of([*long, 10, 11, *short, 20, 21, *short, 30, 31, *long]).longest_match()
    assert match is not None
    assert (match.length, match.position) == (6, 6)
    match = index_of([*short, 10, 11, *short, 20, 21, *short]).longest_match()
    assert match is not None
    assert (match.length, match.position) == (3, 8)


def test_a_text_without_a_repetition_has_no_match() -> None:
    assert index_of(list(range(100))).longest_match() is None
    assert index_of([]).longest_match() is None
    assert index_of([1, 2, 9, 2, 8, 1]).longest_match() is None  # one token is too little


@pytest.mark.parametrize("length", LENGTHS)
def test_an_ngram_of_every_length_is_found(length: int) -> None:
    repeated = list(range(1000, 1000 + length))
    match = index_of([1, *repeated, 2, 3, *repeated]).longest_match()
    assert match is not None
    assert (match.length, match.position) == (length, 1 + length)


def test_an_index_that_grew_token_by_token_is_that_of_the_whole_text() -> None:
    text = [1, 2, 3, 4, 5, 1, 2, 3, 4, 6, 7, 1, 2, 3, 4, 5, 1, 2, 3]
    grown = NgramIndex()
    for end in range(1, len(text) + 1):
        grown.update(text[:end])
        assert grown.longest_match() == index_of(text[:end]).longest_match()


def test_a_continuation_follows_a_loop_beyond_the_end_of_the_text() -> None:
    index = index_of([1, 2, 3, 1, 2, 3])
    match = index.longest_match()
    assert match is not None
    assert index.continuation(match.position, 7) == [1, 2, 3, 1, 2, 3, 1]


# --- how many tokens -------------------------------------------------------------------------------------------------


def test_the_length_has_the_most_expected_tokens_per_cost() -> None:
    assert expected_tokens(0.5, 2) == 1.75
    assert best_length(1.0, 0.3, 7) == 7  # every token adds more than it costs
    assert best_length(0.2, 0.3, 7) == 0
    assert best_length(0.9, 0.3, 0) == 0
    for rate in (0.4, 0.6, 0.8, 0.95):
        values = [expected_tokens(rate, n) / (1 + 0.3 * n) for n in range(8)]
        assert values[best_length(rate, 0.3, 7)] == max(values)


def test_rates_follow_what_was_accepted_by_ngram_and_by_length() -> None:
    rates, good, bad, new = AcceptanceRates(), Match(1, 4, 0), Match(2, 4, 0), Match(3, 4, 0)
    before = rates.rate(new)
    for _ in range(20):
        rates.count(good, 5, 5)
    assert rates.rate(good) > 0.95
    assert before < rates.rate(new) < rates.rate(good)
    for _ in range(50):
        rates.count(bad, 3, 0)
    assert rates.rate(bad) < 0.1
    assert rates.rate(new) < rates.rate(good)
    assert rates.rate(Match(4, 12, 0)) == AcceptanceRates().rate(Match(4, 12, 0))


def test_the_cost_of_a_step_is_measured_and_not_disturbed_by_single_slow_steps() -> None:
    cost = StepCost()
    assumed = cost.slope
    for seconds in (0.010, 0.011, 0.5, 0.010, 0.009):
        cost.observe(1, seconds)
    assert cost.slope == assumed
    for tokens in (2, 4, 8, 8, 4):
        cost.observe(tokens, 0.010 * (1 + 0.2 * (tokens - 1)))
    cost.observe(8, 3.0)
    assert cost.slope == pytest.approx(0.2, abs=0.05)
    assert cost.of(1) == 1
    assert cost.of(8) == pytest.approx(2.4, abs=0.3)


def test_a_balance_without_a_gain_loses_a_step_and_one_percent() -> None:
    balance, lost = Balance(), 0.0
    for _ in range(1000):
        proposed = min(7, balance.affordable(0.5))
        balance.add(1, 1 + 0.5 * proposed)  # all rejected
        lost += 0.5 * proposed
    assert lost <= 1 + 0.01 * 1000


# --- prompt lookup ---------------------------------------------------------------------------------------------------


def decode(prompt: list[int], reply: list[int], slope: float = 0.3) -> tuple[int, float]:
    """Decode a reply that is known; its steps, and their cost in steps of one token."""
    drafter, text, done, steps, cost = PromptLookup(StepCost()), [*prompt, reply[0]], 1, 0, 0.0
    while done < len(reply):
        proposed = drafter.propose(text, min(7, len(reply) - done - 1))
        assert len(proposed) <= 7
        accepted = 0
        while accepted < len(proposed) and proposed[accepted] == reply[done + accepted]:
            accepted += 1
        width_cost = 1 + slope * len(proposed)
        drafter.observe(StepResult(len(proposed), accepted, 0.01 * width_cost))
        text += reply[done : done + accepted + 1]
        done += accepted + 1
        steps += 1
        cost += width_cost
    return steps, cost


def test_a_copy_of_the_prompt_takes_a_third_of_the_steps_or_fewer() -> None:
    prompt = [(i * i + 3 * i) % 997 for i in range(300)]
    steps, cost = decode([*prompt, 5000], prompt)
    assert steps < 100
    assert cost < 0.6 * 300


def test_a_text_that_repeats_nothing_takes_no_longer() -> None:
    steps, cost = decode(list(range(500)), list(range(1000, 1500)))
    assert (steps, cost) == (499, 499)


def test_a_text_in_which_every_proposal_is_wrong_loses_two_percent_at_most() -> None:
    reply = []
    for i in range(2000):  # three tokens that came before, then a new one
        reply += [1, 2, 3, 10 + i]
    steps, cost = decode([1, 2, 3, 4], reply)
    assert cost < 1.02 * len(reply)
    assert cost > steps  # something was proposed


# --- a draft model ---------------------------------------------------------------------------------------------------

STEP = 0.01  # seconds of a step of one token


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class ScriptedModel:
    """Proposes the true reply, each token with a probability; its time passes on the clock."""

    def __init__(self, clock: Clock, rate: float, ratio: float, feeding: float = 0.0) -> None:
        self._clock, self._rate, self._ratio, self._feeding = clock, rate, ratio, feeding
        self._random, self._held = random.Random(1), 0
        self.max_seq_len, self.text, self.asked = 10**6, list[int](), 0

    def continue_greedily(self, token_ids: Sequence[int], count: int) -> GreedyTokens:
        self.asked += 1
        fed, started = len(token_ids) - self._held, self._clock.now
        self._clock.now += STEP * (self._ratio + (fed * self._feeding if fed > 8 else 0))
        first, self._held = self._clock.now - started, len(token_ids)
        self._clock.now += STEP * self._ratio * (count - 1)
        right = self.text[len(token_ids) : len(token_ids) + count]
        return GreedyTokens([token if self._random.random() < self._rate else -1 for token in right], fed, first)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr("numba_atomflow.speculation.draft_model.time", clock)
    return clock


def generate(draft: DraftModel, clock: Clock, model: ScriptedModel, slope: float, prompt: int, reply: int) -> float:
    """Generate a reply; its cost in steps of one token, the draft model's time included."""
    model.text = [*range(prompt + reply)]
    drafter, length, started = ModelDrafter(draft), prompt + 1, clock.now
    while length < len(model.text):
        proposed = drafter.propose(model.text[:length], min(7, len(model.text) - length - 1))
        accepted = 0
        while accepted < len(proposed) and proposed[accepted] == length + accepted:
            accepted += 1
        seconds = STEP * (1 + slope * len(proposed))
        clock.now += seconds
        drafter.observe(StepResult(len(proposed), accepted, seconds))
        length += accepted + 1
    return (clock.now - started) / STEP


def draft_model(model: ScriptedModel, expected_ratio: float = 0.1) -> DraftModel:
    return DraftModel(model, 10**6, StepCost(), expected_ratio)


@pytest.mark.parametrize(("rate", "ratio", "gain"), [(0.8, 0.1, 1.6), (0.9, 0.1, 2.1), (0.8, 0.4, 1.05)])
def test_a_draft_model_that_is_often_right_pays(clock: Clock, rate: float, ratio: float, gain: float) -> None:
    model = ScriptedModel(clock, rate, ratio)
    assert 600 / generate(draft_model(model), clock, model, slope=0.1, prompt=20, reply=600) > gain


@pytest.mark.parametrize(("rate", "ratio", "expected"), [(0.0, 0.1, 0.1), (0.2, 0.3, 0.1), (0.99, 1.5, 0.01)])
def test_a_draft_model_that_does_not_pay_loses_a_step_and_one_percent(
    clock: Clock, rate: float, ratio: float, expected: float
) -> None:
    """Also one that is right and slower than it was thought to be, and one that has to take in a lot of text again."""
    for feeding in (0.0, 0.05):
        model = ScriptedModel(clock, rate, ratio, feeding)
        cost = generate(draft_model(model, expected), clock, model, slope=0.2, prompt=8, reply=2000)
        assert cost < 1.01 * 2000 + 1 + 7 * ratio  # the first proposal goes by the expected ratio
        assert model.asked > 0


def test_a_draft_model_that_is_as_slow_as_the_other_is_never_asked(clock: Clock) -> None:
    model = ScriptedModel(clock, rate=1.0, ratio=1.0)
    assert generate(draft_model(model, 1.0), clock, model, slope=0.2, prompt=8, reply=200) == pytest.approx(199)
    assert model.asked == 0


def test_the_prompt_of_a_draft_model_is_not_held_against_it(clock: Clock) -> None:
    model = ScriptedModel(clock, rate=0.9, ratio=0.1, feeding=0.02)
    cost = generate(draft_model(model), clock, model, slope=0.1, prompt=5000, reply=600)
    assert 100 < cost < 100 + 600 / 2


def test_steps_of_one_token_are_measured_again_and_again(clock: Clock) -> None:
    model = ScriptedModel(clock, rate=1.0, ratio=0.05)
    draft = draft_model(model)
    generate(draft, clock, model, slope=0.1, prompt=8, reply=2000)
    assert len(draft.steps._single) == 3 + model.asked // 64 >= 5
    assert draft.cost.per_token(STEP) == pytest.approx(0.05)


def test_a_rate_follows_the_recent_text_and_returns_to_what_is_expected() -> None:
    rate = RecentRate()
    expected = rate.rate
    for _ in range(50):
        rate.count(4, 0)
    assert rate.rate < 0.05
    for _ in range(500):
        rate.count(0, 0)
    assert rate.rate == pytest.approx(expected, abs=0.1)
    for _ in range(50):
        rate.count(4, 4)
    assert rate.rate > 0.95


def test_what_a_draft_model_costs_is_measured() -> None:
    cost = DraftCost(0.2)
    assert cost.per_token(STEP) == 0.2
    assert cost.of_feeding(100, STEP) == pytest.approx(100 * 0.2 / 4)
    for seconds in (0.002, 0.5, 0.002):
        cost.observe_proposal(2, 2 * seconds)
        cost.observe_feeding(50, seconds)
    assert cost.per_token(STEP) == pytest.approx(0.2)
    assert cost.of_feeding(100, STEP) == pytest.approx(0.4)
