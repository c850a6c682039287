"""Mutual exclusion of an engine's calls: it has one KV cache, which concurrent calls would corrupt."""

import os
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

from numba_atomflow.errors import BackendError, EngineBusyError

Result = TypeVar("Result")

_ADVICE = "an engine serves one thread at a time: use a lock, or load an engine for each thread"


class ExclusiveCalls:
    """Runs calls one at a time. A call during another one is refused; it does not wait.

    Args:
        survives_fork: calls may be made in a forked child. Memory of a GPU is not usable there.
    """

    def __init__(self, survives_fork: bool = True) -> None:
        self._lock = threading.Lock()
        self._thread = 0  # of the call in progress, or 0
        self._survives_fork, self._lost = survives_fork, False
        _all.add(self)

    def run(self, action: Callable[[], Result]) -> Result:
        """Run `action` and return its result.

        Two threads may both find the lock free; then one waits for the other. The lock is taken by `with`, because
        Ctrl-C cannot interrupt between its acquisition and the block.

        Raises:
            EngineBusyError: another call is in progress, in another thread or, for a signal handler, in this one.
            BackendError: the engine was loaded before this process was forked, and cannot be used here.
        """
        if self._lost:
            raise BackendError(
                "This engine belongs to the process that this one was forked from, as its GPU does; load it here, in a "
                'process that was started by "spawn" or "forkserver" (multiprocessing.get_context).'
            )
        if self._lock.locked():
            raise EngineBusyError(f"Another call of this engine is running, and {_ADVICE}.")
        return self._run(action)

    def wait_and_run(self, action: Callable[[], None]) -> None:
        """Wait for a call in another thread, then run `action`. Does nothing in a forked child that lost the engine.

        Raises:
            EngineBusyError: the call in progress is of this thread.
        """
        if self._lost:
            return
        if self._lock.locked() and self._thread == threading.get_ident():
            raise EngineBusyError("This engine is in the middle of a call of this very thread; let it end first.")
        self._run(action)

    def _run(self, action: Callable[[], Result]) -> Result:
        with self._lock:
            try:
                self._thread = threading.get_ident()
                return action()
            finally:
                self._thread = 0

    def forked(self) -> None:
        """In a forked child: replace the lock, which a thread of the parent may hold for ever."""
        self._lock, self._thread = threading.Lock(), 0
        self._lost = not self._survives_fork


_all: weakref.WeakSet[ExclusiveCalls] = weakref.WeakSet()


def _after_fork() -> None:
    for caller in list(_all):
        caller.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def runs_elsewhere(thread: threading.Thread) -> bool:
    """Whether `thread` is another one than this, and alive."""
    return thread is not threading.current_thread() and thread.is_alive()


def busy_elsewhere() -> EngineBusyError:
    """The error of ending a generation that is in progress in another thread."""
    return EngineBusyError(f"A generation is in progress in another thread (end it by its close()), and {_ADVICE}.")
