"""What has been made on the GPU, and giving it back: everything, once, last made first, whatever happens.

The rule is that nothing is made without an owner. The owner's entry is there before the thing is made, Ctrl-C waits
while the driver makes it, and giving back takes each entry off the list before it is undone. So neither an error nor
Ctrl-C between two instructions leaves anything behind, and closing twice, or closing after a failure, is fine.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, Self, TypeVar

from numba_atomflow.device.driver import Device, DriverError, call, open_device
from numba_atomflow.errors import BackendError, ClosedError
from numba_atomflow.utils.interrupts import deferred_interrupts

T = TypeVar("T")

_NOTHING: Any = object()  # in an entry whose thing is not made (yet)


class _Entry:
    """Something made, and what undoes it."""

    __slots__ = ("made", "undo")

    def __init__(self, undo: Callable[[Any], object]) -> None:
        self.undo = undo
        self.made = _NOTHING


class Resources:
    """A list of what to undo. Calls of the driver go to the context that is current on the calling thread."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._streams: list[Any] = []  # that may still work with what is given back
        self._process = os.getpid()
        self._lock = threading.RLock()

    def make(self, make: Callable[..., T], *arguments: Any, undo: Callable[[T], object]) -> T:
        """What `make(*arguments)` returns, which `close` hands to `undo`."""
        entry = _Entry(undo)
        self._entries.append(entry)
        with deferred_interrupts():
            made = entry.made = make(*arguments)
        return made

    def call(self, function: str, *arguments: Any, undo: str) -> Any:
        """Call a function of the driver that makes something; `undo` names the one that takes it back.

        Raises:
            DriverError: it failed.
        """
        return self.make(call, function, *arguments, undo=partial(call, undo))

    def stream(self) -> Any:
        """A stream of its own. `close` waits for what is queued in it before anything else."""
        from cuda.bindings import driver

        stream = self.call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING, undo="cuStreamDestroy")
        self._streams.append(stream)
        return stream

    @contextmanager
    def scope(self, stream: Any = None) -> Iterator["Resources"]:
        """Resources that last as long as the block; should closing them be interrupted, as long as these ones.

        Args:
            stream: that works with them: closing waits for it.
        """
        inner = Resources()
        if stream is not None:
            inner._streams.append(stream)
        entry = _Entry(Resources.close)
        entry.made = inner
        self._entries.append(entry)
        try:
            yield inner
        except GeneratorExit:  # Ctrl-C before the block has begun; by now another context may be current
            raise
        except BaseException:
            with suppress(Exception):  # the block's own error is the one to tell
                self._close_inner(entry)
            raise
        self._close_inner(entry)

    def _close_inner(self, entry: _Entry) -> None:
        with deferred_interrupts():
            try:
                entry.made.close()
            finally:
                with suppress(ValueError):  # closed by its owner in the meantime
                    self._entries.remove(entry)

    def held(self) -> list[Any]:
        """All that was made and not given back, in the order of making."""
        return [entry.made for entry in self._entries if entry.made is not _NOTHING]

    def close(self) -> None:
        """Give everything back. Closing twice is fine; in a forked child, whose parent owns it all, nothing is undone.

        A failing call of the driver is passed over: after a failure of the GPU everything went with the context, and
        it says so each time.
        """
        if os.getpid() != self._process:  # the lock may have been another thread's
            self._entries.clear()
            return
        failures: list[BaseException] = []
        with deferred_interrupts(), self._lock:
            while self._entries and self._streams:
                _undo(partial(call, "cuStreamSynchronize"), self._streams.pop(), failures)
            while self._entries:
                entry = self._entries.pop()
                if entry.made is not _NOTHING:
                    _undo(entry.undo, entry.made, failures)
        if failures:
            raise failures[0]


def _undo(undo: Callable[[Any], object], made: Any, failures: list[BaseException]) -> None:
    """Whatever happens here, the rest is given back all the same."""
    try:
        undo(made)
    except DriverError:
        pass
    except BaseException as error:
        failures.append(error)


class DeviceResources:
    """One owner's use of the process's GPU: the device itself, and in `made` all that the owner makes there.

    Given back by `close`, when the object is collected, and when the interpreter ends: by whichever comes first.
    """

    def __init__(self) -> None:
        self.made = Resources()
        self.closed = False
        self._use = Resources()  # the device, closed when its context is needed no more
        self._forgotten = weakref.finalize(self, _give_back, self._use, self.made)

    def open(self, device_ordinal: int = 0) -> Device:
        """A GPU, by its number among those that the driver sees.

        Raises:
            BackendError: there is no such GPU, or it cannot be used.
        """
        return self._use.make(open_device, device_ordinal, undo=Device.close)

    def current(self) -> AbstractContextManager[None]:
        """`Device.current`.

        Raises:
            ClosedError: closed, or never opened.
        """
        devices = self._use.held()
        if self.closed or not devices:
            raise closed_sentence()
        device: Device = devices[0]
        return device.current()

    def close(self) -> None:
        """Give everything back. Closing twice is fine."""
        self.closed = True
        _give_back(self._use, self.made)
        self._forgotten.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def closed_sentence() -> ClosedError:
    """What to raise for a use after closing."""
    return ClosedError("This model's memory on the GPU has been given back; load the model again.")


def _give_back(use: Resources, made: Resources) -> None:
    with deferred_interrupts():
        try:
            for device in use.held():
                with suppress(BackendError), device.current():
                    made.close()
        finally:
            use.close()
