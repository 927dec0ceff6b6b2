"""`slipway bench peers`: every engine on the same random weights and loads, interleaved in one run.

Decides the loads, the rounds and the report: medians, ratios and spread. Knows engines only through bench/rivals.py.
"""

import dataclasses
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slipway.bench import limits, llama_cpp, rivals
from slipway.bench.models import QWEN3_SHAPE, random_model
from slipway.llm import NANO

Engine = Literal["ours", "transformers", "vllm", "llama.cpp"]
BATCHES, PREFILLS = (1, 8, 16), (512, 2048)
SERVES = {"128/128": (128, 128, 0), "1024/128": (1024, 128, 0), "shared prefix": (512, 64, 448)}
SLOTS, MAX_MODEL_LEN = 16, 2176


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeersBench:
    """Ours, transformers, vLLM and llama.cpp: decode, prefill, requests at concurrency 16, cold start, memory.

    Needs torch (the test extra), whose product is the host's limit.
    """

    engines: tuple[Engine, ...] = ("ours", "transformers", "vllm", "llama.cpp")
    """Each rival is installed on first use, in the user's cache."""
    model: Literal["qwen3-0.6b", "nano"] = "qwen3-0.6b"
    """Random bf16 weights of the published shape; or the shipped model, of which requests alone are timed."""
    rounds: int = 3
    """Alternating rounds: each engine once in each."""
    decode_tokens: int = 24
    """Steps of a decode measurement."""
    requests: int = 64
    loads: tuple[Literal["128/128", "1024/128", "shared prefix"], ...] = ("128/128",)
    """Prompt and output tokens of the requests; shared prefix: 512 tokens, 448 of them common, and 64 out."""
    out: Path | None = None
    """Write the figures here as JSON."""

    def run(self) -> None:
        """Measure, and print a table."""
        threads = len(os.sched_getaffinity(0))
        with tempfile.TemporaryDirectory() as folder, _started(self, Path(folder), threads) as engines:
            figures = self._rounds(engines, threads)
            figures["start s"] = {name: [engine.start_s] for name, engine in engines.items()}
            figures["peak RSS MB"] = {name: [engine.peak_mb()] for name, engine in engines.items()}
        report = summary(figures) | {"versions": {name: version(name) for name in ("jax", "torch", "transformers")}}
        print(table(report["medians"]))
        print(json.dumps(report, indent=2))
        if self.out is not None:
            self.out.write_text(json.dumps(report, indent=2) + "\n")

    def _rounds(self, engines: dict[str, Any], threads: int) -> dict[str, dict[str, list[float]]]:
        """figure -> engine -> a value per round. Rates are tokens a second."""
        rng = np.random.default_rng(0)
        vocab = json.loads((Path(NANO) / "config.json").read_bytes())["vocab_size"]  # the smaller of the two
        figures: dict[str, dict[str, list[float]]] = {}

        def prompts(count: int, length: int, shared: int = 0) -> list[list[int]]:
            common = rng.integers(0, vocab, shared).tolist()
            return [common + rng.integers(0, vocab, length - shared).tolist() for _ in range(count)]

        def take(figure: str, measure: Callable[[Any], float], names: list[str]) -> None:
            for name in names:
                figures.setdefault(figure, {}).setdefault(name, []).append(measure(engines[name]))

        for turn in range(self.rounds + 1):
            if turn == 1:
                figures.clear()  # the first round warms up
            for key, rate in (("read GB/s", limits.read_bandwidth(threads)), ("bf16 GFLOP/s", limits.matmul_rate())):
                figures.setdefault(key, {}).setdefault("host", []).append(rate)
            names = list(engines)[turn % len(engines) :] + list(engines)[: turn % len(engines)]
            whole = self.model != "nano"  # whose steps are too short for a rival's tools to time
            for batch in BATCHES if whole else ():
                asked, steps = prompts(batch, 16), self.decode_tokens
                take(f"decode b{batch} tok/s", partial(_decode_rate, prompts=asked, steps=steps), names)
            for length in PREFILLS if whole else ():
                take(f"prefill {length} tok/s", partial(_prefill_rate, prompts=prompts, length=length), names)
            for load in self.loads if turn else ():
                length, out, shared = SERVES[load]
                for name in names:
                    if name == "transformers":
                        continue  # it has no queue
                    run = engines[name].drive(prompts(self.requests, length, shared), out, SLOTS)
                    for figure, value in served(run, out).items():
                        figures.setdefault(f"{load} {figure}", {}).setdefault(name, []).append(value)
        return figures


