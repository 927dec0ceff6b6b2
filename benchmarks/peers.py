"""Slipway, transformers, vLLM and llama.cpp on the same random weights and loads, in one run.

The engines alternate in every round. The report holds medians, ratios and spread. Not here: how
each engine starts and runs a load (engines.py, servers.py, llama_cpp.py), the limits of the host
(host_limits.py).
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from slipway.bench.random_model import QWEN3_MOE_SHAPE, QWEN3_SHAPE, write_random_model
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
# Slipway's packed weights -> llama.cpp's weights of about the same size
COUNTERPARTS = {"ours int8": "llama.cpp q8_0", "ours int4": "llama.cpp q4_0"}
# Packed weights -> bits of a weight of projections and experts, and of the head, with their scales.
# Beside projections of 4 bits, Slipway's head has 8, and llama.cpp's is q6_K.
BITS = {
    "ours int8": (8.0, 8.0),
    "ours int4": (4.5, 8.0),
    "llama.cpp q8_0": (8.5, 8.5),
    "llama.cpp q4_0": (4.5, 6.5625),
}
SERVERS = ("ours", "vllm", "llama.cpp")
UNPACKED = ("ours", "transformers", "vllm", "llama.cpp")
MOE_SHAPE = QWEN3_MOE_SHAPE | {"num_hidden_layers": 8}
# Bytes of the weights of QWEN3_SHAPE in bf16.
QWEN3_BYTES = 2 * 596_049_920
BATCHES, PREFILLS, CONTEXTS = (1, 8, 16), (512, 2048), (128, 512, 2048, 8192)
# load -> tokens of a prompt, tokens of an output, and tokens that all prompts begin with
LOADS = {"128/128": (128, 128, 0), "1024/128": (1024, 128, 0), "shared prefix": (512, 64, 448)}
# Requests at a time; longest contexts of engines with bf16 and with packed weights.
SLOTS, MAX_MODEL_LEN, PACKED_MODEL_LEN = 16, 2176, 256
# figure -> engine -> one value per round
Figures = dict[str, dict[str, list[float]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeersBench:
    """Slipway, transformers, vLLM and llama.cpp: decode, prefill, requests, cold start, memory.

    16 requests run at a time. Needs torch (the test extra), which measures the host's limit.
    """

    engines: tuple[Engine, ...] = typing.get_args(Engine)
    """Each other engine is installed on first use, in the user's cache. With packed weights only
    decode is timed."""
    model: Literal["qwen3-0.6b", "moe", "nano"] = "qwen3-0.6b"
    """Random bf16 weights of the published shape; moe: of Qwen3-30B-A3B cut to 8 layers, of which
    only one engine is in memory at a time, and decode and prefill of 512 are timed; nano: the
    shipped model, with requests only."""
    rounds: int = 3
    """Rounds, with every engine once in each."""
    decode_tokens: int = 24
    """Steps of a decode measurement."""
    requests: int = 64
    """Requests of a load."""
    loads: tuple[Literal["128/128", "1024/128", "shared prefix"], ...] = ("128/128",)
    """Prompt and output tokens of the requests; shared prefix: 512, with 448 common, and 64."""
    server: bool = False
    """Time requests only, over HTTP: Slipway's server, vLLM's and llama.cpp's."""
    contexts: bool = True
    """Time a step of Slipway after prompts of 128 to 8,192 tokens, too."""
    out: Path | None = None
    """Write the figures here as JSON."""
    plot: Path | None = None
    """Draw here, as PNG, how many times as good Slipway is; needs matplotlib."""

    def run(self) -> None:
        """Measure, and print a table."""
        threads = len(os.sched_getaffinity(0))
        if self.model == "moe":
            self._report(self._one_by_one(threads))
            return
        with (
            tempfile.TemporaryDirectory() as folder,
            self._started(Path(folder), threads) as engines,
        ):
            figures = self.measure(engines, threads)
            unpacked = [name for name in engines if name in UNPACKED]
            figures["start s"] = {name: [engines[name].start_s] for name in unpacked}
            figures["peak RSS MB"] = {name: [engines[name].peak_mb()] for name in unpacked}
            for engine in engines.values():
                engine.stop()
            for name in unpacked:
                engines[name] = self._start(name, Path(folder), threads)
            figures["start again s"] = {name: [engines[name].start_s] for name in unpacked}
            if self.contexts and not self.server and "ours" in engines and self.model != "nano":
                engines["ours, long"] = start_process(
                    "ours", Path(folder) / "model", CONTEXTS[-1] + 64, max_num_seqs=1
                )
                figures |= self._contexts(engines["ours, long"])
        self._report(figures)

    def _one_by_one(self, threads: int) -> Figures:
        """Return figures of engines that are started for each round, and stopped after it.

        The weights of two engines do not fit into memory together.
        """
        rng, record = np.random.default_rng(0), Record()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self._write_models(folder)
            for turn in range(self.rounds):
                record.turn = turn + 1
                first = turn % len(self.engines)
                for engine_name in (*self.engines[first:], *self.engines[:first]):
                    # Weights that the engines before have pushed out of memory.
                    host_limits.read_files(self._files(engine_name, folder))
                    engine = self._start(engine_name, folder, threads)
                    try:
                        # Each expert is read once before steps are timed.
                        engine.prefill(random_prompts(rng, 1, PREFILLS[0])[0])
                        read = host_limits.read_bandwidth(threads)
                        record.note("read GB/s of the host", engine_name, read)
                        self._measure_steps({engine_name: engine}, record, rng)
                    finally:
                        engine.stop()
        for batch in BATCHES:
            rates = record.figures.get(f"decode b{batch} tok/s", {})
            sizes = {name: moe_step_bytes(MOE_SHAPE, batch, *bits_of(name)) for name in rates}
            record.figures[f"decode b{batch} GB/s"] = {
                name: [rate / batch * sizes[name] / 1e9 for rate in values]
                for name, values in rates.items()
            }
        return record.figures

    def _files(self, name: str, folder: Path) -> list[Path]:
        """Return the files with the weights of an engine."""
        if name.startswith("llama.cpp"):
            return [folder / f"{_gguf_kind(name)}.gguf"]
        return sorted(self._directory(folder).glob("*.safetensors"))

    def _report(self, figures: Figures) -> None:
        """Print the figures as a table and as JSON, and write them where the options state."""
        versions = {name: version(name) for name in ("jax", "torch", "transformers")}
        report = summary(figures) | {"versions": versions}
        print(table(report["medians"]))
        print(json.dumps(report, indent=2))
        if self.out is not None:
            self.out.write_text(json.dumps(report, indent=2) + "\n")
        if self.plot is not None:
            draw(report["times_as_good"], self.plot)

    def measure(self, engines: Mapping[str, Any], threads: int) -> Figures:
        """Return the figures of all rounds, and print each on stderr as it arrives.

        The order of the engines rotates from round to round. Rates are tokens a second.
        """
        rng, record = np.random.default_rng(0), Record()
        for turn in range(self.rounds + 1):
            # the first round warms up
            if turn == 1:
                record.figures.clear()
            record.turn = turn
            record.note("read GB/s", "host", host_limits.read_bandwidth(threads))
            record.note("bf16 GFLOP/s", "host", host_limits.matmul_rate())
            first = turn % len(engines)
            names = [*list(engines)[first:], *list(engines)[:first]]
            ordered = {name: engines[name] for name in names}
            # steps of nano are too short for the other engines' tools
            if self.model != "nano" and not self.server:
                self._measure_steps(ordered, record, rng)
            if turn:
                self._measure_loads(ordered, record, rng)
        return record.figures

    def _measure_steps(
        self, engines: Mapping[str, Any], record: "Record", rng: np.random.Generator
    ) -> None:
        """Time decode of every engine, and prefill of those with bf16 weights."""
        for batch in BATCHES:
            decode = partial(
                _decode_rate, prompts=random_prompts(rng, batch, 16), steps=self.decode_tokens
            )
            record.take(f"decode b{batch} tok/s", decode, engines)
        unpacked = {name: engine for name, engine in engines.items() if name in UNPACKED}
        for length in PREFILLS[:1] if self.model == "moe" else PREFILLS:
            prefill = partial(_prefill_rate, rng=rng, length=length)
            record.take(f"prefill {length} tok/s", prefill, unpacked)

    def _measure_loads(
        self, engines: Mapping[str, Any], record: "Record", rng: np.random.Generator
    ) -> None:
        """Time requests of engines with bf16 weights, except transformers, which has no queue."""
        for load in self.loads:
            length, max_tokens, shared = LOADS[load]
            for name, engine in engines.items():
                if name not in UNPACKED or name == "transformers":
                    continue
                prompts = random_prompts(rng, self.requests, length, shared=shared)
                times = engine.drive(prompts, max_tokens, SLOTS)
                for figure, value in served(times, max_tokens).items():
                    record.note(f"{load} {figure}", name, value)

    @contextmanager
    def _started(self, folder: Path, threads: int) -> Iterator[dict[str, Any]]:
        """Start the engines in turn; at the end, stop all that are in the dictionary then."""
        names = [name for name in self.engines if not self.server or name in SERVERS]
        self._write_models(folder)
        engines: dict[str, Any] = {}
        try:
            for name in names:
                engines[name] = self._start(name, folder, threads)
            yield engines
        finally:
            for engine in engines.values():
                engine.stop()

    def _write_models(self, folder: Path) -> None:
        """Write the model in the formats of all engines."""
        if self.model != "nano":
            shape = QWEN3_SHAPE if self.model == "qwen3-0.6b" else MOE_SHAPE
            write_random_model(shape, folder / "model")
        kinds = [_gguf_kind(name) for name in self.engines if name.startswith("llama.cpp")]
        if kinds:
            binaries = llama_cpp.environment(CACHE / "llama.cpp")
            plain = folder / "bf16.gguf"
            llama_cpp.write_gguf(self._directory(folder), plain, CACHE / "llama.cpp")
            for kind in kinds:
                if kind != "bf16":
                    packed = folder / f"{kind}.gguf"
                    llama_cpp.quantize(binaries, plain, packed, kind=kind.upper())

    def _start(self, name: str, folder: Path, threads: int) -> Any:
        """Start an engine; Slipway's first start in a run finds no compiled programs."""
        directory = self._directory(folder)
        # short for packed weights, so that the memory of all engines together suffices
        is_alone = self.model == "moe"
        length = MAX_MODEL_LEN if is_alone or name in UNPACKED else PACKED_MODEL_LEN
        if self.model == "nano":
            length = _nano_config()["max_position_embeddings"]
        if name.startswith("llama.cpp"):
            kind = _gguf_kind(name)
            return LlamaCpp(
                folder / f"{kind}.gguf",
                length,
                SLOTS,
                threads=threads,
                serves=kind == "bf16" and self.model != "moe",
            )
        if self.server:
            return HttpServer(
                name,
                directory,
                max_model_len=length,
                max_num_seqs=SLOTS,
                tokenizer=self.model == "nano",
            )
        return start_process(name, directory, length, max_num_seqs=SLOTS, cache=folder / "cache")

    def _directory(self, folder: Path) -> Path:
        return Path(NANO) if self.model == "nano" else folder / "model"

    def _contexts(self, engine: Any) -> Figures:
        """Return the time of a step by context, and its ratio to a prediction.

        The prediction: the time at the first context grows as the bytes of weights and cache that a
        step reads.
        """
        rng, shape = np.random.default_rng(1), QWEN3_SHAPE
        step_ms: dict[int, list[float]] = {context: [] for context in CONTEXTS}
        for _ in range(self.rounds):
            for context in CONTEXTS:
                length = context - self.decode_tokens // 2
                prompt = rng.integers(0, shape["vocab_size"], length).tolist()
                step_ms[context].append(1e3 * engine.decode([prompt], self.decode_tokens))
        head_bytes = 2 * 2 * shape["num_key_value_heads"] * shape["head_dim"]
        token_bytes = head_bytes * shape["num_hidden_layers"]
        read_bytes = {context: QWEN3_BYTES + context * token_bytes for context in CONTEXTS}
        figures = {f"step ms at context {context}": {"ours": ms} for context, ms in step_ms.items()}
        first = CONTEXTS[0]
        for context in CONTEXTS[1:]:
            predicted = read_bytes[context] / read_bytes[first]
            ratios = [b / a / predicted for a, b in zip(step_ms[first], step_ms[context])]
            figures[f"the same, over the bytes' prediction, {context}"] = {"ours": ratios}
        return figures


