"""A request and its generation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["eos", "max_tokens"]


@dataclass
class Request:
    """A prompt and its generation so far. Times are seconds of the engine's clock.

    Attributes:
        id: unique; also of its sequence in the KV cache.
        prompt: token ids, at least one.
        max_tokens: the most generated tokens, at least one.
        end_tokens: ids that end the generation.
        arrival: time of arrival.
        output: generated token ids.
        shared_tokens: tokens found in the cache (prefix hits, and blocks shared by a fork), at each admission.
        preemptions: times that it was preempted.
        token_times: time at which each generated token was complete.
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
        """Tokens of prompt and output so far."""
        return len(self.prompt) + len(self.output)

    @property
    def most_tokens(self) -> int:
        """The most tokens of prompt and output."""
        return len(self.prompt) + self.max_tokens

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens start .. stop - 1 of prompt and output."""
        first = len(self.prompt)
        return [*self.prompt[start : min(stop, first)], *self.output[max(start - first, 0) : max(stop - first, 0)]]

    @property
    def ttft(self) -> float:
        """Time to first token: seconds from arrival, queueing included."""
        return self.token_times[0] - self.arrival

    @property
    def tpot(self) -> float | None:
        """Time per output token: mean seconds per token after the first; None if there is only one."""
        count = len(self.token_times) - 1
        return (self.token_times[-1] - self.token_times[0]) / count if count else None
