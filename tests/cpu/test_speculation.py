"""What proposes tokens: the n-gram index, how many tokens pay, and when nothing is proposed."""

import pytest

from numba_atomflow.speculation.acceptance_rates import AcceptanceRates
from numba_atomflow.speculation.draft_length import Balance, best_length, expected_tokens
from numba_atomflow.speculation.drafter import StepResult
from numba_atomflow.speculation.ngram_index import LENGTHS, Match, NgramIndex
from numba_atomflow.speculation.prompt_lookup import PromptLookup
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