def _decode_rate(engine: Any, prompts: list[list[int]], steps: int) -> float:
    return len(prompts) / engine.decode(prompts, steps)


def _prefill_rate(engine: Any, prompts: Callable, length: int) -> float:
    return length / engine.prefill(prompts(1, length)[0])  # a new prompt each time: nobody's cache knows it


@contextmanager
def _started(bench: PeersBench, folder: Path, threads: int) -> Iterator[dict[str, Any]]:
    """The engines by name, one after the other started; ended together."""
    directory = Path(NANO)
    if bench.model != "nano":
        directory = folder / "model"
        random_model(QWEN3_SHAPE, directory)
    length = MAX_MODEL_LEN if bench.model != "nano" else json.loads((directory / "config.json").read_bytes())[
        "max_position_embeddings"
    ]  # fmt: skip
    engines: dict[str, Any] = {}
    try:
        for name in bench.engines:
            if name == "llama.cpp":
                llama_cpp.environment(rivals.CACHE / "llama.cpp")
                llama_cpp.write_gguf(directory, folder / "model.gguf", rivals.CACHE / "llama.cpp")
                engines[name] = rivals.LlamaCpp(folder / "model.gguf", length, SLOTS, threads)
            else:
                engines[name] = rivals.Worker(name, directory, "bfloat16", length, SLOTS)
        yield engines
    finally:
        for engine in engines.values():
            engine.stop()


def served(run: dict[str, Any], max_tokens: int) -> dict[str, float]:
    """Output tokens a second over the whole run, and the medians of first token and between tokens in ms."""
    ends = [times[-1] for times in run["times"]]
    firsts = [times[0] - started for times, started in zip(run["times"], run["started"])]
    gaps = [(times[-1] - times[0]) / (len(times) - 1) for times in run["times"]]
    return {
        "out tok/s": len(ends) * max_tokens / max(ends),
        "TTFT ms": statistics.median(firsts) * 1e3,
        "ITL ms": statistics.median(gaps) * 1e3,
    }


def summary(figures: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Medians, lowest and highest, and how ours stands to each rival (above 1: better, also where less is better)."""
    medians = {figure: {name: statistics.median(v) for name, v in runs.items()} for figure, runs in figures.items()}
    ratios: dict[str, dict[str, float]] = {}
    for figure, runs in figures.items():
        for name, values in runs.items():
            if name != "ours" and "ours" in runs:
                pairs = [a / b for a, b in zip(runs["ours"], values)]
                ratio = statistics.median(pairs)
                less_is_better = "tok/s" not in figure
                ratios.setdefault(figure, {})[name] = round(1 / ratio if less_is_better else ratio, 2)
    return {
        "medians": {f: {n: round(v, 2) for n, v in runs.items()} for f, runs in medians.items()},
        "spread": {f: {n: [round(min(v), 2), round(max(v), 2)] for n, v in r.items()} for f, r in figures.items()},
        "times_as_good": ratios,
    }


def table(medians: dict[str, dict[str, float]]) -> str:
    """The medians as Markdown."""
    names = list(dict.fromkeys(name for runs in medians.values() for name in runs))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for figure, runs in medians.items():
        cells = [f"{runs[name]:.1f}" if name in runs else "" for name in names]
        lines.append(f"| {figure} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