class Record:
    """Figures of a run, printed on stderr as they arrive."""

    def __init__(self) -> None:
        self.figures: Figures = {}
        self.turn = 0

    def note(self, figure: str, name: str, value: float) -> None:
        """Add the value of an engine."""
        self.figures.setdefault(figure, {}).setdefault(name, []).append(value)
        print(f"round {self.turn}: {figure}, {name}: {value:.1f}", file=sys.stderr)

    def take(
        self, figure: str, measure: Callable[[Any], float], engines: Mapping[str, Any]
    ) -> None:
        """Measure each engine in turn; leave out a value where the tool of an engine crashes.

        llama.cpp's packed weights crash on some processors.
        """
        for name, engine in engines.items():
            try:
                self.note(figure, name, measure(engine))
            except subprocess.CalledProcessError as error:
                message = f"round {self.turn}: {figure}, {name}: left out, {error}"
                print(message, file=sys.stderr)


def random_prompts(
    rng: np.random.Generator, count: int, length: int, *, shared: int = 0
) -> list[list[int]]:
    """Return prompts of random token ids, the first ``shared`` of which are common to all.

    The ids are of nano's vocabulary, the smaller one of the two models.
    """
    vocab = _nano_config()["vocab_size"]
    common = rng.integers(0, vocab, shared).tolist()
    return [common + rng.integers(0, vocab, length - shared).tolist() for _ in range(count)]


