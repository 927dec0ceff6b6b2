"""A file of batch requests: every line gets its answer, in its place, as the server would give it."""

import json
import subprocess
import sys

import pytest

from tests.server.conftest import SMALL

pytestmark = pytest.mark.xdist_group("server")
CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 5}


def test_every_line_is_answered_in_its_place(server, tmp_path):
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "def f(", "temperature": 0}},
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": CHAT},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "temperature": -1}},
        {"custom_id": "d", "method": "GET", "url": "/v1/models", "body": {}},
        {"custom_id": "e", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "stream": True}},
    ] + [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"prompt": f"{i}", "temperature": 0}}
        for i in range(30)
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("\n".join([*map(json.dumps, lines), "no JSON", ""]))
    code = "from slipway.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "run-batch",
        "-i",
        tmp_path / "in.jsonl",
        "-o",
        tmp_path / "out.jsonl",
        *SMALL,
    ]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 1 and "4 requests failed" in run.stderr, run.stderr[-2000:]
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["custom_id"] for each in found] == [*(line["custom_id"] for line in lines), None]
    expected = server.complete(prompt="def f(", max_tokens=16)["choices"][0]["text"]
    assert (
        found[0]["response"]["body"]["choices"][0]["text"] == expected and found[0]["error"] is None
    )
    chat = server.post("/v1/chat/completions", **CHAT).json()["choices"][0]["message"]["content"]
    assert found[1]["response"]["body"]["choices"][0]["message"]["content"] == chat
    assert [each["error"]["code"] for each in found if each["error"]] == ["400"] * 4
    assert "temperature" in found[2]["error"]["message"]


def test_the_environment_is_collected():
    code = "from slipway.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", code, "collect-env"], capture_output=True, text=True
    )
    found = json.loads(run.stdout)
    assert found["versions"]["jax"] and found["devices"] and found["c++ kernels"]


def test_names_that_users_bring_are_understood(launch):
    server = launch(
        "--max-running-requests", "4", "--served-model-name", "mine", "--trust-remote-code"
    ).wait_ready()
    info = server.http.get("/server_info").json()
    assert info["engine"]["max_num_seqs"] == 4 and info["model"] == "mine"
