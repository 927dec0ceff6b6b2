"""Clients that hang up, abort and send nonsense by the hundred, under load: afterwards all is as it was."""

import asyncio
import json
import os
import random
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
    """One client that means no good."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        kind = rng.choice(["garbage", "half", "malformed", "malformed", "hang up", "hang up", "hang up", "abort"])
        if kind == "garbage":
            writer.write(rng.randbytes(rng.randrange(1, 400)) + b"\r\n\r\n")
        elif kind == "half":
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{")
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
        pass  # the server may hang up, too
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()


def chain(size):
    """A schema whose definitions each name the next."""
    links = {
        f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}, "required": ["x"]}
        for i in range(size)
    }
    return {"$defs": links | {f"a{size}": {"type": "integer"}}, "$ref": "#/$defs/a0"}


RULES = "\n".join(f'r{i} ::= r{i + 1} "a"' for i in range(9000))
DEEP = {
    "a schema": {"guided_json": chain(2500)}, "EBNF": {"ebnf": f'root ::= r0\n{RULES}\nr9000 ::= "a"'},
    "Lark": {"guided_grammar": f'start: r0\n{RULES.replace("::=", ":")}\nr9000: "a"'},
    "tags": {"structured_outputs": {"structural_tag": {
        "structures": [{"begin": "x", "schema": chain(2500), "end": ""}], "triggers": ["x"]}}},
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_a_grammar_that_ends_who_builds_it_ends_no_engine(server, name):
    engines = server.engine_pids()
    for _ in range(2):
        answer = server.post("/v1/completions", prompt="def f(", max_tokens=2, **DEEP[name])
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "structured_outputs", answer.text
        fine = server.complete(prompt="def f(", guided_json=chain(20), max_tokens=2)
        assert fine["choices"][0]["text"].lstrip().startswith("{")
    assert server.engine_pids() == engines


def post(body, path="/v1/completions"):
    return (f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            ).encode() + body  # fmt: skip


async def attacks(port, count, seed):
    gate = asyncio.Semaphore(32)

    async def one(number):
        async with gate:
            await attack(port, random.Random(seed + number), number + seed)

    await asyncio.gather(*(one(number) for number in range(count)))


def held(pid):
    """Open files and resident bytes of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return len(os.listdir(f"/proc/{pid}/fd")), resident * 1024


def test_everything_returns_to_where_it_was(launch):
    server = launch().wait_ready()
    (engine,) = server.engine_pids()
    expected = server.complete(prompt="def read(path):")["choices"][0]["text"]
    asyncio.run(attacks(server.port, COUNT // 3, 10**6))  # what is allocated once is allocated now
    server.wait_idle(30)
    before = held(server.process.pid), held(engine)
    asyncio.run(attacks(server.port, COUNT, 0))
    server.wait_idle(30)
    deadline = time.monotonic() + 20
    while held(server.process.pid)[0] > before[0][0] + 4 or server.http.get("/load").json()["server_load"]:
        assert time.monotonic() < deadline, server.http.get("/load").json()
        time.sleep(0.2)
    after = held(server.process.pid), held(engine)
    for name, (files, size), (files_then, size_then) in zip(("server", "engine"), after, before):
        assert files <= files_then + 4, f"{name}: {files} files open, {files_then} before"
        assert size - size_then < 40 * 2**20, f"{name} grew by {(size - size_then) >> 20} MiB"
    assert server.engine_pids() == [engine]
    assert server.complete(prompt="def read(path):")["choices"][0]["text"] == expected
    assert "Traceback" not in server.log.read_text()
