"""`slipway run-batch`: each line of a file gets the response that the server would give."""

import json
import subprocess

import pytest

from tests.server.conftest import COMMAND, SMALL

pytestmark = pytest.mark.xdist_group("server")
CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 5}


def request(custom_id, **body):
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def test_every_line_gets_its_response_in_order(server, tmp_path):
    lines = [
        request("a", prompt="def f(", temperature=0),
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": CHAT},
        request("c", prompt="x", temperature=-1),
        {"custom_id": "d", "method": "GET", "url": "/v1/models", "body": {}},
        request("e", prompt="x", stream=True),
        *(request(str(i), prompt=f"{i}", temperature=0) for i in range(30)),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join([*map(json.dumps, lines), "no JSON", ""]))
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    command = [*COMMAND, "run-batch", *files, *SMALL]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr[-2000:]
    assert "4 requests failed" in run.stderr, run.stderr[-2000:]
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["custom_id"] for each in found] == [*(line["custom_id"] for line in lines), None]
    expected = server.choice(prompt="def f(", max_tokens=16)["text"]
    assert found[0]["response"]["body"]["choices"][0]["text"] == expected
    assert found[0]["error"] is None
    chat = server.post("/v1/chat/completions", **CHAT).json()["choices"][0]["message"]["content"]
    assert found[1]["response"]["body"]["choices"][0]["message"]["content"] == chat
    assert [each["error"]["code"] for each in found if each["error"]] == ["400"] * 4
    assert "temperature" in found[2]["error"]["message"]


def test_collect_env_prints_versions_and_devices():
    run = subprocess.run([*COMMAND, "collect-env"], capture_output=True, text=True)
    found = json.loads(run.stdout)
    assert found["versions"]["jax"]
    assert found["devices"]
    assert found["c++ kernels"]


def test_option_names_of_other_servers_are_accepted(launch):
    server = launch(
        "--max-running-requests", "4", "--served-model-name", "mine", "--trust-remote-code"
    ).wait_ready()
    info = server.http.get("/server_info").json()
    assert info["engine"]["max_num_seqs"] == 4
    assert info["model"] == "mine"
