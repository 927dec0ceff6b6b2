"""Fixtures that start servers of the model nano as processes, and helpers for their clients."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

COMMAND = (sys.executable, "-c", "from slipway.cli import main; main()")
SMALL = ("--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--dtype", "float32")


class Server:
    """One process of `slipway serve`, with an HTTP client."""

    def __init__(self, folder: Path, *words: str, model: str = "nano"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        command = [*COMMAND, "serve", model, "--port", str(self.port), *SMALL, *words]
        environment = os.environ | {"XLA_FLAGS": ""}  # one device, as users have
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def wait_ready(self, timeout_s: float = 120) -> "Server":
        """Wait until the server accepts requests."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/readyz").status_code == 200:
                    return self
            time.sleep(0.05)
        raise AssertionError(self.log.read_text()[-3000:])

    def post(self, path: str, /, **body):
        """Send a POST request with a JSON body."""
        return self.http.post(path, json=body)

    def complete(self, **body) -> dict:
        """Return a response of /v1/completions, by default greedy; it must succeed."""
        answer = self.post("/v1/completions", **({"temperature": 0, "max_tokens": 12} | body))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def choice(self, **body) -> dict:
        """Return the first choice of a response of /v1/completions."""
        return self.complete(**body)["choices"][0]

    def engine_pids(self) -> list[int]:
        """Return the process ids of the engines."""
        children = (
            Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        )
        names = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        return [pid for pid, name in names.items() if b"slipway.server.worker" in name]

    def metric(self, name: str) -> float:
        """Return the value of one metric."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(name) and line[len(name)] in " {":
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no {name}")

    def idle(self) -> bool:
        """Return whether no request runs and no page is in use."""
        return self.metric("slipway_running") == self.metric("slipway_kv_cache_usage") == 0

    def wait_idle(self, timeout_s: float = 10) -> None:
        """Wait until no request runs."""
        deadline = time.monotonic() + timeout_s
        while not self.idle():
            assert time.monotonic() < deadline, "a request is still running"
            time.sleep(0.02)

    def stop(self) -> int:
        """Send SIGTERM; return the exit code."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def templated(template, tmp_path_factory):
    """Run a server with a chat template; tests must leave it idle."""
    folder = tmp_path_factory.mktemp("templated")
    (folder / "template.jinja").write_text(template)
    server = Server(folder, "--chat-template", str(folder / "template.jinja"))
    try:
        yield server.wait_ready()
        server.wait_idle()
    finally:
        server.http.close()
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="session")
def _server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        yield server.wait_ready()
        assert server.stop() == 0
    finally:
        server.process.kill()


@pytest.fixture
def server(_server):
    """Shared server: 8 rows of nano in float32; each test must leave it idle."""
    yield _server
    _server.wait_idle()


@pytest.fixture
def launch(tmp_path):
    """Function that starts a server with further options; all servers end with the test."""
    started = []

    def start(*words: str, **options) -> Server:
        started.append(Server(tmp_path, *words, **options))
        return started[-1]

    yield start
    for each in started:
        each.http.close()
        each.process.kill()
        each.process.wait()


def events(answer) -> list:
    """Return the JSON of a stream's events, without the last, which must be [DONE]."""
    lines = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
