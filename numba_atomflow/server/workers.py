"""Threads beside the event loop, in which prompts are rendered and tokenized.

They are few: each of many would delay the event loop. Large requests have a thread of their own, so that small ones
never wait behind them.
"""

from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

Result = TypeVar("Result")

LARGE_BYTES = 64 << 10  # of a request's body, from which on it is a large one
_SMALL_THREADS, _LARGE_THREADS = 2, 1


class Workers:
    """Of one event loop, in which the first call is made."""

    def __init__(self) -> None:
        self._small: anyio.CapacityLimiter | None = None
        self._large: anyio.CapacityLimiter | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait for a thread."""
        return sum(limiter.statistics().tasks_waiting for limiter in (self._small, self._large) if limiter)

    async def run(self, action: Callable[[], Result], body_bytes: int) -> Result:
        """The result of `action`, run in a thread; requests of a kind take turns in the order of their arrival.

        Args:
            body_bytes: of the request that it works on.
        """
        if self._small is None or self._large is None:  # a limiter belongs to the loop that runs when it is made
            self._small = anyio.CapacityLimiter(_SMALL_THREADS)
            self._large = anyio.CapacityLimiter(_LARGE_THREADS)
        limiter = self._small if body_bytes < LARGE_BYTES else self._large
        return await anyio.to_thread.run_sync(action, limiter=limiter)
