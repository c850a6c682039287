"""What proposes tokens to check."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class StepResult(NamedTuple):
    """What became of a step.

    Attributes:
        proposed: tokens that were checked; 0 in a step of one token.
        accepted: of them, those that the model chose, too. The step has generated one token more.
        seconds: that the step took, without the drafter's own time. None if that is not known: on a GPU a step runs
            while the caller takes the tokens of the step before, and may end meanwhile.
    """

    proposed: int
    accepted: int
    seconds: float | None


class Drafter(Protocol):
    """Proposes the next tokens. It cannot change the text, only the number of steps that it takes."""

    def propose(self, token_ids: Sequence[int], limit: int) -> Sequence[int]:
        """Tokens that may follow; none if nothing is likely enough to be worth a longer step.

        Args:
            token_ids: prompt and reply so far. The list grows between calls and is not to be changed or kept.
            limit: at most as many are checked; the rest is dropped.
        """

    def observe(self, result: StepResult) -> None:
        """Called after every step, also after one without proposed tokens, but not after the reply's last."""
