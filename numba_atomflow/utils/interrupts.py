"""Defer Ctrl-C (SIGINT) during short critical sections."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _Recorder:
    """Replaces the handler of SIGINT and records a signal."""

    def __init__(self) -> None:
        self.frame: FrameType | None = None
        self.received = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.frame, self.received = frame, True


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Defer SIGINT to the end of the block; the previous handler is called then.

    For blocks of milliseconds. Python runs signal handlers on the main thread only, so this does nothing on other
    threads. Blocks may be nested.
    """
    previous = signal.getsignal(signal.SIGINT)
    on_main_thread = threading.get_ident() == threading.main_thread().ident
    if not on_main_thread or not callable(previous) or isinstance(previous, _Recorder):
        yield
        return
    recorder = _Recorder()
    try:
        signal.signal(signal.SIGINT, recorder)
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if recorder.received:
            previous(signal.SIGINT, recorder.frame)
