"""Ownership of GPU resources: everything is released exactly once, in reverse order, also after errors and Ctrl-C.

Nothing is created without an owner. The owner's entry exists before the resource is created, Ctrl-C is deferred while
the driver creates it, and closing removes each entry before it is undone. So neither an error nor Ctrl-C between two
bytecodes leaks anything, and closing twice, or closing after a failure, is safe.
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

_NOTHING: Any = object()  # in an entry whose resource does not exist (yet)


class _Entry:
    """A resource, and the function that releases it."""

    __slots__ = ("undo", "value")

    def __init__(self, undo: Callable[[Any], object]) -> None:
        self.undo = undo
        self.value = _NOTHING


class Resources:
    """A list of resources to release. Driver calls use the context that is current on the calling thread."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._streams: list[Any] = []  # that may still use the resources
        self._process = os.getpid()
        self._lock = threading.RLock()

    def make(self, make: Callable[..., T], *arguments: Any, undo: Callable[[T], object]) -> T:
        """Create a resource by `make(*arguments)`; `close` calls `undo` with it."""
        entry = _Entry(undo)
        self._entries.append(entry)
        with deferred_interrupts():
            value = entry.value = make(*arguments)
        return value

    def call(self, function: str, *arguments: Any, undo: str) -> Any:
        """Call a function of the driver that creates a resource; `undo` names the one that releases it.

        Raises:
            DriverError: it failed.
        """
        return self.make(call, function, *arguments, undo=partial(call, undo))

    def stream(self) -> Any:
        """Create a stream. `close` waits for its work before it releases anything."""
        from cuda.bindings import driver

        stream = self.call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING, undo="cuStreamDestroy")
        self._streams.append(stream)
        return stream

    @contextmanager
    def scope(self, stream: Any = None) -> Iterator["Resources"]:
        """Resources of a `with` block; if closing them is interrupted, these ones release the rest.

        Args:
            stream: that uses them: closing waits for it.
        """
        inner = Resources()
        if stream is not None:
            inner._streams.append(stream)
        entry = _Entry(Resources.close)
        entry.value = inner
        self._entries.append(entry)
        try:
            yield inner
        except GeneratorExit:  # Ctrl-C before the block has begun; another context may be current
            raise
        except BaseException:
            with suppress(Exception):  # the block's own error is the one to report
                self._close_inner(entry)
            raise
        self._close_inner(entry)

    def _close_inner(self, entry: _Entry) -> None:
        with deferred_interrupts():
            try:
                entry.value.close()
            finally:
                with suppress(ValueError):  # already closed by its owner
                    self._entries.remove(entry)

    def held(self) -> list[Any]:
        """All resources that exist, in the order of creation."""
        return [entry.value for entry in self._entries if entry.value is not _NOTHING]

    def close(self) -> None:
        """Release everything. Closing twice is safe; in a forked child, whose parent owns it all, nothing is released.

        Failing driver calls are ignored: after a failure of the GPU the context is lost, and every call reports that.
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
                if entry.value is not _NOTHING:
                    _undo(entry.undo, entry.value, failures)
        if failures:
            raise failures[0]


def _undo(undo: Callable[[Any], object], value: Any, failures: list[BaseException]) -> None:
    """Release one resource, and record an error instead of raising it, so that the rest is released too."""
    try:
        undo(value)
    except DriverError:
        pass
    except BaseException as error:
        failures.append(error)


class DeviceResources:
    """One owner's use of a GPU: the device itself, and in `resources` all that the owner creates there.

    Released by `close`, when the object is collected, or when the interpreter ends, whichever comes first.
    """

    def __init__(self) -> None:
        self.resources = Resources()
        self.closed = False
        self._device = Resources()  # the device alone: closed last, because the others need its context
        self._finalizer = weakref.finalize(self, _release, self._device, self.resources)

    def open(self, device_ordinal: int = 0) -> Device:
        """A GPU, by its number among those that the driver sees.

        Raises:
            BackendError: there is no such GPU, or it cannot be used.
        """
        return self._device.make(open_device, device_ordinal, undo=Device.close)

    def current(self) -> AbstractContextManager[None]:
        """`Device.current`.

        Raises:
            ClosedError: closed, or never opened.
        """
        devices = self._device.held()
        if self.closed or not devices:
            raise closed_error()
        device: Device = devices[0]
        return device.current()

    def close(self) -> None:
        """Release everything. Closing twice is safe."""
        self.closed = True
        _release(self._device, self.resources)
        self._finalizer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def closed_error() -> ClosedError:
    """The error for a use after closing."""
    return ClosedError("This model's memory on the GPU has been given back; load the model again.")


def _release(devices: Resources, resources: Resources) -> None:
    with deferred_interrupts():
        try:
            for device in devices.held():
                with suppress(BackendError), device.current():
                    resources.close()
        finally:
            devices.close()
