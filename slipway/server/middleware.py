"""Around every request: keys, failures, one line in the log; the only place that knows status codes.

A client is let in by its key on every route but the probes, decided on the path that the router sees.
"""

import hmac
import logging
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from slipway.errors import (
    CheckpointError,
    ClientBusy,
    ContextTooLong,
    EngineBusy,
    EngineDead,
    InvalidInput,
    InvalidRequest,
    SlipwayError,
    WeightsLost,
)
from slipway.server.metrics import Metrics
from slipway.server.responses import DONE, encode, error_body, server_sent_event

logger = logging.getLogger("slipway.access")
ADMIN = frozenset(
    {
        "/update_weights_from_disk",
        "/weights/begin",
        "/weights/update",
        "/weights/finish",
        "/sleep",
        "/wake_up",
        "/start_profile",
        "/stop_profile",
    }
)  # for an admin's key alone
PROBES = frozenset({"/livez", "/readyz", "/health"})
CLIENT_GONE = 499


class BodyTooLarge(InvalidRequest):
    """A body beyond the limit."""


class ModelNotFound(InvalidRequest):
    """No such model."""


class BodyTimeout(InvalidRequest):
    """A body that does not come."""


STATUS = {
    BodyTooLarge: 413,
    BodyTimeout: 408,
    ModelNotFound: 404,
    ClientBusy: 429,
    EngineBusy: 503,
    EngineDead: 503,
    WeightsLost: 503,
    InvalidInput: 400,
    CheckpointError: 400,
}
KINDS = {
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}  # OpenAI's types; else a wrong request
CODES = {
    ContextTooLong: "context_length_exceeded",
    ModelNotFound: "model_not_found",
    ClientBusy: "rate_limit_exceeded",
}


class RequestMiddleware:
    """Around every request: keys, failures, one line in the log."""

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], admin_keys: Sequence[str], metrics: Metrics
    ):
        self._asgi, self._metrics = app, metrics
        self._admins = [key.encode() for key in admin_keys]
        self._keys = [key.encode() for key in keys] + (self._admins if keys else [])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._asgi(scope, receive, send)
            return
        started, status = time.perf_counter(), CLIENT_GONE
        scope["slipway.send"] = send  # for the many pieces of a stream, once it has begun

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            keys = self._admins if scope["path"] in ADMIN else self._keys
            if scope["path"] in PROBES or not keys or self._has_key(scope, keys):
                await self._asgi(scope, receive, watched)
            else:
                body = error_body(
                    "no such API key", "invalid_request_error", code="invalid_api_key"
                )
                await json_response(encode(body), {"www-authenticate": "Bearer"}, 401)(
                    scope, receive, watched
                )
        except ClientDisconnect:
            pass
        except SlipwayError as error:
            await error_response(error)(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(route, str(status)).inc()
            if scope["path"] not in PROBES:
                logger.info(
                    "request",
                    extra={
                        "method": scope["method"],
                        "route": route,
                        "status": status,
                        "ms": round(1e3 * (time.perf_counter() - started), 1),
                        "id": scope.get("slipway.id", "-"),
                    },
                )

    def _has_key(self, scope: Scope, keys: Sequence[bytes]) -> bool:
        """Whether the request brings one of ``keys``; compared in constant time, all of them."""
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        scope["slipway.client"] = key.decode(errors="replace")
        return kind.lower() == b"bearer" and any(
            [hmac.compare_digest(key.strip(), known) for known in keys]
        )


def status_of(error: SlipwayError) -> int:
    """The status code of a failure."""
    return next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)


def error_object(error: SlipwayError) -> dict[str, Any]:
    """Return OpenAI's error object for a failure."""
    status = status_of(error)
    text = str(error) if status != 500 else "internal error"
    code = next((code for kind, code in CODES.items() if isinstance(error, kind)), None)
    param = getattr(error, "field", None)
    return error_body(text, KINDS.get(status, "invalid_request_error"), param, code)


def error_response(error: SlipwayError) -> Response:
    """Return the response for a failure before an answer has begun."""
    headers = {"retry-after": f"{error.retry_after_s:.0f}"} if isinstance(error, EngineBusy) else {}
    return json_response(encode(error_object(error)), headers, status_of(error))


def failure_events(error: SlipwayError) -> bytes:
    """Return the events that end a stream which cannot go on."""
    return server_sent_event(encode(error_object(error))) + DONE


async def unknown_route(request: Request, _: Exception) -> Response:
    """Return the response for a path that is not served."""
    body = error_body(
        f"no such route: {request.method} {request.url.path}",
        "invalid_request_error",
        code="unknown_url",
    )
    return json_response(encode(body), status=404)


async def wrong_method(request: Request, error: Exception) -> Response:
    """Return the response for a path that is served for other methods."""
    headers = dict(getattr(error, "headers", None) or {})
    allowed = next(
        (value for name, value in headers.items() if name.lower() == "allow"), "another method"
    )
    text = f"{request.method} is not supported for {request.url.path}; use {allowed}"
    body = error_body(text, "invalid_request_error", code="method_not_supported")
    return json_response(encode(body), headers, 405)


async def internal_error(_: Request, __: Exception) -> Response:
    """Return the response for a fault of the server's own, which the log has."""
    return json_response(encode(error_body("internal error", "server_error")), status=500)


def json_response(
    body: bytes, headers: dict[str, str] | None = None, status: int = 200
) -> Response:
    """An answer that is JSON already."""
    return Response(body, status, headers, media_type="application/json")
