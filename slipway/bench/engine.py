"""`slipway bench engine`: what a step costs on the host, what several decode steps in a call gain, how long streams
wait while prompts are computed, and how fast the engine is beside transformers.

Decides the loads and how they are compared: alternating rounds, medians, ratios. Knows no kernels.
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
STREAMS, STREAM_TOKENS = 8, 800  # that decode while prompts arrive
FULL_STEPS = 100  # timed before, and as many after


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineBench:
    """Host cost per step, decode steps and streams under prefill, all on nano; with --against, prefill and decode of a
    Qwen3-0.6B shape beside transformers."""

    against: Literal["none", "transformers"] = "none"
    """The rival to time in the same run."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of our weights."""
    against_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the rival's."""
    rows: int = 256
    """Running requests for the host's cost."""
    rounds: int = 5
    """Alternating rounds of each measurement."""
    prefill_tokens: int = 512
    decode_tokens: int = 16
    """Steps timed per decode measurement."""
    out: Path | None = None
    """Write the figures here as JSON."""

    def run(self) -> None:
        """Measure and print."""
        figures: dict[str, Any] = {
            "machine": platform.processor() or platform.machine(),
            "jax": version("jax"),
        }
        figures["host"] = host_cost(self.rows)
        figures["decode"] = decode_steps(self.rounds)
        figures["decode under prefill"] = [under_prefill(tokens) for tokens in (512, 960)]
        if self.against == "transformers":
            figures["speed"] = self._speed()
        print(json.dumps(figures, indent=2))
        if self.out is not None:
            self.out.write_text(json.dumps(figures, indent=2) + "\n")

    def _speed(self) -> dict[str, Any]:
        """Seconds per prefill and per decode step, ours and theirs, in alternating rounds."""
        with tempfile.TemporaryDirectory() as folder:
            write_random_model(QWEN3_SHAPE, Path(folder))
            sizes = self.prefill_tokens + self.decode_tokens + 1, max(BATCHES)
            ours, theirs = (
                EngineProcess(name, Path(folder), dtype, *sizes)
                for name, dtype in (("ours", self.dtype), (self.against, self.against_dtype))
            )
            prompt = [7] * self.prefill_tokens
            pair = partial(ours.prefill, prompt), partial(theirs.prefill, prompt)
            figures = {f"prefill {len(prompt)}": compare(*pair, self.rounds)}
            for batch in BATCHES:
                asked = [[7 + i] * 16 for i in range(batch)], self.decode_tokens
                pair = partial(ours.decode, *asked), partial(theirs.decode, *asked)
                figures[f"decode step, batch {batch}"] = compare(*pair, self.rounds)
            ours.stop()
            theirs.stop()
        return figures


def compare(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> dict[str, float]:
    """Medians of alternating rounds after one warm-up each, and the median of the rounds' ratios."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return {
        "ours_s": round(statistics.median(a for a, _ in pairs), 6),
        "theirs_s": round(statistics.median(b for _, b in pairs), 6),
        "times_as_fast": round(statistics.median(b / a for a, b in pairs), 2),
    }


def host_cost(rows: int) -> dict[str, Any]:
    """Milliseconds a step, apart from the device's, while ``rows`` requests of nano decode; and all counters."""
    llm = LLM(max_num_seqs=rows, max_num_batched_tokens=max(rows, 128))
    rng, steps = np.random.default_rng(0), 64
    for _ in range(rows):
        params = SamplingParams(max_tokens=steps + 32, ignore_eos=True)
        llm.engine.add(RequestSpec(rng.integers(3, 4000, 8).tolist(), params))
    stats, costs = llm.engine.stats, []
    while llm.engine.has_work():
        before, generated = stats.host_s, stats.generated_tokens
        llm.engine.step()
        if stats.generated_tokens - generated == rows:
            costs.append((stats.host_s - before) * 1e3)
    costs = sorted(costs[:steps])
    return {
        "rows": rows, "median_ms": round(statistics.median(costs), 3), "p90_ms": round(costs[int(len(costs) * 0.9)], 3),
        "waited_ms": round(stats.device_s / stats.steps * 1e3, 2), "counters": counters(llm.engine.snapshot()),
    }  # fmt: skip


def decode_steps(rounds: int) -> dict[str, Any]:
    """Milliseconds a token through LLM.generate, by rows: single steps, and as many in a call as nano's default."""
    found: dict[str, Any] = {}
    with LLM(decode_steps=1) as single, LLM() as several:

        def seconds(llm: LLM, rows: int, tokens: int = 256) -> float:
            prompts = [[7 + row] * 16 for row in range(rows)]
            started = time.perf_counter()
            llm.generate(
                prompts,
                SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True),
                use_tqdm=False,
            )
            return (time.perf_counter() - started) / tokens

        for rows in (1, 4, 16):
            pair = compare(partial(seconds, several, rows), partial(seconds, single, rows), rounds)
            milliseconds = {
                "several_ms": round(pair["ours_s"] * 1e3, 3),
                "single_ms": round(pair["theirs_s"] * 1e3, 3),
            }
            found[f"{rows} rows"] = milliseconds | {"times_as_fast": pair["times_as_fast"]}
    return found


