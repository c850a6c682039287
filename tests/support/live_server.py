"""A server on a free port, in a thread of the test's process."""

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from numba_atomflow import Engine
from numba_atomflow.server.app import Server, ServerOptions
from numba_atomflow.server.limits import Limits
from numba_atomflow.server.run import HttpServer, bind

NAME = "tiny"


@dataclass(frozen=True)
class Answer:
    """A response: JSON where it is JSON, else text."""

    status: int
    body: Any
    headers: http.client.HTTPMessage


class Live:
    """A running server."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.port = server, port
        self.stream = server.stream
        self.url = f"http://127.0.0.1:{port}"

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """One request on a connection of its own; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if data is None else {"Content-Type": "application/json"}
        connection.request(method, path, data, kind | (headers or {}))
        response = connection.getresponse()
        text = response.read()
        connection.close()
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        return Answer(response.status, json.loads(text) if is_json else text.decode(), response.headers)

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.request("POST", path, body, headers)

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port))

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds that the server is bound to reach; every turn asks the server something."""
        for _ in range(20_000):
            if condition():
                return
            assert self.get("/health").status == 200
        raise AssertionError("the server does not get there")

    def metric(self, name: str) -> float:
        """The value of a metric, with its labels in the name."""
        key = self.server.options.api_key
        page = self.get("/metrics", **({"Authorization": f"Bearer {key}"} if key else {})).body
        values = (float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(name + " "))
        return next(values, 0.0)  # of labels there is nothing until they occur


@contextmanager
def live_server(
    engine: Engine, *, limits: Limits | None = None, send_buffer: int | None = None, **options: Any
) -> Iterator[Live]:
    """Serve this engine, which no other thread uses meanwhile.

    With a small `send_buffer` (bytes) little of a reply is under way to a client that does not read.
    """
    limits = limits or Limits()
    server = Server(engine, ServerOptions(NAME, limits=limits, **options))
    ready = threading.Event()
    with bind("127.0.0.1", 0) as bound:
        if send_buffer is not None:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        http_server = HttpServer(server, bound, limits, access_log=False, ready=ready.set)
        thread = threading.Thread(target=http_server.listen)
        thread.start()
        try:
            ready.wait()
            yield Live(server, bound.getsockname()[1])
        finally:
            http_server.stop()
            thread.join()


def events(text: str) -> list[Any]:
    """The records of a stream of server-sent events; the last one is "[DONE]"."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
