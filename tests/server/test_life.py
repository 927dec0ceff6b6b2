"""Life of a server: API keys, full queues, disconnects, dead engines, SIGTERM."""

import contextlib
import os
import signal
import threading
import time

import httpx
import pytest

from tests.server.conftest import events

pytestmark = pytest.mark.xdist_group("server")
PROMPT = "def read(path):"
LONG = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True}


def test_a_disconnected_client_frees_its_pages(server):
    for streams in (True, False):
        for _ in range(5):
            with contextlib.suppress(httpx.TimeoutException):
                server.http.post("/v1/completions", json=LONG | {"stream": streams}, timeout=0.15)
        server.wait_idle(5)
    assert server.complete(prompt=PROMPT)["choices"]


def test_a_request_is_aborted_by_its_id(server):
    found = {}
    thread = threading.Thread(
        target=lambda: found.update(
            server.post("/v1/completions", **LONG, request_id="victim").json()
        )
    )
    thread.start()
    while server.http.get("/load").json()["server_load"] == 0:
        time.sleep(0.01)
    twice = server.post("/v1/completions", **LONG, request_id="victim")
    assert twice.status_code == 400, "ids are unique"
    assert server.post("/abort_request", rid="victim").json() == {"aborted": True}
    thread.join(10)
    assert found["choices"][0]["finish_reason"] == "abort"
    assert found["usage"]["completion_tokens"] < 900
    assert server.post("/abort_request", rid="victim").json() == {"aborted": False}


def test_pause_and_flush(server):
    server.complete(prompt="import os\n" * 12, max_tokens=1)
    assert server.http.post("/flush_cache").json()["values"][0] > 0
    assert server.http.post("/pause").json()["success"]
    with pytest.raises(httpx.TimeoutException):
        server.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2}, timeout=0.5)
    assert server.http.post("/resume").json()["success"]
    assert server.complete(prompt=PROMPT)["choices"]


def test_every_route_except_the_probes_needs_a_key(launch):
    server = launch("--api-key", "first", "second").wait_ready()
    document = server.http.get("/openapi.json")
    assert document.status_code == 401
    second = {"authorization": "Bearer second"}
    paths = server.http.get("/openapi.json", headers=second).json()["paths"]
    for path, operations in paths.items():
        status = 200 if path in ("/livez", "/readyz", "/health") else 401
        for method in operations:
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "first"},
                {"host": "127.0.0.1/readyz"},
                {"authorization": "Bearer"},
            ):
                answer = server.http.request(
                    method, path.replace("{model}", "nano"), headers=headers
                )
                assert answer.status_code == status, path
    for path in (
        "/readyz/../v1/models",
        "//v1/models",
        "/v1/models/",
        "/V1/models",
        "/nowhere",
        "/%72eadyz/x",
    ):
        assert server.http.get(path).status_code == 401, path
    answer = server.http.post(
        "/v1/completions",
        json={"prompt": PROMPT, "max_tokens": 1},
        headers={"authorization": "Bearer first"},
    )
    assert answer.status_code == 200
    assert "first" not in server.log.read_text()
    assert "second" not in server.log.read_text()


def test_queues_and_bodies_are_bounded(launch):
    bounds = {
        "--max-queued-requests": 3,
        "--max-requests-per-client": 2,
        "--max-body-bytes": 20000,
        "--max-queued-tokens": 600,
    }
    server = launch(*(str(word) for item in bounds.items() for word in item)).wait_ready()
    with contextlib.ExitStack() as stack:
        lines = []  # keeps the generators, which would close their streams
        for _ in range(2):
            stream = stack.enter_context(
                server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True})
            )
            lines.append(stream.iter_lines())
            next(lines[-1])
        refused = server.post("/v1/completions", prompt=PROMPT)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
    server.wait_idle()
    assert server.post("/v1/completions", prompt="a" * 30000).status_code == 413
    chunked = server.http.post("/v1/completions", content=(b"x" * 5000 for _ in range(10)))
    assert chunked.status_code == 413
    full = server.post("/v1/completions", prompt=[[5] * 400, [6] * 400], max_tokens=1)
    assert full.status_code == 503
    assert "retry-after" in full.headers
    server.wait_idle()


def test_a_killed_engine_ends_its_requests_and_restarts(launch):
    server = launch().wait_ready()
    (engine,) = server.engine_pids()
    answers = []

    def send(streams):
        with httpx.Client(base_url=server.url, timeout=30) as http:
            answer = http.post("/v1/completions", json=LONG | {"stream": streams})
            answers.append((answer.status_code, answer.text))

    threads = [threading.Thread(target=send, args=(i % 2 == 0,)) for i in range(6)]
    for thread in threads:
        thread.start()
    while (
        server.http.get("/load").json()["server_load"] < 6 or server.metric("slipway_running") < 6
    ):
        time.sleep(0.01)
    os.kill(engine, signal.SIGKILL)
    killed = time.monotonic()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - killed < 5
    assert len(answers) == 6, "every request must end"
    for status, text in answers:
        assert status == 503 or (
            status == 200 and '"error"' in text and text.endswith("data: [DONE]\n\n")
        )
    assert server.http.get("/readyz").status_code == 503
    assert server.http.get("/livez").status_code == 200
    assert server.post("/v1/completions", prompt=PROMPT).status_code == 503
    server.wait_ready()
    assert server.complete(prompt=PROMPT)["choices"]
    assert server.engine_pids() != [engine]


def test_sigterm_lets_running_requests_finish(launch):
    server = launch().wait_ready()
    found = []
    thread = threading.Thread(
        target=lambda: found.append(
            events(server.post("/v1/completions", **LONG | {"stream": True}))
        )
    )
    thread.start()
    while server.http.get("/load").json()["server_load"] == 0:
        time.sleep(0.005)
    server.process.send_signal(signal.SIGTERM)
    thread.join(60)
    assert found[0][-1]["choices"][0]["finish_reason"] == "length", (
        "the request must run to its end"
    )
    assert server.process.wait(30) == 0


def test_sigterm_aborts_requests_that_take_too_long(launch):
    server = launch("--drain-timeout-s", "0.2", "--max-model-len", "1000").wait_ready()
    found = []
    many = LONG | {"stream": True, "n": 8}
    thread = threading.Thread(
        target=lambda: found.append(events(server.post("/v1/completions", **many)))
    )
    thread.start()
    while server.http.get("/load").json()["server_load"] == 0:
        time.sleep(0.005)
    server.process.send_signal(signal.SIGTERM)
    thread.join(60)
    reasons = {choice["finish_reason"] for event in found[0] for choice in event["choices"]}
    assert reasons - {None} == {"abort"}
    assert server.process.wait(30) == 0


def test_a_model_that_cannot_be_loaded_ends_the_server_with_a_reason(launch, tmp_path):
    server = launch("--max-num-batched-tokens", "8", "--memory-fraction", "0.0000001")
    assert server.process.wait(120) == 2
    assert "OutOfMemory" in server.log.read_text()
    assert "memory_fraction" in server.log.read_text()


def test_two_replicas_share_the_work(launch):
    server = launch("--replicas", "2").wait_ready()
    deadline = time.monotonic() + 300
    while server.metric("slipway_engines_running") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    expected = server.choice(prompt=PROMPT)["text"]
    (first, second) = server.engine_pids()
    os.kill(first, signal.SIGKILL)
    while server.metric("slipway_engines_running") == 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.choice(prompt=PROMPT)["text"] == expected, "the other replica answers"
    assert second in server.engine_pids()
