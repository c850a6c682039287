"""uvicorn's HTTP/1.1 protocol with the limits that it lacks.

A connection is aborted when a request's headers take too long, or when a client reads nothing of what waits for it.
The application then sees a client that has left.

Of the requests that arrive at the same moment, one is begun in each iteration of the event loop, and what needs no
generation (GET) in the first: otherwise /health waits until the last of them has been parsed.
"""

import asyncio
from collections import deque
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from numba_atomflow.server.limits import Limits


class Turns:
    """Data that connections have received: in the order of arrival, those of one connection per loop iteration."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[LimitedProtocol, bytes]] = deque()
        self._is_taken = False  # in this iteration

    def take(self, protocol: "LimitedProtocol", data: bytes) -> bool:
        """Whether it is the connection's turn; otherwise its `process` is called with the data when it is."""
        if self._is_taken:
            self._waiting.append((protocol, data))
            return False
        self._is_taken = True
        protocol.loop.call_soon(self._next, protocol.loop)
        return True

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._waiting:
            self._is_taken = False
            return
        loop.call_soon(self._next, loop)
        protocol, data = self._waiting.popleft()
        protocol.process(data)


class LimitedProtocol(H11Protocol):
    """A connection; limits and turns are those of its class, since uvicorn makes the objects."""

    limits = Limits()
    turns = Turns()

    _waiting = 0  # parts of its data
    _headers_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        if (data.startswith(b"GET ") and not self._waiting) or self.turns.take(self, data):
            self._receive(data)
        else:
            self._waiting += 1
            self.flow.pause_reading()

    def process(self, data: bytes) -> None:
        """Take what has waited for its turn."""
        self._waiting -= 1
        if not self.transport.is_closing():
            self.flow.resume_reading()  # uvicorn may pause it again
            self._receive(data)

    def _receive(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def _watch_headers(self) -> None:
        """While a request's first line and headers are incomplete, the time since their begin is limited.

        Between two requests of a connection uvicorn's own limit applies, until the first byte.
        """
        incomplete = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if incomplete and self._headers_timer is None:
            self._headers_timer = self.loop.call_later(self.limits.send_seconds, self.transport.abort)
        elif not incomplete and self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_stall()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._watch_stall()

    def _watch_stall(self) -> None:
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.limits.stall_seconds, self._abort_stalled)

    def _abort_stalled(self) -> None:
        self._stall_timer = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _cancel_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
        self._cancel_stall()
        super().connection_lost(exc)


def limited_protocol(limits: Limits) -> type[H11Protocol]:
    """The class of the connections of one server, with these limits."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits, "turns": Turns()})
