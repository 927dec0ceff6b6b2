"""Hundreds of hostile clients at once: disconnects, aborts, malformed requests, deep grammars."""

import asyncio
import contextlib
import json
import os
import random
import socket
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("server")
COUNT = int(os.environ.get("SLIPWAY_ATTACKS", "1500"))
BODIES = [
    b"{",
    b"\x00\xff",
    b"[]",
    b'{"prompt": 5}',
    b'{"prompt": "a", "n": 99999999999999999999}',
    b'{"prompt": "a", "stop": [""]}',
    b'{"prompt": "a", "logit_bias": {"-1": 1}}',
    b'{"prompt": [1, -2]}',
    b'{"prompt": "a", "guided_regex": "("}',
]


async def attack(port, rng, number):
    """Run one hostile client."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        kind = rng.choice(
            ["garbage", "half", "malformed", "malformed", "hang up", "hang up", "hang up", "abort"]
        )
        if kind == "garbage":
            writer.write(rng.randbytes(rng.randrange(1, 400)) + b"\r\n\r\n")
        elif kind == "half":
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{"
            )
        elif kind == "malformed":
            writer.write(post(rng.choice(BODIES)))
        else:
            body = {
                "prompt": "def f(",
                "max_tokens": rng.randrange(1, 300),
                "ignore_eos": True,
                "stream": rng.random() < 0.5,
                "n": rng.randrange(1, 4),
                "request_id": f"attack-{number}",
                "temperature": rng.random(),
            }
            writer.write(post(json.dumps(body).encode()))
        await writer.drain()
        await asyncio.sleep(rng.random() * 0.05)
        if kind == "abort":
            _, other = await asyncio.open_connection("127.0.0.1", port)
            other.write(post(json.dumps({"rid": f"attack-{number}"}).encode(), "/abort_request"))
            await other.drain()
            await asyncio.sleep(0.01)
            other.close()
    except ConnectionError:
        pass  # the server may close the connection, too
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()


def chain(size):
    """Return a JSON schema with a chain of references of the given length."""
    links = {
        f"a{i}": {
            "type": "object",
            "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}},
            "required": ["x"],
        }
        for i in range(size)
    }
    return {"$defs": links | {f"a{size}": {"type": "integer"}}, "$ref": "#/$defs/a0"}


RULES = "\n".join(f'r{i} ::= r{i + 1} "a"' for i in range(9000))
DEEP_TAG = {
    "structures": [{"begin": "x", "schema": chain(2500), "end": ""}],
    "triggers": ["x"],
}
DEEP = {
    "a schema": {"guided_json": chain(2500)},
    "EBNF": {"ebnf": f'root ::= r0\n{RULES}\nr9000 ::= "a"'},
    "Lark": {"guided_grammar": f'start: r0\n{RULES.replace("::=", ":")}\nr9000: "a"'},
    "tags": {"structured_outputs": {"structural_tag": DEEP_TAG}},
}


@pytest.mark.parametrize("name", DEEP)
def test_a_grammar_that_crashes_its_compilation_leaves_the_engine_alive(server, name):
    engines = server.engine_pids()
    for _ in range(2):
        answer = server.post("/v1/completions", prompt="def f(", max_tokens=2, **DEEP[name])
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].startswith(next(iter(DEEP[name]))), answer.text
        fine = server.complete(prompt="def f(", guided_json=chain(20), max_tokens=2)
        assert fine["choices"][0]["text"].lstrip().startswith("{")
    assert server.engine_pids() == engines


@pytest.fixture
def trap():
    """Listening socket that the server must not connect to, and its URL."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.settimeout(0.3)
        yield listening, f"http://127.0.0.1:{listening.getsockname()[1]}/x"


