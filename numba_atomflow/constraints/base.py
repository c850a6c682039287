"""What a constraint is: it says which tokens may come next, and is told which one came.

`SamplingParams(constraint=...)` takes any object with the methods of `Constraint`.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.text.token_table import TokenTable


class ConstraintState(Protocol):
    """A constraint on one reply, as far as the reply has come."""

    def allowed(self) -> NDArray[np.uint32] | None:
        """Tokens that may come next: uint32 [ceil(V / 32)], bit i % 32 of word i // 32 for token i; None: all.

        An EOS token among them means that the reply may end here.
        """

    def accept(self, token: int) -> None:
        """The reply goes on with this token, which was allowed."""

    def is_complete(self) -> bool:
        """Whether the reply satisfies the constraint as it is."""


class Constraint(Protocol):
    """What replies must satisfy: the same object for any number of generations and models."""

    def start(self, tokens: TokenTable) -> ConstraintState:
        """The state at the beginning of a reply.

        Raises:
            OptionError: the constraint is malformed, or cannot be used with this model.
        """
