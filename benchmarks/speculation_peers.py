"""Gains of speculation in Slipway, vLLM and llama.cpp, each over its own plain decoding.

The engines alternate in every round of one run, on the same prompts of token ids, each in a process
of its own, in bf16. Not here: Slipway alone, with more kinds of text (speculation.py).
"""

import dataclasses
import json
import os
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from benchmarks import environments, llama_cpp, script
from benchmarks.engines import start_process
from benchmarks.speculation import prompts_of
from slipway.bench.worker import NGRAM
from slipway.codec.tokenizer import Tokenizer
from slipway.llm import NANO

Engine = Literal["ours", "vllm", "llama.cpp"]
Text = Literal["editing", "free", "code"]
# vLLM's own defaults of a match; as many drafts as in Slipway.
VLLM_NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": NGRAM["num_speculative_tokens"],
    "prompt_lookup_min": 3,
    "prompt_lookup_max": 5,
}
# llama.cpp's forms of lookup in the prompt and output. The first with the lengths of Slipway's
# drafts and matches, the second with its defaults.
LLAMA_CPP = {
    "llama.cpp ngram-simple": (
        *("--spec-type", "ngram-simple"),
        *("--spec-ngram-simple-size-n", 3, "--spec-ngram-simple-size-m", 8),
    ),
    "llama.cpp ngram-mod": ("--spec-type", "ngram-mod"),
}
LENGTH = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculationPeersBench:
    """Output tokens a second of n-gram speculation beside plain decoding, in three engines.

    Time counts from a request's first token to its last: prompts are not part of it. Each round has
    prompts of its own, so that no engine repeats what it has seen.
    """

    model: str = "nano"
    """nano, or a directory of a Llama or Qwen3."""
    engines: tuple[Engine, ...] = ("ours", "vllm", "llama.cpp")
    """Each other engine is installed on first use, in the user's cache."""
    mtp: bool = False
    """Time Slipway with the model's prediction layer, too."""
    texts: tuple[Text, ...] = ("editing", "code")
    """Loads to time, as in benchmarks/speculation.py; all greedy."""
    batches: tuple[int, ...] = (1, 8)
    """Requests at a time."""
    requests: int = 8
    """Requests of a load."""
    output_tokens: int = 128
    """Tokens of each output."""
    rounds: int = 5
    """Alternating rounds; the first is not counted."""
    out: Path | None = None
    """Write the figures here as JSON."""

    def run(self) -> None:
        """Measure, and print a table."""
        directory = Path(NANO) if self.model == "nano" else Path(self.model)
        figures: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            engines = self._started(directory, Path(name))
            for engine in engines.values():
                stack.callback(engine.stop)
            tokenizer = Tokenizer.load(directory)
            for text in self.texts:
                count = self.requests * self.rounds
                prompts = [tokenizer.encode(each) for each in prompts_of(text, count)]
                for rows in self.batches:
                    found = self.measure(engines, prompts, rows)
                    figures[f"{text} {rows}"] = found
                    print(f"\n{text}, {rows} at a time\n{table(found)}", flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(figures, indent=2) + "\n")

    def measure(
        self, engines: Mapping[str, Any], prompts: list[list[int]], rows: int
    ) -> dict[str, list[float]]:
        """Return tokens a second of each engine, one value per round."""
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(self.rounds):
            of_round = prompts[number * self.requests :][: self.requests]
            names = list(engines)
            first = number % len(names)
            for name in names[first:] + names[:first]:
                load = engines[name].drive(of_round, self.output_tokens, rows)
                if number:
                    rates[name].append(decode_rate(load["times"], self.output_tokens, rows))
        return rates

    def _started(self, directory: Path, folder: Path) -> dict[str, Any]:
        """Return the engines by name, plain ones before those with drafts."""
        most, found = max(self.batches), dict[str, Any]()
        ours = ("ours", "ours ngram", *(("ours mtp",) if self.mtp else ()))
        for name in ours if "ours" in self.engines else ():
            found[name] = start_process(name, directory, LENGTH, max_num_seqs=most)
        if "vllm" in self.engines:
            options = {"vllm": {}, "vllm ngram": {"speculative_config": VLLM_NGRAM}}
            for name, each in options.items():
                found[name] = start_process(
                    "vllm", directory, LENGTH, max_num_seqs=most, vllm_options=each
                )
        if "llama.cpp" in self.engines:
            home = environments.CACHE / "llama.cpp"
            binaries, model = llama_cpp.environment(home), folder / "model.gguf"
            llama_cpp.write_gguf(directory, model, home)
            for name, words in {"llama.cpp": (), **LLAMA_CPP}.items():
                found[name] = llama_cpp.Server(
                    binaries,
                    model,
                    slots=most,
                    max_model_len=LENGTH,
                    threads=len(os.sched_getaffinity(0)),
                    options=words,
                )
        return found


def decode_rate(times: list[list[float]], output_tokens: int, rows: int) -> float:
    """Return tokens a second from the first to the last token of requests.

    ``times``: when tokens arrived, of each request; ``rows``: how many ran at once. Of one at a
    time, the time between requests does not count.
    """
    tokens = (output_tokens - 1) * len(times)
    if rows == 1:
        return tokens / sum(each[-1] - each[0] for each in times)
    return tokens / (max(each[-1] for each in times) - min(each[0] for each in times))


def table(rates: Mapping[str, list[float]]) -> str:
    """Return medians, and gains over the plain engine in the same round, as a table."""
    lines = ["| engine | tok/s | gain |", "|---|---|---|"]
    for name, values in rates.items():
        plain = rates[name.split(" ")[0]]
        gain = statistics.median(fast / slow for fast, slow in zip(values, plain))
        shown = f"{gain:.2f}" if values is not plain else ""
        lines.append(f"| {name} | {statistics.median(values):.1f} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    script.run("speculation_peers", SpeculationPeersBench)
