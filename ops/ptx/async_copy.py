"""Asynchronous copies of 4 or 16 bytes from global to shared memory (`cp.async`), and `ldmatrix`, which reads what they
brought as fragments of tensor core instructions. Since sm_80.

Addresses in shared memory (`shared_address`) are in bytes; in the simulator they are offsets from its start. There, a
copy's bytes arrive when its thread waits for them, and are NaN from the copy's start until then: a kernel that reads
them early, or that copies over what is still being read, computes NaN.
Source: PTX ISA 9.0, sections 9.7.9.25 and 9.7.14.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.ptx import simulator
from numba_atomflow.ops.ptx.core import ADDRESS, ARRAY, instruction, u32

COPY_BYTES = 16
_NAN_BYTE = 0xFF  # of which NaN of every float type consists


@dataclass
class _Copy:
    """A copy that has been started."""

    target: NDArray[np.uint8]
    source: NDArray[Any]
    arrived: bool = False


class _Copies:
    """The copies of one simulated thread: groups that are committed, oldest first, and those since the last commit."""

    def __init__(self) -> None:
        self.groups: list[list[_Copy]] = []
        self.open: list[_Copy] = []

    def finish(self, pending: int) -> None:
        """Let all groups arrive but the newest `pending`."""
        done, self.groups = self.groups[: len(self.groups) - pending], self.groups[len(self.groups) - pending :]
        for group in done:
            _arrive(group)


def _arrive(copies: list[_Copy]) -> None:
    for copy in copies:
        if copy.arrived:
            continue
        copy.arrived = True
        data = np.ascontiguousarray(copy.source).view(np.uint8)
        copy.target[: data.size], copy.target[data.size :] = data, 0


def _copies() -> _Copies:
    """Those of the running thread."""
    found: _Copies = vars(threading.current_thread()).setdefault("atomflow_copies", _Copies())
    return found


def _bytes(array: Any, address: Any, nbytes: int) -> NDArray[np.uint8]:
    """Bytes of shared memory at an address, which must be a multiple of their number: 4 or 16."""
    start = int(address)
    if start % nbytes or not 0 <= start <= array.nbytes - nbytes:
        raise IndexError(f"{nbytes} bytes at {start} of {array.nbytes} bytes of shared memory")
    return np.asarray(array).view(np.uint8)[start : start + nbytes]


@instruction("cp.async.cg.shared.global [$0], [$1], 16, $2;", (), (ARRAY, u32, ADDRESS, u32), memory=True)
def copy_async_16(target, destination, source, start, nbytes):
    """Start a copy of 16 bytes from element `start` of global memory to address `destination` of shared memory.

    Only the first `nbytes` (0 to 16) are read; zeros take the place of the others. Both addresses: multiples of 16.
    `start` may be anywhere if no bytes are read.
    """
    _start(_bytes(target, destination, COPY_BYTES), source, int(start), int(nbytes) // source.itemsize)


@instruction("cp.async.ca.shared.global [$0], [$1], 4;", (), (ARRAY, u32, ADDRESS), memory=True)
def copy_async_4(target, destination, source, start):
    """Start a copy of 4 bytes from element `start` of global memory to address `destination` of shared memory."""
    _start(_bytes(target, destination, 4), source, int(start), 4 // source.itemsize)


def _start(place: NDArray[np.uint8], source: Any, start: int, count: int) -> None:
    """Start a copy of so many elements to bytes of shared memory, of which zeros fill the rest."""
    if start * source.itemsize % place.size or (count and not 0 <= start <= source.size - count):
        raise IndexError(f"{count} elements from {start} of {source.size} cannot be copied")
    place[:] = _NAN_BYTE
    _copies().open.append(_Copy(place, np.asarray(source[start : start + count])))


@instruction("cp.async.commit_group;", (), (), memory=True)
def commit_copies():
    """Make a group of this thread's copies since the last commit. It may be empty."""
    copies = _copies()
    copies.groups.append(copies.open)
    copies.open = []


@cache
def make_wait_copies(pending: int) -> Callable[[], None]:
    """Device function (): wait until all of this thread's groups of copies have arrived but the newest `pending`.

    Other threads see them after a barrier.
    """

    @instruction(f"cp.async.wait_group {pending};", (), (), memory=True)
    def wait_copies():
        copies = _copies()
        copies.finish(min(pending, len(copies.groups)))

    return wait_copies  # type: ignore[no-any-return]


@instruction("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", (), (ARRAY, u32), memory=True)
def barrier_arrive_on_copies(barriers, address):
    """Let this thread arrive at an mbarrier as soon as all its copies up to now have, without waiting for them.

    It is one of the arrivals that the mbarrier was initialised for. In groups or not, the copies are the same ones. In
    the simulator they arrive when a thread polls this barrier.
    """
    copies = _copies()
    copies.open = [copy for copy in copies.open if not copy.arrived]
    started = [copy for group in (*copies.groups, copies.open) for copy in group]

    def arrive():
        _arrive(started)
        simulator.advance_barrier(barriers, address, 1, 0)

    simulator.arrive_when_polled(address, arrive)


# --- ldmatrix --------------------------------------------------------------------------------------------------------


def _load_rows(target: Any) -> Callable[[list[Any]], NDArray[np.uint16]]:
    """What the lanes' addresses refer to: 16-bit elements [4 matrices, 8 rows, 8]."""

    def load(addresses: list[Any]) -> NDArray[np.uint16]:
        rows = [_bytes(target, address, COPY_BYTES) for address in addresses]
        return np.stack(rows).view(np.uint16).reshape(4, 8, 8)

    return load


def _word(low: Any, high: Any) -> int:
    return int(low) | int(high) << 16


@instruction("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", (u32,) * 4, (ARRAY, u32), memory=True)
def load_matrix(array, address):
    """Four matrices of 8 x 8 16-bit elements from shared memory; lane 8 i + r gives the address of row r of matrix i.

    Lane 4 g + t gets, of each, the pair (row g, columns 2t and 2t + 1): with rows as tokens, B of `mma`.
    """
    matrices = simulator.exchange(int(address), _load_rows(array))
    g, t = simulator.lane_index() >> 2, simulator.lane_index() & 3
    return tuple(_word(matrix[g, 2 * t], matrix[g, 2 * t + 1]) for matrix in matrices)


@instruction(
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];", (u32,) * 4, (ARRAY, u32), memory=True
)
def load_matrix_transposed(array, address):
    """The same, transposed: lane 4 g + t gets (rows 2t and 2t + 1, column g) of each matrix."""
    matrices = simulator.exchange(int(address), _load_rows(array))
    g, t = simulator.lane_index() >> 2, simulator.lane_index() & 3
    return tuple(_word(matrix[2 * t, g], matrix[2 * t + 1, g]) for matrix in matrices)
