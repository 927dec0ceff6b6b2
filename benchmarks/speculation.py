"""Speculative decoding beside the plain engine: one model, several texts and batch sizes.

Both engines live in this process and alternate in every round; the report has medians and their
ratios. The outputs of both are compared. Not here: how drafts are made (slipway/engine/drafts).
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks import script
from slipway.codec.grammar import StructuredOutputs
from slipway.engine.params import SamplingParams
from slipway.llm import LLM, NANO
from training.data import read_corpus

Text = Literal["editing", "extraction", "free", "code"]
TEXTS: tuple[Text, ...] = ("editing", "extraction", "free", "code")
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "city": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "city", "age"],
}
RECORDS = {"type": "array", "items": RECORD, "minItems": 4, "maxItems": 4}
NAMES = ("Ada", "Bela", "Carl", "Dora", "Emil", "Fred", "Gina", "Hugo")
CITIES = ("Rome", "Oslo", "Lyon", "Graz", "Bonn", "Kyiv", "Porto", "Cork")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculationBench:
    """Output tokens a second with and without speculation.

    editing: a source file is to be written again with small changes (greedy); extraction: records
    of a text as JSON under a schema (greedy); free: text from a beginning, sampled at temperature
    0.8; code: held-out code is continued (greedy).
    """

    model: str = "nano"
    """nano, or a directory."""
    config: str = '{"method": "ngram", "num_speculative_tokens": 8}'
    """Options of speculation, as --speculative-config."""
    texts: tuple[Text, ...] = TEXTS
    """Loads to time."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Requests at a time."""
    output_tokens: int = 128
    """Tokens of each output, unless a schema ends it."""
    rounds: int = 5
    """Alternating rounds; the first is not counted."""
    out: Path | None = None
    """Write the figures here as JSON."""

    def run(self) -> None:
        """Measure, and print a table."""
        model = str(NANO) if self.model == "nano" else self.model
        most = max(self.batches)
        options: dict[str, Any] = {"max_num_seqs": most, "max_num_batched_tokens": max(512, most)}
        plain = LLM(model, **options)
        drafting = LLM(model, speculative_config=json.loads(self.config), **options)
        figures = {}
        print("| text | rows | plain tok/s | speculative tok/s | ratio | acceptance length |")
        print("|---|---|---|---|---|---|")
        for text in self.texts:
            for rows in self.batches:
                found = self.measure(plain, drafting, text=text, rows=rows)
                figures[f"{text} {rows}"] = found
                cells = (found[name] for name in ("plain", "speculative", "ratio", "length"))
                print(f"| {text} | {rows} | " + " | ".join(map(str, cells)) + " |", flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(figures, indent=2) + "\n")

    def measure(self, plain: LLM, drafting: LLM, *, text: Text, rows: int) -> dict[str, float]:
        """Return tokens a second of both engines, their ratio, and the acceptance length."""
        prompts = prompts_of(text, rows)
        params = [self._params(text, number) for number in range(rows)]
        rates: dict[str, list[float]] = {"plain": [], "speculative": []}
        engines = {"plain": plain, "speculative": drafting}
        drafting.engine.reset_stats()
        for number in range(self.rounds):
            outputs = {}
            for name, llm in engines.items():
                llm.engine.flush()
                started = time.perf_counter()
                results = llm.generate(prompts, params, use_tqdm=False)
                seconds = time.perf_counter() - started
                outputs[name] = [result.outputs[0].token_ids for result in results]
                if number:
                    rates[name].append(sum(map(len, outputs[name])) / seconds)
            assert outputs["plain"] == outputs["speculative"], "speculation changed an output"
        medians = {name: statistics.median(values) for name, values in rates.items()}
        pairs = zip(rates["speculative"], rates["plain"])
        return {
            **{name: round(value, 1) for name, value in medians.items()},
            "ratio": round(statistics.median(fast / slow for fast, slow in pairs), 2),
            "length": round(drafting.engine.stats.acceptance_length, 2),
        }

    def _params(self, text: Text, number: int) -> SamplingParams:
        count = self.output_tokens
        if text == "extraction":
            schema = StructuredOutputs(json=RECORDS)
            return SamplingParams(temperature=0, max_tokens=2 * count, structured_outputs=schema)
        if text == "free":
            return SamplingParams(
                temperature=0.8, top_p=0.95, seed=number, max_tokens=count, ignore_eos=True
            )
        return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def prompts_of(text: Text, rows: int) -> list[str]:
    """Return ``rows`` different prompts of a kind; the code is of files that nano never saw."""
    sources = _sources(rows)
    if text == "editing":
        return [f"{source}\n\n\n# The same code, with type hints:\n\n" for source in sources]
    if text == "extraction":
        return [_people(number) for number in range(rows)]
    if text == "free":
        return [source[: len(source) // 4] for source in sources]
    return [source[: len(source) // 2] for source in sources]


def _sources(count: int) -> list[str]:
    """Return pieces of held-out library code of about 700 characters, at line breaks."""
    found: list[str] = []
    for document in read_corpus().held_out:
        lines, size = list[str](), 0
        for line in document.text.splitlines():
            lines.append(line)
            size += len(line) + 1
            if size > 700:
                found.append("\n".join(lines))
                lines, size = [], 0
    step = max(1, len(found) // count)
    return found[::step][:count]


def _people(number: int) -> str:
    def person(at: int) -> str:
        name, city = NAMES[(number + at) % len(NAMES)], CITIES[(3 * number + at) % len(CITIES)]
        return f"{name} is {20 + (7 * number + 11 * at) % 60} years old and lives in {city}."

    people: Sequence[str] = [person(at) for at in range(4)]
    return " ".join(people) + "\n\nThe people as JSON, with name, city and age:\n"


if __name__ == "__main__":
    script.run("speculation", SpeculationBench)
