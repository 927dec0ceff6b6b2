"""Limits of an HTTP request's head: its size, and the time until it is complete.

uvicorn's fast parser has neither limit: without them, clients without a key could make the server
hold gigabytes, or occupy every connection.

Not here: the limit of a body (app.py). Everything else of HTTP is uvicorn's.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 30.0


class HttpProtocol(HttpToolsProtocol):
    """One HTTP connection, with request heads limited in size and time."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.head_size_bytes = 0
        """Bytes received of the head that is being read."""
        self._reads_head = True
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the time limit of the first head."""
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time limit of a closed connection."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes; close the connection with status 431 if a head is too large."""
        if self._reads_head:
            self.head_size_bytes += len(data)
        super().data_received(data)
        if self._reads_head and self.head_size_bytes > MAX_HEAD_BYTES:
            self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """Start the limits of another request on the same connection."""
        if not self._reads_head:
            self._begin_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """End the limits of a head: the body that follows has its own."""
        self._end_head()
        super().on_headers_complete()

    def _begin_head(self) -> None:
        self.head_size_bytes = 0
        self._reads_head = True
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, b"408 Request Timeout")

    def _end_head(self) -> None:
        self._reads_head = False
        if self._timer is not None:
            self._timer.cancel()

    def _refuse(self, status: bytes) -> None:
        if not self.transport.is_closing():
            headers = b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(b"HTTP/1.1 " + status + headers)
            self.transport.close()
