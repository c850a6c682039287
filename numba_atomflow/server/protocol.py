"""uvicorn's HTTP/1.1 protocol with the time limits that it lacks.

A connection is aborted when a request's headers take too long, or when a client reads nothing of what waits for it.
The application then sees a client that has left.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from numba_atomflow.server.limits import Limits


class LimitedProtocol(H11Protocol):
    """A connection; the limits are those of its class, since uvicorn makes the objects."""

    limits = Limits()

    _headers_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
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
    """The class of connections with these limits."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})
