"""Work for a client that ends when the client disconnects: streams of events, and single results.

Not here: the content of events (responses.py), routes (app.py).
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from slipway.errors import SlipwayError
from slipway.server.middleware import failure_events
from slipway.server.service import QueueSlot


async def unless_disconnected(request: Request, work: Any, slot: QueueSlot) -> Any:
    """Return the result of ``work``; abort it and raise ClientDisconnect if the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            slot.abort()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Response of server-sent events; a client that disconnects aborts its request."""

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes],
        slot: QueueSlot,
        *,
        resources: contextlib.ExitStack,
        headers: dict[str, str],
    ):
        """Make a response from its first event and the generator of the others.

        ``resources`` are closed at the end of the stream.
        """
        super().__init__(headers=headers, media_type="text/event-stream")
        names = [name for name, _ in self.raw_headers]
        del self.raw_headers[names.index(b"content-length")]
        self._first = first
        self._rest = rest
        self._slot = slot
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response by ASGI."""
        gone = asyncio.ensure_future(self._abort_on_disconnect(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            # In a task of its own: otherwise every event would resume the whole chain of
            # coroutines that await this one.
            await asyncio.ensure_future(self._write(scope.get("slipway.send", send)))
        finally:
            gone.cancel()
            await self._rest.aclose()
            self._resources.close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for event in self._rest:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except SlipwayError as error:
            events = failure_events(error)
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _abort_on_disconnect(self, receive: Receive) -> None:
        await _wait_for_disconnect(receive)
        self._slot.abort()  # the engine ends the request, and that ends the events
