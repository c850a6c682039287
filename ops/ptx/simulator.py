"""What the Python bodies of PTX instructions need in numba's CUDA simulator: warps, mbarriers, polling.

The simulator runs each thread of a CTA as a Python thread and has no warps: instructions that exchange data between
lanes synchronise the 32 threads of a warp in `exchange`. An mbarrier is a word of simulated shared memory, laid out by
`barrier_word`.
"""

import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LOCK = threading.Lock()  # of mbarriers, and of the warps and barriers of a CTA
FAILED = "atomflow_failed"  # attribute of a CTA of which a thread has failed


class Lanes:
    """An all-gather of the simulated threads of a warp or a warpgroup.

    Each lane waits at a gate of its own, which the last lane opens: with `threading.Barrier` all lanes would contend
    for one lock.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.values: list[Any] = [None] * count
        self.result: Any = None
        self.arrived, self.broken = 0, False
        self.lock, self.gates = threading.Lock(), [threading.Lock() for _ in range(count)]
        for gate in self.gates:
            gate.acquire()

    def exchange(self, lane: int, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """combine(values of all lanes), computed by the last lane to arrive."""
        with self.lock:
            self.values[lane] = value
            self.arrived = (self.arrived + 1) % self.count
            last = self.arrived == 0
        if last:
            values, self.values = self.values, [None] * self.count  # a lane may start the next exchange at once
            self.result = combine(values)
            for other, gate in enumerate(self.gates):
                if other != lane:
                    gate.release()
        elif not self.gates[lane].acquire(timeout=120):
            self.abort()
        if self.broken:
            raise threading.BrokenBarrierError
        return self.result

    def abort(self) -> None:
        """Release all lanes: one failed, or never arrived."""
        self.broken = True
        for gate in self.gates:
            with suppress(RuntimeError):  # it is open
                gate.release()


class NamedBarrier:
    """A barrier of a CTA at which some threads wait and others only arrive."""

    def __init__(self) -> None:
        self.arrived, self.generation, self.broken = 0, 0, False
        self.changed = threading.Condition()

    def arrive(self, threads: int, *, wait: bool) -> None:
        """The last of `threads` arrivals ends the generation."""
        with self.changed:
            generation = self.generation
            self.arrived += 1
            if self.arrived == threads:
                self.arrived = 0
                self.generation += 1
                self.changed.notify_all()
            elif wait and not self.changed.wait_for(lambda: self.generation != generation, timeout=120):
                raise threading.BrokenBarrierError
            if self.broken:
                raise threading.BrokenBarrierError

    def abort(self) -> None:
        """Release all threads: one failed."""
        with self.changed:
            self.broken = True
            self.generation += 1
            self.changed.notify_all()


def abort_cta(manager: Any) -> None:
    """Let all threads of a CTA fail, wherever they wait: one of them did."""
    setattr(manager, FAILED, True)
    for name in ("atomflow_warps", "atomflow_barriers"):
        for waiting in list(vars(manager).get(name, {}).values()):
            waiting.abort()


def named_barrier(number: int) -> NamedBarrier:
    """That of the running thread's CTA."""
    thread: Any = threading.current_thread()
    with LOCK:
        barriers = vars(thread._manager).setdefault("atomflow_barriers", {})  # noqa: SLF001  as in `exchange`
        barrier: NamedBarrier = barriers.setdefault(int(number), NamedBarrier())
    return barrier


def lane_index() -> int:
    """Index of the running thread in its warp."""
    return int(threading.current_thread().thread_id % 32)  # type: ignore[attr-defined]


def exchange(value: Any, combine: Callable[[list[Any]], Any] = list, *, lanes: int = 32) -> Any:
    """combine(values of all lanes), computed once per warp, or warpgroup of 128 lanes; every lane must call it."""
    thread: Any = threading.current_thread()
    key = lanes, thread.thread_id // lanes
    with LOCK:
        warps = vars(thread._manager).setdefault("atomflow_warps", {})  # noqa: SLF001  shared by the threads of a CTA
        if key not in warps:
            warps[key] = Lanes(lanes)
    return warps[key].exchange(thread.thread_id % lanes, value, combine)


def f16_pair(word: int) -> tuple[float, float]:
    """The two float16 of a 32-bit word, low half first."""
    low, high = struct.unpack("<ee", struct.pack("<I", int(word)))
    return low, high


def back_off(index: int, words: tuple[int, ...]) -> None:
    """Sleep, twice as long each time, while this thread polls an unchanged value: the writers need the interpreter."""
    polls = vars(threading.current_thread()).setdefault("atomflow_polls", {})
    before, nap = polls.get(index, (None, 0.0))
    nap = min(2 * nap, 0.2) if before == words else 0.002
    if before == words:
        time.sleep(nap)
    polls[index] = words, nap


def _late_arrivals() -> dict[int, list[Callable[[], None]]]:
    """Arrivals at mbarriers of the running thread's CTA that wait until the barrier is polled, by its index."""
    thread: Any = threading.current_thread()
    found: dict[int, list[Callable[[], None]]] = vars(thread._manager).setdefault("atomflow_late_arrivals", {})  # noqa: SLF001
    return found


def arrive_when_polled(address: Any, arrive: Callable[[], None]) -> None:
    """Let `arrive` run as late as it may: a kernel that does not wait for this mbarrier does not see its effects."""
    with LOCK:
        _late_arrivals().setdefault(int(address) // 8, []).append(arrive)


def phase_complete(barriers: Any, address: Any, parity: Any) -> bool:
    """Whether the phase of this parity is complete."""
    with LOCK:
        arrivals = _late_arrivals().pop(int(address) // 8, [])
    for arrive in arrivals:
        arrive()
    if FAILED in vars(threading.current_thread()._manager):  # type: ignore[attr-defined]  # noqa: SLF001
        raise threading.BrokenBarrierError
    with LOCK:
        return int(barriers[int(address) // 8]) & 1 != int(parity) & 1


def barrier_word(phase: int, pending: int, arrivals: int, nbytes: int) -> int:
    """An mbarrier: parity of the phase, pending arrivals, arrivals per phase, pending bytes (biased)."""
    return phase & 1 | pending << 1 | arrivals << 16 | (nbytes + (1 << 30)) << 32


def advance_barrier(barriers: Any, address: Any, arrived: int, nbytes: int) -> None:
    """Count arrivals and expected bytes; the phase flips once none are pending."""
    index = int(address) // 8
    with LOCK:
        word = int(barriers[index])
        phase, pending, arrivals = word & 1, (word >> 1 & 0x7FFF) - arrived, word >> 16 & 0xFFFF
        expected = (word >> 32) - (1 << 30) + nbytes
        if pending == 0 and expected == 0:
            phase, pending = phase ^ 1, arrivals
        barriers[index] = barrier_word(phase, pending, arrivals, expected)


def bulk_stores() -> list[Callable[[], None] | None]:
    """Bulk stores of this thread that it has not waited for; None where a group ends."""
    stores: list[Callable[[], None] | None] = vars(threading.current_thread()).setdefault("atomflow_bulk_stores", [])
    return stores


def finish_bulk_stores() -> None:
    """Copy what was committed, as late as the hardware may."""
    stores = bulk_stores()
    while None in stores:
        copy = stores.pop(0)
        if copy is not None:
            copy()
