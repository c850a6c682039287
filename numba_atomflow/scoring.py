"""How likely given continuations are: what must be computed, each token once, and what is read from its logits.

The token sequences of all pairs of a prompt and a continuation form a tree. In lexicographic order it is walked depth
first: each sequence continues a prefix of the one before, which the KV cache still holds. Logits are computed once as
well: by the first sequence that passes a token, for all pairs that need what follows it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from numba_atomflow.context import Context
from numba_atomflow.logprobs import log_sum_exp
from numba_atomflow.utils.progress import Progress


class TokenPair(NamedTuple):
    """Token ids of a prompt and of its continuation."""

    prompt: list[int]
    continuation: list[int]

    @property
    def fed(self) -> list[int]:
        """The tokens that go through the model: all but the last, which nothing follows."""
        return self.prompt + self.continuation[:-1]


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after its prompt.

    Attributes:
        token_ids: of the continuation.
        logprobs: of each of them, in nats: float64 log-softmax of the float32 logits.
        is_greedy: whether it is what greedy decoding gives: each token is the most likely one.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_greedy: bool

    @property
    def logprob(self) -> float:
        """Log-probability of the whole continuation, in nats."""
        return math.fsum(self.logprobs)


class Target(NamedTuple):
    """A token to score: number `place` in the continuation of pair `pair`."""

    pair: int
    place: int


class Branch(NamedTuple):
    """A token sequence to feed, and the tokens that are scored by its logits.

    Attributes:
        targets: by index into `tokens`: what may follow there.
    """

    tokens: list[int]
    targets: dict[int, list[Target]]


def checked_pair(context: Context, prompt: Sequence[int], continuation: Sequence[int]) -> TokenPair:
    """A pair as lists.

    Raises:
        ContextError: they do not fit into the KV cache; the last token need not.
        OptionError: one is empty, or a token is not one of this model.
    """
    pair = TokenPair(context.checked(prompt, used=0), context.checked(continuation, used=0, what="continuation"))
    context.checked(pair.fed, used=0, what="prompt with its continuation")
    return pair


def plan(pairs: Sequence[TokenPair]) -> list[Branch]:
    """The branches of the tree in the order in which they are fed.

    Each shares a prefix with the branch before, before the first of its targets.
    """
    branches: list[Branch] = []
    path: list[int] = []
    owners: list[Branch] = []  # of each token of `path`: the first branch that passes it
    for index in sorted(range(len(pairs)), key=lambda index: pairs[index].fed):
        pair = pairs[index]
        branch = Branch(pair.fed, defaultdict(list))
        shared = _common_length(path, branch.tokens)
        owners[shared:] = [branch] * (len(branch.tokens) - shared)
        for place in range(len(pair.continuation)):
            row = len(pair.prompt) - 1 + place
            owners[row].targets[row].append(Target(index, place))
        path = branch.tokens
        branches.append(branch)
    return [branch for branch in branches if branch.targets]


def _common_length(first: Iterable[int], second: Iterable[int]) -> int:
    shared = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        shared += 1
    return shared


def score_pairs(context: Context, pairs: Sequence[TokenPair], progress: Progress | None = None) -> list[Score]:
    """The score of each pair, in order.

    Raises:
        CheckpointError: the logits contain NaN or Inf.
    """
    logprobs = [[0.0] * len(pair.continuation) for pair in pairs]
    greedy = [True] * len(pairs)
    branches = plan(pairs)
    for done, branch in enumerate(branches):
        if progress:
            progress("scoring", done, len(branches))
        row = min(branch.targets)
        shared = context.rewind_to_common_prefix(branch.tokens[: row + 1])
        for rows in context.feed_by_chunks(branch.tokens[shared:], first=row - shared):
            for logits in rows:
                if row in branch.targets:
                    total, most_likely = log_sum_exp(logits), int(logits.argmax())
                    for pair, place in branch.targets[row]:
                        token = pairs[pair].continuation[place]
                        logprobs[pair][place] = float(logits[token]) - total
                        greedy[pair] &= token == most_likely
                row += 1
    return [
        Score(tuple(pair.continuation), tuple(values), is_greedy)
        for pair, values, is_greedy in zip(pairs, logprobs, greedy, strict=True)
    ]
