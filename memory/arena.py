"""The host arena: one allocation that holds all buffers of a memory plan."""

import mmap
import sys

import numpy as np

from numba_atomflow.errors import BackendError
from numba_atomflow.memory.plan import MemoryPlan
from numba_atomflow.memory.view import View


class HostArena:
    """An anonymous mapping with every buffer of a plan.

    The operating system commits pages at first access, so a long KV cache takes only the memory of its used positions.
    A forked process gets a copy, page by page as one of the two writes: each has its own KV cache.

    Raises:
        BackendError: the mapping fails.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        try:
            self._block = _map(max(plan.total, 1))
        except (OSError, OverflowError, ValueError) as error:
            raise BackendError(
                f"This machine refused {plan.total / 1e9:.1f} GB for KV cache and activations ({error}); "
                "use a smaller --max-seq-len."
            ) from error
        self._base = np.frombuffer(self._block, np.uint8).ctypes.data
        self._views = {
            buffer.name: View(buffer.name, self._base + offset, buffer.shape, buffer.dtype)
            for buffer, offset in zip(plan.buffers, plan.offsets, strict=True)
        }

    def __getitem__(self, name: str) -> View:
        return self._views[name]


def _map(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # Python's default is MAP_SHARED
