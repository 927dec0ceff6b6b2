"""`python -m benchmarks.peers`: every engine on the same random weights and loads, interleaved in one run.

Decides the loads, the rounds and the report: medians, ratios and spread. Knows engines only through bench/rivals.py.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import host_limits, llama_cpp, script
from benchmarks.engines import LlamaCpp, start_process
from benchmarks.environments import CACHE
from benchmarks.servers import HttpServer
from slipway.bench.random_model import QWEN3_SHAPE, write_random_model
from slipway.llm import NANO

Engine = Literal[
    "ours",
    "transformers",
    "vllm",
    "llama.cpp",
    "ours int8",
    "llama.cpp q8_0",
    "ours int4",
    "llama.cpp q4_0",
]
QWEN3_BYTES = 2 * 596_049_920  # weights of the shape
COUNTERPARTS = {"ours int8": "llama.cpp q8_0", "ours int4": "llama.cpp q4_0"}
BATCHES, PREFILLS, CONTEXTS = (1, 8, 16), (512, 2048), (128, 512, 2048, 8192)
SERVES = {"128/128": (128, 128, 0), "1024/128": (1024, 128, 0), "shared prefix": (512, 64, 448)}
SLOTS, MAX_MODEL_LEN, PACKED_MODEL_LEN = 16, 2176, 256
SERVERS = ("ours", "vllm", "llama.cpp")
UNPACKED = ("ours", "transformers", "vllm", "llama.cpp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeersBench:
    """Ours, transformers, vLLM and llama.cpp: decode, prefill, requests at concurrency 16, cold start, memory.

    Needs torch (the test extra), whose product is the host's limit.
    """

    engines: tuple[Engine, ...] = typing.get_args(Engine)
    """Each rival is installed on first use, in the user's cache. Of packed weights the decode alone is timed."""
    model: Literal["qwen3-0.6b", "nano"] = "qwen3-0.6b"
    """Random bf16 weights of the published shape; or the shipped model, of which requests alone are timed."""
    rounds: int = 3
    """Alternating rounds: each engine once in each."""
    decode_tokens: int = 24
    """Steps of a decode measurement."""
    requests: int = 64
    loads: tuple[Literal["128/128", "1024/128", "shared prefix"], ...] = ("128/128",)
    """Prompt and output tokens of the requests; shared prefix: 512 tokens, 448 of them common, and 64 out."""
    server: bool = False
    """Requests alone, over HTTP: ours, vLLM's server and llama.cpp's."""
    contexts: bool = True
    """Time a step of ours after prompts of 128 to 8,192 tokens, too."""
    out: Path | None = None
    """Write the figures here as JSON."""
    plot: Path | None = None
    """Draw how many times as good ours is, here, as PNG; needs matplotlib."""

    def run(self) -> None:
        """Measure, and print a table."""
        threads = len(os.sched_getaffinity(0))
        if self.server:
            kept = tuple(name for name in self.engines if name in SERVERS)
            self = dataclasses.replace(self, engines=kept, contexts=False)
        with (
            tempfile.TemporaryDirectory() as folder,
            self._started(Path(folder), threads) as engines,
        ):
            figures = self._rounds(engines, threads)
            figures["start s"] = {name: [engines[name].start_s] for name in engines if name in UNPACKED}
            figures["peak RSS MB"] = {name: [engines[name].peak_mb()] for name in engines if name in UNPACKED}
            for engine in engines.values():
                engine.stop()
            again = {name: self._start(name, Path(folder), threads) for name in engines if name in UNPACKED}
            figures["start again s"] = {name: [engine.start_s] for name, engine in again.items()}
            engines |= again
            if self.contexts and "ours" in engines and self.model != "nano":
                engines["ours, long"] = start_process("ours", Path(folder) / "model", CONTEXTS[-1] + 64, 1)
                figures |= self._contexts(engines["ours, long"])
        report = summary(figures) | {"versions": {name: version(name) for name in ("jax", "torch", "transformers")}}
        print(table(report["medians"]))
        print(json.dumps(report, indent=2))
        if self.out is not None:
            self.out.write_text(json.dumps(report, indent=2) + "\n")
        if self.plot is not None:
            draw(report["times_as_good"], self.plot)

    def _rounds(self, engines: dict[str, Any], threads: int) -> dict[str, dict[str, list[float]]]:
        """figure -> engine -> a value per round, said on stderr as they come. Rates are tokens a second."""
        rng = np.random.default_rng(0)
        vocab = json.loads((Path(NANO) / "config.json").read_bytes())["vocab_size"]  # the smaller of the two
        figures: dict[str, dict[str, list[float]]] = {}

        def prompts(count: int, length: int, shared: int = 0) -> list[list[int]]:
            common = rng.integers(0, vocab, shared).tolist()
            return [common + rng.integers(0, vocab, length - shared).tolist() for _ in range(count)]

        def note(figure: str, name: str, value: float) -> None:
            figures.setdefault(figure, {}).setdefault(name, []).append(value)
            print(f"round {turn}: {figure}, {name}: {value:.1f}", file=sys.stderr)

        def take(figure: str, measure: Callable[[Any], float], names: list[str]) -> None:
            for name in names:
                try:
                    note(figure, name, measure(engines[name]))
                except subprocess.CalledProcessError as error:  # llama.cpp's packed weights crash on some processors
                    print(f"round {turn}: {figure}, {name}: left out, {error}", file=sys.stderr)

        for turn in range(self.rounds + 1):
            if turn == 1:
                figures.clear()  # the first round warms up
            for key, rate in (
                ("read GB/s", host_limits.read_bandwidth(threads)),
                ("bf16 GFLOP/s", host_limits.matmul_rate()),
            ):
                note(key, "host", rate)
            everyone = list(engines)[turn % len(engines) :] + list(engines)[: turn % len(engines)]
            names = [name for name in everyone if name in UNPACKED]
            whole = self.model != "nano" and not self.server  # nano's steps are too short for a rival's tools to time
            for batch in BATCHES if whole else ():
                asked, steps = prompts(batch, 16), self.decode_tokens
                take(
                    f"decode b{batch} tok/s",
                    partial(_decode_rate, prompts=asked, steps=steps),
                    everyone,
                )
            for length in PREFILLS if whole else ():
                take(
                    f"prefill {length} tok/s",
                    partial(_prefill_rate, prompts=prompts, length=length),
                    names,
                )
            for load in self.loads if turn else ():
                length, out, shared = SERVES[load]
                for name in names:
                    if name == "transformers":
                        continue  # it has no queue
                    run = engines[name].drive(prompts(self.requests, length, shared), out, SLOTS)
                    for figure, value in served(run, out).items():
                        note(f"{load} {figure}", name, value)
        return figures

    @contextmanager
    def _started(self, folder: Path, threads: int) -> Iterator[dict[str, Any]]:
        """The engines by name, one after the other started; those that are there at the end are ended."""
        if self.model != "nano":
            write_random_model(QWEN3_SHAPE, folder / "model")
        if any(name.startswith("llama.cpp") for name in self.engines):
            binaries = llama_cpp.environment(CACHE / "llama.cpp")
            llama_cpp.write_gguf(self._directory(folder), folder / "bf16.gguf", CACHE / "llama.cpp")
            for name in self.engines:
                kind = name.removeprefix("llama.cpp").strip()
                if name.startswith("llama.cpp") and kind:
                    llama_cpp.quantize(binaries, folder / "bf16.gguf", folder / f"{kind}.gguf", kind.upper())
        engines: dict[str, Any] = {}
        try:
            for name in self.engines:
                engines[name] = self._start(name, folder, threads)
            yield engines
        finally:
            for engine in engines.values():
                engine.stop()

    def _start(self, name: str, folder: Path, threads: int) -> Any:
        """One engine; ours starts with an empty cache of compiled programs, if it is the first time in this run."""
        directory = self._directory(folder)
        length = MAX_MODEL_LEN if name in UNPACKED else PACKED_MODEL_LEN  # memory for all at once
        if self.model == "nano":
            length = json.loads((directory / "config.json").read_bytes())["max_position_embeddings"]
        if name.startswith("llama.cpp"):
            kind = name.removeprefix("llama.cpp").strip() or "bf16"
            return LlamaCpp(folder / f"{kind}.gguf", length, SLOTS, threads=threads, serves=kind == "bf16")
        if self.server:
            return HttpServer(name, directory, length, SLOTS, tokenizer=self.model == "nano")
        return start_process(name, directory, length, SLOTS, cache=folder / "cache")

    def _directory(self, folder: Path) -> Path:
        return Path(NANO) if self.model == "nano" else folder / "model"

    def _contexts(self, engine: Any) -> dict[str, dict[str, list[float]]]:
        """A step's time by context, and how it stands to what the bytes of weights and cache predict from the first."""
        rng, shape = np.random.default_rng(1), QWEN3_SHAPE
        step_ms: dict[int, list[float]] = {context: [] for context in CONTEXTS}
        for _ in range(self.rounds):
            for context in CONTEXTS:
                prompt = rng.integers(0, shape["vocab_size"], context - self.decode_tokens // 2).tolist()
                step_ms[context].append(1e3 * engine.decode([prompt], self.decode_tokens))
        token_bytes = 2 * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
        weights = (QWEN3_BYTES + context * token_bytes for context in CONTEXTS)
        read = dict(zip(CONTEXTS, weights))
        figures = {f"step ms at context {context}": {"ours": times} for context, times in step_ms.items()}
        for context in CONTEXTS[1:]:
            ratios = [b / a * read[CONTEXTS[0]] / read[context] for a, b in zip(step_ms[CONTEXTS[0]], step_ms[context])]
            figures[f"the same, over the bytes' prediction, {context}"] = {"ours": ratios}
        return figures


def _decode_rate(engine: Any, prompts: list[list[int]], steps: int) -> float:
    return len(prompts) / engine.decode(prompts, steps)


def _prefill_rate(engine: Any, prompts: Callable, length: int) -> float:
    return length / engine.prefill(prompts(1, length)[0])  # a new prompt each time: nobody's cache knows it


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
            own = next((own for own, theirs in COUNTERPARTS.items() if theirs == name), "ours")
            if not name.startswith("ours") and own in runs:
                pairs = [a / b for a, b in zip(runs[own], values)]
                ratio = statistics.median(pairs)
                less_is_better = "tok/s" not in figure
                ratios.setdefault(figure, {})[name] = round(1 / ratio if less_is_better else ratio, 2)
    return {
        "medians": {f: {n: round(v, 2) for n, v in runs.items()} for f, runs in medians.items()},
        "spread": {f: {n: [round(min(v), 2), round(max(v), 2)] for n, v in r.items()} for f, r in figures.items()},
        "times_as_good": ratios,
    }


def draw(ratios: dict[str, dict[str, float]], out: Path) -> None:
    """Bars by figure and rival; 1 is the rival's own."""
    from matplotlib.figure import Figure  # an extra, for who asks for a plot

    rivals_ = list(dict.fromkeys(name for row in ratios.values() for name in row))
    figure = Figure(figsize=(9, 0.45 * len(ratios) + 1.5), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(rivals_)
    for i, name in enumerate(rivals_):
        at = [row + i * height for row, figure_ in enumerate(ratios) if name in ratios[figure_]]
        widths = [row[name] - 1 for row in ratios.values() if name in row]
        axes.barh(at, widths, height, left=1, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(ratios))], list(ratios))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("times as good as the rival (right of 1: ours is better)")
    axes.legend()
    figure.savefig(out, dpi=120)


def table(medians: dict[str, dict[str, float]]) -> str:
    """The medians as Markdown."""
    names = list(dict.fromkeys(name for runs in medians.values() for name in runs))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for figure, runs in medians.items():
        cells = [f"{runs[name]:.1f}" if name in runs else "" for name in names]
        lines.append(f"| {figure} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark with the options of the command line."""
    script.run("peers", PeersBench)


if __name__ == "__main__":
    main()
