"""A client that costs little: one streamed completion over HTTP/1.1, timed event by event; knows no load.

httptools and msgspec parse, so that the client does not take the cores that it measures.
"""

import asyncio
import dataclasses
import time
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec


@dataclasses.dataclass
class Timed:
    """When a request was sent, when tokens came, and how it ended. Seconds of time.perf_counter()."""

    sent: float
    events: list[float] = dataclasses.field(default_factory=list)  # of tokens, as far as events tell them apart
    status: int = 0
    num_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether all of it came."""
        return self.status == 200 and not self.error and bool(self.events)


class Call(asyncio.Protocol):
    """One connection for one request."""

    def __init__(self, request: bytes, timed: Timed, done: asyncio.Future[None]):
        self._request, self.timed, self._done = request, timed, done
        self._parser = httptools.HttpResponseParser(self)
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        """Send."""
        self._transport = transport
        self.timed.sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Parse what has come."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"no HTTP: {error}")

    def connection_lost(self, _: Exception | None) -> None:
        """The other side has closed."""
        self._end("" if self._done.done() else "the connection was closed")

    def on_body(self, body: bytes) -> None:
        """Count events; the last but one may hold the usage."""
        self.timed.status = self._parser.get_status_code()
        now = time.perf_counter()
        *lines, self._buffer = (self._buffer + body).split(b"\n\n")
        for line in lines:
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            event = msgspec.json.decode(line[6:])
            if "error" in event:
                self._end(str(event["error"])[:200])
                return
            if (usage := event.get("usage")) is not None:
                self.timed.num_tokens = usage["completion_tokens"]
            for choice in event["choices"]:
                text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                self.timed.text += text
                if text or choice.get("token_ids") or choice.get("finish_reason"):
                    self.timed.events.append(now)

    def on_message_complete(self) -> None:
        """All has come."""
        self.timed.status = self._parser.get_status_code()
        self._end("" if self.timed.status == 200 else self._buffer.decode(errors="replace")[:200])

    def _end(self, error: str) -> None:
        if not self._done.done():
            self.timed.error = error
            self._done.set_result(None)
        self._transport.close()


async def complete(base_url: str, path: str, body: dict[str, Any], api_key: str | None) -> Timed:
    """POST ``body`` and wait for the end of its stream."""
    parts = urlsplit(base_url)
    content = msgspec.json.encode(body)
    key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST {parts.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"{key}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    done, timed = loop.create_future(), Timed(time.perf_counter())
    try:
        await loop.create_connection(
            lambda: Call(head.encode() + content, timed, done),
            parts.hostname or "",
            parts.port or 80,
        )
    except OSError as error:
        timed.error = str(error)
        return timed
    await done
    return timed
