"""Replies in the making, as the caller of an engine sees them: iterators of text or of token ids."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Literal, Self, TypeVar

from numba_atomflow.utils.one_caller import OneCaller, held_by_another, other_reply

FinishReason = Literal["eos", "stop", "max_tokens", "context", "interrupted"]
Item = TypeVar("Item", int, str)


@dataclass
class GenerationStats:
    """What a reply cost. Times in seconds."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, still in the KV cache from before
    tokens: int = 0  # generated, the end-of-sequence token included
    ttft: float = 0.0  # from the call to the first token
    decode_seconds: float = 0.0  # from the first token to the last, with all that the host and the caller did between

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: tokens after the first, per second; 0 if there were none."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 else 0.0

    @property
    def tpot(self) -> float:
        """Mean time per output token after the first, in seconds; 0 if there were none."""
        return self.decode_seconds / (self.tokens - 1) if self.tokens > 1 else 0.0


@dataclass
class ReplyState:
    """What is known of a reply so far. What makes the reply writes here and does not refer to the reply itself: one
    that nobody holds any more is gone at once, and in nobody's way.
    """

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)


class Reply(Generic[Item]):
    """What replies of tokens and of text have in common.

    Args:
        make_items: makes the iterator that does the work and notes in the state what it did.
        calls: of the engine: each item is made in a call of its own.
    """

    def __init__(self, make_items: Callable[[ReplyState], Iterator[Item]], calls: OneCaller) -> None:
        self._state = ReplyState()
        self._items: Iterator[Item] = make_items(self._state)
        self._calls = calls
        self._thread = threading.current_thread()  # that asked for it, or for its last item

    @property
    def token_ids(self) -> list[int]:
        """All generated tokens so far."""
        return self._state.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it goes on."""
        return self._state.finish_reason

    @property
    def stats(self) -> GenerationStats:
        """Counts and times so far."""
        return self._state.stats

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        """The next item.

        Raises:
            EngineBusyError: another call of the engine is running.
            CheckpointError: the model file was changed by another program, or is damaged.
        """
        return self._calls.run(self._next)

    def _next(self) -> Item:
        self._thread = threading.current_thread()
        try:
            return next(self._items)
        except StopIteration:
            raise
        except BaseException:  # Ctrl-C, for one
            self.close()
            raise

    def close(self) -> None:
        """Stop here. What was generated stays in the KV cache, so that a chat can go on."""
        if self._state.finish_reason is None:
            self._state.finish_reason = "interrupted"
        self._items = iter(())

    def make_way(self) -> None:
        """End, because the KV cache is about to change: the reply would go on from somebody else's text.

        Raises:
            EngineBusyError: another thread is making the reply.
        """
        if self._state.finish_reason is None and held_by_another(self._thread):
            raise other_reply()
        self.close()

    def finish(self) -> Self:
        """Generate to the end without looking at the pieces."""
        for _ in self:
            pass
        return self


class TokenGeneration(Reply[int]):
    """A reply in the making: iterate over it to get its token ids one by one, an end-of-sequence token included.

    Attributes:
        token_ids, finish_reason, stats: as those of `Generation`; there is no "stop".
    """


class Generation(Reply[str]):
    """A reply in the making: iterate over it to get its text piece by piece.

    Attributes:
        text: all text so far. token_ids: all generated tokens so far. finish_reason: None while it goes on, then
        "eos", "stop" (a stop string), "max_tokens", "context" (it is full) or
            "interrupted" (closed early).
        stats: counts and times.
    """

    text = ""

    def __next__(self) -> str:
        piece = super().__next__()
        self.text += piece
        return piece
