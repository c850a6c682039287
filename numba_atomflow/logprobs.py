"""Log-probabilities of tokens under the model's own distribution.

That is the softmax of the logits as they are: before the repetition penalty, the temperature and the filters of
`numba_atomflow.sampling`. Sums are in float64, where their rounding is far below that of the float32 logits.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import non_finite_logits


class TopLogprob(NamedTuple):
    """One of the most likely tokens at a position, and its log-probability in nats."""

    token: int
    logprob: float


class TokenLogprobs(NamedTuple):
    """How likely a token was where it stands.

    Attributes:
        logprob: log-probability of `token`, in nats.
        rank: its place among all tokens, from 1, the most likely one; of equal ones the lower id comes first.
        top: the most likely tokens, as many as were requested, in order of rank; with or without `token`.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[TopLogprob, ...]


def token_logprobs(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprobs:
    """How likely `token` is by logits float32 [V], with the `top` most likely tokens.

    Raises:
        CheckpointError: the logits hold a NaN, or no finite value is the largest.
    """
    total = log_sum_exp(logits)
    return TokenLogprobs(
        token,
        float(logits[token]) - total,
        rank_of(logits, token),
        tuple(TopLogprob(likely, float(logits[likely]) - total) for likely in most_likely(logits, top)),
    )


def log_sum_exp(logits: NDArray[np.float32]) -> float:
    """log(sum(exp(logits))) of float32 [V]: what is subtracted from a logit to make it a log-probability.

    Raises:
        CheckpointError: the logits hold a NaN, or no finite value is the largest.
    """
    largest = float(logits.max())  # a NaN, if there is one
    if not np.isfinite(largest):
        raise non_finite_logits()
    weights = logits.astype(np.float64)
    weights -= largest
    return largest + float(np.log(np.exp(weights, out=weights).sum()))


def rank_of(logits: NDArray[np.float32], token: int) -> int:
    """The place of `token` among all, from 1; of equal logits the lower id comes first, as in an arg-max."""
    above = np.count_nonzero(logits > logits[token])
    equal_before = np.count_nonzero(logits[:token] == logits[token])
    return 1 + int(above) + int(equal_before)


def most_likely(logits: NDArray[np.float32], count: int) -> list[int]:
    """The `count` tokens of the largest logits, in order of rank; all of them if there are fewer."""
    count = min(count, len(logits))
    if count == 0:
        return []
    threshold = np.partition(logits, -count)[-count]
    tokens = np.flatnonzero(logits >= threshold)
    order = np.argsort(-logits[tokens], kind="stable")[:count]
    return [int(token) for token in tokens[order]]
