"""`slipway bench throughput`: how much the engine gets through offline, and what its caches and queues did meanwhile.

Decides the loads: random lengths, a prefix that all share, requests all at once; knows no rival (bench peers does).
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
from slipway.engine.stats import Histogram
from slipway.errors import InvalidConfig
from slipway.llm import LLM

SERIES_S = 0.25  # how often gauges are read for the plot


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThroughputBench:
    """Complete random prompts offline, all queued at once; with --against-uncached, without the prefix cache too."""

    model: str = "nano"
    """A directory or a hub id; nano is the shipped model."""
    num_prompts: int = 256
    prompt_tokens: tuple[int, int] = (16, 256)
    """Shortest and longest prompt, the shared prefix not counted."""
    output_tokens: tuple[int, int] = (16, 128)
    """Shortest and longest output; ends are ignored."""
    shared_prefix: int = 0
    """Tokens that all prompts begin with."""
    against_uncached: bool = False
    """Run the same load with the prefix cache off, in turns."""
    rounds: int = 1
    """Of each; the cache is flushed between them."""
    engine: EngineConfig = EngineConfig()
    out: Path | None = None
    """Write the figures here as JSON."""
    plot: Path | None = None
    """Draw running, waiting and cached pages over time, as PNG; needs matplotlib."""

    def run(self) -> None:
        """Measure, and print the figures as JSON."""
        options = {field.name: getattr(self.engine, field.name) for field in dataclasses.fields(self.engine)}
        options["skip_tokenizer_init"] = True
        kinds = [True, False] if self.against_uncached else [self.engine.enable_prefix_caching]
        with contextlib.ExitStack() as stack:
            engines = {}
            for on in kinds:
                options["enable_prefix_caching"] = on
                engines[on] = stack.enter_context(LLM(self.model, **options))
            prompts, lengths = self._load(engines[kinds[0]])
            runs: dict[bool, list[dict[str, Any]]] = {on: [] for on in kinds}
            for _ in range(self.rounds):
                for on, llm in engines.items():
                    runs[on].append(measure(llm, prompts, lengths))
        best = {on: min(each, key=lambda run: run["elapsed_s"]) for on, each in runs.items()}
        series = best[kinds[0]].pop("series")
        report: dict[str, Any] = {"load": self._described(), **best[kinds[0]]}
        if self.against_uncached:
            best[False].pop("series")
            report["uncached"] = best[False]
            report["times_as_fast_with_cache"] = round(best[False]["elapsed_s"] / best[True]["elapsed_s"], 2)
        print(json.dumps(report, indent=2))
        if self.out is not None:
            self.out.write_text(json.dumps(report, indent=2) + "\n")
        if self.plot is not None:
            draw(series, self.plot)

    def _load(self, llm: LLM) -> tuple[list[list[int]], list[int]]:
        """Prompts, and how many tokens follow each."""
        rng, limits = np.random.default_rng(self.engine.seed), llm.engine.limits
        longest = self.shared_prefix + self.prompt_tokens[1] + self.output_tokens[1]
        if longest > limits.max_model_len:
            got = f"{longest} with prefix and output"
            raise InvalidConfig("prompt_tokens", got, f"at most {limits.max_model_len}, the context")
        prefix = rng.integers(0, limits.vocab_size, self.shared_prefix).tolist()
        sizes = rng.integers(self.prompt_tokens[0], self.prompt_tokens[1] + 1, self.num_prompts)
        prompts = [prefix + rng.integers(0, limits.vocab_size, size).tolist() for size in sizes]
        return prompts, rng.integers(self.output_tokens[0], self.output_tokens[1] + 1, self.num_prompts).tolist()

    def _described(self) -> dict[str, Any]:
        fields = (
            "model",
            "num_prompts",
            "prompt_tokens",
            "output_tokens",
            "shared_prefix",
            "rounds",
        )
        return {field: getattr(self, field) for field in fields}


def measure(llm: LLM, prompts: list[list[int]], lengths: list[int]) -> dict[str, Any]:
    """Run the prompts to their end; figures, counters of this run, and a series of gauges."""
    engine = llm.engine
    engine.flush()
    engine.reset_stats()
    before, started = engine.snapshot(), time.perf_counter()
    for prompt, length in zip(prompts, lengths):
        engine.add(RequestSpec(prompt, SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)))
    series: list[dict[str, float]] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("prompts", total=len(prompts))
        while engine.has_work():
            for request in engine.step():
                progress.advance(task, request.finished)
            now = time.perf_counter() - started
            if not series or now > series[-1]["s"] + SERIES_S:
                gauges = engine.snapshot()
                series.append({"s": round(now, 2), "running": gauges.running, "waiting": gauges.waiting,
                               "pages used": gauges.pages_used, "pages cached": gauges.pages_cached})  # fmt: skip
    elapsed, after = time.perf_counter() - started, engine.snapshot()
    stats = after.stats
    prompt_tokens = sum(map(len, prompts))
    return {
        "elapsed_s": round(elapsed, 3), "requests_per_s": round(len(prompts) / elapsed, 2),
        "output_tokens_per_s": round(sum(lengths) / elapsed, 1),
        "total_tokens_per_s": round((sum(lengths) + prompt_tokens) / elapsed, 1),
        "prompt_tokens": prompt_tokens, "output_tokens": stats.generated_tokens,
        "computed_tokens": after.computed_tokens - before.computed_tokens,
        "cached_prompt_tokens": after.cached_tokens - before.cached_tokens,
        "steps": stats.steps, "preemptions": after.preemptions - before.preemptions,
        "compilations_while_serving": after.compilations - before.compilations,
        "host_ms_a_step": quantiles(stats.step_host), "waited_ms_a_step": quantiles(stats.step_device),
        "first_token_ms": quantiles(stats.first_token), "inter_token_ms": quantiles(stats.inter_token),
        "series": series,
    }  # fmt: skip


def quantiles(histogram: Histogram) -> dict[str, float]:
    """Mean and bounds below which a half and 95% of the values lie, in milliseconds."""
    found = {"mean": round(1e3 * histogram.sum / max(1, histogram.count), 3)}
    for name, share in (("p50 below", 0.5), ("p95 below", 0.95)):
        reached = 0
        for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts):
            reached += count
            if reached >= share * histogram.count:
                found[name] = bound * 1e3
                break
    return found


def draw(series: list[dict[str, float]], out: Path) -> None:
    """Requests above, pages below, over time."""
    from matplotlib.figure import Figure  # an extra, for who asks for a plot

    figure = Figure(figsize=(9, 5), layout="constrained")
    for axes, names in zip(figure.subplots(2, sharex=True), (("running", "waiting"), ("pages used", "pages cached"))):
        for name in names:
            axes.plot([point["s"] for point in series], [point[name] for point in series], label=name)
        axes.set_ylim(bottom=0)
        axes.legend()
    axes.set_xlabel("seconds")
    figure.savefig(out, dpi=120)
