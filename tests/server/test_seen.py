"""Output of a server with all flags: CORS headers, log lines, metrics, traces."""

import json
import socket
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from slipway.errors import InvalidConfig
from slipway.server.config import ServerConfig
from tests.server.conftest import Server

pytestmark = pytest.mark.xdist_group("server")
GOOD, BAD = "https://good.example", "https://bad.example"
KEY = {"authorization": "Bearer sesame"}
FORGED = '{"forged": 1}'


@pytest.fixture(scope="module")
def open_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    server = Server(
        folder,
        "--allow-origins",
        GOOD,
        "--log-format",
        "json",
        "--vllm-metric-names",
        "--api-key",
        "sesame",
        "--admin-api-key",
        "crown",
        "--profile-dir",
        str(folder / "traces"),
    )
    try:
        server.wait_ready()
        server.http.headers.update(KEY)
        yield server
        server.wait_idle()
    finally:
        server.http.close()
        server.process.kill()
        server.process.wait()


def lines(server):
    """Return all lines of a JSON log."""
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_only_allowed_origins_get_cors_headers(open_server, server):
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    allowed = httpx.options(
        f"{open_server.url}/v1/completions", headers={"origin": GOOD} | preflight
    )
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == GOOD
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    refused = httpx.options(
        f"{open_server.url}/v1/completions", headers={"origin": BAD} | preflight
    )
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers
    for origin, named in (
        (GOOD, True),
        (BAD, False),
        ("null", False),
        (f"{GOOD}.evil.example", False),
    ):
        answer = open_server.http.get("/v1/models", headers={"origin": origin})
        assert answer.status_code == 200
        assert ("access-control-allow-origin" in answer.headers) == named
    unknown = httpx.get(f"{open_server.url}/v1/models", headers={"origin": GOOD})
    assert unknown.status_code == 401
    assert unknown.headers["access-control-allow-origin"] == GOOD, "a page may read the reason"
    plain = server.http.get("/v1/models", headers={"origin": GOOD})
    assert not any(name.startswith("access-control") for name in plain.headers), "off by default"


def raw(server, text):
    """Send bytes that an HTTP client would refuse to send."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(text.encode("latin-1"))
        connection.settimeout(10)
        return connection.recv(65536)


def attempts(server):
    """Send requests that try to forge log lines, through everything that is logged."""
    post = {"prompt": "def f(", "max_tokens": 1}
    assert server.http.get(f"/v1/models%0a{FORGED}").status_code == 404
    assert server.http.get(f"/%0d%0a{FORGED}", params={"a\n": FORGED}).status_code == 404
    assert server.post("/v1/completions", **post, request_id=f"a\n{FORGED}").status_code == 400
    answer = server.post(
        "/v1/completions", **post, **{f"field\n{FORGED}\u2028": 1, f"\r\n{FORGED}": 2}
    )
    assert answer.status_code == 200
    assert server.post("/v1/completions", **post, model=f"\n{FORGED}").status_code == 404
    for text in (
        f"GET / HTTP/1.1\r\nHost: a\r\nx-request-id: a\n{FORGED}\r\n\r\n",
        f"GET /\n{FORGED} HTTP/1.1\r\n\r\n",
    ):
        raw(server, text)


def test_json_lines_parse_and_cannot_be_forged(open_server):
    before = len([line for line in lines(open_server) if line["message"] == "request"])
    attempts(open_server)
    open_server.complete(prompt="def f(", request_id="mine")
    wait_for(lambda: any(line.get("id") == "mine" for line in lines(open_server)))
    found = lines(open_server)
    assert not [line for line in found if "forged" in line]
    assert {"time", "level", "name", "message"} <= found[0].keys()
    access = [line for line in found if line["message"] == "request"][before:]
    assert all(line.keys() >= {"method", "route", "status", "ms", "id"} for line in access)
    (mine,) = [line for line in access if line["id"] == "mine"]
    fields = mine["method"], mine["route"], mine["status"]
    assert fields == ("POST", "/v1/completions", 200)
    assert mine["ms"] > 0
    assert [line["route"] for line in access if line["status"] == 404][:2] == ["unknown"] * 2
    messages = [line["message"] for line in found]
    assert any("unknown fields ignored" in each for each in messages), "attempts reach the log"


def test_text_lines_cannot_be_forged(server):
    attempts(server)
    server.complete(prompt="def f(", request_id="the-last-one")
    wait_for(lambda: "the-last-one" in server.log.read_text())
    text = server.log.read_text()
    assert "unknown fields ignored" in text
    assert not [line for line in text.splitlines() if line.startswith("{")]


# vLLM's metric -> its growth by two requests of 12 tokens each; None: any growth.
KNOWN = {
    "num_requests_running": 0,
    "num_requests_waiting": 0,
    "kv_cache_usage_perc": 0,
    "num_preemptions_total": 0,
    "prompt_tokens_total": "prompt",
    "generation_tokens_total": 24,
    "request_success_total": 2,
    "prefix_cache_queries_total": "prompt",
    "prefix_cache_hits_total": None,
    "time_to_first_token_seconds_count": 2,
    "inter_token_latency_seconds_count": 22,
    "e2e_request_latency_seconds_count": 2,
    "request_queue_time_seconds_count": 2,
}


def samples(server, prefix):
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    found = {}
    all_samples = [sample for family in families for sample in family.samples]
    for sample in all_samples:
        if not sample.name.startswith(prefix):
            continue
        assert sample.labels["model_name"] == "nano"
        name = sample.name.removeprefix(prefix)
        found[name] = found.get(name, 0) + sample.value
    return found


def test_vllms_metric_names_have_true_values(open_server, server):
    before = samples(open_server, "vllm:")
    used = [open_server.complete(prompt="def g(x):", ignore_eos=True)["usage"] for _ in range(2)]
    open_server.wait_idle()
    after = samples(open_server, "vllm:")
    prompt = sum(usage["prompt_tokens"] for usage in used)
    for name, expected in KNOWN.items():
        grown = after[name] - before.get(name, 0)
        assert expected is None or grown == (prompt if expected == "prompt" else expected), name
    name = "e2e_request_latency_seconds_sum"
    assert 0 < after[name] - before.get(name, 0) < 60
    assert "vllm:" not in server.http.get("/metrics").text, "only with the flag"


def test_profiling_needs_an_admin_key_and_a_directory(open_server, server, tmp_path):
    for path in ("/start_profile", "/stop_profile"):
        assert server.http.post(path).status_code == 404, "no route without the flag"
        assert httpx.post(f"{open_server.url}{path}").status_code == 401, "no trace without a key"
        assert open_server.http.post(path).status_code == 401, "no trace with a client's key"
    crown = {"authorization": "Bearer crown"}
    assert open_server.http.post("/stop_profile", headers=crown).status_code == 400, "no trace runs"
    started = open_server.http.post("/start_profile", headers=crown).json()
    assert started == {"success": True, "engines": 1}
    assert open_server.http.post("/start_profile", headers=crown).status_code == 400, (
        "a trace runs already"
    )
    assert open_server.complete(prompt="def f(")["choices"]
    assert open_server.http.post("/stop_profile", headers=crown).json()["success"]
    (trace,) = (open_server.log.parent / "traces" / "engine-0").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    info = open_server.http.get("/server_info").text
    assert str(Path(trace).parents[4]) not in info
    assert "sesame" not in info
    assert "crown" not in info
    with pytest.raises(InvalidConfig) as caught:
        ServerConfig(profile_dir=tmp_path, api_key=("sesame",))
    assert caught.value.field == "profile_dir"
