"""What stands between a drafter and the steps of a generation."""

from collections.abc import Collection, Iterable, Sequence
from itertools import islice

from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.speculation.drafter import Drafter, StepResult
from numba_atomflow.utils.arguments import whole_number


class Speculator:
    """Asks a drafter before each step, and reports to it what became of its proposal.

    Args:
        drafter: None proposes nothing.
        width: most tokens of a step.
        vocabulary: tokens of the model.
        eos_ids: tokens that end the generation.
    """

    def __init__(self, drafter: Drafter | None, width: int, vocabulary: int, eos_ids: Collection[int]) -> None:
        self._drafter, self._width, self._vocabulary, self._eos_ids = drafter, width, vocabulary, eos_ids

    def propose(self, token_ids: Sequence[int], room: int) -> list[int]:
        """The tokens to check in the next step.

        EOS and what follows it are cut off: nothing is generated after EOS, so a step that checks it gains nothing.

        Args:
            token_ids: prompt and reply so far.
            room: tokens that the next step may generate.

        Raises:
            OptionError: the drafter proposed what is no token of this model.
        """
        limit = min(self._width, room) - 1
        if self._drafter is None or limit < 1:
            return []
        proposal = self._drafter.propose(token_ids, limit)
        if not isinstance(proposal, Iterable):
            raise OptionError(f"The drafter proposed {quote(proposal)}; it must return token ids, or [] for none.")
        tokens: list[int] = []
        for token in islice(proposal, limit):
            token = whole_number("a token of the drafter", token)
            if not 0 <= token < self._vocabulary:
                raise OptionError(
                    f"The drafter proposed token {quote(token)}; the vocabulary has {self._vocabulary} tokens."
                )
            if token in self._eos_ids:
                break
            tokens.append(token)
        return tokens

    def observe(self, proposed: int, accepted: int, seconds: float | None) -> None:
        """Report a step, as `StepResult` says."""
        if self._drafter is not None:
            self._drafter.observe(StepResult(proposed, accepted, seconds))
