"""Structural tags: free text in which a trigger must go on as a known beginning, JSON by its schema, and an end.

vLLM's, SGLang's and OpenAI-like servers' {"structures": [{"begin", "schema", "end"}], "triggers": [...]}, with SGLang's
"at_least_one", as a grammar in Lark's notation; knows no vocabulary.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest

MAX_STRUCTURES = 128


def lark(given: Any, schema: Callable[[Any], str], spelled: Callable[[str], list[str]]) -> str:
    """The grammar. ``schema``: a checked schema's text; ``spelled``: a text as Lark's texts and tokens.

    Raises InvalidRequest, naming the field.
    """
    structures, triggers, owes = _read(given)
    choice, times = " | ".join(f"tag_{number}" for number in range(len(structures))), "+" if owes else "*"
    rules = [f"start: ({choice}){times} text", "text: TEXT"]
    for number, structure in enumerate(structures):
        begin, field = structure["begin"], f"structural_tag.structures[{number}]"
        # the longest: what it opens can go on in no other way
        trigger = max((t for t in triggers if begin.startswith(t)), key=len, default="")
        if not trigger:
            raise InvalidRequest(f"{field}.begin", begin, f"one that begins with a trigger: {', '.join(triggers)}")
        first, *others = spelled(trigger)
        rest = [*others, *spelled(begin.removeprefix(trigger)), "%json", schema(structure["schema"])]
        body = " ".join([*rest, *spelled(structure["end"])])
        if first.startswith("<["):  # a token is no text: it is seen as it comes
            rules.append(f"tag_{number}: TEXT {first} {body}")
        else:
            rules += [f"open_{number}[lazy]: TEXT {first}", f"tag_{number}: open_{number} {body}"]
    return "\n".join([*rules, r"TEXT: /(.|\n)*/", ""])


def marks(tokenizer: Tokenizer) -> dict[str, int]:
    """Added tokens in <...>, by their texts: llguidance finds them by their ids alone, never in a text."""
    added = {token.content: i for i, token in tokenizer.raw.get_added_tokens_decoder().items()}
    return {text: i for text, i in added.items() if text[:1] == "<" and text[-1:] == ">"}


def spelled(text: str, known: Mapping[str, int]) -> list[str]:
    """A text as Lark's texts, and tokens where it holds marks that are known."""
    pattern = "|".join(re.escape(mark) for mark in sorted(known, key=len, reverse=True))
    parts = re.split(f"({pattern})", text) if known else [text]
    return [f"<[{known[part]}]>" if part in known else json.dumps(part) for part in parts if part]


def as_text(text: str) -> list[str]:
    """The same, where no vocabulary has tokens of its own for marks."""
    return spelled(text, {})


def _read(given: Any) -> tuple[list[dict[str, Any]], list[str], bool]:
    expected = '{"type": "structural_tag", "structures": [{"begin", "schema", "end"}], "triggers": ["..."]}'
    fine = isinstance(given, dict) and given.get("type", "structural_tag") == "structural_tag"
    if not fine or given.keys() - {"type", "at_least_one"} != {"structures", "triggers"}:
        raise InvalidRequest("structural_tag", given, expected)
    structures, triggers = given["structures"], given["triggers"]
    if not isinstance(triggers, list) or not triggers or not all(isinstance(t, str) and t for t in triggers):
        raise InvalidRequest("structural_tag.triggers", triggers, "a list of texts that are not empty")
    if not isinstance(structures, list) or not 1 <= len(structures) <= MAX_STRUCTURES:
        raise InvalidRequest("structural_tag.structures", structures, f"a list of 1 to {MAX_STRUCTURES}")
    for number, structure in enumerate(structures):
        texts = isinstance(structure, dict) and all(isinstance(structure.get(key), str) for key in ("begin", "end"))
        if not texts or structure.keys() != {"begin", "schema", "end"} or not isinstance(structure["schema"], dict):
            field = f"structural_tag.structures[{number}]"
            raise InvalidRequest(field, structure, '{"begin": "...", "schema": {...}, "end": "..."}')
    if not isinstance(owes := given.get("at_least_one", False), bool):
        raise InvalidRequest("structural_tag.at_least_one", owes, "true or false")
    return structures, triggers, owes
