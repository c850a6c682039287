"""One block of memory, handed out once, in the order of the plan. Nothing is allocated afterwards."""

import mmap

import numpy as np

from numba_atomflow.errors import BackendError
from numba_atomflow.memory.plan import MemoryPlan
from numba_atomflow.memory.view import View


class HostArena:
    """A single anonymous mapping that holds every buffer of a plan.

    The operating system gives pages when they are first touched, so a long KV cache costs only what is used of it.

    Raises:
        BackendError: the machine will not give that much address space.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        try:
            self._block = mmap.mmap(-1, max(plan.total, 1))
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
