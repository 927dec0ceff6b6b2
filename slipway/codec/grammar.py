"""Structured output: the allowed next tokens of a schema, regex, choice, grammar or structural tag.

llguidance parses the grammars and computes the masks. Its fuel, not a clock, bounds the building of
a grammar and the computing of a mask: at the default limits some 20 and 15 ms even for a malicious
pattern, according to its documentation (LLParserLimits).

Not here: EBNF (ebnf.py), limits of schemas (json_schema.py), structural tags (structural_tags.py).
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from slipway.codec import ebnf, json_schema, reasoning, structural_tags
from slipway.codec.json_schema import MAX_CHARS
from slipway.codec.reasoning import Constraint, Reasoning, ReasoningBudget
from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest

Spelled = Callable[[str], list[str]]  # splits a text into Lark's strings and tokens
MAX_CHOICES = 1024
KEPT = 256  # number of built grammars in the cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """Structure of an output: exactly one of the fields is set.

    ``json``: a JSON schema. ``json_object``: any JSON object. ``grammar``: Lark's notation, or EBNF
    (ebnf.py). ``structural_tag``: free text with tool calls in it (structural_tags.py). Raises
    InvalidRequest, naming the invalid field.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | Mapping[str, Any] | None = None

    def __post_init__(self):
        given = [
            name for name in self.__dataclass_fields__ if getattr(self, name) not in (None, False)
        ]
        if len(given) != 1:
            expected = f"exactly one of {', '.join(self.__dataclass_fields__)}"
            raise InvalidRequest("structured_outputs", given, expected)

        assert self.notation()  # raises InvalidRequest for an invalid structure

    def notation(self, spelled: Spelled = structural_tags.as_text) -> str:
        """Return the structure in llguidance's notation.

        ``spelled`` splits a text into Lark's strings and the tokens of a vocabulary.
        """
        if self.json_object:
            return _lark('start: %json {"type": "object"}')
        if self.json is not None:
            return _lark(f"start: %json {_schema(self.json)}")
        if self.choice is not None:
            texts = self.choice if isinstance(self.choice, list | tuple) else ()
            are_texts = all(isinstance(text, str) and text for text in texts)
            if not are_texts or not 1 <= len(texts) <= MAX_CHOICES:
                raise InvalidRequest("choice", self.choice, f"1 to {MAX_CHOICES} non-empty texts")
            _bounded("choice", "".join(self.choice))
            return _lark("start: " + " | ".join(map(json.dumps, self.choice)))
        if self.regex is not None:
            (built,) = json.loads(LLMatcher.grammar_from_regex(_bounded("regex", self.regex)))[
                "grammars"
            ]
            return _lark(built["lark_grammar"])
        if self.structural_tag is not None:
            given = _json("structural_tag", self.structural_tag)
            return _lark(structural_tags.lark(given, _schema, spelled))
        text = _bounded("grammar", self.grammar)
        return _lark(ebnf.lark(text) if ebnf.is_ebnf(text) else text)

    def schemas(self, field: str) -> dict[str, Any]:
        """Return field -> JSON schema for all schemas of a structure in the request's `field`."""
        if self.json is not None and not self.json_object:
            return {field: _json("json", self.json)}
        if self.structural_tag is not None:
            return structural_tags.schemas(_json("structural_tag", self.structural_tag), field)
        return {}


class Grammars:
    """Built grammars for one vocabulary of ``vocab_size`` tokens; ``eos_ids`` end an output."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        self._num_words = -(-vocab_size // 32)
        self._tokenizer = tokenizer
        self._marks = structural_tags.marks(tokenizer)
        self._vocabulary = LLTokenizer(
            tokenizer.raw.to_str(), n_vocab=vocab_size, eos_token=list(eos_ids)
        )
        self._build = lru_cache(KEPT)(self._built)

    def matcher(
        self, structure: StructuredOutputs | None, before: Reasoning | None = None
    ) -> Constraint:
        """Return the constraint of a new output with this structure.

        If the output may begin with reasoning, ``before`` describes it; the structure applies after
        it. Raises InvalidRequest for a grammar that is invalid or too large.
        """
        inner: Constraint | None = None
        if structure is not None:
            grammar = structure.notation(self.spelled)
            if before is not None:
                grammar = reasoning.then(before, grammar, self.spelled)
            # the text without the backslashes that JSON puts before quotes and backslashes
            plain = grammar.replace("\\", "")
            if any(mark in plain for mark in self._marks):
                grammar = _unforced(grammar)
            inner = Matcher(self._build(grammar).deep_copy(), self._num_words)
        if before is None or before.budget is None:
            assert inner is not None, "nothing to match"
            return inner
        return ReasoningBudget(before, inner, tokenizer=self._tokenizer, num_words=self._num_words)

    def spelled(self, text: str) -> list[str]:
        """Split a text into Lark's strings and this vocabulary's tokens."""
        return structural_tags.spelled(text, self._marks)

    def _built(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidRequest(
                "structured_outputs", grammar, f"a valid grammar: {matcher.get_error()[:300]}"
            )
        return matcher


class Matcher:
    """Constraint of a grammar, with the state of one output in it."""

    def __init__(self, matcher: LLMatcher, num_words: int):
        self._matcher = matcher
        self._num_words = num_words

    def allowed(self) -> np.ndarray:
        """Return the allowed next tokens as a bit mask, uint32 [words].

        When the output is complete, these are the tokens that end it.
        """
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._num_words]

    @property
    def is_done(self) -> bool:
        """Whether only a token that ends the output may follow."""
        return self._matcher.is_stopped()

    def accept(self, token_id: int) -> bool:
        """Add a token; return False if it is not allowed or a limit of the grammar is reached."""
        return self._matcher.consume_token(token_id)

    def fork(self) -> "Matcher":
        """Return an independent constraint in the same state."""
        return Matcher(self._matcher.deep_copy(), self._num_words)


def _lark(grammar: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": grammar}]})


def _unforced(grammar: str) -> str:
    """Return a grammar with llguidance's forced tokens switched off.

    Where only one text can follow, llguidance allows only the first token of that text as the
    tokenizer encodes it, because a model may choose a worse tokenization. For `</tool_call>` this
    token may be an added one, which llguidance then refuses: it does not treat added tokens as text
    (llguidance 1.9.1).
    """
    first, *others = json.loads(grammar)["grammars"]
    if "%llguidance" not in first["lark_grammar"]:
        first["lark_grammar"] = '%llguidance {"no_forcing": true}\n' + first["lark_grammar"]
    return json.dumps({"grammars": [first, *others]})


def _schema(given: Any) -> str:
    """Return the JSON text of a schema. Raises InvalidRequest."""
    schema = _json("json", given)
    if not isinstance(schema, dict | bool):
        raise InvalidRequest("json", schema, "a JSON schema: an object")
    return json_schema.notation(schema)


def _json(field: str, given: Any) -> Any:
    text = _bounded(field, given if isinstance(given, str) else json.dumps(given))
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidRequest(field, text, f"JSON: {error}") from error


def _bounded(field: str, text: Any) -> str:
    if not isinstance(text, str) or not text:
        raise InvalidRequest(field, text, "a non-empty text")
    if len(text) > MAX_CHARS:
        raise InvalidRequest(field, f"{len(text)} characters", f"at most {MAX_CHARS}")
    return text
