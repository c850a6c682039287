"""One call at a time: an engine has one KV cache, and two calls that change it at once would make text of neither."""

import threading
from collections.abc import Callable
from typing import TypeVar

from numba_atomflow.errors import EngineBusyError

Result = TypeVar("Result")

_ADVICE = "an engine serves one thread at a time: take turns by a lock, or load an engine for each"


class OneCaller:
    """Runs calls one at a time. A call that comes while another runs is refused; it does not wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = 0  # that runs a call, if one runs

    def run(self, action: Callable[[], Result]) -> Result:
        """What `action` returns.

        Two threads may both find the lock free; then one waits for the other. `with` and the lock's own methods are
        what Ctrl-C cannot come between.

        Raises:
            EngineBusyError: another call runs, in another thread or, for a signal handler, in this one.
        """
        if self._lock.locked():
            raise EngineBusyError(f"Another call of this engine is running, and {_ADVICE}.")
        return self._run(action)

    def wait_and_run(self, action: Callable[[], Result]) -> Result:
        """The same, but after a call that runs in another thread has ended.

        Raises:
            EngineBusyError: it would wait for its own thread.
        """
        if self._lock.locked() and self._thread == threading.get_ident():
            raise EngineBusyError("This engine is in the middle of a call of this very thread; let it end first.")
        return self._run(action)

    def _run(self, action: Callable[[], Result]) -> Result:
        with self._lock:
            try:
                self._thread = threading.get_ident()
                return action()
            finally:
                self._thread = 0


def held_by_another(thread: threading.Thread) -> bool:
    """Whether what `thread` began may still be going on there."""
    return thread is not threading.current_thread() and thread.is_alive()


def other_reply() -> EngineBusyError:
    """The refusal to end a reply that another thread is making."""
    return EngineBusyError(f"Another thread's reply is in the making (end it by its close()), and {_ADVICE}.")
