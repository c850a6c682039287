"""Limits on what a client may send and how long it may take, and the API key."""

import asyncio
import hashlib
import hmac
import ipaddress
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.server import page
from numba_atomflow.server.errors import ApiError

OPEN_PATHS = frozenset({"/health"}) | page.PATHS  # need no key


@dataclass(frozen=True)
class Limits:
    """Of one client or request; times are in seconds.

    Attributes:
        body_bytes: of a request. header_bytes: of its first line and headers.
        send_seconds: from the first byte to the last, of the headers and of the body.
        stall_seconds: how long a client may read nothing while data waits for it.
        connections: at once.
    """

    body_bytes: int = 4 << 20
    header_bytes: int = 32 << 10
    send_seconds: float = 20.0
    stall_seconds: float = 30.0
    connections: int = 1000

    def __post_init__(self) -> None:
        for name in ("body_bytes", "header_bytes", "send_seconds", "stall_seconds", "connections"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} is {quote(getattr(self, name))}; it must be above 0.")


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a JSON request.

    Raises:
        ApiError: it is announced as something else, too large, or sent too slowly. The connection is then closed.
        ClientDisconnect: the client left before the end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page of another origin can send anything else without asking first
        raise _refused(415, "The body must be JSON, with the header Content-Type: application/json.")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limits.body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.send_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        raise _refused(408, f"The body took longer than {limits.send_seconds:g} seconds.") from None
    return bytes(body)


def _too_large(limits: Limits) -> ApiError:
    return _refused(413, f"The body is larger than {limits.body_bytes} bytes.")


def _refused(status: int, message: str) -> ApiError:
    return ApiError(status, message, headers={"Connection": "close"})


class HeaderSize:
    """ASGI middleware: headers are limited also where they came with one read, and h11 has not counted them."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._most = app, limits.header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            size = len(scope["raw_path"]) + len(scope["query_string"])
            size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
            if size > self._most:
                error = ApiError(431, f"The headers are larger than {self._most} bytes.")
                await JSONResponse(error.body(), 431, {"Connection": "close"})(scope, receive, send)
                return
        await self._app(scope, receive, send)


class ApiKey:
    """ASGI middleware: requests need ``Authorization: Bearer KEY``, but those of `OPEN_PATHS`.

    Digests of equal length are compared in constant time, so that the time of a refusal tells neither the length of the
    key nor how much of it is right.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._digest = app, _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = Headers(scope=scope).get("authorization", "")
            kind, _, key = given.partition(" ")
            right = hmac.compare_digest(_digest(key.strip().encode("latin-1")), self._digest)
            if kind.lower() != "bearer" or not right:
                message = "The API key is missing or wrong; send it as Authorization: Bearer KEY."
                error = ApiError(401, message, code="invalid_api_key")
                await JSONResponse(error.body(), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is one of this machine alone."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class LoopbackHost:
    """ASGI middleware of a server on a loopback address: the Host header must name one.

    Otherwise a web page could reach the server under a name of its own that resolves to 127.0.0.1 (DNS rebinding).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "localhost")
            name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
            if not is_loopback(name.strip("[]")):
                error = ApiError(400, f"This server is called localhost, not {quote(name)}.", code="wrong_host")
                await JSONResponse(error.body(), 400)(scope, receive, send)
                return
        await self._app(scope, receive, send)
