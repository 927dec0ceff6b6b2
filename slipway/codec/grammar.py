"""Structured output: from a schema, regex, choice or grammar to the tokens that may come next; knows no JAX.

llguidance parses and walks the grammars. Building one and computing a mask are bounded by its fuel, not by a clock: by
its documentation (LLParserLimits) some 20 and 15 ms at the default limits, however evil the pattern.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest

MAX_CHARS, MAX_DEPTH, MAX_CHOICES = 256 * 1024, 64, 1024
GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
KEPT = 256  # grammars that are kept built


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What an output must be; exactly one of these. Raises InvalidRequest, naming the field.

    ``json``: a JSON schema. ``json_object``: any JSON object. ``grammar``: Lark's or GBNF's (llama.cpp, EBNF) notation.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self):
        given = [name for name in self.__dataclass_fields__ if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            expected = "exactly one of json, regex, choice, grammar, json_object"
            raise InvalidRequest("structured_outputs", given, expected)
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        assert self.built  # what cannot be built is refused here

    @cached_property
    def built(self) -> str:
        """The same in llguidance's notation."""
        if self.json_object:
            return LLMatcher.grammar_from_json_schema({"type": "object"})
        if self.json is not None:
            return LLMatcher.grammar_from_json_schema(_schema(self.json))
        if self.choice is not None:
            texts = self.choice if isinstance(self.choice, tuple) else ()
            if not 1 <= len(texts) <= MAX_CHOICES or not all(isinstance(text, str) and text for text in texts):
                raise InvalidRequest("choice", self.choice, f"1 to {MAX_CHOICES} texts that are not empty")
            _bounded("choice", "".join(self.choice))
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, self.choice)))
        if self.regex is not None:
            return LLMatcher.grammar_from_regex(_bounded("regex", self.regex))
        text = _bounded("grammar", self.grammar)
        try:
            return LLMatcher.grammar_from_lark(gbnf_to_lark(text) if GBNF.search(text) else text)
        except (ValueError, IndexError, KeyError) as error:
            raise InvalidRequest("grammar", text, f"a grammar: {error}") from error


class Grammars:
    """The grammars of one vocabulary of ``vocab_size`` tokens, and the tokens that end a text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        self._num_words = -(-vocab_size // 32)
        self._vocabulary = LLTokenizer(tokenizer.raw.to_str(), n_vocab=vocab_size, eos_token=list(eos_ids))
        self._build = lru_cache(KEPT)(self._built)

    def matcher(self, grammar: str) -> "Matcher":
        """At the beginning of a text. Raises InvalidRequest for a grammar that is none, or too large."""
        return Matcher(self._build(grammar).deep_copy(), self._num_words)

    def _built(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidRequest("structured_outputs", grammar, f"a grammar: {matcher.get_error()[:300]}")
        return matcher


class Matcher:
    """How far one output has come in its grammar."""

    def __init__(self, matcher: LLMatcher, num_words: int):
        self._matcher, self._num_words = matcher, num_words

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, as bits [words]; once all is said, the end."""
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._num_words]

    @property
    def is_done(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    def accept(self, token_id: int) -> bool:
        """Take the token that came; False if the grammar has no place for it, or its limits were reached."""
        return self._matcher.consume_token(token_id)


def _schema(given: Any) -> str:
    text = given if isinstance(given, str) else json.dumps(given)
    _bounded("json", text)
    try:
        schema = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidRequest("json", text, f"a JSON schema: {error}") from error
    if not isinstance(schema, dict | bool):
        raise InvalidRequest("json", text, "a JSON schema: an object")
    if _depth(schema) > MAX_DEPTH:
        raise InvalidRequest("json", text, f"a schema nested at most {MAX_DEPTH} deep")
    return text


def _bounded(field: str, text: Any) -> str:
    if not isinstance(text, str) or not text:
        raise InvalidRequest(field, text, "a text that is not empty")
    if len(text) > MAX_CHARS:
        raise InvalidRequest(field, f"{len(text)} characters", f"at most {MAX_CHARS}")
    return text


def _depth(value: Any) -> int:
    """How deep a JSON value is nested; no recursion, for the value may be evil."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, depth = stack.pop()
        deepest = max(deepest, depth)
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        stack += [(each, depth + 1) for each in inner]
    return deepest
