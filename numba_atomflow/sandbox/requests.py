"""A request, and what becomes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["eos", "max_tokens"]


@dataclass
class Request:
    """One prompt, and its reply in the making. Times are seconds of the server's clock.

    Attributes:
        id: of its sequence in the cache; no two requests have the same.
        prompt: token ids, at least one.
        max_tokens: of the reply, at least one.
        end_tokens: ids that end the reply.
        arrival: when it came.
        output: the reply so far.
        shared_tokens: tokens that were found in the cache, counted each time that it was admitted.
        preemptions: how often its blocks were taken for others.
        token_times: when each token of the reply was there.
    """

    id: int
    prompt: Sequence[int]
    max_tokens: int
    end_tokens: frozenset[int] = frozenset()
    arrival: float = 0.0
    output: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    shared_tokens: int = 0
    preemptions: int = 0
    token_times: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and reply so far."""
        return len(self.prompt) + len(self.output)

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and reply at most."""
        return len(self.prompt) + self.max_tokens

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens start .. stop - 1 of prompt and reply."""
        first = len(self.prompt)
        return [*self.prompt[start : min(stop, first)], *self.output[max(start - first, 0) : max(stop - first, 0)]]

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token, waiting included."""
        return self.token_times[0] - self.arrival

    @property
    def tpot(self) -> float | None:
        """Mean seconds per token after the first; None if there is only one."""
        count = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) / count if count else None
