"""Writer of nano's model card: `python -m training.card`.

It writes the curve, the figures and the samples. Figures are read from log.jsonl and corpus.json;
samples are generated with transformers from the exported directory, with seed 0, and are not
selected.

Not here: training (train.py), perplexity of packed weights (perplexity.py).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Template

import matplotlib
import torch
from matplotlib.figure import Figure
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training.export import NANO_FOLDER
from training.train import TrainConfig

RECORD_FOLDER = Path(__file__).parent
PERPLEXITY = RECORD_FOLDER / "quantized.json"
TEMPLATE = RECORD_FOLDER / "card_template.md"

# They end before a line break, because the tokenizer joins it to the indentation, which the model
# must choose.
COMPLETIONS = (
    'def read_lines(path):\n    """Return the lines of a text file."""',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
    "import argparse\n\ndef main():\n    parser = argparse.ArgumentParser(",
)
QUESTIONS = (
    "Write a Python function `is_empty(self)`: Return True if the queue is empty.",
    "What does this function do?\n\n```python\ndef close(self):\n    if self.file is not None:\n"
    "        self.file.close()\n        self.file = None\n```",
)
SAMPLE_TOKENS = 120


@dataclass(frozen=True)
class Record:
    """Values of log.jsonl by step and kind.

    A resumed run may repeat a step; the later line counts.
    """

    train: dict[int, dict]
    held_out: dict[int, dict]

    @property
    def last(self) -> dict:
        """Line of the last evaluation on the held-out text."""
        return self.held_out[max(self.held_out)]


def read_record(path: Path) -> Record:
    """Read the values of log.jsonl."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return Record(
        train={line["step"]: line for line in lines if "train_loss" in line},
        held_out={line["step"]: line for line in lines if "held_out_loss" in line},
    )


def main() -> None:
    """Write README.md and curve.png into nano's directory."""
    record = read_record(RECORD_FOLDER / "log.jsonl")
    corpus = json.loads((RECORD_FOLDER / "corpus.json").read_text())
    draw_curve(record, NANO_FOLDER / "curve.png")
    tokenizer = AutoTokenizer.from_pretrained(NANO_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(NANO_FOLDER, dtype=torch.float32)
    config = TrainConfig()
    text = Template(TEMPLATE.read_text()).substitute(
        parameters=f"{model.num_parameters():,}",
        python=corpus["python"],
        library_tokens=f"{corpus['library']:,}",
        library_lines_tokens=f"{corpus['library_lines']:,}",
        chat_tokens=f"{corpus['chat']:,}",
        test_tokens=f"{corpus['tests']:,}",
        held_out_tokens=f"{corpus['held_out']:,}",
        held_out_bytes=f"{corpus['held_out_bytes']:,}",
        bytes_per_token=f"{corpus['held_out_bytes'] / corpus['held_out']:.2f}",
        context=config.context,
        batch_tokens=f"{config.context * config.rows_per_batch:,}",
        peak_learning_rate=config.peak_learning_rate,
        decay_percent=f"{config.decay_fraction:.0%}",
        steps=f"{record.last['step']:,}",
        tokens=f"{record.last['tokens']:,}",
        minutes=f"{record.last['seconds'] / 60:.0f}",
        held_out_loss=f"{record.last['held_out_loss']:.3f}",
        bits_per_byte=f"{record.last['bits_per_byte']:.3f}",
        **_packed(json.loads(PERPLEXITY.read_text())["perplexity"]),
        completions=_quote(_complete(model, tokenizer, prompt) for prompt in COMPLETIONS),
        answers=_quote(_answer(model, tokenizer, question) for question in QUESTIONS),
    )
    (NANO_FOLDER / "README.md").write_text(text)


def _packed(perplexity: dict[str, float]) -> dict[str, str]:
    """Return the perplexity of each kind of weight, and its change from bfloat16's."""
    change = {kind: value / perplexity["bfloat16"] - 1 for kind, value in perplexity.items()}
    shown = {f"perplexity_{kind}": f"{value:.3f}" for kind, value in perplexity.items()}
    return shown | {f"change_{kind}": f"{value:+.2%}" for kind, value in change.items()}


def draw_curve(record: Record, path: Path) -> None:
    """Draw loss against tokens: logged batches as a thin line, the held-out text as dots."""
    matplotlib.use("agg")
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    train = [(line["tokens"] / 1e6, line["train_loss"]) for line in record.train.values()]
    held_out = [(line["tokens"] / 1e6, line["held_out_loss"]) for line in record.held_out.values()]
    axes.plot(*zip(*train), color="0.7", linewidth=0.8, label="training batch")
    dots = {"marker": "o", "markersize": 3, "color": "tab:blue", "linewidth": 1}
    axes.plot(*zip(*held_out), label="held out", **dots)
    axes.set(xlabel="million tokens", ylabel="loss, nats per token")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def _quote(samples: Iterable[str]) -> str:
    """Put samples into fences of four backquotes, because a sample may hold a fence of three."""
    return "\n\n".join(f"````text\n{sample}\n````" for sample in samples)


def _complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return prompt and completion with special tokens, sampled as in generation_config.json."""
    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS)
    return tokenizer.decode(output[0]).rstrip()


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return _complete(model, tokenizer, prompt)


if __name__ == "__main__":
    main()
