"""How often a draft model's tokens are accepted, by those of the recent text."""

_EXPECTED = 0.7  # accepted tokens per token checked, before anything is known
_WEIGHT = 4.0  # tokens that the expectation counts as
_PER_TOKEN = 0.97  # what a token checked counts after one more: some 33 of them make the rate
_PER_STEP = 0.99  # the same after a step without proposed tokens, in favour of the expectation


class RecentRate:
    """Accepted tokens per token checked. Earlier tokens count less, and while nothing is proposed the rate returns to
    the expectation, so that a text that has changed is tried again.
    """

    def __init__(self) -> None:
        self._accepted, self._checked = _EXPECTED * _WEIGHT, _WEIGHT

    @property
    def rate(self) -> float:
        """The probability that a proposed token is accepted, if the one before it was."""
        return self._accepted / self._checked

    def count(self, proposed: int, accepted: int) -> None:
        """Record that of `proposed` tokens the first `accepted` ones were accepted, or that nothing was proposed."""
        checked = accepted + (accepted < proposed)
        if checked:
            kept = _PER_TOKEN**checked
            self._accepted = self._accepted * kept + accepted
            self._checked = self._checked * kept + checked
        else:
            self._accepted += (1 - _PER_STEP) * (_EXPECTED * _WEIGHT - self._accepted)
            self._checked += (1 - _PER_STEP) * (_WEIGHT - self._checked)
