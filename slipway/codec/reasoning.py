"""Reasoning before an answer: constraints that begin at its end, its number of tokens, its budget.

Markers of reasoning are searched in the text, not among the tokens: a marker is one token for one
model and five for another.

Not here: separation of reasoning and content in an output (output_parser.py), grammars
(grammar.py).
"""

import copy
import dataclasses
import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest


class Constraint(Protocol):
    """Constraint on the tokens of one output, with its current state."""

    @property
    def is_done(self) -> bool:
        """Whether only a token that ends the output may follow."""

    def allowed(self) -> np.ndarray:
        """Return the allowed next tokens as a bit mask, uint32 [words].

        When the output is complete, these are the tokens that end it.
        """

    def accept(self, token_id: int) -> bool:
        """Add a token; return False if it is not allowed or a limit of the grammar is reached."""

    def fork(self) -> "Constraint":
        """Return an independent constraint in the same state."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reasoning:
    """Reasoning at the beginning of an output, between the markers ``start`` and ``end``.

    ``opened``: the prompt already holds ``start``; otherwise the output may begin with it or go
    without reasoning. ``budget`` is the number of reasoning tokens after which the end is forced.
    Raises InvalidRequest.
    """

    start: str
    end: str
    opened: bool
    budget: int | None = None

    def __post_init__(self):
        for field in ("start", "end"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise InvalidRequest(f"reasoning.{field}", getattr(self, field), "a non-empty text")
        if self.budget is not None and not (type(self.budget) is int and self.budget >= 0):
            raise InvalidRequest(
                "thinking_token_budget", self.budget, "an integer of at least 0, or None"
            )


def then(before: Reasoning, grammar: str, spelled: Callable[[str], list[str]]) -> str:
    """Return a grammar of reasoning followed by ``grammar``, in llguidance's notation.

    If the output begins without reasoning, ``grammar`` applies from its beginning. ``spelled``
    splits a text into Lark's strings and tokens.
    """
    first, *rest = spelled(before.end)
    end = f"TEXT {first}" if first.startswith("<[") else "lazy_end"
    rules = [
        f"start: {'' if before.opened else 'answer | begin '}thought answer",
        f"begin: {' '.join(spelled(before.start))}",
        f"thought: {' '.join([end, *rest])} /\\n{{0,2}}/",
        "answer: @answer",
        r"TEXT: /(.|\n)*/",
    ]
    if end == "lazy_end":
        rules.append(f"lazy_end[lazy]: TEXT {first}")
    inner = json.loads(grammar)["grammars"]
    assert len(inner) == 1, "grammar.py writes one grammar"
    return json.dumps(
        {"grammars": [{"lark_grammar": "\n".join(rules)}, inner[0] | {"name": "answer"}]}
    )


class ReasoningTokens:
    """Counter of the reasoning tokens of one output: the tokens between its markers.

    ``count`` is their number so far.
    """

    def __init__(self, reasoning: Reasoning, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._start = reasoning.start.encode()
        self._end = reasoning.end.encode()
        # in state "before": the whole text; "inside": its end, which may hold a part of the end
        # marker
        self._text = b""
        # bytes of each reasoning token in ``_text``
        self._sizes: deque[int] = deque()
        self._state = "inside" if reasoning.opened else "before"
        self.count = 0

    def push(self, token_ids: Sequence[int]) -> None:
        """Add new tokens and update ``count``."""
        for token_id in token_ids:
            if self._state == "after":
                return
            piece = self._tokenizer.token_bytes(token_id)
            self._text += piece
            if self._state == "before":
                self._begin()
            else:
                self._sizes.append(len(piece))
                self.count += 1
                self._look()

    def _begin(self) -> None:
        text = self._text.lstrip()
        if text.startswith(self._start):
            self._state = "inside"
            self._text = text[len(self._start) :]
        elif not self._start.startswith(text):
            self._state = "after"  # the output has no reasoning

    def _look(self) -> None:
        mark, end = self._text.find(self._end), len(self._text)
        if mark >= 0:
            self._state = "after"
            # tokens of the end marker itself are no reasoning
            while self._sizes and (end := end - self._sizes.pop()) >= mark:
                self.count -= 1
        while self._sizes and len(self._text) - self._sizes[0] >= len(self._end):
            self._text = self._text[self._sizes.popleft() :]


class ReasoningBudget:
    """Constraint that lets an output reason freely within a budget of tokens, then forces the end.

    ``inner`` is another constraint that holds at the same time, or None.
    """

    def __init__(
        self, reasoning: Reasoning, inner: Constraint | None, tokenizer: Tokenizer, num_words: int
    ):
        assert reasoning.budget is not None
        self._inner = inner
        self._tokenizer = tokenizer
        self._num_words = num_words
        self._start = reasoning.start.encode()
        self._end = reasoning.end.encode()
        self._text = b""
        self._left = reasoning.budget
        self._forced: deque[int] = deque()
        self._state = "before"
        if reasoning.opened:
            self._enter(b"")

    @property
    def is_done(self) -> bool:
        """Whether only a token that ends the output may follow."""
        return self._inner is not None and self._inner.is_done

    def allowed(self) -> np.ndarray:
        """Return the allowed next tokens as a bit mask, uint32 [words]."""
        if self._forced:
            bits = np.zeros(self._num_words, np.uint32)
            bits[self._forced[0] // 32] = 1 << self._forced[0] % 32
            return bits
        if self._inner is not None:
            return self._inner.allowed()
        return np.full(self._num_words, 2**32 - 1, np.uint32)

    def accept(self, token_id: int) -> bool:
        """Add a token; return False if ``inner`` does not allow it."""
        if self._state != "after":
            self._follow(token_id)
        return self._inner is None or self._inner.accept(token_id)

    def fork(self) -> "ReasoningBudget":
        """Return an independent constraint in the same state."""
        forked = copy.copy(self)
        forked._inner = None if self._inner is None else self._inner.fork()
        forked._forced = self._forced.copy()
        return forked

    def _follow(self, token_id: int) -> None:
        self._text += self._tokenizer.token_bytes(token_id)
        if self._state == "before":
            text = self._text.lstrip()
            if text.startswith(self._start):
                self._enter(text[len(self._start) :])
            elif not self._start.startswith(text):
                self._state = "after"  # the output has no reasoning
            return
        if self._forced:
            self._forced.popleft()
        self._left -= 1
        self._look()

    def _enter(self, text: bytes) -> None:
        self._state = "inside"
        self._text = text
        self._look()

    def _look(self) -> None:
        if self._end in self._text:
            self._state = "after"
            self._forced.clear()
        elif self._left <= 0 and not self._forced:
            self._forced.extend(
                self._tokenizer.encode(self._end.decode(), add_special_tokens=False)
            )
        self._text = self._text[-len(self._end) :]
