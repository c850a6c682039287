"""Sampling against plain sorting, against transformers' processors, and against its own probabilities."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from sample_reference import DISTRIBUTIONS, device_token, logits_of

from numba_atomflow.errors import CheckpointError, OptionError
from numba_atomflow.sampling import LEAST_TEMPERATURE, Sampler, SamplingParams, candidates, penalise, uniform

OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.05, 5),
        "top_k": st.one_of(st.just(0), st.integers(1, 12), st.integers(13, 10_000)),
        "top_p": st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
        "min_p": st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    }
)


def softmax(scaled: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def naive(logits: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64], float]:
    """Everything sorted, one filter after the other, renormalised after each.

    Also returns how close a token came to the edge of top-p or min-p, where rounding decides.
    """
    scaled = (logits - logits.max().astype(np.float64)) / params.temperature
    order = np.lexsort((np.arange(len(scaled)), -scaled))
    if params.top_k:
        order = order[: params.top_k]
    probabilities = softmax(scaled[order])
    edge = 1.0
    if params.top_p < 1.0:
        before = np.concatenate([[0.0], np.cumsum(probabilities)[:-1]])
        edge = min(edge, float(np.abs(before - params.top_p).min()))
        order, probabilities = order[before < params.top_p], probabilities[before < params.top_p]
    if params.min_p > 0.0:
        ratio = probabilities / probabilities[0]
        edge = min(edge, float(np.abs(ratio - params.min_p)[1:].min(initial=1.0)))
        order, probabilities = order[ratio >= params.min_p], probabilities[ratio >= params.min_p]
    return order, probabilities / probabilities.sum(), edge


def by_token(tokens: NDArray[np.int64], probabilities: NDArray[np.float64]) -> dict[int, float]:
    assert len(set(tokens.tolist())) == len(tokens)
    return dict(zip(tokens.tolist(), probabilities.tolist(), strict=True))


def check_candidates(logits: NDArray[np.float32], params: SamplingParams) -> None:
    tokens, probabilities, edge = naive(logits, params)
    if edge < 1e-12:
        return
    actual, expected = by_token(*candidates(logits, params)), by_token(tokens, probabilities)
    assert actual.keys() == expected.keys()
    assert actual == pytest.approx(expected, rel=1e-9, abs=1e-300)


# --- filters -----------------------------------------------------------------------------------------------------


@given(
    logits=arrays.arrays(np.float32, st.integers(1, 40), elements=st.integers(-2000, 2000)).map(
        lambda x: x / np.float32(100)
    ),
    options=OPTIONS,
)
@example(logits=np.zeros(7, np.float32), options={"temperature": 1.0, "top_k": 3, "top_p": 1.0, "min_p": 0.0})
@settings(deadline=None)
def test_few_logits_are_filtered_as_by_sorting_all(logits: NDArray[np.float32], options: dict[str, Any]) -> None:
    """Hypothesis likes ties: among equals the lower token id comes first."""
    check_candidates(logits, SamplingParams(**options))


@given(seed=st.integers(0, 1 << 32), vocabulary=st.sampled_from([300, 5000, 20_000]), options=OPTIONS)
@settings(deadline=None, max_examples=150)
def test_many_logits_are_filtered_as_by_sorting_all(seed: int, vocabulary: int, options: dict[str, Any]) -> None:
    """Large enough for the shortcuts of 256 and 4,096 tokens to be taken, and to fail."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(vocabulary) * rng.choice([0.01, 1.0, 5.0])).astype(np.float32)
    check_candidates(logits, SamplingParams(**options))


@pytest.mark.parametrize("top_k", [300, 301, 10_000])
def test_a_top_k_of_everything_changes_nothing(top_k: int) -> None:
    logits = np.random.default_rng(1).standard_normal(300).astype(np.float32)
    for rest in ({"top_p": 0.5}, {"min_p": 0.2}, {}):
        check_candidates(logits, SamplingParams(temperature=1.0, top_k=top_k, **rest))
        plain = by_token(*candidates(logits, SamplingParams(temperature=1.0, **rest)))
        assert by_token(*candidates(logits, SamplingParams(temperature=1.0, top_k=top_k, **rest))) == pytest.approx(
            plain
        )


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, 1), (0.499, 1), (0.501, 2), (0.749, 2), (0.751, 3), (0.876, 4), (1.0, 4)]
)
def test_top_p_keeps_the_token_that_crosses_the_threshold(top_p: float, kept: int) -> None:
    logits = (np.array([-3, -1, -3, -2]) * np.log(2)).astype(np.float32)
    tokens, _ = candidates(logits, SamplingParams(temperature=1.0, top_p=top_p))
    assert sorted(tokens.tolist()) == sorted([1, 3, 0, 2][:kept])


