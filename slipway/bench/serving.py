"""`slipway bench serving`: how an OpenAI-compatible server holds up under load; decides loads and what is reported.

Without --base-url it starts `slipway serve` itself; with --against-engine the same load goes through AsyncEngine, too,
in the same run, which shows what HTTP costs.
"""

import asyncio
import contextlib
import dataclasses
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from slipway.bench.client import Timed, complete
from slipway.engine.config import EngineConfig
from slipway.errors import InvalidConfig
from slipway.llm import LLM
from slipway.server import heap, loop

READY_S = 600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingBench:
    """Stream completions from a server: at a fixed concurrency, or with Poisson arrivals."""

    base_url: str | None = None
    """Of the server, as http://127.0.0.1:8000/v1; none: `slipway serve` is started for this run."""
    model: str = "nano"
    """What the server calls it; without --base-url, what is served."""
    api_key: str | None = None
    load: Literal["random", "sharegpt", "shared-prefix", "multi-turn"] = "random"
    """random: lengths uniform in the ranges; sharegpt: log-normal, shaped like that data set's; shared-prefix: a
    quarter of --prompt-tokens is the same for all; multi-turn: conversations of four turns, each with all before."""
    num_prompts: int = 256
    prompt_tokens: tuple[int, int] = (16, 128)
    output_tokens: tuple[int, int] = (16, 128)
    vocab: int = 4000
    """Prompts are token ids below this."""
    concurrency: int = 16
    """Requests at a time, where no rate is given."""
    rate: float | None = None
    """Requests a second, with Poisson arrivals."""
    slo_ttft_ms: float = 1000.0
    """A request is good if its first token came by then,"""
    slo_itl_ms: float = 100.0
    """and its tokens, on average, within this of each other: goodput counts those."""
    against_engine: bool = False
    """Run the load through AsyncEngine in this process, too. Only without --base-url."""
    rounds: int = 1
    """How often server and engine take turns."""
    max_num_seqs: int = 256
    """Of a server that is started here, and of the engine."""
    stream_interval: int = 1
    """Of both, too."""
    out: Path | None = None
    """Write the figures here as JSON."""
    plot: Path | None = None
    """Draw the distributions, as PNG; needs matplotlib."""

    def run(self) -> None:
        """Measure, and print a table and the figures."""
        if self.against_engine and self.base_url is not None:
            raise InvalidConfig("against_engine", True, "no base_url: the engine must be the server's")
        if self.rounds < 1:
            raise InvalidConfig("rounds", self.rounds, "at least 1")
        requests, rounds = self._requests(), list[dict[str, Any]]()
        for _ in range(self.rounds):
            with self._served() as (base_url, ready_s):
                timed, seconds = loop.run(self._drive(requests, self._over_http(base_url)))
            started = {} if ready_s is None else {"process start to ready_s": round(ready_s, 2)}
            rounds.append({"server": started | self._figures(timed, seconds)})
            if self.against_engine:
                with LLM(self.model, **self._engine_options()) as llm:
                    heap.settle()  # as in the server's processes
                    inside, seconds = loop.run(self._inside(llm, requests))
                rounds[-1]["engine"] = self._figures(inside, seconds)
        report: dict[str, Any] = {"load": self._described(), **rounds[-1]}
        if self.against_engine:
            rates = [[each[side]["output_tokens_per_s"] for side in ("server", "engine")] for each in rounds]
            report["output tokens/s of server, engine"] = rates
            report["server over engine"] = round(statistics.median(over / alone for over, alone in rates), 3)
        print(table(report))
        print(json.dumps(report, indent=2))
        if self.out is not None:
            self.out.write_text(json.dumps(report, indent=2) + "\n")
        if self.plot is not None:
            draw(timed, self.plot)

    def _requests(self) -> list[list[tuple[list[int], int]]]:
        """Conversations: turns of (token ids to say, tokens to answer)."""
        rng = np.random.default_rng(0)
        common = rng.integers(3, self.vocab, self.prompt_tokens[1] // 4).tolist()

        def size(low: int, high: int) -> int:
            if self.load == "sharegpt":  # a median of a sixth of the range, and a long tail
                return int(np.clip(rng.lognormal(np.log(max(low, high / 6)), 1.0), low, high))
            return int(rng.integers(low, high + 1))

        def turn() -> tuple[list[int], int]:
            ids = rng.integers(3, self.vocab, size(*self.prompt_tokens)).tolist()
            if self.load == "shared-prefix":
                ids = (common + ids)[: max(len(ids), len(common) + 1)]
            return ids, size(*self.output_tokens)

        turns = 4 if self.load == "multi-turn" else 1
        return [[turn() for _ in range(turns)] for _ in range(-(-self.num_prompts // turns))]

    async def _drive(
        self,
        conversations: list[list[tuple[list[int], int]]],
        ask: Callable[[list[int], int], Awaitable[Timed]],
    ) -> tuple[list[Timed], float]:
        """Run the load; what came of every request, and the seconds it took."""
        gate, found, rng = (
            asyncio.Semaphore(self.concurrency),
            list[Timed](),
            np.random.default_rng(1),
        )
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task("requests", total=sum(map(len, conversations)))

            async def converse(turns: list[tuple[list[int], int]]) -> None:
                said: list[int] = []
                async with gate if self.rate is None else contextlib.nullcontext():
                    for ids, length in turns:
                        said += ids
                        found.append(await ask(said, length))
                        progress.advance(task)

            started, tasks = time.perf_counter(), []
            for turns in conversations:
                if self.rate is not None:
                    await asyncio.sleep(rng.exponential(1 / self.rate))
                tasks.append(asyncio.create_task(converse(turns)))
            await asyncio.gather(*tasks)
        return found, time.perf_counter() - started

    def _over_http(self, base_url: str) -> Callable[[list[int], int], Awaitable[Timed]]:
        async def ask(ids: list[int], length: int) -> Timed:
            body = {
                "model": self.model, "prompt": ids, "max_tokens": length, "temperature": 0, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            return await complete(base_url, "/completions", body, self.api_key)

        return ask

    async def _inside(self, llm: LLM, requests: list[list[tuple[list[int], int]]]) -> tuple[list[Timed], float]:
        from slipway.async_engine import (
            AsyncEngine,  # with JAX, which a bench of another server does without
        )
        from slipway.engine.params import SamplingParams

        engine = AsyncEngine(llm.engine, max_requests=10**6, max_tokens=10**9)

        async def ask(ids: list[int], length: int) -> Timed:
            timed = Timed(time.perf_counter(), status=200)
            params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
            async for delta in engine.generate(list(ids), params):
                timed.events.append(time.perf_counter())
                timed.num_tokens += len(delta.outputs[0].token_ids)
            return timed

        try:
            return await self._drive(requests, ask)
        finally:
            engine.close()

    @contextlib.contextmanager
    def _served(self) -> Iterator[tuple[str, float | None]]:
        """The server's address; one of our own is started and ended, and how many seconds it took to be ready."""
        if self.base_url is not None:
            yield self.base_url, None
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [f"--{name.replace('_', '-')}={value}" for name, value in self._engine_options().items()]
        code = "from slipway.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", self.model, "--port", str(port), *words,
                   "--max-requests-per-client", "1000000", "--max-queued-requests", "1000000"]  # fmt: skip
        begun, process = time.perf_counter(), subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            _wait_ready(f"http://127.0.0.1:{port}/readyz", process)
            yield f"http://127.0.0.1:{port}/v1", time.perf_counter() - begun
        finally:
            process.terminate()
            process.wait()

    def _engine_options(self) -> dict[str, Any]:
        tokens = max(self.max_num_seqs, EngineConfig().max_num_batched_tokens)
        return {
            "max_num_seqs": self.max_num_seqs, "max_num_batched_tokens": tokens, "stream_interval": self.stream_interval
        }  # fmt: skip

    def _described(self) -> dict[str, Any]:
        shown = (
            "model",
            "load",
            "num_prompts",
            "prompt_tokens",
            "output_tokens",
            "concurrency",
            "rate",
        )
        return {name: getattr(self, name) for name in shown}

    def _figures(self, timed: list[Timed], seconds: float) -> dict[str, Any]:
        """Rates, percentiles in milliseconds, and how many requests were good."""
        fine = [each for each in timed if each.ok]
        series: dict[str, Any] = {
            "ttft_ms": [1e3 * (each.events[0] - each.sent) for each in fine],
            "itl_ms": [1e3 * gap for each in fine for gap in np.diff(each.events)],
            "tpot_ms": [1e3 * _tpot(each) for each in fine if each.num_tokens > 1],
            "e2e_ms": [1e3 * (each.events[-1] - each.sent) for each in fine],
        }  # fmt: skip
        good = sum(self._is_good(each) for each in fine)
        return {
            "requests": len(timed), "failed": len(timed) - len(fine),
            "errors": sorted({each.error for each in timed if each.error})[:5], "seconds": round(seconds, 3),
            "requests_per_s": round(len(fine) / seconds, 2), "goodput_per_s": round(good / seconds, 2),
            "output_tokens_per_s": round(sum(each.num_tokens for each in fine) / seconds, 1),
            **{name: percentiles(values) for name, values in series.items()},
        }  # fmt: skip

    def _is_good(self, timed: Timed) -> bool:
        return 1e3 * (timed.events[0] - timed.sent) <= self.slo_ttft_ms and 1e3 * _tpot(timed) <= self.slo_itl_ms


def _tpot(timed: Timed) -> float:
    """Seconds a token after the first."""
    return (timed.events[-1] - timed.events[0]) / max(1, timed.num_tokens - 1)


def percentiles(values: list[float]) -> dict[str, float]:
    """Mean, and what a half, nine tenths and 99 hundredths do not exceed."""
    if not values:
        return {}
    found = {"mean": float(np.mean(values))} | {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
    return {name: round(value, 2) for name, value in found.items()}


def table(report: dict[str, Any]) -> str:
    """The figures of each side, in Markdown."""
    sides = [side for side in ("server", "engine") if side in report]
    rows = [
        (f"{name} {key}".strip(), [side_value[key] if key else side_value for side_value in values])
        for name in report["server"] if name not in ("errors",)
        for values in [[report[side].get(name, "") for side in sides]]
        for key in (list(values[0]) if isinstance(values[0], dict) else [""])
    ]  # fmt: skip
    lines = ["| | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(map(str, values)) + " |" for name, values in rows)])


def draw(timed: list[Timed], out: Path) -> None:
    """How many requests had their first token, and how many tokens came, within a time."""
    from matplotlib.figure import Figure  # an extra, for who asks for a plot

    fine = [each for each in timed if each.ok]
    figure = Figure(figsize=(9, 4), layout="constrained")
    series: dict[str, Any] = {
        "first token, ms": [1e3 * (each.events[0] - each.sent) for each in fine],
        "between tokens, ms": [1e3 * gap for each in fine for gap in np.diff(each.events)],
    }
    for axes, (name, values) in zip(figure.subplots(1, 2), series.items()):
        axes.plot(np.sort(values), np.linspace(0, 1, len(values)))
        axes.set_xlabel(name)
        axes.set_ylim(0, 1)
    figure.savefig(out, dpi=120)


def _wait_ready(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(url, timeout=1).status == 200:
                return
        time.sleep(0.05)
    raise InvalidConfig("model", url, "a server that gets ready")
