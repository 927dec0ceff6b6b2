"""Flags: translation of vLLM's, SGLang's and a YAML file's, and values that are JSON.

A flag with a counterpart is replaced by it. A flag without any effect here is dropped with a note
on stderr. Every other unknown flag is left for the parser to refuse.

Not here: the commands and their own flags (cli.py).
"""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from slipway.errors import InvalidConfig

SAME = {
    "--tp": "--tensor-parallel-size",
    "--tp-size": "--tensor-parallel-size",
    "-tp": "--tensor-parallel-size",
    "--ep": "--expert-parallel-size",
    "--ep-size": "--expert-parallel-size",
    "--dp": "--replicas",
    "--dp-size": "--replicas",
    "-dp": "--replicas",
    "--context-length": "--max-model-len",
    "--max-running-requests": "--max-num-seqs",
    "--chunked-prefill-size": "--max-num-batched-tokens",
    "--block-size": "--page-size",
    "--gpu-memory-utilization": "--memory-fraction",
    "--mem-fraction-static": "--memory-fraction",
    "--tool-call-parser": "--output-parser",
    "--reasoning-parser": "--output-parser",
}
SWITCHES = {
    "--disable-radix-cache": "--no-enable-prefix-caching",
    "--no-prefix-caching": "--no-enable-prefix-caching",
}
MODEL = ("--model", "--model-path")
# vLLM's: the experts of a layer are split over all devices of the layer.
EXPERTS_EVERYWHERE = "--enable-expert-parallel"
# flags without a value that change nothing here -> why
NOTHING = {
    "--trust-remote-code": "code in a model's repository is never imported",
    "--disable-log-requests": "a request is one line in the log, never its text",
    "--enable-chunked-prefill": "prompts are always computed in chunks",
    "--enable-auto-tool-choice": "a model may call tools whenever a request has tools",
}
COMMANDS = ("serve", "run-batch", "follow")
# SGLang's flags of speculative decoding, which become one --speculative-config.
ALGORITHM = "--speculative-algorithm"
DRAFT_MODEL = "--speculative-draft-model-path"
NUM_STEPS = "--speculative-num-steps"
TOP_K = "--speculative-eagle-topk"
NUM_DRAFT_TOKENS = "--speculative-num-draft-tokens"
# SGLang's algorithm -> vLLM's method. EAGLE without a draft model is the model's own MTP layer.
METHODS = {
    "EAGLE": "eagle",
    "EAGLE3": "eagle3",
    "NEXTN": "mtp",
    "NGRAM": "ngram",
    "STANDALONE": "draft_model",
}


