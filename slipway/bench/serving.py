"""Benchmark of an OpenAI-compatible server under load: `slipway bench serving`.

Without --base-url it starts `slipway serve` itself. With --against-engine the same load also runs
through AsyncEngine in this process, in the same run; the difference is the cost of HTTP.
Not here: offline loads (throughput.py), the HTTP client (client.py).
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
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from slipway.bench.client import Timed, complete
from slipway.engine.config import EngineConfig
from slipway.errors import InvalidConfig
from slipway.llm import LLM
from slipway.server.process import run_event_loop, tune_garbage_collector

READY_S = 600.0
# A conversation's turns: token ids that the turn adds to the prompt, and tokens to generate.
Conversation = list[tuple[list[int], int]]
Ask = Callable[[list[int], int], Awaitable[Timed]]
COLUMNS = (
    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
)  # fmt: skip
DESCRIBED = (
    "model", "load", "num_prompts", "prompt_tokens", "output_tokens", "concurrency", "rate"
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingBench:
    """Stream completions from a server: at a fixed concurrency, or with Poisson arrivals."""

    base_url: str | None = None
    """Address of the server, such as http://127.0.0.1:8000/v1; by default `slipway serve` is
    started for this run."""
    model: str = "nano"
    """The model's name in requests; without --base-url, the model to serve."""
    api_key: str | None = None
    load: Literal["random", "sharegpt", "shared-prefix", "multi-turn"] = "random"
    """random: lengths uniform in the ranges; sharegpt: log-normal lengths, shaped like that data
    set's; shared-prefix: a quarter of the longest prompt is common to all; multi-turn:
    conversations of four turns, whose prompts repeat the earlier turns."""
    num_prompts: int = 256
    prompt_tokens: tuple[int, int] = (16, 128)
    """Shortest and longest prompt."""
    output_tokens: tuple[int, int] = (16, 128)
    """Shortest and longest output; ends are ignored."""
    vocab: int = 4000
    """Prompts consist of token ids below this."""
    concurrency: int = 16
    """Requests at a time; not with --rate."""
    rate: float | None = None
    """Requests a second, with Poisson arrivals."""
    slo_ttft_ms: float = 1000.0
    """Longest time to the first token of a request that counts for goodput."""
    slo_itl_ms: float = 100.0
    """Longest mean time of a further token of a request that counts for goodput."""
    against_engine: bool = False
    """Run the load through AsyncEngine in this process, too; only without --base-url."""
    rounds: int = 1
    """Alternating rounds of server and engine."""
    max_num_seqs: int = 256
    """Limit of running requests, of the engine and of a server that is started here."""
    stream_interval: int = 1
    """Tokens per streamed event, of the engine and of a server that is started here."""
    speculative_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options of speculation, of the engine and of a server that is started here."""
    out: Path | None = None
    """Write the figures here as JSON."""
    plot: Path | None = None
    """Draw the distributions, as PNG; needs matplotlib."""

    def run(self) -> None:
        """Measure, and print a table and the figures."""
        if self.against_engine and self.base_url is not None:
            raise InvalidConfig(
                "against_engine", True, "no base_url: the engine must be the server's"
            )
        if self.rounds < 1:
            raise InvalidConfig("rounds", self.rounds, "at least 1")
        conversations, rounds = self.conversations(), list[dict[str, Any]]()
        for _ in range(self.rounds):
            with self._served() as (base_url, ready_s):
                before = draft_counts(base_url)
                timed, seconds = run_event_loop(
                    self._drive(conversations, self._over_http(base_url))
                )
                drafts, accepted = np.subtract(draft_counts(base_url), before).tolist()
            figures: dict[str, Any] = {}
            if ready_s is not None:
                figures["process start to ready_s"] = round(ready_s, 2)
            figures |= self._figures(timed, seconds)
            if drafts:
                figures["acceptance_length"] = round(1 + accepted / drafts, 3)
            rounds.append({"server": figures})
            if self.against_engine:
                rounds[-1]["engine"] = self._engine_figures(conversations)
        report = self._report(rounds)
        print(table(report))
        print(json.dumps(report, indent=2))
        if self.out is not None:
            self.out.write_text(json.dumps(report, indent=2) + "\n")
        if self.plot is not None:
            draw(timed, self.plot)

    def conversations(self) -> list[Conversation]:
        """Return the load, the same in every call."""
        rng = np.random.default_rng(0)
        common = rng.integers(3, self.vocab, self.prompt_tokens[1] // 4).tolist()

        def size(low: int, high: int) -> int:
            if self.load == "sharegpt":
                # median: a sixth of the range's end, with a long tail
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
        self, conversations: list[Conversation], ask: Ask
    ) -> tuple[list[Timed], float]:
        """Run the load; return the times of every request, and the seconds of the whole load."""
        gate, rng = asyncio.Semaphore(self.concurrency), np.random.default_rng(1)
        results = list[Timed]()
        with Progress(*COLUMNS, transient=True) as progress:
            task = progress.add_task("requests", total=sum(map(len, conversations)))

            async def converse(turns: Conversation) -> None:
                prompt: list[int] = []
                async with gate if self.rate is None else contextlib.nullcontext():
                    for ids, length in turns:
                        prompt += ids
                        results.append(await ask(prompt, length))
                        progress.advance(task)

            started, tasks = time.perf_counter(), []
            for turns in conversations:
                if self.rate is not None:
                    await asyncio.sleep(rng.exponential(1 / self.rate))
                tasks.append(asyncio.create_task(converse(turns)))
            await asyncio.gather(*tasks)
        return results, time.perf_counter() - started

    def _over_http(self, base_url: str) -> Ask:
        async def ask(ids: list[int], length: int) -> Timed:
            body = {
                "model": self.model,
                "prompt": ids,
                "max_tokens": length,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            return await complete(base_url, "/completions", body, api_key=self.api_key)

        return ask

    def _engine_figures(self, conversations: list[Conversation]) -> dict[str, Any]:
        with LLM(self.model, **self._engine_options()) as llm:
            tune_garbage_collector()  # as the server's processes do
            timed, seconds = run_event_loop(self._inside(llm, conversations))
        return self._figures(timed, seconds)

    async def _inside(
        self, llm: LLM, conversations: list[Conversation]
    ) -> tuple[list[Timed], float]:
        """Run the load through AsyncEngine in this process."""
        # bring JAX, which a benchmark of another server does not need
        from slipway.async_engine import AsyncEngine
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
            return await self._drive(conversations, ask)
        finally:
            engine.close()

    @contextlib.contextmanager
    def _served(self) -> Iterator[tuple[str, float | None]]:
        """Yield the server's address, and the seconds until it was ready if it is started here."""
        if self.base_url is not None:
            yield self.base_url, None
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = self._engine_options()
        options["speculative_config"] = json.dumps(dict(self.speculative_config))
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        words += ["--max-requests-per-client", "1000000", "--max-queued-requests", "1000000"]
        code = "from slipway.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", self.model, "--port", str(port), *words]
        begun = time.perf_counter()
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            _wait_ready(f"http://127.0.0.1:{port}/readyz", process)
            yield f"http://127.0.0.1:{port}/v1", time.perf_counter() - begun
        finally:
            process.terminate()
            process.wait()

    def _engine_options(self) -> dict[str, Any]:
        return {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": max(self.max_num_seqs, EngineConfig().max_num_batched_tokens),
            "stream_interval": self.stream_interval,
            "speculative_config": self.speculative_config,
        }

    def _report(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the options, the figures of the last round, and the ratio over all rounds."""
        load = {name: getattr(self, name) for name in DESCRIBED}
        report: dict[str, Any] = {"load": load, **rounds[-1]}
        if self.against_engine:
            rates = [
                [each[side]["output_tokens_per_s"] for side in ("server", "engine")]
                for each in rounds
            ]
            report["output tokens/s of server, engine"] = rates
            ratio = statistics.median(server / engine for server, engine in rates)
            report["server over engine"] = round(ratio, 3)
        return report

    def _figures(self, timed: list[Timed], seconds: float) -> dict[str, Any]:
        """Return rates, percentiles in milliseconds, and the number of failed requests."""
        fine = [each for each in timed if each.ok]
        series: dict[str, Any] = {
            "ttft_ms": [1e3 * (each.events[0] - each.sent) for each in fine],
            "itl_ms": [1e3 * gap for each in fine for gap in np.diff(each.events)],
            "tpot_ms": [1e3 * _tpot(each) for each in fine if each.num_tokens > 1],
            "e2e_ms": [1e3 * (each.events[-1] - each.sent) for each in fine],
        }
        good, tokens = sum(map(self._is_good, fine)), sum(each.num_tokens for each in fine)
        return {
            "requests": len(timed),
            "failed": len(timed) - len(fine),
            "errors": sorted({each.error for each in timed if each.error})[:5],
            "seconds": round(seconds, 3),
            "requests_per_s": round(len(fine) / seconds, 2),
            "goodput_per_s": round(good / seconds, 2),
            "output_tokens_per_s": round(tokens / seconds, 1),
            **{name: percentiles(values) for name, values in series.items()},
        }

    def _is_good(self, timed: Timed) -> bool:
        ttft_ms = 1e3 * (timed.events[0] - timed.sent)
        return ttft_ms <= self.slo_ttft_ms and 1e3 * _tpot(timed) <= self.slo_itl_ms


def draft_counts(base_url: str) -> tuple[float, float]:
    """Return how often drafts were verified, and how many were accepted; zeros if unknown.

    These are counters of /metrics, which vLLM's servers have, too.
    """
    found = [0.0, 0.0]
    with contextlib.suppress(OSError):
        url = f"{base_url.removesuffix('/').removesuffix('/v1')}/metrics"
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
        for at, name in enumerate(("num_drafts_total", "num_accepted_tokens_total")):
            by_prefix = [
                [sample.value for sample in samples if sample.name == f"{prefix}spec_decode_{name}"]
                for prefix in ("slipway_", "vllm:")
            ]
            found[at] = sum(by_prefix[0] or by_prefix[1])
    return found[0], found[1]


def _tpot(timed: Timed) -> float:
    """Return the mean seconds of a token after the first."""
    return (timed.events[-1] - timed.events[0]) / max(1, timed.num_tokens - 1)


def percentiles(values: list[float]) -> dict[str, float]:
    """Return the mean and the 50th, 90th and 99th percentile; nothing of an empty list."""
    if not values:
        return {}
    figures = {"mean": float(np.mean(values))}
    figures |= {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
    return {name: round(value, 2) for name, value in figures.items()}


def table(report: dict[str, Any]) -> str:
    """Return the figures as Markdown, with a column for the server and one for the engine."""
    sides = [side for side in ("server", "engine") if side in report]
    lines = ["| | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for name in report["server"]:
        if name == "errors":
            continue
        values = [report[side].get(name, "") for side in sides]
        # a series has a row for each of its percentiles
        for key in list(values[0]) if isinstance(values[0], dict) else [""]:
            cells = [str(value[key] if key else value) for value in values]
            lines.append(f"| {f'{name} {key}'.strip()} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(timed: list[Timed], out: Path) -> None:
    """Draw the distributions of the time to the first token and of the time between tokens."""
    from matplotlib.figure import Figure  # an optional dependency, needed for plots only

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
    raise InvalidConfig("model", url, "a server that becomes ready")
