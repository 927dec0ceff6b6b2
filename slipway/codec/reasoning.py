"""Reasoning before an answer: where it ends, what must hold only from there on, and how long it may go on.

Marks are found in the text, for what is one token to one model is five to another.
"""

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from slipway.codec.tokenizer import Tokenizer
from slipway.errors import InvalidRequest


class Constraint(Protocol):
    """How far one output has come in what it must be."""

    @property
    def is_done(self) -> bool:
        """Whether nothing but the end may follow."""

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, as bits [words]; once all is said, the end."""

    def accept(self, token_id: int) -> bool:
        """Take the token that came; False if there is no place for it, or limits were reached."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reasoning:
    """That an output reasons first, between ``start`` and ``end``, or may: ``opened`` says that the prompt began it.

    ``budget``: after as many tokens of reasoning its end is forced. Raises InvalidRequest.
    """

    start: str
    end: str
    opened: bool
    budget: int | None = None

    def __post_init__(self):
        for field in ("start", "end"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise InvalidRequest(f"reasoning.{field}", getattr(self, field), "a text that is not empty")
        if self.budget is not None and not (type(self.budget) is int and self.budget >= 0):
            raise InvalidRequest("thinking_token_budget", self.budget, "an integer of at least 0, or None")


def then(before: Reasoning, grammar: str, spelled: Callable[[str], list[str]]) -> str:
    """llguidance's notation for a ``grammar`` that begins where reasoning ends, or at once if none was begun."""
    first, *rest = spelled(before.end)
    end = f"TEXT {first}" if first.startswith("<[") else "lazy_end"
    rules = [
        f"start: {'' if before.opened else 'answer | begin '}thought answer",
        f"begin: {' '.join(spelled(before.start))}", f"thought: {' '.join([end, *rest])} /\\n{{0,2}}/",
        "answer: @answer", r"TEXT: /(.|\n)*/",
    ]  # fmt: skip
    if end == "lazy_end":
        rules.append(f"lazy_end[lazy]: TEXT {first}")
    inner = json.loads(grammar)["grammars"]
    assert len(inner) == 1, "grammars are built as one"
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}, inner[0] | {"name": "answer"}]})


class ReasoningTokens:
    """How many tokens of one output are reasoning: those between its marks, as they come."""

    def __init__(self, reasoning: Reasoning, tokenizer: Tokenizer):
        self._tokenizer, self._start, self._end = tokenizer, reasoning.start.encode(), reasoning.end.encode()
        self._text = b""  # before: all of it; inside: what may hold the beginning of the end mark
        self._sizes: deque[int] = deque()  # of the tokens inside ``_text``
        self._state = "inside" if reasoning.opened else "before"
        self.count = 0

    def push(self, token_ids: Sequence[int]) -> None:
        """Count new tokens."""
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
            self._state, self._text = "inside", text[len(self._start) :]
        elif not self._start.startswith(text):
            self._state = "after"  # it answers at once

    def _look(self) -> None:
        mark, end = self._text.find(self._end), len(self._text)
        if mark >= 0:
            self._state = "after"
            while self._sizes and (end := end - self._sizes.pop()) >= mark:  # tokens of the mark itself
                self.count -= 1
        while self._sizes and len(self._text) - self._sizes[0] >= len(self._end):
            self._text = self._text[self._sizes.popleft() :]


class ReasoningBudget:
    """One output's reasoning as it comes, by tokens: free, then forced to end. ``inner``: what else must hold."""

    def __init__(self, reasoning: Reasoning, inner: Constraint | None, tokenizer: Tokenizer, num_words: int):
        assert reasoning.budget is not None
        self._inner, self._tokenizer, self._num_words = inner, tokenizer, num_words
        self._start, self._end = reasoning.start.encode(), reasoning.end.encode()
        self._text, self._left = b"", reasoning.budget
        self._forced: deque[int] = deque()
        self._state = "before"
        if reasoning.opened:
            self._enter(b"")

    @property
    def is_done(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._inner is not None and self._inner.is_done

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, as bits [words]."""
        if self._forced:
            bits = np.zeros(self._num_words, np.uint32)
            bits[self._forced[0] // 32] = 1 << self._forced[0] % 32
            return bits
        return np.full(self._num_words, 2**32 - 1, np.uint32) if self._inner is None else self._inner.allowed()

    def accept(self, token_id: int) -> bool:
        """Take the token that came; False if what else must hold has no place for it."""
        if self._state != "after":
            self._follow(token_id)
        return self._inner is None or self._inner.accept(token_id)

    def _follow(self, token_id: int) -> None:
        self._text += self._tokenizer.token_bytes(token_id)
        if self._state == "before":
            text = self._text.lstrip()
            if text.startswith(self._start):
                self._enter(text[len(self._start) :])
            elif not self._start.startswith(text):
                self._state = "after"  # it answers at once
            return
        if self._forced:
            self._forced.popleft()
        self._left -= 1
        self._look()

    def _enter(self, text: bytes) -> None:
        self._state, self._text = "inside", text
        self._look()

    def _look(self) -> None:
        if self._end in self._text:
            self._state = "after"
            self._forced.clear()
        elif self._left <= 0 and not self._forced:
            self._forced.extend(self._tokenizer.encode(self._end.decode(), add_special_tokens=False))
        self._text = self._text[-len(self._end) :]
