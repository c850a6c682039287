"""What a step that verifies has posted to pinned memory, of one GPU or of several that share a model."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.cuda.queue import POLLS, posted_token
from numba_atomflow.backends.cuda.wide_sampling import WideSampling
from numba_atomflow.errors import BackendError, CheckpointError
from numba_atomflow.sampling import accepted_tokens


class PostedChoices:
    """Polls for the tokens of a step, and takes those that are accepted.

    Args:
        choices: pinned, uint64 [columns]: the most likely token after each column, 0 before it is posted.
        sampling: what samples from each row of logits.
        finished: whether all work of the stream is done; called now and then while the host polls.
        failed: called where a token's logits were not finite; raises if a watchdog tripped.
    """

    def __init__(
        self,
        choices: NDArray[np.uint64],
        sampling: WideSampling,
        finished: Callable[[], bool],
        failed: Callable[[], None],
    ) -> None:
        self._choices, self._sampling, self._finished, self._failed = choices, sampling, finished, failed

    def accepted(self, tokens: Sequence[int], *, sampled: bool) -> list[int]:
        """Those of the step's tokens after the first that were chosen, and the token that was chosen after them.

        Raises:
            CheckpointError: logits contain NaN or Inf.
            BackendError: a watchdog tripped, or the step has ended without its tokens.
        """
        if sampled:
            return accepted_tokens(tokens, self._sampled)
        choices = self._choices[: len(tokens)]
        self._poll(choices.all)
        return accepted_tokens(tokens, lambda row: self._token(choices[row]))

    def _sampled(self, row: int) -> int:
        """The token that was sampled after number `row`."""
        self._poll(lambda: self._sampling.posted(row) is not None)
        self._token(self._choices[row])  # what the kernel itself posts shows that a watchdog tripped
        return self._token(self._sampling.posted(row) or 0)

    def _poll(self, posted: Callable[[], object]) -> None:
        polls = 0
        while not posted():
            polls += 1
            if polls % POLLS == 0:
                if self._finished() and not posted():
                    raise BackendError("the GPU has finished a step without its tokens")
                time.sleep(0)  # let other threads run

    def _token(self, entry: Any) -> int:
        """The token that was posted."""
        try:
            return posted_token(int(entry))
        except CheckpointError:
            self._failed()
            raise
