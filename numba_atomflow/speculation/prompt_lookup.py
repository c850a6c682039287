"""Prompt lookup: what followed the last tokens earlier in the prompt or the reply is proposed again.

Source: Saxena, "Prompt Lookup Decoding" (2023). Here the longest n-gram that occurred before is taken, how many tokens
are proposed follows from how often those of this n-gram and of its length were accepted, and the cost of a longer step
is measured.
"""

from collections.abc import Sequence

from numba_atomflow.speculation.acceptance_rates import AcceptanceRates
from numba_atomflow.speculation.draft_length import Balance, best_length
from numba_atomflow.speculation.drafter import StepResult
from numba_atomflow.speculation.ngram_index import Match, NgramIndex
from numba_atomflow.speculation.step_cost import StepCost


class PromptLookup:
    """A drafter for one generation.

    Args:
        cost: of steps, kept between generations.
    """

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._index = NgramIndex()
        self._rates = AcceptanceRates()
        self._balance = Balance()
        self._match: Match | None = None  # that has proposed the tokens of the current step

    def propose(self, token_ids: Sequence[int], limit: int) -> list[int]:
        """What followed the longest n-gram at the end of the text, as far as it pays."""
        self._index.update(token_ids)
        self._match = match = self._index.longest_match()
        if match is None:
            return []
        slope = self._cost.slope
        length = best_length(self._rates.rate(match), slope, min(limit, self._balance.affordable(slope)))
        return self._index.continuation(match.position, length)

    def observe(self, result: StepResult) -> None:
        """Count what was accepted, and what it cost."""
        if result.seconds is not None:
            self._cost.observe(1 + result.proposed, result.seconds)
        self._balance.add(1 + result.accepted, self._cost.of(1 + result.proposed))
        if self._match is not None and result.proposed:
            self._rates.count(self._match, result.proposed, result.accepted)
