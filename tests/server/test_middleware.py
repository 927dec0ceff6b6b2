"""API keys, error responses and limits of heads, bodies and templates, without a server process."""

import ast
import asyncio
import hmac
import json
from pathlib import Path

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient
from uvicorn.server import ServerState

import slipway
from slipway.codec.tokenizer import Tokenizer
from slipway.errors import EngineBusy, InvalidRequest, SlipwayError
from slipway.llm import NANO
from slipway.server import app, http_limits, middleware, schema
from slipway.server import service as services
from slipway.server.config import ServerConfig
from slipway.server.metrics import Metrics
from slipway.server.middleware import RequestMiddleware
from slipway.server.service import Service

pytestmark = pytest.mark.host


def status_of(keys, headers, path="/v1/models", admins=()):
    """Return the status code of a GET request that passes through the middleware."""
    found = []

    async def send(message):
        found.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
    metrics = Metrics("nano", vllm_names=False)
    handler = RequestMiddleware(Response(b"ok"), keys, admins, metrics)
    asyncio.run(handler(scope, None, send))
    return found[0]["status"]


def test_every_key_is_compared_in_constant_time(monkeypatch):
    compared = []

    def compare(given, known):
        compared.append(known)
        return real(given, known)

    real = hmac.compare_digest
    monkeypatch.setattr(middleware.hmac, "compare_digest", compare)
    keys = ["first", "second", "third"]
    for given, status in (
        (b"first", 200),
        (b"third", 200),
        (b"firs", 401),
        (b"", 401),
        (b"\xff", 401),
    ):
        compared.clear()
        assert status_of(keys, [(b"authorization", b"Bearer " + given)]) == status
        assert compared == [key.encode() for key in keys], "a match must not end the comparison"


def test_admin_keys_open_all_routes_and_client_keys_no_admin_route():
    def status(key, path):
        return status_of(["client"], [(b"authorization", b"Bearer " + key)], path, ["admin"])

    for path in middleware.ADMIN:
        assert status(b"admin", path) == 200, path
        assert status(b"client", path) == status(b"", path) == 401, path
    assert status(b"admin", "/v1/models") == status(b"client", "/v1/models") == 200
    assert status_of([], [], "/v1/models", ["admin"]) == 200
    assert status_of([], [], "/sleep", ["admin"]) == 401


def test_the_first_authorization_header_decides():
    both = [(b"authorization", b"Bearer wrong"), (b"authorization", b"Bearer right")]
    assert status_of(["right"], both) == 401
    assert status_of(["right"], both[::-1]) == 200


class Unknown(SlipwayError):
    """Error with a text that clients must not see."""


def test_error_responses_hide_internal_details():
    hidden = middleware.error_response(Unknown("/home/me/secret.txt"))
    assert hidden.status_code == 500
    assert json.loads(hidden.body)["error"]["message"] == "internal error"
    busy = middleware.error_response(EngineBusy("full", 1.0))
    assert busy.status_code == 503
    assert busy.headers["retry-after"] == "1"
    named = json.loads(middleware.error_response(InvalidRequest("n", -1, "more")).body)["error"]
    assert (named["param"], named["type"], named["code"]) == ("n", "invalid_request_error", None)


class Wire:
    """Transport that records what is written."""

    def __init__(self):
        self.sent = b""
        self.closed = False

    def write(self, data):
        self.sent += data

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed

    def get_extra_info(self, _):
        return None

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


async def answered(scope, receive, send):
    await Request(scope, receive).body()
    await Response(b"ok")(scope, receive, send)


async def connected():
    config = uvicorn.Config(answered, http=http_limits.HttpProtocol, log_config=None)
    config.load()
    found, wire = http_limits.HttpProtocol(config, ServerState(), {}), Wire()
    found.connection_made(wire)
    return found, wire