def _nano_config() -> dict[str, Any]:
    return json.loads((Path(NANO) / "config.json").read_bytes())


def _gguf_kind(name: str) -> str:
    """Return the kind of weights of one of llama.cpp's entries, such as q8_0."""
    return name.removeprefix("llama.cpp").strip() or "bf16"


def _decode_rate(engine: Any, prompts: list[list[int]], steps: int) -> float:
    return len(prompts) / engine.decode(prompts, steps)


def _prefill_rate(engine: Any, rng: np.random.Generator, length: int) -> float:
    # a new prompt for each engine and round, which is in no prefix cache
    return length / engine.prefill(random_prompts(rng, 1, length)[0])


def served(run: dict[str, Any], max_tokens: int) -> dict[str, float]:
    """Return output tokens a second of a load, and medians of its requests in milliseconds.

    TTFT is the time to a request's first token, ITL its mean time between tokens.
    """
    ends = [times[-1] for times in run["times"]]
    firsts = [times[0] - started for times, started in zip(run["times"], run["started"])]
    gaps = [(times[-1] - times[0]) / (len(times) - 1) for times in run["times"]]
    return {
        "out tok/s": len(ends) * max_tokens / max(ends),
        "TTFT ms": statistics.median(firsts) * 1e3,
        "ITL ms": statistics.median(gaps) * 1e3,
    }


