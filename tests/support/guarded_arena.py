"""Arenas that detect out-of-bounds access of kernels: by canaries, or by guard pages.

Both replace `HostArena`. Memory is initialized with NaN (as integers: -1), to detect reads of unwritten memory.
"""

import ctypes
import mmap
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.memory.plan import Buffer, MemoryPlan
from numba_atomflow.memory.view import View

PAGE = mmap.PAGESIZE
GUARD = 16 * PAGE  # bytes on either side of a buffer
UNWRITTEN = 0xFF
CANARIES = np.full(GUARD // 4, 0x7FC00001, np.uint32).view(np.uint8)  # another NaN

Side = Literal["above", "below"]  # the side on which a buffer is adjacent to a guard page


class CanaryArena:
    """Every buffer between two regions of canaries."""

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self._blocks = {buffer.name: _between_canaries(buffer.nbytes) for buffer in plan.buffers}
        self._views = {
            buffer.name: _view(buffer, self._blocks[buffer.name].ctypes.data + GUARD) for buffer in plan.buffers
        }

    def __getitem__(self, name: str) -> View:
        return self._views[name]

    def check(self) -> None:
        """Check that no canary was overwritten."""
        for buffer in self.plan.buffers:
            block = self._blocks[buffer.name]
            for side, canaries in (("before", block[:GUARD]), ("after", block[GUARD + buffer.nbytes :])):
                changed = np.flatnonzero(canaries != CANARIES)
                assert not len(changed), f"{len(changed)} bytes {side} {buffer.name} {buffer.shape} were written"


def _between_canaries(nbytes: int) -> NDArray[np.uint8]:
    return np.concatenate([CANARIES, np.full(nbytes, UNWRITTEN, np.uint8), CANARIES])


class GuardedArena:
    """Every buffer adjacent to a page without access: an access to it raises SIGSEGV."""

    def __init__(self, plan: MemoryPlan, side: Side) -> None:
        self.plan = plan
        self._blocks = [_guarded(buffer.nbytes, side) for buffer in plan.buffers]
        self._views = {
            buffer.name: _view(buffer, block.ctypes.data)
            for buffer, block in zip(plan.buffers, self._blocks, strict=True)
        }

    def __getitem__(self, name: str) -> View:
        return self._views[name]


def guarded_copy(array: NDArray[Any], side: Side) -> NDArray[Any]:
    """A read-only copy of a weight, adjacent to such a page."""
    copy = _guarded(array.nbytes, side).view(array.dtype).reshape(array.shape)
    copy[...] = array
    copy.flags.writeable = False
    return copy


def _guarded(nbytes: int, side: Side) -> NDArray[np.uint8]:
    """Initialized bytes between pages without access."""
    inside = -(-nbytes // PAGE) * PAGE
    block = mmap.mmap(-1, inside + 2 * GUARD)
    mapping = np.frombuffer(block, np.uint8)  # keeps the mapping
    start = GUARD + (inside - nbytes if side == "above" else 0)
    mapping[start : start + nbytes] = UNWRITTEN
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (0, GUARD + inside):
        address = ctypes.c_void_p(mapping.ctypes.data + guard)
        if libc.mprotect(address, ctypes.c_size_t(GUARD), 0):  # PROT_NONE
            raise OSError(ctypes.get_errno(), "mprotect")
    return mapping[start : start + nbytes]


def _view(buffer: Buffer, address: int) -> View:
    return View(buffer.name, address, buffer.shape, buffer.dtype)
