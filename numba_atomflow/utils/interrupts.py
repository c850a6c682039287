"""Ctrl-C, put off while a few lines run that must not be left halfway."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _Noted:
    """Stands in for the handler of SIGINT, and remembers that one came."""

    def __init__(self) -> None:
        self.frame: FrameType | None = None
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.frame, self.came = frame, True


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Have Ctrl-C wait until the block has ended; whatever handles SIGINT is called then.

    For blocks of milliseconds. Python runs handlers of signals on the main thread alone: on other threads there is
    nothing to put off. Blocks may lie within each other.
    """
    previous = signal.getsignal(signal.SIGINT)
    on_main_thread = threading.get_ident() == threading.main_thread().ident
    if not on_main_thread or not callable(previous) or isinstance(previous, _Noted):
        yield
        return
    noted = _Noted()
    try:
        signal.signal(signal.SIGINT, noted)
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if noted.came:
            previous(signal.SIGINT, noted.frame)
