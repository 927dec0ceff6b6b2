"""The flags that users of vLLM and SGLang bring, and a YAML file of flags, as our own; knows no command.

A name that stands for one of ours is replaced; what cannot be honoured is refused; what changes nothing is said.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from slipway.errors import InvalidConfig

SAME = {
    "--tp": "--tensor-parallel-size", "--tp-size": "--tensor-parallel-size", "-tp": "--tensor-parallel-size",
    "--dp": "--replicas", "--dp-size": "--replicas", "-dp": "--replicas",
    "--context-length": "--max-model-len", "--max-running-requests": "--max-num-seqs",
    "--chunked-prefill-size": "--max-num-batched-tokens", "--block-size": "--page-size",
    "--gpu-memory-utilization": "--memory-fraction", "--mem-fraction-static": "--memory-fraction",
    "--tool-call-parser": "--output-parser", "--reasoning-parser": "--output-parser",
}  # fmt: skip
SWITCHES = {"--disable-radix-cache": "--no-enable-prefix-caching", "--no-prefix-caching": "--no-enable-prefix-caching"}
MODEL = ("--model", "--model-path")
NOTHING = {  # flags without a value that change nothing here, and why
    "--trust-remote-code": "code in a model's repository is never imported",
    "--disable-log-requests": "a request is one line in the log, never its text",
    "--enable-chunked-prefill": "prompts are always computed in chunks",
    "--enable-auto-tool-choice": "tools are chosen wherever a body brings some",
}
COMMANDS = ("serve", "run-batch", "follow")


def expand(words: Sequence[str]) -> list[str]:
    """The words of a command line, of a command that runs an engine, with our names. Raises InvalidConfig."""
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
    return [command, *given]


def _split(words: Sequence[str]) -> list[str]:
    """``--name=value`` as two words."""
    return [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]


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
    """A mapping of flags, with dashes or underscores, as words. Raises InvalidConfig."""
    try:
        held = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidConfig("config", str(path), f"a YAML file: {error}") from error
    if not isinstance(held, dict):
        raise InvalidConfig("config", str(path), "a YAML file that maps flags to values")
    return [word for name, value in held.items() for word in _words(f"--{str(name).replace('_', '-')}", value)]


def _words(flag: str, value: Any) -> list[str]:
    if value is True:
        return [flag]
    if value is False:
        return [flag.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def _without(words: Sequence[str], held: set[str], has_model: bool) -> list[str]:
    """The file's words less those that the command line states itself."""
    found: list[str] = []
    skipping = False
    for number, word in enumerate(words):
        if word.startswith("--"):
            opposite = word.replace("--no-", "--", 1) if word.startswith("--no-") else word.replace("--", "--no-", 1)
            skipping = word in held or opposite in held
        elif number == 0:
            skipping = has_model
        if not skipping:
            found.append(word)
    return found