def test_nothing_is_fetched_for_a_client(server, trap):
    listening, url = trap
    chat, completion = "/v1/chat/completions", "/v1/completions"
    image = {"type": "image_url", "image_url": {"url": url}}
    audio = {"type": "input_audio", "input_audio": {"data": url}}
    for path, body in (
        (chat, {"messages": [{"role": "user", "content": [image]}]}),
        (chat, {"messages": [{"role": "user", "content": [audio]}]}),
        (completion, {"prompt": "a", "guided_json": {"$ref": url}}),
    ):
        answer = server.post(path, max_tokens=2, **body)
        assert answer.status_code == 400, answer.text
    names = {"$schema": url, "$id": url, "properties": {"a": {"$ref": "x"}}}
    assert server.post(completion, prompt="a", max_tokens=2, guided_json=names).status_code < 500
    with pytest.raises(TimeoutError):
        listening.accept()


def test_names_in_requests_open_no_files(server):
    for name in (
        "../../etc/passwd",
        "/etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "nano/../..",
    ):
        for path in (f"/v1/models/{name}", f"/{name}", f"/docs/{name}"):
            answer = server.http.get(path)
            assert answer.status_code == 404, path
            assert "root:" not in answer.text, path
    for body in (
        {"model": "../../etc/passwd", "prompt": "a"},
        {"model": "/etc/passwd", "prompt": "a"},
    ):
        assert server.post("/v1/completions", **body).status_code == 404
    for field in ("chat_template", "lora_path"):  # fields that open files in other servers
        answer = server.post("/v1/completions", prompt="a", max_tokens=1, **{field: "/etc/passwd"})
        assert field in answer.headers["x-slipway-warning"]
        assert "root:" not in answer.text
    answer = server.post("/v1/completions", prompt_embeds="/etc/passwd", max_tokens=1)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt_embeds"


def test_engine_sockets_are_private_to_their_user(server):
    (engine,) = server.engine_pids()
    address = Path(f"/proc/{engine}/cmdline").read_bytes().split(b"\0")[-2].decode()
    assert address.startswith("ipc://"), "engines must not listen on a port"
    assert Path(address.removeprefix("ipc://")).parent.stat().st_mode & 0o777 == 0o700


def test_endless_request_heads_are_refused(server):
    with (
        socket.create_connection(("127.0.0.1", server.port), 10) as connection,
        contextlib.suppress(ConnectionError),
    ):
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n")
        for _ in range(1000):
            connection.sendall(b"x-a: " + b"a" * 1000 + b"\r\n")
            time.sleep(0.0002)
        raise AssertionError("the server accepted a megabyte")
    assert server.http.get("/livez").status_code == 200


def post(body, path="/v1/completions"):
    """Return the bytes of a POST request."""
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def attacks(port, count, seed):
    """Run many hostile clients, 32 at a time."""
    semaphore = asyncio.Semaphore(32)

    async def one(number):
        async with semaphore:
            await attack(port, random.Random(seed + number), number + seed)

    await asyncio.gather(*(one(number) for number in range(count)))


def usage(pid):
    """Return the number of open files and the resident bytes of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(
        int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")
    )
    return len(os.listdir(f"/proc/{pid}/fd")), resident * 1024


def test_resources_return_to_their_level_after_attacks(launch):
    server = launch().wait_ready()
    (engine,) = server.engine_pids()
    expected = server.choice(prompt="def read(path):")["text"]
    # First attacks, so that everything that is allocated only once is allocated.
    asyncio.run(attacks(server.port, COUNT // 3, 10**6))
    server.wait_idle(30)
    before = usage(server.process.pid), usage(engine)
    asyncio.run(attacks(server.port, COUNT, 0))
    server.wait_idle(30)
    deadline = time.monotonic() + 20
    while (
        usage(server.process.pid)[0] > before[0][0] + 4
        or server.http.get("/load").json()["server_load"]
    ):
        assert time.monotonic() < deadline, server.http.get("/load").json()
        time.sleep(0.2)
    after = usage(server.process.pid), usage(engine)
    for name, (files, size), (files_then, size_then) in zip(("server", "engine"), after, before):
        assert files <= files_then + 4, f"{name}: {files} files open, {files_then} before"
        assert size - size_then < 40 * 2**20, f"{name} grew by {(size - size_then) >> 20} MiB"
    assert server.engine_pids() == [engine]
    assert server.choice(prompt="def read(path):")["text"] == expected
    assert "Traceback" not in server.log.read_text()
