"""One call at a time: an engine has one KV cache, and two calls that change it at once would make text of neither."""

import os
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

from numba_atomflow.errors import BackendError, EngineBusyError

Result = TypeVar("Result")

_ADVICE = "an engine serves one thread at a time: take turns by a lock, or load an engine for each"


class OneCaller:
    """Runs calls one at a time. A call that comes while another runs is refused; it does not wait.

    Args:
        survives_fork: what is called works in a forked child too, or says itself why not. Memory of a GPU does not.
    """

    def __init__(self, survives_fork: bool = True) -> None:
        self._lock = threading.Lock()
        self._thread = 0  # that runs a call, if one runs
        self._survives_fork, self._lost = survives_fork, False
        _all.add(self)

    def run(self, action: Callable[[], Result]) -> Result:
        """What `action` returns.

        Two threads may both find the lock free; then one waits for the other. `with` and the lock's own methods are
        what Ctrl-C cannot come between.

        Raises:
            EngineBusyError: another call runs, in another thread or, for a signal handler, in this one.
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
        """The same, but after a call that runs in another thread has ended; nothing for an engine of another process.

        Raises:
            EngineBusyError: it would wait for its own thread.
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
        """In a forked child: a call that ran in another thread does not run here, and would hold the lock for ever."""
        self._lock, self._thread = threading.Lock(), 0
        self._lost = not self._survives_fork


_all: weakref.WeakSet[OneCaller] = weakref.WeakSet()


def _after_fork() -> None:
    for caller in list(_all):
        caller.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def held_by_another(thread: threading.Thread) -> bool:
    """Whether what `thread` began may still be going on there."""
    return thread is not threading.current_thread() and thread.is_alive()


def other_reply() -> EngineBusyError:
    """The refusal to end a reply that another thread is making."""
    return EngineBusyError(f"Another thread's reply is in the making (end it by its close()), and {_ADVICE}.")
