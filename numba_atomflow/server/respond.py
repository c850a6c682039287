"""From the events of a ticket to an HTTP response, whole or streamed; a client that leaves gives up its ticket."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from numba_atomflow.server.errors import ApiError
from numba_atomflow.server.replies import DONE, Shape, server_sent_event
from numba_atomflow.server.stream import Failed, Stream, Ticket

CLIENT_CLOSED_REQUEST = 499  # nginx's status; the client is gone and does not see it


async def whole_reply(request: Request, stream: Stream, ticket: Ticket, shape: Shape) -> Response:
    """The reply as one JSON object, once it is complete.

    Raises:
        ApiError: the generation failed.
    """
    collecting = asyncio.create_task(_collect(ticket, shape))
    leaving = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if collecting.done():
            return JSONResponse(collecting.result())
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        stream.release(ticket)
        for task in (collecting, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await task


async def _collect(ticket: Ticket, shape: Shape) -> dict[str, Any]:
    async for batch in ticket.batches():
        for event in batch:
            if isinstance(event, Failed):
                raise event.error
            shape.add(event)
    return shape.whole()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class StreamedReply(StreamingResponse):
    """The reply as server-sent events, from the first on; releases the ticket at the end, whatever it is."""

    def __init__(self, stream: Stream, ticket: Ticket, shape: Shape, include_usage: bool) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy must not collect events
        super().__init__(_events(ticket, shape, include_usage), media_type="text/event-stream", headers=headers)
        self._stream, self._ticket = stream, ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.release(self._ticket)


async def _events(ticket: Ticket, shape: Shape, include_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events; what has come while the client was reading is sent at once."""
    yield b"".join(map(server_sent_event, shape.opening()))
    async for batch in ticket.batches():
        data = b""
        for event in batch:
            if isinstance(event, Failed):
                yield data + server_sent_event(event.error.body()) + DONE
                return
            data += b"".join(map(server_sent_event, shape.chunks(event)))
        if data:
            yield data
    yield (server_sent_event(shape.usage_chunk()) if include_usage else b"") + DONE
