"""The type of progress callbacks."""

from typing import Protocol


class Progress(Protocol):
    """Called as work advances: what is done, units finished, units in all (steps, tokens or bytes)."""

    def __call__(self, what: str, done: int, total: int, /) -> None: ...
