"""Batch files of OpenAI's format: `slipway run-batch` turns requests into responses.

The requests go to the same handlers as those of the server, without HTTP.

Not here: start and end of the engine (serve.py), the handlers (completions.py, chat.py).
"""

import asyncio
import json
import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from slipway.errors import EngineDead, InvalidRequest, Shown, SlipwayError
from slipway.server import bodies, schema
from slipway.server.chat import ChatHandler
from slipway.server.completions import CompletionHandler
from slipway.server.middleware import status_of
from slipway.server.service import Service

logger = logging.getLogger(__name__)
# Route of a request -> type of its body, and its handler.
ROUTES: dict[str, tuple[type, Any]] = {
    "/v1/completions": (schema.Completion, CompletionHandler),
    "/v1/chat/completions": (schema.Chat, ChatHandler),
}


async def run_batch(
    service: Service,
    source: Path,
    target: Path,
    *,
    concurrency: int,
    on_response: Callable[[], None],
) -> int:
    """Write the response to each line of ``source`` to ``target``, in the same order.

    Returns the number of failed requests; a line that is no request gets an error of its own.
    ``on_response`` is called after each response. Raises EngineDead if the engine has died.
    """
    lines = [line for line in source.read_text().splitlines() if line.strip()]
    semaphore, num_failed = asyncio.Semaphore(concurrency), 0

    async def respond(line: str) -> dict[str, Any]:
        async with semaphore:
            response = await _respond(service, line)
            on_response()
            return response

    tasks = [asyncio.create_task(respond(line)) for line in lines]
    partial = target.with_name(f".{target.name}.partial")
    with partial.open("w") as out:
        for task in tasks:
            response = await task
            num_failed += response["error"] is not None
            out.write(json.dumps(response, ensure_ascii=False) + "\n")
    partial.rename(target)
    return num_failed


async def _respond(service: Service, line: str) -> dict[str, Any]:
    """Return the response line to a request line. Raises EngineDead."""
    found: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": None}
    try:
        request = msgspec.json.decode(line)
        if not isinstance(request, dict) or not isinstance(request.get("custom_id"), str):
            expected = "a JSON object with a text custom_id"
            raise InvalidRequest("custom_id", Shown(line[:80]), expected)
        found["custom_id"] = request["custom_id"]
        if request.get("method", "POST") != "POST" or request.get("url") not in ROUTES:
            raise InvalidRequest("url", request.get("url"), f"POST to {' or '.join(ROUTES)}")
        kind, make_handler = ROUTES[request["url"]]
        content = json.dumps(request.get("body")).encode()
        body, _ = bodies.read(content, kind, service.config.strict)
        if body.stream:
            raise InvalidRequest("stream", True, "false in a batch file")
        handler = make_handler(service, body, body.request_id)
        with service.queue_slot("batch", handler.envelope.id) as slot:
            await handler.prepare()
            whole = json.loads(await handler.full_response(slot))
    except EngineDead:
        raise
    except (SlipwayError, msgspec.DecodeError) as error:
        status = status_of(error) if isinstance(error, SlipwayError) else 400
        failure = {"code": str(status), "message": str(error)}
        return found | {"response": None, "error": failure}
    response = {"status_code": 200, "request_id": handler.envelope.id, "body": whole}
    return found | {"response": response, "error": None}
