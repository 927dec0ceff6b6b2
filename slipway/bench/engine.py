"""Benchmark of the engine: `slipway bench engine`.

It measures the host's time in a step, the gain of several decode steps in one call, the delay of
streams while prompts are computed and, with --against, speed beside transformers. Comparisons
alternate within one run: medians, and medians of ratios.
Not here: single ops (benchmarks/roofline.py), other engines (benchmarks/peers.py).
"""

import dataclasses
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slipway.bench.engine_process import EngineProcess
from slipway.bench.random_model import QWEN3_SHAPE, write_random_model
from slipway.bench.throughput import quantiles
from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestSpec
from slipway.engine.stats import Snapshot
from slipway.llm import LLM

BATCHES = (1, 8)
# Requests that decode while prompts arrive, and the tokens of each.
STREAMS, STREAM_TOKENS = 8, 800
# Steps without decoding that are timed before the streams, and as many after them.
FULL_STEPS = 100
HISTOGRAMS = ("step_host", "step_device", "queue", "first_token", "inter_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineBench:
    """Host time per step, several decode steps per call, and streams under prefill, all with nano.

    With --against: prefill and decode of the Qwen3-0.6B shape beside transformers, too.
    """

    against: Literal["none", "transformers"] = "none"
    """The other engine to time in the same run."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of Slipway's weights, with --against."""
    against_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the other engine's weights."""
    rows: int = 256
    """Running requests for the host's time."""
    rounds: int = 5
    """Alternating rounds of each measurement."""
    prefill_tokens: int = 512
    """Tokens of a prompt, with --against."""
    decode_tokens: int = 16
    """Steps per decode measurement, with --against."""
    out: Path | None = None
    """Write the figures here as JSON."""

    def run(self) -> None:
        """Measure and print."""
        machine = platform.processor() or platform.machine()
        figures: dict[str, Any] = {"machine": machine, "jax": version("jax")}
        figures["host"] = host_cost(self.rows)
        figures["decode"] = decode_steps(self.rounds)
        figures["decode under prefill"] = [under_prefill(tokens) for tokens in (512, 960)]
        if self.against == "transformers":
            figures["speed"] = self._speed()
        print(json.dumps(figures, indent=2))
        if self.out is not None:
            self.out.write_text(json.dumps(figures, indent=2) + "\n")

    def _speed(self) -> dict[str, Any]:
        """Return seconds per prefill and per decode step of both engines, in alternating rounds."""
        with tempfile.TemporaryDirectory() as folder:
            write_random_model(QWEN3_SHAPE, Path(folder))
            ours, theirs = (
                EngineProcess(
                    name,
                    Path(folder),
                    dtype,
                    max_model_len=self.prefill_tokens + self.decode_tokens + 1,
                    max_num_seqs=max(BATCHES),
                )
                for name, dtype in (("ours", self.dtype), (self.against, self.against_dtype))
            )
            prompt = [7] * self.prefill_tokens
            pair = partial(ours.prefill, prompt), partial(theirs.prefill, prompt)
            figures = {f"prefill {len(prompt)}": compare(*pair, rounds=self.rounds)}
            for batch in BATCHES:
                asked = [[7 + i] * 16 for i in range(batch)], self.decode_tokens
                pair = partial(ours.decode, *asked), partial(theirs.decode, *asked)
                figures[f"decode step, batch {batch}"] = compare(*pair, rounds=self.rounds)
            ours.stop()
            theirs.stop()
        return figures


def compare(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int
) -> dict[str, float]:
    """Return medians of alternating rounds after a warm-up, and the median of their ratios."""
    ours()
    theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return {
        "ours_s": round(statistics.median(a for a, _ in pairs), 6),
        "theirs_s": round(statistics.median(b for _, b in pairs), 6),
        "times_as_fast": round(statistics.median(b / a for a, b in pairs), 2),
    }


def host_cost(rows: int) -> dict[str, Any]:
    """Decode ``rows`` requests of nano; return the host's milliseconds per step, and all counters.

    The host's time is the time of a step in which it does not wait for the device.
    """
    llm = LLM(max_num_seqs=rows, max_num_batched_tokens=max(rows, 128))
    rng, steps = np.random.default_rng(0), 64
    params = SamplingParams(max_tokens=steps + 32, ignore_eos=True)
    for _ in range(rows):
        llm.engine.add(RequestSpec(rng.integers(3, 4000, 8).tolist(), params))
    stats, costs = llm.engine.stats, []
    while llm.engine.has_work():
        before, generated = stats.host_s, stats.generated_tokens
        llm.engine.step()
        # only steps in which every request decodes
        if stats.generated_tokens - generated == rows:
            costs.append((stats.host_s - before) * 1e3)
    costs = sorted(costs[:steps])
    return {
        "rows": rows,
        "median_ms": round(statistics.median(costs), 3),
        "p90_ms": round(costs[int(len(costs) * 0.9)], 3),
        "waited_ms": round(stats.device_s / stats.steps * 1e3, 2),
        "counters": counters(llm.engine.snapshot()),
    }


def decode_steps(rounds: int) -> dict[str, Any]:
    """Return milliseconds per token of LLM.generate with 1, 4 and 16 rows of nano.

    Compares one decode step per call with the default number of steps per call.
    """
    figures: dict[str, Any] = {}
    with LLM(decode_steps=1) as single, LLM() as several:

        def seconds(llm: LLM, rows: int, tokens: int = 256) -> float:
            prompts = [[7 + row] * 16 for row in range(rows)]
            params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
            started = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return (time.perf_counter() - started) / tokens

        for rows in (1, 4, 16):
            pair = compare(partial(seconds, several, rows), partial(seconds, single, rows), rounds)
            figures[f"{rows} rows"] = {
                "several_ms": round(pair["ours_s"] * 1e3, 3),
                "single_ms": round(pair["theirs_s"] * 1e3, 3),
                "times_as_fast": pair["times_as_fast"],
            }
    return figures


def under_prefill(prompt_tokens: int) -> dict[str, Any]:
    """Return the time between tokens of decoding streams while prompts are always being computed.

    Beside it stands the time of a step that computes a prompt of the largest step's size.
    """
    rng = np.random.default_rng(0)
    with LLM(skip_tokenizer_init=True) as llm:
        engine, size = llm.engine, llm.engine.limits.max_num_batched_tokens

        def prompt(tokens: int) -> list[int]:
            return rng.integers(3, 4000, tokens).tolist()

        full = [_prefill_seconds(llm, prompt(size)) for _ in range(FULL_STEPS)]
        params = SamplingParams(max_tokens=STREAM_TOKENS, temperature=0, ignore_eos=True)
        specs = [RequestSpec(prompt(16), params) for _ in range(STREAMS)]
        streams = [engine.request(engine.add(spec)) for spec in specs]
        while not all(stream.num_generated for stream in streams):
            engine.step()
        gaps, prompts = [], 0
        last = dict.fromkeys(streams, time.perf_counter())
        while not any(stream.finished for stream in streams):
            if not engine.snapshot().waiting:
                prompts += 1
                engine.add(RequestSpec(prompt(prompt_tokens), SamplingParams(max_tokens=1)))
            counts = {stream: stream.num_generated for stream in streams}
            engine.step()
            now = time.perf_counter()
            for stream in streams:
                if stream.num_generated > counts[stream]:
                    gaps.append(now - last[stream])
                    last[stream] = now
        while engine.has_work():
            engine.step()
        full += [_prefill_seconds(llm, prompt(size)) for _ in range(FULL_STEPS)]
    # without the first gap of each stream, and without the first step
    series = {"between_tokens": gaps[STREAMS:], "full_step": full[1:]}
    figures: dict[str, Any] = {"prompt_tokens": prompt_tokens, "prompts": prompts}
    for name, seconds in series.items():
        milliseconds = (np.quantile(seconds, (0.5, 0.99, 1)) * 1e3).round(1).tolist()
        figures[f"{name}_ms"] = dict(zip(("p50", "p99", "max"), milliseconds))
    return figures


def _prefill_seconds(llm: LLM, prompt: list[int]) -> float:
    started = time.perf_counter()
    llm.generate(prompt, SamplingParams(max_tokens=1))
    return time.perf_counter() - started


def counters(snapshot: Snapshot) -> dict[str, Any]:
    """Return the engine's gauges and sums, and quantiles of its histograms."""
    stats = snapshot.stats
    names = {field.name for field in dataclasses.fields(snapshot)} - {"stats"}
    shown: dict[str, Any] = {name: getattr(snapshot, name) for name in sorted(names)}
    shown |= {
        "pages_used": snapshot.pages_used,
        "hit_rate": round(snapshot.hit_rate, 3),
        "steps": stats.steps,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
    }
    return shown | {f"{name}_ms": quantiles(getattr(stats, name)) for name in HISTOGRAMS}
