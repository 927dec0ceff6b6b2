"""OpenAI-compatible servers that are timed over HTTP, each a process of its own: decides how they start, are asked."""

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
from slipway.server import loop

READY_TIMEOUT_S = 600


class HttpServer:
    """Ours or vLLM's, asked with token ids, streamed; without a tokenizer each event is told by its token ids."""

    def __init__(self, name: str, directory: Path, max_model_len: int, max_num_seqs: int, tokenizer: bool):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._url = f"http://127.0.0.1:{free.getsockname()[1]}"
        options = [
            "--port", self._url.rpartition(":")[2], "--max-model-len", str(max_model_len), "--max-num-seqs",
            str(max_num_seqs), "--dtype", "bfloat16", *([] if tokenizer else ["--skip-tokenizer-init"]),
        ]  # fmt: skip
        if name == "vllm":
            # its console script asks for a package named vllm, which the build for CPUs is not
            module = "vllm.entrypoints.openai.api_server"
            command = [
                str(environments.vllm()),
                "-P",
                "-m",
                module,
                "--model",
                str(directory),
                *options,
            ]
            command += [
                "--host",
                "127.0.0.1",
                "--load-format",
                "safetensors",
                "--served-model-name",
                "model",
            ]
        else:
            code = "from slipway.cli import main; main()"
            command = [
                sys.executable,
                "-c",
                code,
                "serve",
                str(directory),
                *options,
                "--served-model-name",
                "model",
            ]
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
        }
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdout=self._errors,
            stderr=self._errors,
            env=os.environ | variables,
            start_new_session=True,
        )
        self._wait_ready()
        self.drive([[7, 8]], 1, 1)
        self.start_s = time.perf_counter() - started

    def drive(self, prompts: Sequence[list[int]], max_tokens: int, concurrency: int) -> dict[str, Any]:
        """As bench/load.py's: each client sends its next prompt when its last has ended. Raises RuntimeError."""
        return loop.run(self._drive(prompts, max_tokens, concurrency))

    def peak_mb(self) -> float:
        """Peak resident memory of all its processes."""
        total = 0.0
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ProcessLookupError):
                if os.getpgid(int(process.name)) == self._process.pid:
                    status = (process / "status").read_text()
                    total += int(status.partition("VmHWM:")[2].split()[0]) / 1e3 if "VmHWM:" in status else 0.0
        return total

    def stop(self) -> None:
        """End it, and what it has started."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _drive(self, prompts: Sequence[list[int]], max_tokens: int, concurrency: int) -> dict[str, Any]:
        begin, waiting = time.perf_counter(), iter(range(len(prompts)))
        started, times = [0.0] * len(prompts), [list[float]() for _ in prompts]

        async def one() -> None:
            for number in waiting:
                body = {
                    "model": "model", "prompt": prompts[number], "max_tokens": max_tokens, "temperature": 0,
                    "ignore_eos": True, "stream": True, "return_token_ids": True,
                }  # fmt: skip
                timed = await client.complete(self._url, "/v1/completions", body, None)
                if not timed.ok:
                    raise RuntimeError(f"a request failed: {timed.status} {timed.error}")
                started[number], times[number] = (
                    timed.sent - begin,
                    [at - begin for at in timed.events],
                )

        await asyncio.gather(*(one() for _ in range(concurrency)))
        return {"started": started, "times": times}

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self._url}/health", timeout=5) as answer,
            ):
                if answer.status == 200:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        self._errors.seek(0)
        raise RuntimeError(f"the server is not ready:\n{self._errors.read()[-2000:].decode(errors='replace')}")
