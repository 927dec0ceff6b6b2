"""Child process that holds one engine, seen from its parent: its start, its loads, its memory.

Not here: what runs in the child (worker.py), the loads (driver.py).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORKER = (sys.executable, "-P", "-m", "slipway.bench.worker")


class EngineProcess:
    """An engine in a child process that answers driver.py's loads over a pipe.

    ``start_s``: seconds from the start of the process to the end of its first request.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        *,
        command: Sequence[str] | None = None,
        variables: Mapping[str, str] | None = None,
    ):
        """Start the process and wait until it has answered one request.

        ``command``: the words that start the child, by default worker.py with ``name``, one of its
        engines. ``variables``: additions to the environment. Raises RuntimeError with the end of
        the child's stderr if it exits.
        """
        self._name = name
        # closed with the process
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        words = [*(command or (*WORKER, name)), str(directory), dtype]
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [*words, str(max_model_len), str(max_num_seqs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | dict(variables or {}),
        )
        self._read()
        self.drive([[7, 8]], max_tokens=1, concurrency=1)
        self.start_s = time.perf_counter() - started

    def drive(
        self, prompts: Sequence[list[int]], max_tokens: int, concurrency: int
    ) -> dict[str, Any]:
        """Run a load in the child, and return the times that driver.drive returns."""
        load = {"prompts": list(prompts), "max_tokens": max_tokens, "concurrency": concurrency}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(load) + "\n")
        self._process.stdin.flush()
        return self._read()

    def prefill(self, prompt: list[int]) -> float:
        """Return the seconds from the start of a request to its first token."""
        run = self.drive([prompt], max_tokens=1, concurrency=1)
        return run["times"][0][0] - run["started"][0]

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Return the seconds of one decode step of all prompts together."""
        run = self.drive(prompts, max_tokens=steps + 1, concurrency=len(prompts))
        first = max(times[0] for times in run["times"])
        last = max(times[-1] for times in run["times"])
        return (last - first) / steps

    def peak_mb(self) -> float:
        """Return the peak resident memory of the process and of its children, in MB."""
        return peak_mb(self._process.pid)

    def stop(self) -> None:
        """End the process: its standard input is closed, and it exits at the end of its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            tail = self._errors.read()[-2000:].decode(errors="replace")
            raise RuntimeError(f"{self._name} exited with {self._process.wait()}:\n{tail}")
        return json.loads(line)


def peak_mb(pid: int) -> float:
    """Return the sum of the peak resident memory of a process and of its children, in MB."""
    total = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            status = (process / "status").read_text()
        except (OSError, IndexError):
            continue
        if pid in (int(process.name), parent) and "VmHWM:" in status:
            total += int(status.partition("VmHWM:")[2].split()[0]) / 1e3
    return total
