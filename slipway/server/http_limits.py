"""The head of a request: how large it may be, and how long it may take to come; all else is uvicorn's.

uvicorn's fast parser knows neither limit: clients without a key could have it hold gigabytes, or every connection.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 30.0


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._size_bytes = 0  # of the head that is being read
        self._reads_head = True
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for the first head."""
        super().connection_made(transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, unless the head is too large already."""
        if self._reads_head:
            self._size_bytes += len(data)
        super().data_received(data)
        if self._reads_head and self._size_bytes > MAX_HEAD_BYTES:
            self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """Another request on the same connection."""
        if not self._reads_head:
            self._begin()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A body is none of ours."""
        self._end()
        super().on_headers_complete()

    def _begin(self) -> None:
        self._size_bytes, self._reads_head = 0, True
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, b"408 Request Timeout")

    def _end(self) -> None:
        self._reads_head = False
        if self._timer is not None:
            self._timer.cancel()

    def _refuse(self, status: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            )
            self.transport.close()
