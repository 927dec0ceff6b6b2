"""Engines that are timed offline, each in a process of its own: their start, loads and memory.

Not here: engines timed over HTTP (servers.py), how llama.cpp is built and called (llama_cpp.py),
what runs inside the child processes (slipway/bench/worker.py, worker_vllm.py).
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environments, llama_cpp
from slipway.bench.engine_process import EngineProcess, peak_mb

WORKER_VLLM = Path(__file__).with_name("worker_vllm.py")
VLLM_VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}


def start_process(
    name: str,
    directory: Path,
    max_model_len: int,
    max_num_seqs: int,
    *,
    cache: Path | None = None,
    vllm_options: Mapping[str, Any] | None = None,
) -> EngineProcess:
    """Start vLLM, transformers or Slipway in bfloat16.

    ``cache``: folder for Slipway's compiled programs, instead of the user's cache.
    ``vllm_options``: further options of vLLM.
    """
    command, variables = None, {} if cache is None else {"XDG_CACHE_HOME": str(cache)}
    if name == "vllm":
        options = json.dumps(dict(vllm_options or {}))
        command = [str(environments.vllm()), "-P", str(WORKER_VLLM), options]
        variables = VLLM_VARIABLES
    return EngineProcess(
        name,
        directory,
        "bfloat16",
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        command=command,
        variables=variables,
    )


class LlamaCpp:
    """llama.cpp with the methods of EngineProcess: its tools, and its server if requests are timed.

    ``start_s``: seconds from the start of the server to the end of its first request.
    """

    def __init__(
        self, model: Path, max_model_len: int, max_num_seqs: int, *, threads: int, serves: bool
    ):
        """``model``: a GGUF file. ``serves``: start a server, too."""
        self._binaries = llama_cpp.environment(environments.CACHE / "llama.cpp")
        self._model = model
        self._threads = threads
        self._server: llama_cpp.Server | None = None
        if not serves:
            return
        started = time.perf_counter()
        self._server = llama_cpp.Server(
            self._binaries,
            model,
            slots=max_num_seqs,
            max_model_len=max_model_len,
            threads=threads,
        )
        self._server.drive([[7, 8]], max_tokens=1, concurrency=1)
        self.start_s = time.perf_counter() - started

    def drive(
        self, prompts: Sequence[list[int]], max_tokens: int, concurrency: int
    ) -> dict[str, Any]:
        """Run a load through the server, and return the times that driver.drive returns."""
        assert self._server is not None
        return self._server.drive(prompts, max_tokens, concurrency)

    def prefill(self, prompt: list[int]) -> float:
        """Return the seconds of a prompt, measured by llama-bench."""
        return llama_cpp.prefill(
            self._binaries, self._model, tokens=len(prompt), threads=self._threads
        )

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Return the seconds of one decode step, measured by llama-batched-bench."""
        return llama_cpp.decode(
            self._binaries, self._model, batch=len(prompts), steps=steps, threads=self._threads
        )

    def peak_mb(self) -> float:
        """Return the peak resident memory of the server, in MB."""
        assert self._server is not None
        return peak_mb(self._server.process.pid)

    def stop(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.stop()