def test_candidates_come_most_likely_first_when_filtered() -> None:
    logits = np.random.default_rng(2).standard_normal(5000).astype(np.float32)
    for options in ({"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 9999, "top_p": 0.5}):
        tokens, probabilities = candidates(logits, SamplingParams(temperature=0.8, **options))
        assert tokens[0] == logits.argmax()
        assert np.all(np.diff(probabilities) <= 0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-5, 100.0])
def test_any_allowed_temperature_gives_probabilities(temperature: float) -> None:
    logits = np.array([-3e38, 5.0, 4.9, -1.0], np.float32)
    tokens, probabilities = candidates(logits, SamplingParams(temperature=temperature, top_p=0.9))
    assert tokens[0] == logits.argmax()
    assert probabilities.sum() == pytest.approx(1.0)


# --- against transformers ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processors() -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.generation import logits_process

    return logits_process


@pytest.mark.parametrize("vocabulary", [50, 3000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 20},
        {"top_p": 0.05},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"temperature": 1.7, "min_p": 0.5},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.5, "top_k": 5},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.1},
    ],
)
def test_the_same_tokens_are_left_as_in_transformers(
    rng: np.random.Generator, processors: Any, vocabulary: int, options: dict[str, Any]
) -> None:
    import torch

    logits = (3 * rng.standard_normal(vocabulary)).astype(np.float32)
    context = rng.integers(0, vocabulary, 12)
    options = {"temperature": 1.0} | options
    params = SamplingParams(**options)

    scores = torch.from_numpy(logits.astype(np.float64))[None]  # float64: no rounding at the edges of the filters
    ids = torch.from_numpy(context)[None]
    if "repetition_penalty" in options:
        scores = processors.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(ids, scores)
    scores = processors.TemperatureLogitsWarper(options["temperature"])(ids, scores)
    if "top_k" in options:
        scores = processors.TopKLogitsWarper(options["top_k"])(ids, scores)
    if "top_p" in options:
        scores = processors.TopPLogitsWarper(options["top_p"])(ids, scores)
    if "min_p" in options:
        scores = processors.MinPLogitsWarper(options["min_p"])(ids, scores)
    theirs = torch.softmax(scores, -1)[0].numpy()

    seen = np.zeros(vocabulary, np.bool_)
    seen[context] = True
    actual = by_token(*candidates(penalise(logits, seen, params.repetition_penalty), params))
    assert sorted(actual) == np.flatnonzero(theirs).tolist()
    # penalised logits are rounded to float32: e^(3 * 4 / temperature) times 2^-24 at most
    np.testing.assert_allclose([actual[i] for i in sorted(actual)], theirs[theirs > 0], rtol=1e-5)


def test_penalties_push_down_whatever_the_sign() -> None:
    logits = np.array([2.0, -2.0, 0.0, 2.0, -2.0], np.float32)
    seen = np.array([True, True, True, False, False])
    assert penalise(logits, seen, 2.0).tolist() == [1.0, -4.0, 0.0, 2.0, -2.0]
    assert penalise(logits, seen, 1.0) is logits


# --- draws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 12345, (1 << 64) - 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 2.0, "top_k": 6, "top_p": 0.9},
    ],
)
def test_draws_are_as_frequent_as_their_probabilities(seed: int, options: dict[str, Any]) -> None:
    logits = np.random.default_rng(99).standard_normal(10).astype(np.float32)
    params = SamplingParams(**({"temperature": 1.0, "seed": seed} | options))
    sampler, draws = Sampler(params, 10, ()), 4000
    counts = np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=10)
    tokens, probabilities, _ = naive(logits, params)
    assert counts[tokens].sum() == draws, "a token that was filtered out has been drawn"
    expected = draws * probabilities
    chi_square = float(((counts[tokens] - expected) ** 2 / expected).sum())
    # Mean d, variance 2 d; five standard deviations and the tail of a small d. The seeds are fixed.
    freedom = len(tokens) - 1
    assert chi_square <= freedom + 5 * np.sqrt(2 * freedom) + 8, f"{chi_square:.1f} for {freedom} degrees of freedom"


def test_uniform_numbers_are_splitmix64() -> None:
    # Steele, Lea and Flood's generator from state 1234567, upper 53 bits of each number.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [uniform(1234567, i) for i in range(5)] == [(z >> 11) * 2.0**-53 for z in known]


def test_uniform_numbers_are_in_range_and_spread() -> None:
    draws = np.array([[uniform(seed, i) for i in range(200)] for seed in range(50)])
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 19 + 5 * np.sqrt(38)
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.05  # neighbouring seeds


def replies(params: SamplingParams, context: tuple[int, ...] = ()) -> list[int]:
    sampler, rng = Sampler(params, 100, context), np.random.default_rng(5)
    return [sampler.choose(rng.standard_normal(100).astype(np.float32)) for _ in range(40)]


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    assert replies(SamplingParams(temperature=1.0, seed=7)) == replies(SamplingParams(temperature=1.0, seed=7))
    assert replies(SamplingParams(temperature=1.0, seed=7)) != replies(SamplingParams(temperature=1.0, seed=8))
    assert replies(SamplingParams(temperature=1.0)) != replies(SamplingParams(temperature=1.0))


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.array([1.0, 3.0, 3.0, 2.0], np.float32)
    for params in (SamplingParams(), SamplingParams(temperature=5.0, top_k=1, seed=1)):
        assert params.greedy
        assert Sampler(params, 4, ()).choose(logits) == 1
    assert not SamplingParams(temperature=0.1).greedy