def expand(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with Slipway's flags, and with those of its --config file.

    Only commands that run an engine are changed. Raises InvalidConfig for an invalid file.
    """
    if not words or words[0] not in COMMANDS:
        return list(words)
    command, *rest = words
    given = _renamed(_split(rest))
    if "--config" in given:
        at = given.index("--config")
        if at + 1 == len(given):
            raise InvalidConfig("config", "nothing", "a YAML file")
        path = Path(given[at + 1])
        given = given[:at] + given[at + 2 :]
        held = {word for word in given if word.startswith("-")}
        has_model = bool(given) and not given[0].startswith("-")
        stated = _renamed(_from_file(path))
        given += _without(stated, held, has_model)
    return [command, *_with_speculation(_with_expert_groups(given))]


def _with_expert_groups(words: list[str]) -> list[str]:
    """Replace vLLM's switch of expert parallelism by as many groups as there are devices."""
    if EXPERTS_EVERYWHERE not in words:
        return words
    tensor, size = "--tensor-parallel-size", "1"
    if tensor in words[:-1]:
        size = words[words.index(tensor) + 1]
    rest = [word for word in words if word != EXPERTS_EVERYWHERE]
    return [*rest, "--expert-parallel-size", size]


def _with_speculation(words: list[str]) -> list[str]:
    """Replace SGLang's flags of speculative decoding by one --speculative-config.

    Raises InvalidConfig for an unknown algorithm, for trees of drafts, and for numbers that
    contradict each other.
    """
    found: dict[str, str] = {}
    rest: list[str] = []
    given = iter(words)
    for word in given:
        if word in (ALGORITHM, DRAFT_MODEL, NUM_STEPS, TOP_K, NUM_DRAFT_TOKENS):
            found[word] = next(given, "")
        else:
            rest.append(word)
    if not found:
        return rest
    algorithm = found.get(ALGORITHM, "nothing")
    if algorithm not in METHODS:
        raise InvalidConfig(ALGORITHM, algorithm, " | ".join(METHODS))
    if found.get(TOP_K, "1") != "1":
        raise InvalidConfig(TOP_K, found[TOP_K], "1: drafts are chains, not trees")
    numbers = {
        name: _count(name, found[name]) for name in (NUM_STEPS, NUM_DRAFT_TOKENS) if name in found
    }
    # The last token of the sequence is one of SGLang's draft tokens.
    steps = numbers.get(NUM_STEPS, numbers.get(NUM_DRAFT_TOKENS, 0) - 1)
    if numbers.get(NUM_DRAFT_TOKENS, steps + 1) != steps + 1:
        expected = f"{steps + 1}, one more than {NUM_STEPS}"
        raise InvalidConfig(NUM_DRAFT_TOKENS, numbers[NUM_DRAFT_TOKENS], expected)
    config: dict[str, Any] = {"method": METHODS[algorithm]}
    if algorithm == "EAGLE" and DRAFT_MODEL not in found:
        config["method"] = "mtp"
    if numbers:
        config["num_speculative_tokens"] = steps
    if DRAFT_MODEL in found:
        config["model"] = found[DRAFT_MODEL]
    return [*rest, "--speculative-config", json.dumps(config)]


def _count(flag: str, text: str) -> int:
    if not text.isdecimal():
        raise InvalidConfig(flag, text, "an integer")
    return int(text)


def _split(words: Sequence[str]) -> list[str]:
    """Split each ``--name=value`` into two words."""
    split = [word.split("=", 1) if word.startswith("--") else [word] for word in words]
    return list(itertools.chain.from_iterable(split))


def _renamed(words: Sequence[str]) -> list[str]:
    found: list[str] = []
    model: str | None = None
    rest = iter(words)
    for word in rest:
        if word in NOTHING:
            print(f"slipway: {word} changes nothing: {NOTHING[word]}", file=sys.stderr)
        elif word in MODEL:
            model = next(rest, "")
        else:
            found.append(SAME.get(word, SWITCHES.get(word, word)))
    return found if model is None else [model, *found]


def _from_file(path: Path) -> list[str]:
    """Return the words of a YAML file that maps flags, with dashes or underscores, to values.

    Raises InvalidConfig.
    """
    try:
        held = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidConfig("config", str(path), f"a YAML file: {error}") from error
    if not isinstance(held, dict):
        raise InvalidConfig("config", str(path), "a YAML file that maps flags to values")
    named = [(str(name).replace("_", "-"), value) for name, value in held.items()]
    return [word for name, value in named for word in _words(f"--{name}", value)]


def _words(flag: str, value: Any) -> list[str]:
    if value is True:
        return [flag]
    if value is False:
        return [flag.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def _without(words: Sequence[str], held: set[str], has_model: bool) -> list[str]:
    """Return the words of the file without the flags that the command line sets itself.

    ``held`` are the command line's flags; ``has_model``: whether it names a model.
    """
    found: list[str] = []
    skipping = False
    for number, word in enumerate(words):
        if word.startswith("--"):
            if word.startswith("--no-"):
                opposite = word.replace("--no-", "--", 1)
            else:
                opposite = word.replace("--", "--no-", 1)
            skipping = word in held or opposite in held
        elif number == 0:
            skipping = has_model
        if not skipping:
            found.append(word)
    return found


def registry() -> ConstructorRegistry:
    """Return a registry in which mappings are JSON: ``--hf-overrides '{"rope_scaling": null}'``."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def mapping(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type_origin is not Mapping:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda words: json.loads(words[0]),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    return registry
