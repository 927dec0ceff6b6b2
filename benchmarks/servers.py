"""OpenAI-compatible servers that are timed over HTTP, each in a process group of its own.

Not here: llama.cpp's server (llama_cpp.py), engines timed without HTTP (engines.py).
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import environments
from slipway.bench import client
from slipway.server.process import run_event_loop

READY_TIMEOUT_S = 600
VLLM_MODULE = "vllm.entrypoints.openai.api_server"
VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


class HttpServer:
    """Slipway's or vLLM's server under streamed requests of token ids.

    Without a tokenizer, each event carries token ids instead of text. ``start_s``: seconds from the
    start of the process to the end of its first request.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        max_model_len: int,
        max_num_seqs: int,
        tokenizer: bool,
    ):
        """Start the server and wait until it has answered one request.

        Raises RuntimeError, with the end of its output, if it does not become ready.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        options = ["--port", str(port), "--max-model-len", str(max_model_len)]
        options += ["--max-num-seqs", str(max_num_seqs), "--dtype", "bfloat16"]
        options += ["--served-model-name", "model"]
        options += [] if tokenizer else ["--skip-tokenizer-init"]
        # closed with the process
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [*_command(name, directory), *options],
            stdout=self._output,
            stderr=self._output,
            env=os.environ | VARIABLES,
            start_new_session=True,
        )
        self._wait_ready()
        self.drive([[7, 8]], max_tokens=1, concurrency=1)
        self.start_s = time.perf_counter() - started

    def drive(
        self, prompts: Sequence[list[int]], max_tokens: int, concurrency: int
    ) -> dict[str, Any]:
        """Run a load, and return the times that driver.drive returns.

        Each client sends its next prompt when its last request has ended. Raises RuntimeError for a
        request that fails.
        """
        return run_event_loop(self._drive(prompts, max_tokens, concurrency))

    def peak_mb(self) -> float:
        """Return the sum of the peak resident memory of all its processes, in MB."""
        total = 0.0
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ProcessLookupError):
                if os.getpgid(int(process.name)) == self._process.pid:
                    status = (process / "status").read_text()
                    if "VmHWM:" in status:
                        total += int(status.partition("VmHWM:")[2].split()[0]) / 1e3
        return total

    def stop(self) -> None:
        """End the server and all processes that it has started."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _drive(
        self, prompts: Sequence[list[int]], max_tokens: int, concurrency: int
    ) -> dict[str, Any]:
        begin, waiting = time.perf_counter(), iter(range(len(prompts)))
        started, times = [0.0] * len(prompts), [list[float]() for _ in prompts]
        options = {
            "model": "model",
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }

        async def one_client() -> None:
            for number in waiting:
                body = options | {"prompt": prompts[number]}
                timed = await client.complete(self._url, "/v1/completions", body)
                if not timed.ok:
                    raise RuntimeError(f"a request failed: {timed.status} {timed.error}")
                started[number] = timed.sent - begin
                times[number] = [arrival - begin for arrival in timed.events]

        await asyncio.gather(*(one_client() for _ in range(concurrency)))
        return {"started": started, "times": times}

    def _wait_ready(self) -> None:
        url = f"{self._url}/health"
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(url, timeout=5) as response,
            ):
                if response.status == 200:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        self._output.seek(0)
        tail = self._output.read()[-2000:].decode(errors="replace")
        raise RuntimeError(f"the server did not become ready:\n{tail}")


def _command(name: str, directory: Path) -> list[str]:
    """Return the words that start a server, without the options that both servers have."""
    if name == "vllm":
        # not the console script: it needs a package named vllm, and the CPU build is vllm-cpu
        command = [str(environments.vllm()), "-P", "-m", VLLM_MODULE, "--model", str(directory)]
        return [*command, "--host", "127.0.0.1", "--load-format", "safetensors"]
    code = "from slipway.cli import main; main()"
    return [sys.executable, "-c", code, "serve", str(directory)]
