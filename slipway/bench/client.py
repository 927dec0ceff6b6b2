"""HTTP client of the benchmarks: one streamed completion, timed event by event.

httptools and msgspec parse the stream, so that the client takes little time from the cores that it
measures. Not here: the loads (serving.py).
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
    """Times and result of one request, in seconds of time.perf_counter().

    ``events``: arrival of each event with tokens; an event can hold several tokens.
    """

    sent: float
    events: list[float] = dataclasses.field(default_factory=list)
    status: int = 0
    num_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether the request succeeded and brought tokens."""
        return self.status == 200 and not self.error and bool(self.events)


class Call(asyncio.Protocol):
    """A connection that carries one request."""

    def __init__(self, request: bytes, timed: Timed, done: asyncio.Future[None]):
        self._request = request
        self.timed = timed
        self._done = done
        self._parser = httptools.HttpResponseParser(self)
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        """Send the request."""
        self._transport = transport
        self.timed.sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"the response is not HTTP: {error}")

    def connection_lost(self, _: Exception | None) -> None:
        """End the request with an error, unless its end has been read."""
        self._end("" if self._done.done() else "the connection was closed")

    def on_body(self, body: bytes) -> None:
        """Record the events of a part of the body (httptools calls this)."""
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
            # in the event before [DONE]
            if (usage := event.get("usage")) is not None:
                self.timed.num_tokens = usage["completion_tokens"]
            for choice in event["choices"]:
                text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                self.timed.text += text
                if text or choice.get("token_ids") or choice.get("finish_reason"):
                    self.timed.events.append(now)

    def on_message_complete(self) -> None:
        """End the request at the end of the response (httptools calls this)."""
        self.timed.status = self._parser.get_status_code()
        failed = self.timed.status != 200
        self._end(self._buffer.decode(errors="replace")[:200] if failed else "")

    def _end(self, error: str) -> None:
        if not self._done.done():
            self.timed.error = error
            self._done.set_result(None)
        self._transport.close()


async def complete(
    base_url: str, path: str, body: dict[str, Any], api_key: str | None = None
) -> Timed:
    """POST a body and wait for the end of its stream; errors are in the result."""
    parts = urlsplit(base_url)
    content = msgspec.json.encode(body)
    head = [
        f"POST {parts.path.rstrip('/')}{path} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        *([f"Authorization: Bearer {api_key}"] if api_key else []),
        f"Content-Length: {len(content)}",
        "Connection: close",
    ]
    request = "".join(f"{line}\r\n" for line in [*head, ""]).encode() + content
    loop = asyncio.get_running_loop()
    done, timed = loop.create_future(), Timed(time.perf_counter())
    try:
        await loop.create_connection(
            lambda: Call(request, timed, done), parts.hostname or "", parts.port or 80
        )
    except OSError as error:
        timed.error = str(error)
        return timed
    await done
    return timed