def test_request_heads_have_a_size_limit():
    async def run():
        found, wire = await connected()
        found.data_received(b"GET / HTTP/1.1\r\n")
        for _ in range(100):
            found.data_received(b"x: " + b"a" * 1000 + b"\r\n")
            if wire.closed:
                break
        assert wire.sent.startswith(b"HTTP/1.1 431 ")
        assert found.head_size_bytes < http_limits.MAX_HEAD_BYTES + 2000
        other, wire = await connected()
        # The limit is for each head; bodies do not count.
        for _ in range(3):
            other.data_received(
                b"POST / HTTP/1.1\r\ncontent-length: 200000\r\nx: " + b"a" * 30000 + b"\r\n\r\n"
            )
            other.data_received(b"b" * 200_000)
            await asyncio.sleep(0.01)
        assert not wire.closed
        assert wire.sent.count(b"200 OK") == 3

    asyncio.run(run())


def test_request_heads_have_a_time_limit(monkeypatch):
    monkeypatch.setattr(http_limits, "HEAD_TIMEOUT_S", 0.05)

    async def run():
        silent, half = await connected(), await connected()
        half[0].data_received(b"GET / HTTP/1.1\r\nx: a")
        done = await connected()
        done[0].data_received(b"GET / HTTP/1.1\r\n\r\n")
        await asyncio.sleep(0.2)
        for _, wire in (silent, half):
            assert wire.closed
            assert wire.sent.startswith(b"HTTP/1.1 408 ")
        assert not done[1].closed
        assert b"200 OK" in done[1].sent
        done[0].data_received(b"GET / HT")
        await asyncio.sleep(0.2)
        assert done[1].closed
        assert done[1].sent.count(b"408") == 1, "the limit holds for later requests, too"

    asyncio.run(run())


def test_no_module_unpickles_or_evaluates_data():
    """Read the source of all modules that handle data of clients."""
    forbidden = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "torch"}
    for path in (
        Path(slipway.__file__).parent / name for name in ("server", "engine", "codec", "checkpoint")
    ):
        files = list(path.rglob("*.py"))
        assert files
        for file in files:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    names = {alias.name.partition(".")[0] for alias in node.names}
                    assert not forbidden & names, file
                elif isinstance(node, ast.ImportFrom):
                    assert (node.module or "").partition(".")[0] not in forbidden, file
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in ("eval", "exec"), file


def service(**options):
    """Return a service without engines, with a chat template that takes long."""
    template = "{% for a in range(2000) %}{% for b in range(2000) %}{% endfor %}{% endfor %}x"
    return Service(
        ServerConfig(**options),
        "nano",
        Tokenizer.load(Path(NANO)),
        {"default": template},
        [],
        Path(),
    )


def test_a_slow_template_is_abandoned_without_blocking_others(monkeypatch):
    """Templates run beside the event loop, which goes on meanwhile."""
    monkeypatch.setattr(services, "TEMPLATE_TIMEOUT_S", 0.05)

    async def run():
        turns = 0

        async def others():
            nonlocal turns
            while True:
                await asyncio.sleep(0.005)
                turns += 1

        task = asyncio.ensure_future(others())
        with pytest.raises(InvalidRequest) as caught:
            await service().conversation([{"role": "user", "content": "hi"}])
        task.cancel()
        assert caught.value.field == "messages"
        assert "ends within" in caught.value.expected
        assert turns > 1

    asyncio.run(run())


def test_an_unexpected_exception_becomes_an_error_object(monkeypatch):
    async def broken(*_):
        raise RuntimeError("/home/me/secret.txt")

    async def nothing():
        pass

    monkeypatch.setattr(app.App, "version", broken)
    application = app.App(service()).asgi(nothing, nothing)
    with TestClient(application, raise_server_exceptions=False) as client:
        answer = client.get("/version")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"] == {
        "message": "internal error",
        "type": "server_error",
        "param": None,
        "code": None,
    }


def test_request_bodies_have_a_time_limit(monkeypatch):
    monkeypatch.setattr(app, "BODY_TIMEOUT_S", 0.05)

    async def receive():
        await asyncio.sleep(0 if not sent else 60)
        sent.append(1)
        return {"type": "http.request", "body": b"{", "more_body": True}

    sent = []
    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    with pytest.raises(middleware.BodyTimeout) as caught:
        asyncio.run(app.App(service()).read_body(request, schema.Completion))
    assert middleware.status_of(caught.value) == 408
