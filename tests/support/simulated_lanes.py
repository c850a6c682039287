"""CUDA threads of numba's simulator as greenlets: they take turns where they wait, and nowhere else.

numba runs each as a thread of the operating system. Switching between those takes most of a test's time where lanes
exchange data, and CTAs that wait for each other poll. Here a turn ends where a lane waits or sleeps; waiting lanes
run again in the order in which they were released, sleeping ones when no other can run. So a test has one order of
events, on every machine.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import BrokenBarrierError, current_thread
from types import SimpleNamespace
from typing import Any

from greenlet import getcurrent, greenlet

_ready: deque[greenlet] = deque()
_asleep: deque[greenlet] = deque()


class Lane(greenlet):
    """One CUDA thread. `thread` is numba's object for it, whose `run` is called and which is never started."""

    def __init__(self, thread: Any) -> None:
        super().__init__(thread.run)
        self.thread = thread


def run(threads: Sequence[Any]) -> None:
    """Run threads until all have ended. Those that wait for what never happens get a BrokenBarrierError."""
    lanes = [Lane(thread) for thread in threads]
    _ready.extend(lanes)
    try:
        while not all(lane.dead for lane in lanes):
            _run_ready()
            for lane in lanes:
                if not lane.dead:
                    lane.throw(BrokenBarrierError)
    finally:  # after an interruption
        _ready.clear()
        _asleep.clear()


def _run_ready() -> None:
    while _ready or _asleep:
        if not _ready:
            _ready.extend(_asleep)
            _asleep.clear()
        _ready.popleft().switch()


def _wait_in(queue: deque[greenlet]) -> None:
    """End this lane's turn. It goes on once it was moved from `queue` to the ready ones."""
    lane = getcurrent()
    if not isinstance(lane, Lane) or lane.parent is None:
        raise RuntimeError("a wait outside of a simulated kernel would not end")
    queue.append(lane)
    lane.parent.switch()


def _sleep(_seconds: float) -> None:
    _wait_in(_asleep)


def _current_thread() -> Any:
    lane = getcurrent()
    return lane.thread if isinstance(lane, Lane) else current_thread()


class Lock:
    """`threading.Lock`, without its timeouts: a lane that waits in vain fails at once."""

    def __init__(self) -> None:
        self._locked, self._waiting = False, deque[greenlet]()

    def acquire(self, timeout: float = -1) -> bool:
        del timeout
        if self._locked:
            _wait_in(self._waiting)  # until `release` hands the lock over
        self._locked = True
        return True

    def release(self) -> None:
        if not self._locked:
            raise RuntimeError("the lock is open")
        if self._waiting:
            _ready.append(self._waiting.popleft())
        else:
            self._locked = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Condition:
    """`threading.Condition`. It needs no lock: no other lane runs before this one waits."""

    def __init__(self) -> None:
        self._waiting = deque[greenlet]()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        del timeout
        while not predicate():
            _wait_in(self._waiting)
        return True

    def notify_all(self) -> None:
        _ready.extend(self._waiting)
        self._waiting.clear()


class Barrier:
    """`threading.Barrier`."""

    def __init__(self, parties: int) -> None:
        self._parties, self._broken, self._waiting = parties, False, deque[greenlet]()

    def wait(self) -> None:
        if not self._broken and len(self._waiting) + 1 == self._parties:
            _ready.extend(self._waiting)
            self._waiting.clear()
        elif not self._broken:
            _wait_in(self._waiting)
        if self._broken:
            raise BrokenBarrierError

    def abort(self) -> None:
        self._broken = True
        _ready.extend(self._waiting)
        self._waiting.clear()


# What takes the place of the modules `threading` and `time` in those that simulate.
THREADING = SimpleNamespace(
    Lock=Lock, Condition=Condition, BrokenBarrierError=BrokenBarrierError, current_thread=_current_thread
)
TIME = SimpleNamespace(sleep=_sleep, perf_counter_ns=time.perf_counter_ns)
