"""What a step of several tokens costs, in steps of one token: measured while text is generated."""

from collections import deque
from statistics import median

_EXPECTED_SLOPE = 0.2  # before anything is measured; that of SmolLM2 on two cores
_SLOPES = (0.05, 0.9)  # what a measurement may say; beyond that it was disturbed, or nothing is to be gained
_RECENT = 15  # steps that count; enough for a median that other programs do not disturb
_ENOUGH = 3  # steps, for a median that is better than the expectation


class StepCost:
    """The cost of a step of n tokens, as a line: 1 + slope * (n - 1).

    A line has one number to learn, to which steps of all widths contribute. Costs depend on the machine and little on
    the text, so an engine keeps them from one generation to the next.
    """

    def __init__(self) -> None:
        self._single: deque[float] = deque(maxlen=_RECENT)  # seconds of steps of one token
        self._several: deque[tuple[int, float]] = deque(maxlen=_RECENT)  # tokens and seconds

    def observe(self, tokens: int, seconds: float) -> None:
        """Record a step of `tokens` tokens."""
        if tokens == 1:
            self._single.append(seconds)
        else:
            self._several.append((tokens, seconds))

    @property
    def single_seconds(self) -> float | None:
        """Seconds of a step of one token; None before enough of them are measured."""
        return median(self._single) if len(self._single) >= _ENOUGH else None

    @property
    def slope(self) -> float:
        """What each token after the first adds to the cost of a step."""
        single = self.single_seconds
        if single is None or len(self._several) < _ENOUGH:
            return _EXPECTED_SLOPE
        slope = median((seconds / single - 1) / (tokens - 1) for tokens, seconds in self._several)
        return min(max(slope, _SLOPES[0]), _SLOPES[1])

    def of(self, tokens: int) -> float:
        """The cost of a step of `tokens` tokens."""
        return 1 + self.slope * (tokens - 1)
