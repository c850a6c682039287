"""The type of progress callbacks."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol


class Progress(Protocol):
    """Called as work advances: what is done, units finished, units in all (steps, tokens or bytes)."""

    def __call__(self, what: str, done: int, total: int, /) -> None: ...


OpenBar = Callable[[], AbstractContextManager[Progress | None]]
"""Opens a progress bar; None where there is none to be seen."""