def summary(figures: Figures) -> dict[str, Any]:
    """Return medians, the lowest and highest values, and Slipway's ratio to each other engine.

    A ratio above 1 means that Slipway is better, also where less is better.
    """
    medians: dict[str, dict[str, float]] = {}
    spread: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for figure, runs in figures.items():
        medians[figure] = {name: round(statistics.median(each), 2) for name, each in runs.items()}
        spread[figure] = {
            name: [round(min(each), 2), round(max(each), 2)] for name, each in runs.items()
        }
        for name, values in runs.items():
            own = _counterpart(name)
            if not name.startswith("ours") and own in runs:
                ratio = statistics.median(a / b for a, b in zip(runs[own], values))
                less_is_better = not figure.endswith("/s")
                ratio = 1 / ratio if less_is_better else ratio
                ratios.setdefault(figure, {})[name] = round(ratio, 2)
    return {"medians": medians, "spread": spread, "times_as_good": ratios}


def bits_of(engine: str) -> tuple[float, float]:
    """Return the bits of a weight of projections and experts, and those of the head."""
    return BITS.get(engine, (16.0, 16.0))


def moe_step_bytes(shape: Mapping[str, Any], batch: int, bits: float, head_bits: float) -> float:
    """Return the bytes of weights that a decode step of a Qwen3-MoE shape has to read.

    Of the experts only those chosen: the expected number if each token chooses at random. Without
    the router, the cache, the norms and the rows of the token table.
    """
    embed, heads = shape["hidden_size"], shape["num_attention_heads"]
    attention = 2 * embed * shape["head_dim"] * (heads + shape["num_key_value_heads"])
    experts, chosen = shape["num_experts"], shape["num_experts_per_tok"]
    read = experts * (1 - (1 - chosen / experts) ** batch)
    layer = attention + read * 3 * embed * shape["moe_intermediate_size"]
    layers = shape["num_hidden_layers"] * layer
    return (bits * layers + head_bits * embed * shape["vocab_size"]) / 8


def _counterpart(name: str) -> str:
    """Return Slipway's entry that another engine's entry is compared with."""
    return next((own for own, other in COUNTERPARTS.items() if other == name), "ours")


def draw(ratios: dict[str, dict[str, float]], out: Path) -> None:
    """Draw a bar for each figure and other engine; 1 is the other engine's own value."""
    from matplotlib.figure import Figure  # an optional dependency, needed for plots only

    names = list(dict.fromkeys(name for row in ratios.values() for name in row))
    figure = Figure(figsize=(9, 0.45 * len(ratios) + 1.5), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(names)
    for i, name in enumerate(names):
        rows = [number for number, row in enumerate(ratios.values()) if name in row]
        widths = [row[name] - 1 for row in ratios.values() if name in row]
        at = [row + i * height for row in rows]
        axes.barh(at, widths, height=height, left=1, label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(ratios))], list(ratios))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("times as good as the rival (right of 1: ours is better)")
    axes.legend()
    figure.savefig(out, dpi=120)


def table(medians: Mapping[str, Mapping[str, float]]) -> str:
    """Return the medians as Markdown."""
    names: Sequence[str] = list(dict.fromkeys(name for runs in medians.values() for name in runs))
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
