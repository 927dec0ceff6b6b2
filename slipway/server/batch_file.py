"""`slipway run-batch`: a file of OpenAI batch requests to a file of answers; the server's own handlers, no HTTP."""

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
KINDS: dict[str, tuple[type, Any]] = {
    "/v1/completions": (schema.Completion, CompletionHandler),
    "/v1/chat/completions": (schema.Chat, ChatHandler),
}


async def run_batch(
    service: Service, source: Path, target: Path, at_a_time: int, step: Callable[[], None]
) -> int:
    """Answer every line of ``source``, in its order, in ``target``; how many failed. ``step`` is called after each.

    A line that is no request gets an error of its own. Raises EngineDead if the engine has died.
    """
    lines = [line for line in source.read_text().splitlines() if line.strip()]
    semaphore, failed = asyncio.Semaphore(at_a_time), 0

    async def one(line: str) -> dict[str, Any]:
        async with semaphore:
            found = await _answer(service, line)
            step()
            return found

    tasks = [asyncio.create_task(one(line)) for line in lines]
    partial = target.with_name(f".{target.name}.partial")
    with partial.open("w") as out:
        for task in tasks:
            found = await task
            failed += found["error"] is not None
            out.write(json.dumps(found, ensure_ascii=False) + "\n")
    partial.rename(target)
    return failed


async def _answer(service: Service, line: str) -> dict[str, Any]:
    number, custom = f"batch_req_{uuid.uuid4().hex}", None
    try:
        asked = msgspec.json.decode(line)
        if not isinstance(asked, dict) or not isinstance(asked.get("custom_id"), str):
            raise InvalidRequest(
                "custom_id", Shown(line[:80]), "an object with a text of that name"
            )
        custom = asked["custom_id"]
        if asked.get("method", "POST") != "POST" or asked.get("url") not in KINDS:
            raise InvalidRequest("url", asked.get("url"), f"POST to {' or '.join(KINDS)}")
        kind, make = KINDS[asked["url"]]
        body, _ = bodies.read(json.dumps(asked.get("body")).encode(), kind, service.config.strict)
        if body.stream:
            raise InvalidRequest("stream", True, "false in a batch")
        answer = make(service, body, body.request_id)
        with service.queue_slot("batch", answer.envelope.id) as slot:
            await answer.prepare()
            whole = json.loads(await answer.full_response(slot))
    except EngineDead:
        raise
    except (SlipwayError, msgspec.DecodeError) as error:
        status = status_of(error) if isinstance(error, SlipwayError) else 400
        failure = {"code": str(status), "message": str(error)}
        return {"id": number, "custom_id": custom, "response": None, "error": failure}
    response = {"status_code": 200, "request_id": answer.envelope.id, "body": whole}
    return {"id": number, "custom_id": custom, "response": response, "error": None}
