"""How often proposed tokens are accepted, by the n-gram that proposed them."""

from numba_atomflow.speculation.ngram_index import LENGTHS, Match

# Accepted tokens per token checked, before anything is known: longer n-grams occur by chance less often.
_EXPECTED = {12: 0.9, 8: 0.8, 6: 0.7, 4: 0.55, 3: 0.4, 2: 0.2}
_LENGTH_WEIGHT = 4.0  # tokens that the expectation counts as, in the rate of all n-grams of a length
_KEY_WEIGHT = 2.0  # tokens that the rate of the length counts as, in the rate of one n-gram


class AcceptanceRates:
    """Counts of accepted and rejected tokens: of each n-gram, and of all n-grams of a length."""

    def __init__(self) -> None:
        self._by_length = {length: _Counts(_EXPECTED[length] * _LENGTH_WEIGHT, _LENGTH_WEIGHT) for length in LENGTHS}
        self._by_key: dict[int, _Counts] = {}

    def rate(self, match: Match) -> float:
        """The probability that a token which continues this match is accepted, if the one before it was."""
        rate = self._by_length[match.length].rate
        counts = self._by_key.get(match.key)
        if counts is None:
            return rate
        return (counts.accepted + rate * _KEY_WEIGHT) / (counts.checked + _KEY_WEIGHT)

    def count(self, match: Match, proposed: int, accepted: int) -> None:
        """Record that of `proposed` tokens the first `accepted` ones were accepted.

        The token after them, if there is one, was rejected; those after that one say nothing.
        """
        checked = accepted + (accepted < proposed)
        self._by_length[match.length].add(accepted, checked)
        self._by_key.setdefault(match.key, _Counts(0.0, 0.0)).add(accepted, checked)


class _Counts:
    """Tokens checked, and accepted."""

    def __init__(self, accepted: float, checked: float) -> None:
        self.accepted, self.checked = accepted, checked

    @property
    def rate(self) -> float:
        return self.accepted / self.checked

    def add(self, accepted: int, checked: int) -> None:
        self.accepted += accepted
        self.checked += checked
