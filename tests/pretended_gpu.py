"""A GPU that can be opened and asked what it has, and nothing more."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class PretendedGpu:
    """What a device tells of itself; by default, an H200. `open` stands in for `open_device`."""

    name = "Pretended GPU"
    driver_version = (13, 0)
    multiprocessors = 132
    shared_bytes = 232448
    memory_bytes = 1 << 37

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.capability = capability
        self.users = 0

    def open(self) -> "PretendedGpu":
        self.users += 1
        return self

    def close(self) -> None:
        self.users -= 1

    def free_bytes(self) -> int:
        return 1 << 36

    def current(self) -> AbstractContextManager[None]:
        return nullcontext()

    def quietly(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Taking back is left out: nothing was made."""
