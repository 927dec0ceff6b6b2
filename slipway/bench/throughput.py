"""Benchmark of the engine's offline throughput, with its counters: `slipway bench throughput`.

All requests are queued at once; they have random lengths and, with --shared-prefix, a common start.
Not here: other engines under the same load (benchmarks/peers.py).
"""

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from slipway.engine.config import EngineConfig
from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestSpec
from slipway.engine.stats import Histogram, Snapshot
from slipway.errors import InvalidConfig
from slipway.llm import LLM

# Interval at which gauges are read for the plot.
SERIES_S = 0.25
COLUMNS = (
    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
)  # fmt: skip
DESCRIBED = (
    "model", "num_prompts", "prompt_tokens", "output_tokens", "shared_prefix", "rounds"
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThroughputBench:
    """Complete random prompts offline, all queued at once."""

    model: str = "nano"
    """A directory or a hub id; nano is the shipped model."""
    num_prompts: int = 256
    prompt_tokens: tuple[int, int] = (16, 256)
    """Shortest and longest prompt, the shared prefix not counted."""
    output_tokens: tuple[int, int] = (16, 128)
    """Shortest and longest output; ends are ignored."""
    shared_prefix: int = 0
    """Number of tokens with which every prompt begins."""
    against_uncached: bool = False
    """Run the same load without the prefix cache, too, in alternating rounds."""
    rounds: int = 1
    """Rounds of each; the cache is flushed between them."""
    engine: EngineConfig = EngineConfig()
    out: Path | None = None
    """Write the figures here as JSON."""
    plot: Path | None = None
    """Draw running, waiting and cached pages over time, as PNG; needs matplotlib."""

    def run(self) -> None:
        """Measure, and print the figures as JSON."""
        fields = dataclasses.fields(self.engine)
        options = {field.name: getattr(self.engine, field.name) for field in fields}
        options["skip_tokenizer_init"] = True
        kinds = [True, False] if self.against_uncached else [self.engine.enable_prefix_caching]
        with contextlib.ExitStack() as stack:
            engines = {}
            for cached in kinds:
                options["enable_prefix_caching"] = cached
                engines[cached] = stack.enter_context(LLM(self.model, **options))
            prompts, lengths = self._load(engines[kinds[0]])
            runs: dict[bool, list[dict[str, Any]]] = {cached: [] for cached in kinds}
            for _ in range(self.rounds):
                for cached, llm in engines.items():
                    runs[cached].append(measure(llm, prompts, lengths))
        best = {
            cached: min(each, key=lambda run: run["elapsed_s"]) for cached, each in runs.items()
        }
        series = best[kinds[0]].pop("series")
        load = {name: getattr(self, name) for name in DESCRIBED}
        report: dict[str, Any] = {"load": load, **best[kinds[0]]}
        if self.against_uncached:
            best[False].pop("series")
            report["uncached"] = best[False]
            ratio = best[False]["elapsed_s"] / best[True]["elapsed_s"]
            report["times_as_fast_with_cache"] = round(ratio, 2)
        print(json.dumps(report, indent=2))
        if self.out is not None:
            self.out.write_text(json.dumps(report, indent=2) + "\n")
        if self.plot is not None:
            draw(series, self.plot)

    def _load(self, llm: LLM) -> tuple[list[list[int]], list[int]]:
        """Return the prompts, and the number of tokens to generate for each."""
        rng, limits = np.random.default_rng(self.engine.seed), llm.engine.limits
        longest = self.shared_prefix + self.prompt_tokens[1] + self.output_tokens[1]
        if longest > limits.max_model_len:
            got = f"{longest} with prefix and output"
            expected = f"at most {limits.max_model_len}, the context length"
            raise InvalidConfig("prompt_tokens", got, expected)
        prefix = rng.integers(0, limits.vocab_size, self.shared_prefix).tolist()
        low, high = self.prompt_tokens
        sizes = rng.integers(low, high + 1, self.num_prompts)
        prompts = [prefix + rng.integers(0, limits.vocab_size, size).tolist() for size in sizes]
        low, high = self.output_tokens
        return prompts, rng.integers(low, high + 1, self.num_prompts).tolist()


def measure(llm: LLM, prompts: list[list[int]], lengths: list[int]) -> dict[str, Any]:
    """Run all prompts to their end; return figures, counters and a series of gauges."""
    engine = llm.engine
    engine.flush()
    engine.reset_stats()
    before, started = engine.snapshot(), time.perf_counter()
    for prompt, length in zip(prompts, lengths):
        params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
        engine.add(RequestSpec(prompt, params))
    series: list[dict[str, float]] = []
    with Progress(*COLUMNS, transient=True) as progress:
        task = progress.add_task("prompts", total=len(prompts))
        while engine.has_work():
            for request in engine.step():
                progress.advance(task, request.finished)
            now = time.perf_counter() - started
            if not series or now > series[-1]["s"] + SERIES_S:
                series.append({"s": round(now, 2)} | _gauges(engine.snapshot()))
    elapsed, after = time.perf_counter() - started, engine.snapshot()
    stats = after.stats
    prompt_tokens, output_tokens = sum(map(len, prompts)), sum(lengths)
    return {
        "elapsed_s": round(elapsed, 3),
        "requests_per_s": round(len(prompts) / elapsed, 2),
        "output_tokens_per_s": round(output_tokens / elapsed, 1),
        "total_tokens_per_s": round((output_tokens + prompt_tokens) / elapsed, 1),
        "prompt_tokens": prompt_tokens,
        "output_tokens": stats.generated_tokens,
        "computed_tokens": after.computed_tokens - before.computed_tokens,
        "cached_prompt_tokens": after.cached_tokens - before.cached_tokens,
        "steps": stats.steps,
        "acceptance_length": round(stats.acceptance_length, 3),
        "preemptions": after.preemptions - before.preemptions,
        "compilations_while_serving": after.compilations - before.compilations,
        "host_ms_a_step": quantiles(stats.step_host),
        "waited_ms_a_step": quantiles(stats.step_device),
        "first_token_ms": quantiles(stats.first_token),
        "inter_token_ms": quantiles(stats.inter_token),
        "series": series,
    }


def _gauges(snapshot: Snapshot) -> dict[str, float]:
    return {
        "running": snapshot.running,
        "waiting": snapshot.waiting,
        "pages used": snapshot.pages_used,
        "pages cached": snapshot.pages_cached,
    }


def quantiles(histogram: Histogram) -> dict[str, float]:
    """Return the mean, and bounds below which 50% and 95% of the values lie, in milliseconds."""
    figures = {"mean": round(1e3 * histogram.sum / max(1, histogram.count), 3)}
    for name, share in (("p50 below", 0.5), ("p95 below", 0.95)):
        reached = 0
        for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts):
            reached += count
            if reached >= share * histogram.count:
                figures[name] = bound * 1e3
                break
    return figures


def draw(series: list[dict[str, float]], out: Path) -> None:
    """Draw requests and, below them, pages over time."""
    from matplotlib.figure import Figure  # an optional dependency, needed for plots only

    figure = Figure(figsize=(9, 5), layout="constrained")
    groups = (("running", "waiting"), ("pages used", "pages cached"))
    seconds = [point["s"] for point in series]
    for axes, names in zip(figure.subplots(2, sharex=True), groups):
        for name in names:
            axes.plot(seconds, [point[name] for point in series], label=name)
        axes.set_ylim(bottom=0)
        axes.legend()
    axes.set_xlabel("seconds")
    figure.savefig(out, dpi=120)
