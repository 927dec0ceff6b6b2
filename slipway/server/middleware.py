"""ASGI middleware around every request: API keys, errors, access log.

Every route except the probes needs a key. The check uses the same path as the router. Status codes
of errors are defined here only.

Not here: limits of a request's head (http_limits.py) and body (app.py).
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
# Routes that need an admin's key.
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
)
PROBES = frozenset({"/livez", "/readyz", "/health"})
CLIENT_GONE = 499


class BodyTooLarge(InvalidRequest):
    """A request body is larger than max_body_bytes."""


class ModelNotFound(InvalidRequest):
    """A request names a model that is not served."""


class BodyTimeout(InvalidRequest):
    """A request body does not arrive in time."""


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
# OpenAI's types of errors; all other status codes have INVALID_REQUEST.
INVALID_REQUEST, SERVER_ERROR = "invalid_request_error", "server_error"
KINDS = {429: "rate_limit_error", 500: SERVER_ERROR, 503: SERVER_ERROR}
CODES = {
    ContextTooLong: "context_length_exceeded",
    ModelNotFound: "model_not_found",
    ClientBusy: "rate_limit_exceeded",
}
INTERNAL_ERROR = "internal error"


class RequestMiddleware:
    """Middleware that checks keys, turns errors into responses, and logs and counts requests."""

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], admin_keys: Sequence[str], metrics: Metrics
    ):
        self._app = app
        self._metrics = metrics
        self._admin_keys = [key.encode() for key in admin_keys]
        self._keys = [key.encode() for key in keys] + (self._admin_keys if keys else [])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), CLIENT_GONE
        # A stream sends its many events directly, once its response has begun.
        scope["slipway.send"] = send

        async def send_and_note_status(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._handle(scope, receive, send_and_note_status)
        except ClientDisconnect:
            pass
        except SlipwayError as error:
            await error_response(error)(scope, receive, send_and_note_status)
        finally:
            self._record(scope, status, time.perf_counter() - started)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application if the request has a key for its path; else respond with 401."""
        path = scope["path"]
        keys = self._admin_keys if path in ADMIN else self._keys
        if path in PROBES or not keys or self._has_key(scope, keys):
            await self._app(scope, receive, send)
            return
        body = error_body("invalid API key", INVALID_REQUEST, code="invalid_api_key")
        headers = {"www-authenticate": "Bearer"}
        await json_response(encode(body), headers, 401)(scope, receive, send)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request and, unless it is a probe, log it."""
        route = getattr(scope.get("route"), "path", "unknown")
        self._metrics.requests.labels(route, str(status)).inc()
        if scope["path"] not in PROBES:
            fields = {
                "method": scope["method"],
                "route": route,
                "status": status,
                "ms": round(1e3 * seconds, 1),
                "id": scope.get("slipway.id", "-"),
            }
            logger.info("request", extra=fields)

    def _has_key(self, scope: Scope, keys: Sequence[bytes]) -> bool:
        """Return whether the request has one of ``keys``; note the client's key in the scope.

        The key is compared with all of ``keys``, each in constant time.
        """
        headers = scope["headers"]
        given = next((value for name, value in headers if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        scope["slipway.client"] = key.decode(errors="replace")
        # A list: any() over a generator would stop at the first match.
        matches = [hmac.compare_digest(key.strip(), each) for each in keys]
        return kind.lower() == b"bearer" and any(matches)


def status_of(error: SlipwayError) -> int:
    """Return the HTTP status code of an error."""
    return next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)


def error_object(error: SlipwayError) -> dict[str, Any]:
    """Return OpenAI's error object for an error."""
    status = status_of(error)
    return error_body(
        str(error) if status != 500 else INTERNAL_ERROR,
        KINDS.get(status, INVALID_REQUEST),
        param=getattr(error, "field", None),
        code=next((code for kind, code in CODES.items() if isinstance(error, kind)), None),
    )


def error_response(error: SlipwayError) -> Response:
    """Return the HTTP response for an error before a response has begun."""
    headers = {}
    if isinstance(error, EngineBusy):
        headers["retry-after"] = f"{error.retry_after_s:.0f}"
    return json_response(encode(error_object(error)), headers, status_of(error))


def failure_events(error: SlipwayError) -> bytes:
    """Return the events that end a stream after an error."""
    return server_sent_event(encode(error_object(error))) + DONE


async def unknown_route(request: Request, _: Exception) -> Response:
    """Return the response for a path without a route."""
    text = f"no such route: {request.method} {request.url.path}"
    body = error_body(text, INVALID_REQUEST, code="unknown_url")
    return json_response(encode(body), status=404)


async def wrong_method(request: Request, error: Exception) -> Response:
    """Return the response for a path that only serves other methods."""
    headers = dict(getattr(error, "headers", None) or {})
    names = [value for name, value in headers.items() if name.lower() == "allow"]
    allowed = names[0] if names else "another method"
    text = f"{request.method} is not supported for {request.url.path}; use {allowed}"
    body = error_body(text, INVALID_REQUEST, code="method_not_supported")
    return json_response(encode(body), headers, 405)


async def internal_error(_: Request, __: Exception) -> Response:
    """Return the response for an unexpected exception; its details are in the log only."""
    return json_response(encode(error_body(INTERNAL_ERROR, SERVER_ERROR)), status=500)


def json_response(
    body: bytes, headers: dict[str, str] | None = None, status: int = 200
) -> Response:
    """Return an HTTP response with a body that is encoded as JSON already."""
    return Response(body, status, headers, media_type="application/json")
