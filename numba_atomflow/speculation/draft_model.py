"""A draft model: a smaller model of the same tokens proposes what it would generate.

Source: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding" (2023). Here the draft
model is greedy, so that its proposals depend on the text alone, and how many tokens it proposes follows from how many
were accepted of late, from what a longer step costs, and from the draft model's own time.
"""

import time
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple, Protocol

from numba_atomflow.speculation.draft_cost import DraftCost
from numba_atomflow.speculation.draft_length import Balance, best_length
from numba_atomflow.speculation.drafter import StepResult
from numba_atomflow.speculation.recent_rate import RecentRate
from numba_atomflow.speculation.step_cost import StepCost

FEW = 8  # tokens of the text that the draft model takes in with its first step; more are a prompt
_PROPOSING = 64  # steps with proposed tokens before one without, to measure that again


class GreedyTokens(NamedTuple):
    """The most likely tokens after a text.

    Attributes:
        tokens: one after the other.
        fed: tokens of the text that the KV cache did not hold.
        first_seconds: from the call to the first token.
    """

    tokens: list[int]
    fed: int
    first_seconds: float


class GreedyModel(Protocol):
    """What a draft model can do."""

    max_seq_len: int

    def continue_greedily(self, token_ids: Sequence[int], count: int) -> GreedyTokens:
        """The `count` most likely tokens after a text; none if it cannot read the text."""


class DraftModel:
    """What all generations with a draft model share: the model, and what is known of its cost and its proposals.

    Args:
        model: the draft model.
        vocabulary: tokens of the model that checks.
        steps: what that model's steps cost.
        expected_ratio: a step of the draft model over one of the other, in time, before anything is measured.
    """

    def __init__(self, model: GreedyModel, vocabulary: int, steps: StepCost, expected_ratio: float) -> None:
        self.model, self.vocabulary, self.steps = model, vocabulary, steps
        self.cost, self.acceptance = DraftCost(expected_ratio), RecentRate()
        self.steps_since_single = 0


class ModelDrafter:
    """A drafter for one generation."""

    def __init__(self, draft: DraftModel) -> None:
        self._draft, self._balance = draft, Balance()
        self._fed: int | None = None  # tokens of the text that the draft model has taken in, the prompt as if it had
        self._cost = 0.0  # of the current proposal, in steps of one token

    def propose(self, token_ids: Sequence[int], limit: int) -> list[int]:
        """What the draft model generates after the text, as far as it pays.

        The draft model takes the prompt in before its first proposal; the balance does not count that.
        """
        draft, length = self._draft, len(token_ids)
        self._cost = 0.0
        step = draft.steps.single_seconds
        self._fed = length if self._fed is None else self._fed
        if step is None or draft.steps_since_single >= _PROPOSING:
            return []
        behind = length - self._fed
        feeding = draft.cost.of_feeding(behind, step) if behind > FEW else 0.0
        slope = draft.steps.slope + draft.cost.per_token(step)
        most = min(limit, draft.model.max_seq_len + 1 - length, self._balance.affordable(slope, feeding))
        count = best_length(draft.acceptance.rate, slope, most)
        if count < 1:
            return []
        tokens = self._generate(token_ids, count)
        self._fed = length
        self._cost = feeding + len(tokens) * draft.cost.per_token(step)
        return list(takewhile(lambda token: token < draft.vocabulary, tokens))

    def _generate(self, token_ids: Sequence[int], count: int) -> list[int]:
        """The draft model's tokens; their time is recorded."""
        cost, started = self._draft.cost, time.perf_counter()
        tokens, fed, first_seconds = self._draft.model.continue_greedily(token_ids, count)
        seconds = time.perf_counter() - started
        if tokens and fed <= FEW:
            cost.observe_proposal(len(tokens), seconds)
        elif tokens:
            cost.observe_feeding(fed, first_seconds)
        return tokens

    def observe(self, result: StepResult) -> None:
        """Count what was accepted, and what it cost."""
        draft, width = self._draft, 1 + result.proposed
        if result.seconds is not None:
            draft.steps.observe(width, result.seconds)
        draft.steps_since_single = draft.steps_since_single + 1 if result.proposed else 0
        self._balance.add(1 + result.accepted, self._cost + draft.steps.of(width))
        draft.acceptance.count(result.proposed, result.accepted)