def under_prefill(prompt_tokens: int) -> dict[str, Any]:
    """Time between the tokens of streams that decode while a prompt is always being computed, beside a full step's."""
    rng = np.random.default_rng(0)
    with LLM(skip_tokenizer_init=True) as llm:
        engine, size = llm.engine, llm.engine.limits.max_num_batched_tokens

        def prompt(tokens: int) -> list[int]:
            return rng.integers(3, 4000, tokens).tolist()

        full = [_seconds(llm, prompt(size)) for _ in range(FULL_STEPS)]
        asked = SamplingParams(max_tokens=STREAM_TOKENS, temperature=0, ignore_eos=True)
        streams = [engine.request(engine.add(RequestSpec(prompt(16), asked))) for _ in range(STREAMS)]
        while not all(stream.num_generated for stream in streams):
            engine.step()
        gaps, last, prompts = [], dict.fromkeys(streams, time.perf_counter()), 0
        while not any(stream.finished for stream in streams):
            if not engine.snapshot().waiting:
                prompts += 1
                engine.add(RequestSpec(prompt(prompt_tokens), SamplingParams(max_tokens=1)))
            counts = {stream: stream.num_generated for stream in streams}
            engine.step()
            now = time.perf_counter()
            for stream in [stream for stream in streams if stream.num_generated > counts[stream]]:
                gaps.append(now - last[stream])
                last[stream] = now
        while engine.has_work():
            engine.step()
        full += [_seconds(llm, prompt(size)) for _ in range(FULL_STEPS)]
    tails = {"between_tokens": gaps[STREAMS:], "full_step": full[1:]}
    figures = {name: np.quantile(seconds, (0.5, 0.99, 1)) * 1e3 for name, seconds in tails.items()}
    return {"prompt_tokens": prompt_tokens, "prompts": prompts} | {
        f"{name}_ms": dict(zip(("p50", "p99", "max"), found.round(1).tolist())) for name, found in figures.items()
    }


def _seconds(llm: LLM, prompt: list[int]) -> float:
    started = time.perf_counter()
    llm.generate(prompt, SamplingParams(max_tokens=1))
    return time.perf_counter() - started


def counters(snapshot: Snapshot) -> dict[str, Any]:
    """The engine's gauges and sums."""
    stats, kept = snapshot.stats, {field.name for field in dataclasses.fields(snapshot)} - {"stats"}
    shown: dict[str, Any] = {name: getattr(snapshot, name) for name in sorted(kept)}
    shown |= {"pages_used": snapshot.pages_used, "hit_rate": round(snapshot.hit_rate, 3)}
    shown |= {
        "steps": stats.steps,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
    }
    histograms = ("step_host", "step_device", "queue", "first_token", "inter_token")
    return shown | {f"{name}_ms": quantiles(getattr(stats, name)) for name in histograms}