def test_context_and_own_tokens_are_penalised() -> None:
    logits = np.array([4.0, 3.0, 2.5, 0.0], np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), 4, (0,))
    assert [sampler.choose(logits) for _ in range(3)] == [1, 2, 0]  # 2, 3, 2.5; then 2, 1.5, 2.5; then 2, 1.5, 1.25
    assert logits.tolist() == [4.0, 3.0, 2.5, 0.0]


LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-9, 0.7, 100.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_p": 1e-320}])
@pytest.mark.parametrize("logits", [[-LARGEST, LARGEST, 0.0], [LARGEST] * 3, [-LARGEST] * 3, [-1e-45, 1e-45, 0.0]])
def test_logits_at_the_end_of_float32_have_probabilities(
    logits: list[float], filters: dict[str, Any], temperature: float
) -> None:
    """NumPy's warnings of an overflow or a NaN are errors here."""
    params = SamplingParams(temperature=temperature, seed=0, **filters)
    tokens, probabilities = candidates(np.array(logits, np.float32), params)
    assert probabilities.sum() == pytest.approx(1.0)
    assert (probabilities >= 0).all()
    assert Sampler(params, 3, ()).choose(np.array(logits, np.float32)) in tokens


def test_temperatures_below_the_least_count_as_it() -> None:
    logits = np.array([0.0, 3e-30, 0.0], np.float32)
    least = candidates(logits, SamplingParams(temperature=LEAST_TEMPERATURE))[1]
    assert least[1] == pytest.approx(np.exp(3) / (np.exp(3) + 2))
    np.testing.assert_array_equal(candidates(logits, SamplingParams(temperature=1e-320))[1], least)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}])
@pytest.mark.parametrize(
    ("logits", "penalty"),
    [
        ([float("nan"), 1.0, 2.0], 1.0),
        ([float("inf"), 1.0, 2.0], 1.0),
        ([-float("inf")] * 3, 1.0),
        ([LARGEST, 1.0, 2.0], 0.01),  # infinite after the penalty, as on a GPU
        ([float("nan"), 1.0, 2.0], 1.3),
    ],
)
def test_non_finite_logits_are_refused(logits: list[float], penalty: float, params: dict[str, Any]) -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=penalty, seed=0, **params), 3, (0,))
    with pytest.raises(CheckpointError, match="Logits contain NaN or Inf"):
        sampler.choose(np.array(logits, np.float32))


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "min_p": 0.1}])
def test_a_penalty_that_leads_below_float32_excludes_a_token(params: dict[str, Any]) -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=100.0, seed=0, **params), 3, (0, 1))
    assert sampler.choose(np.array([-LARGEST, -LARGEST, -LARGEST], np.float32)) == 2


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": 101.0}, "temperature is 101"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"min_p": -0.01}, "min_p is -0.01"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": 101}, "repetition_penalty is 101"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty is 1e-40; it must be between 0.01 and 100"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 64}, "seed is 18446744073709551616"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop": ""}, "stop holds an empty string"),
        ({"stop": ("a", "")}, "stop holds an empty string"),
        ({"stop": np.array("a")}, "stop is array"),
    ],
)
def test_every_option_out_of_range_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        SamplingParams(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 100.0, "top_p": 1.0, "min_p": 1.0, "repetition_penalty": 100.0, "seed": (1 << 64) - 1},
        {"temperature": 0.0, "top_p": 1e-9, "min_p": 0.0, "seed": 0, "max_tokens": 1, "top_k": 1 << 40},
    ],
)
def test_the_ends_of_the_ranges_are_allowed_and_work(options: dict[str, Any]) -> None:
    logits = np.array([1.0, 3.0, -3.0, 2.0], np.float32)
    assert Sampler(SamplingParams(**options), 4, (0, 2)).choose(logits) in range(4)


def test_one_stop_string_needs_no_list() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 50},
        {"temperature": 1.0, "top_p": 0.95},
        {"temperature": 1.3, "min_p": 0.02},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_from_the_same_logits_a_gpu_draws_the_same_tokens(kind: str, options: dict[str, Any]) -> None:
    """By its kernel's arithmetic: seed, counter, order of tokens and bounds of their shares are the same."""
    rng = np.random.default_rng(0)
    params = SamplingParams(seed=11, **options)
    sampler = Sampler(params, 5003, ())
    for draw in range(20):
        logits = logits_of(kind, 5003, rng)
        assert sampler.choose(logits) == device_token(logits, params, 11, draw)
