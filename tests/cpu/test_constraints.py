"""Constraints in the sampler and the engine: any object that says which tokens may come next."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from numba_atomflow.errors import CheckpointError, OptionError
from numba_atomflow.sampling import Sampler, SamplingParams, tokens_of

VOCABULARY = 70  # not a multiple of 32


def mask_of(tokens: Sequence[int], vocabulary: int = VOCABULARY) -> NDArray[np.uint32]:
    bits = np.zeros(-(-vocabulary // 32) * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


class Listed:
    """Allows the same tokens at every place, and keeps what came."""

    def __init__(self, tokens: Sequence[int] | None) -> None:
        self.tokens = tokens
        self.accepted: list[int] = []

    def start(self, tokens: Any) -> "Listed":
        return self

    def allowed(self) -> NDArray[np.uint32] | None:
        return None if self.tokens is None else mask_of(self.tokens)

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    def is_complete(self) -> bool:
        return True


def logits_of(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(VOCABULARY).astype(np.float32)


def test_bits_of_a_mask_are_tokens() -> None:
    assert tokens_of(mask_of([0, 31, 32, 69]), VOCABULARY).tolist() == [0, 31, 32, 69]
    everything = np.full(3, 0xFFFFFFFF, np.uint32)
    assert tokens_of(everything, VOCABULARY).tolist() == list(range(VOCABULARY))  # not the padding bits
    with pytest.raises(OptionError, match=r"shape \(2,\)"):
        tokens_of(mask_of([1])[:2], VOCABULARY)


def test_greedy_takes_the_most_likely_allowed_token() -> None:
    logits, allowed = logits_of(0), [3, 40, 69]
    constraint = Listed(allowed)
    sampler = Sampler(SamplingParams(repetition_penalty=1.1), VOCABULARY, (), constraint)
    token = sampler.choose(logits)
    assert token == max(allowed, key=lambda i: logits[i])
    assert constraint.accepted == [token]
    assert sampler.seen[token]
    assert sampler.constraint_seconds > 0


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1}, {"repetition_penalty": 1.5}])
def test_draws_are_those_of_a_model_without_the_other_tokens(filters: dict[str, Any]) -> None:
    allowed = [0, 5, 33, 34, 50, 68, 69]
    params = SamplingParams(temperature=1.5, seed=3, **filters)
    constrained = Sampler(params, VOCABULARY, [5, 50], Listed(allowed))
    plain = Sampler(params, len(allowed), [allowed.index(5), allowed.index(50)])
    for step in range(200):
        logits = logits_of(step)
        assert constrained.choose(logits) == allowed[plain.choose(logits[allowed])]


def test_no_mask_allows_everything() -> None:
    free = Sampler(SamplingParams(temperature=1.0, seed=1), VOCABULARY, ())
    unmasked = Sampler(SamplingParams(temperature=1.0, seed=1), VOCABULARY, (), Listed(None))
    assert [free.choose(logits_of(i)) for i in range(20)] == [unmasked.choose(logits_of(i)) for i in range(20)]


def test_damaged_logits_are_found_behind_a_mask() -> None:
    for wrong in (np.nan, np.inf):
        logits = logits_of(0)
        logits[7] = wrong
        with pytest.raises(CheckpointError, match="NaN or Inf"):
            Sampler(SamplingParams(), VOCABULARY, (), Listed([3])).choose(logits)


def test_a_mask_of_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="allows no token"):
        Sampler(SamplingParams(), VOCABULARY, (), Listed([])).choose(logits_of(0))


@pytest.mark.parametrize("value", [3, "{}", Listed, {"type": "object"}])
def test_a_constraint_is_an_object_that_starts(value: Any) -> None:
    with pytest.raises(OptionError, match=r"constraint is .* must be an object with a method `start`"):
        SamplingParams(constraint=value)


def test_a_constraint_needs_an_end() -> None:
    with pytest.raises(OptionError, match="ignore_eos"):
        SamplingParams(constraint=Listed([1]), ignore_eos=True)
