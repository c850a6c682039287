"""Arenas in which a kernel that leaves its buffer is found out: by canaries around it, or by the processor.

Both are used in the place of `HostArena`. What nobody has written is NaN (as integers: -1), which must not be read.
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

Side = Literal["above", "below"]  # where a buffer touches its guard pages


class CanaryArena:
    """Every buffer between two stretches of canaries."""

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self._blocks = {buffer.name: _between_canaries(buffer.nbytes) for buffer in plan.buffers}
        self._views = {
            buffer.name: _view(buffer, self._blocks[buffer.name].ctypes.data + GUARD) for buffer in plan.buffers
        }

    def __getitem__(self, name: str) -> View:
        return self._views[name]

    def check(self) -> None:
        """Every canary lives."""
        for buffer in self.plan.buffers:
            block = self._blocks[buffer.name]
            for side, canaries in (("before", block[:GUARD]), ("behind", block[GUARD + buffer.nbytes :])):
                dead = np.flatnonzero(canaries != CANARIES)
                assert not len(dead), f"{len(dead)} bytes {side} {buffer.name} {buffer.shape} were written"


def _between_canaries(nbytes: int) -> NDArray[np.uint8]:
    return np.concatenate([CANARIES, np.full(nbytes, UNWRITTEN, np.uint8), CANARIES])


class GuardedArena:
    """Every buffer against pages that may not be touched: a kernel that does gets SIGSEGV."""

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
    """A weight against such pages."""
    copy = _guarded(array.nbytes, side).view(array.dtype).reshape(array.shape)
    copy[...] = array
    copy.flags.writeable = False
    return copy


def _guarded(nbytes: int, side: Side) -> NDArray[np.uint8]:
    """So many bytes, unwritten, between pages without access."""
    inside = -(-nbytes // PAGE) * PAGE
    block = mmap.mmap(-1, inside + 2 * GUARD)
    everything = np.frombuffer(block, np.uint8)  # keeps the mapping
    start = GUARD + (inside - nbytes if side == "above" else 0)
    everything[start : start + nbytes] = UNWRITTEN
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (0, GUARD + inside):
        address = ctypes.c_void_p(everything.ctypes.data + guard)
        if libc.mprotect(address, ctypes.c_size_t(GUARD), 0):  # PROT_NONE
            raise OSError(ctypes.get_errno(), "mprotect")
    return everything[start : start + nbytes]


def _view(buffer: Buffer, address: int) -> View:
    return View(buffer.name, address, buffer.shape, buffer.dtype)
