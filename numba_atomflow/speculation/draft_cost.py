"""What a draft model's own time costs, measured while text is generated."""

from collections import deque
from statistics import median

_RECENT = 15  # measurements that count
_FEEDING = 0.25  # expected seconds per token of a text that is taken in at once, of those per proposed token


class DraftCost:
    """Seconds that a draft model takes.

    Args:
        expected_ratio: its step over that of the model that checks, before anything is measured.
    """

    def __init__(self, expected_ratio: float) -> None:
        self._expected_ratio = expected_ratio
        self._proposing: deque[float] = deque(maxlen=_RECENT)  # seconds per proposed token
        self._feeding: deque[float] = deque(maxlen=_RECENT)  # seconds per token of the text

    def observe_proposal(self, tokens: int, seconds: float) -> None:
        """Record that `tokens` tokens were proposed, one after the other."""
        self._proposing.append(seconds / tokens)

    def observe_feeding(self, tokens: int, seconds: float) -> None:
        """Record that so many tokens of the text were taken in at once, and one proposed."""
        self._feeding.append(seconds / tokens)

    def per_token(self, step: float) -> float:
        """What a proposed token costs, in steps of `step` seconds of the model that checks."""
        return median(self._proposing) / step if self._proposing else self._expected_ratio

    def of_feeding(self, tokens: int, step: float) -> float:
        """What it costs to take in so many tokens of the text at once, in the same steps."""
        per_token = median(self._feeding) / step if self._feeding else _FEEDING * self.per_token(step)
        return tokens * per_token
