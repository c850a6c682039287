"""How many tokens to propose: as many as pay, and none while earlier ones have not paid."""

_ALLOWED_LOSS = 0.01  # steps that may be lost per generated token
_FIRST_LOSS = 1.0  # steps that may be lost before anything is gained
_LARGEST_BALANCE = 4.0  # steps; so that a change of the text is noticed after a few rejections


def expected_tokens(rate: float, proposed: int) -> float:
    """Expected number of tokens that a step generates: 1 + rate + ... + rate^proposed."""
    return sum(rate**i for i in range(proposed + 1))


def best_length(rate: float, slope: float, limit: int) -> int:
    """The number of proposed tokens, up to `limit`, with the most expected tokens per cost; 0 if none is above 1.

    Args:
        rate: the probability that a token is accepted, if the one before it was.
        slope: what each proposed token adds to the cost of a step, the drafter's own time included.
        limit: most tokens.
    """
    return max(range(max(limit, 0) + 1), key=lambda length: expected_tokens(rate, length) / (1 + slope * length))


class Balance:
    """What speculation has gained so far, in steps of one token: it may not fall below zero.

    Every generated token adds a small allowance. So a text in which nothing is accepted loses at most
    `_FIRST_LOSS` steps and 1 % of the time: speculation turns itself off, and tries again as the allowance grows.
    """

    def __init__(self) -> None:
        self._steps = _FIRST_LOSS

    def add(self, tokens: int, cost: float) -> None:
        """Record a step of this cost that generated `tokens` tokens."""
        self._steps = min(self._steps + tokens * (1 + _ALLOWED_LOSS) - cost, _LARGEST_BALANCE)

    def affordable(self, slope: float, fixed: float = 0.0) -> int:
        """The most proposed tokens whose rejection would not make the balance negative.

        Args:
            slope: what each of them costs, in steps.
            fixed: what proposing any costs besides.
        """
        return max(0, int((self._steps - fixed) / slope))
