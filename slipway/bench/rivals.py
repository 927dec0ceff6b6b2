"""The engines that are timed, each in a process of its own: decides how they start, answer and are weighed."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slipway.bench import llama_cpp, vllm

CACHE = Path.home() / ".cache" / "slipway" / "peers"


class Worker:
    """An engine behind bench/load.py's pipe."""

    def __init__(
        self, name: str, directory: Path, dtype: str, max_model_len: int, max_num_seqs: int, cache: Path | None = None
    ):
        """``cache``: where ours keeps compiled programs, instead of the user's cache."""
        python, script = [sys.executable, "-m", "slipway.bench.worker", name], []
        variables = {"HF_HUB_OFFLINE": "1"}
        if name == "vllm":
            python, script = [str(vllm.environment()), "-P"], [str(Path(__file__).parent / "worker_vllm.py")]
            variables |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
        elif cache is not None:
            variables["XDG_CACHE_HOME"] = str(cache)
        self._name, self._errors = name, tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [*python, *script, str(directory), dtype, str(max_model_len), str(max_num_seqs)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=os.environ | variables,
        )  # fmt: skip
        self._read()
        self.drive([[7, 8]], 1, 1)
        self.start_s = time.perf_counter() - started

    def drive(self, prompts: Sequence[list[int]], max_tokens: int, concurrency: int) -> dict[str, Any]:
        """As bench/load.py's."""
        load = {"prompts": list(prompts), "max_tokens": max_tokens, "concurrency": concurrency}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(load) + "\n")
        self._process.stdin.flush()
        return self._read()

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""
        run = self.drive([prompt], 1, 1)
        return run["times"][0][0] - run["started"][0]

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Seconds of a step of all prompts together."""
        run = self.drive(prompts, steps + 1, len(prompts))
        first, last = max(times[0] for times in run["times"]), max(times[-1] for times in run["times"])
        return (last - first) / steps

    def peak_mb(self) -> float:
        """Peak resident memory of the process and of those it started."""
        return _peak_mb(self._process.pid)

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            tail = self._errors.read()[-2000:].decode(errors="replace")
            raise RuntimeError(f"{self._name} ended with {self._process.wait()}:\n{tail}")
        return json.loads(line)


class LlamaCpp:
    """llama.cpp's tools, and its server while requests are timed."""

    def __init__(self, model: Path, max_model_len: int, max_num_seqs: int, threads: int, serves: bool):
        """``serves``: with a server, beside its tools."""
        self._binaries, self._model, self._threads = llama_cpp.environment(CACHE / "llama.cpp"), model, threads
        self._server: llama_cpp.Server | None = None
        if not serves:
            return
        started = time.perf_counter()
        self._server = llama_cpp.Server(self._binaries, model, max_num_seqs, max_model_len, threads)
        self._server.drive([[7, 8]], 1, 1)
        self.start_s = time.perf_counter() - started

    def drive(self, prompts: Sequence[list[int]], max_tokens: int, concurrency: int) -> dict[str, Any]:
        """As bench/load.py's, through the server."""
        assert self._server is not None
        return self._server.drive(prompts, max_tokens, concurrency)

    def prefill(self, prompt: list[int]) -> float:
        """Seconds of a prompt, by llama-bench."""
        return llama_cpp.prefill(self._binaries, self._model, len(prompt), self._threads)

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Seconds of a step, by llama-batched-bench."""
        return llama_cpp.decode(self._binaries, self._model, len(prompts), steps, self._threads)

    def peak_mb(self) -> float:
        """Of the server."""
        assert self._server is not None
        return _peak_mb(self._server.process.pid)

    def stop(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.stop()


def _peak_mb(pid: int) -> float:
    total = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            status = (process / "status").read_text()
        except (OSError, IndexError):
            continue
        if int(process.name) == pid or parent == pid:
            total += int(status.partition("VmHWM:")[2].split()[0]) / 1e3 if "VmHWM:" in status else 0.0
    return total
