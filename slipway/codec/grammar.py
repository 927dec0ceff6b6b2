"""Structured output: from a schema, regex, choice or grammar to the tokens that may come next; knows no JAX.

llguidance parses and walks the grammars. Building one and computing a mask are bounded by its fuel, not by a clock: by
its documentation (LLParserLimits) some 20 and 15 ms at the default limits, however evil the pattern.
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

Spelled = Callable[[str], list[str]]  # a text as Lark's texts and tokens
MAX_CHOICES = 1024
KEPT = 256  # grammars that are kept built


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What an output must be; exactly one of these. Raises InvalidRequest, naming the field.

    ``json``: a JSON schema. ``json_object``: any JSON object. ``grammar``: Lark's notation, or EBNF (ebnf.py).
    ``structural_tag``: free text with calls in it (structural_tags.py).
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | Mapping[str, Any] | None = None

    def __post_init__(self):
        given = [name for name in self.__dataclass_fields__ if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            expected = f"exactly one of {', '.join(self.__dataclass_fields__)}"
            raise InvalidRequest("structured_outputs", given, expected)
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        assert self.notation()  # what cannot be written down is refused here

    def notation(self, spelled: Spelled = structural_tags.as_text) -> str:
        """The same in llguidance's notation. ``spelled``: how a vocabulary writes marks."""
        if self.json_object:
            return _lark('start: %json {"type": "object"}')
        if self.json is not None:
            return _lark(f"start: %json {_schema(self.json)}")
        if self.choice is not None:
            texts = self.choice if isinstance(self.choice, tuple) else ()
            if not 1 <= len(texts) <= MAX_CHOICES or not all(isinstance(text, str) and text for text in texts):
                raise InvalidRequest("choice", self.choice, f"1 to {MAX_CHOICES} texts that are not empty")
            _bounded("choice", "".join(self.choice))
            return _lark("start: " + " | ".join(map(json.dumps, self.choice)))
        if self.regex is not None:
            (built,) = json.loads(LLMatcher.grammar_from_regex(_bounded("regex", self.regex)))["grammars"]
            return _lark(built["lark_grammar"])
        if self.structural_tag is not None:
            given = _json("structural_tag", self.structural_tag)
            return _lark(structural_tags.lark(given, _schema, spelled))
        text = _bounded("grammar", self.grammar)
        return _lark(ebnf.lark(text) if ebnf.is_ebnf(text) else text)

    def schemas(self, field: str) -> dict[str, Any]:
        """Return the JSON schemas that the structure holds, by the fields of a request whose `field` it is."""
        if self.json is not None and not self.json_object:
            return {field: _json("json", self.json)}
        if self.structural_tag is not None:
            return structural_tags.schemas(_json("structural_tag", self.structural_tag), field)
        return {}


class Grammars:
    """The grammars of one vocabulary of ``vocab_size`` tokens, and the tokens that end a text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        self._num_words, self._tokenizer = -(-vocab_size // 32), tokenizer
        self._marks = structural_tags.marks(tokenizer)
        self._vocabulary = LLTokenizer(tokenizer.raw.to_str(), n_vocab=vocab_size, eos_token=list(eos_ids))
        self._build = lru_cache(KEPT)(self._built)

    def matcher(self, structure: StructuredOutputs | None, before: Reasoning | None = None) -> Constraint:
        """At the beginning of a text that is ``structure``, once what comes ``before`` it has ended.

        Raises InvalidRequest for a grammar that is none, or too large.
        """
        inner: Constraint | None = None
        if structure is not None:
            grammar = structure.notation(self.spelled)
            if before is not None:
                grammar = reasoning.then(before, grammar, self.spelled)
            plain = grammar.replace("\\", "")  # as the text is, but for what stands before its slashes and quotes
            if any(mark in plain for mark in self._marks):
                grammar = _unforced(grammar)
            inner = Matcher(self._build(grammar).deep_copy(), self._num_words)
        if before is None or before.budget is None:
            assert inner is not None, "nothing to match"
            return inner
        return ReasoningBudget(before, inner, self._tokenizer, self._num_words)

    def spelled(self, text: str) -> list[str]:
        """A text as Lark's texts and this vocabulary's tokens."""
        return structural_tags.spelled(text, self._marks)

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


def _lark(grammar: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": grammar}]})


def _unforced(grammar: str) -> str:
    """The same without llguidance's short cut.

    Where one text alone can follow, it allows the first token of that text alone, as the tokenizer writes it: better
    tokens than a model may choose. But of `</tool_call>` that may be an added one, which it then refuses, for to
    grammars such a token is no text (1.9.1).
    """
    first, *others = json.loads(grammar)["grammars"]
    if "%llguidance" not in first["lark_grammar"]:
        first["lark_grammar"] = '%llguidance {"no_forcing": true}\n' + first["lark_grammar"]
    return json.dumps({"grammars": [first, *others]})


def _schema(given: Any) -> str:
    """Return the text of a schema. Raises InvalidRequest."""
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
        raise InvalidRequest(field, text, "a text that is not empty")
    if len(text) > MAX_CHARS:
        raise InvalidRequest(field, f"{len(text)} characters", f"at most {MAX_CHARS}")
    return text
