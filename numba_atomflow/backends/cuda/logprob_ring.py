"""Log-probabilities of sampled tokens, as the device leaves them in pinned host memory."""

from numba_atomflow.device.resources import Resources
from numba_atomflow.logprobs import TokenLogprobs, TopLogprob
from numba_atomflow.memory.device import PinnedArray
from numba_atomflow.memory.view import View
from numba_atomflow.ops.cuda.token.logprobs import LOGPROB_RING, RECORD_WORDS, read_record


class LogprobRing:
    """The ring that steps write records to, by the number of their token. `resources` owns it."""

    def __init__(self, resources: Resources) -> None:
        self._pinned = PinnedArray((LOGPROB_RING * RECORD_WORDS,), "int64", resources)

    @property
    def view(self) -> View:
        """The ring on the device."""
        return self._pinned.view

    def read(self, number: int, top: int) -> TokenLogprobs:
        """How likely the token with this number was, with the `top` most likely tokens.

        Its token must have been received, and at most `LOGPROB_RING` - 1 steps launched since its own.
        """
        start = (number - 1) % LOGPROB_RING * RECORD_WORDS
        record = read_record(self._pinned.array[start : start + RECORD_WORDS])
        total = record.log_sum_exp
        likely = tuple(TopLogprob(token, logit - total) for token, logit in record.top[:top])
        return TokenLogprobs(record.token, record.logit - total, record.rank, likely)
