"""Listening, and ending: Ctrl-C or SIGTERM ends the streams, then the server."""

import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio.to_thread
import uvicorn

from numba_atomflow.errors import OptionError
from numba_atomflow.server.app import Server
from numba_atomflow.server.limits import Limits
from numba_atomflow.server.protocol import limited_protocol

_SECONDS_TO_END = 10  # for clients to read the last events
_SWITCH_INTERVAL = 0.0002  # s; after each read or write the event loop may wait so long for the generating thread


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, before a model is loaded; clients can connect when the server listens.

    Raises:
        OptionError: the address is not one of this machine, or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise OptionError(f"--host {host} is no address of this machine ({_reason(error)}).") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _port_taken(host, port, error) from error
    return bound


def _port_taken(host: str, port: int, error: Exception) -> OptionError:
    return OptionError(
        f"--port {port} of {host} cannot be listened to ({_reason(error)}); give another port, or 0 for a free one."
    )


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def url(bound: socket.socket) -> str:
    """The address of a bound socket for clients."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpServer(uvicorn.Server):
    """Serves an application on a bound socket.

    Args:
        server: the application. bound: see `bind`. limits: on connections.
        access_log: a line on standard error for each request.
        ready: called when clients can connect.
    """

    def __init__(
        self, server: Server, bound: socket.socket, limits: Limits, *, access_log: bool, ready: Callable[[], None]
    ) -> None:
        config = uvicorn.Config(
            server.app,
            loop="asyncio",
            http=limited_protocol(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=access_log,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=limits.connections,
            timeout_graceful_shutdown=_SECONDS_TO_END,
            h11_max_incomplete_event_size=limits.header_bytes,
        )
        super().__init__(config)
        self._stream, self._bound, self._ready = server.stream, bound, ready

    def listen(self) -> None:
        """Serve until Ctrl-C, SIGTERM or `stop`.

        Raises:
            OptionError: another program has begun to listen to the port since `bind`.
        """
        interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL)
        self._stream.start()
        try:
            self.run(sockets=[self._bound])
        finally:
            self._stream.close()
            self._stream.join()
            sys.setswitchinterval(interval)

    def stop(self) -> None:
        """End the server, from any thread."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await anyio.to_thread.run_sync(int)  # loads anyio's backend now, not during the first request
        try:
            await super().startup(sockets)
        except OSError as error:
            host, port = self._bound.getsockname()[:2]
            raise _port_taken(host, port, error) from error
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stream.close()  # first: the streams end, so there is nothing to wait for
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, without the signal again at the end: a server that is told to end has done its work."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def long_lived_objects() -> Iterator[None]:
    """Within the block, garbage collections do not visit the objects that exist at its begin.

    Those of the libraries and of the engine are so many that one full collection stops every thread for 50 to 130 ms.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def set_up_logs(access_log: bool) -> None:
    """Warnings of uvicorn and of this package to standard error, and the access log if it is wanted."""
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    loggers: dict[str, Any] = {
        "uvicorn.error": logging.ERROR,
        "uvicorn.access": logging.INFO if access_log else logging.CRITICAL,
        "numba_atomflow.server": logging.ERROR,
    }
    for name, level in loggers.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
