"""What a caller asks for and gets back, and a sequence's life between the two; knows no batch and no JAX.

The public names follow vLLM's, so that its users' scripts read on.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from slipway.codec.detokenizer import Detokenizer
from slipway.errors import InvalidRequest

MAX_LOGPROBS, MAX_N, MAX_TEMPERATURE = 20, 1024, 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen and where they end.

    Raises InvalidRequest, naming the field, on a value out of its range.
    """

    n: int = 1
    """Independent samples of the prompt."""
    max_tokens: int | None = 16
    """Longest output; None: up to the model's context."""
    temperature: float = 1.0
    """0: the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 or -1: all."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever else is in the batch."""
    stop: str | tuple[str, ...] = ()
    """Strings that end the output."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output, beside the model's own."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Go on after the model's end token."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside the chosen one, at most 20."""
    skip_special_tokens: bool = True

    def __post_init__(self):
        object.__setattr__(self, "stop", _items("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        ids = _items("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", tuple(int(i) if isinstance(i, np.integer) else i for i in ids))
        for field in ("n", "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "logprobs"):
            if isinstance(value := getattr(self, field), np.integer | np.floating):
                object.__setattr__(self, field, value.item())
        integer, number = _is_integer, _is_number
        checks = {
            "n": (integer(self.n, 1, MAX_N), f"an integer from 1 to {MAX_N}"),
            "max_tokens": (self.max_tokens is None or integer(self.max_tokens, 1), "an integer of at least 1, or None"),
            "temperature": (number(self.temperature, 0, MAX_TEMPERATURE), f"a number from 0 to {MAX_TEMPERATURE:g}"),
            "top_k": (integer(self.top_k, -1, 2**31 - 1), "an integer from -1 to 2**31 - 1"),
            "top_p": (number(self.top_p, 0, 1) and self.top_p > 0, "a number above 0, at most 1"),
            "min_p": (number(self.min_p, 0, 1), "a number from 0 to 1"),
            "seed": (self.seed is None or integer(self.seed, 0, 2**32 - 1), "an integer from 0 to 2**32 - 1, or None"),
            "stop": (all(isinstance(s, str) and s for s in self.stop), "strings that are not empty"),
            "stop_token_ids": (all(integer(t, 0) for t in self.stop_token_ids), "token ids"),
            "logprobs": (
                self.logprobs is None or integer(self.logprobs, 0, MAX_LOGPROBS),
                f"an integer from 0 to {MAX_LOGPROBS}, or None",
            ),
        }
        for field, (fine, expected) in checks.items():
            if not fine:
                raise InvalidRequest(field, getattr(self, field), expected)
        for field in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, field), bool):
                raise InvalidRequest(field, getattr(self, field), "True or False")


@dataclasses.dataclass(frozen=True)
class Logprob:
    """A token's log probability under the model, before temperature, and its rank (1: the likeliest)."""

    logprob: float
    rank: int


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One sample so far. ``finish_reason``: None while it runs, then stop | length | abort."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A prompt and its samples so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool


class Sequence:
    """One sample of one request while it runs: the scheduler moves it, the engine adds its tokens."""

    def __init__(
        self, request: "Request", index: int, seed: int, stop_ids: frozenset[int], detokenizer: Detokenizer | None
    ):
        self.request, self.index, self.seed, self.stop_ids = request, index, seed, stop_ids
        self.detokenizer = detokenizer
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] | None = None if request.params.logprobs is None else []
        self.num_tokens = len(request.prompt_token_ids)  # prompt and output together
        self._num_read, self._flushed = 0, False  # how far the text has come
        self._num_hidden = 0  # 1: the last token is a stop token, which the text leaves out
        self.num_computed = 0  # tokens whose keys and values are in the cache
        self.pages: list[int] = []
        self.page_row: np.ndarray | None = None  # the same, padded to the page table's width
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    @property
    def max_length(self) -> int:
        """The most tokens that it may come to."""
        return len(self.request.prompt_token_ids) + self.request.max_tokens

    def tokens(self, start: int, count: int) -> list[int]:
        """Its tokens from position ``start`` on."""
        if count == 1 and start + 1 == self.num_tokens and self.token_ids:  # decoding, nearly always
            return self.token_ids[-1:]
        prompt = self.request.prompt_token_ids
        if start >= len(prompt):
            return self.token_ids[start - len(prompt) : start - len(prompt) + count]
        return (prompt[start : start + count] + self.token_ids)[:count]

    def append(self, token_id: int, logprobs: dict[int, Logprob] | None) -> None:
        """Take a sampled token, and end where it, the text or the length says so."""
        params = self.request.params
        self.token_ids.append(token_id)
        self.num_tokens += 1
        if self.logprobs is not None:
            self.logprobs.append(logprobs or {})
        if token_id in self.stop_ids:
            self._num_hidden = int(not params.include_stop_str_in_output)
            self.finish("stop", token_id if token_id in params.stop_token_ids else None)
        elif self.detokenizer is not None and params.stop and self._read().stopped is not None:
            self.finish("stop", self.detokenizer.stopped)
        elif len(self.token_ids) >= self.request.max_tokens:
            self.finish("length")
            if self.detokenizer is not None and params.stop and self._read().stopped is not None:
                self.finish("stop", self.detokenizer.stopped)  # completed by the very end of the text

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """End, for this reason."""
        self.finish_reason, self.stop_reason = reason, stop_reason

    def output(self) -> CompletionOutput:
        """What it has come to."""
        text = "" if self.detokenizer is None else self._read().text
        logprobs = None if self.logprobs is None else list(self.logprobs)
        return CompletionOutput(self.index, text, list(self.token_ids), logprobs, self.finish_reason, self.stop_reason)

    def _read(self) -> Detokenizer:
        """Detokenize what is new. Only a stop string needs that at every step; else it waits until someone looks."""
        assert self.detokenizer is not None
        for token_id in self.token_ids[self._num_read : len(self.token_ids) - self._num_hidden]:
            self.detokenizer.add(token_id)
            self._num_read += 1
        if self.finish_reason is not None and not self._flushed:
            self.detokenizer.finish()  # nothing can follow: what was held back is text
            self._flushed = True
        return self.detokenizer


class Request:
    """A prompt with its parameters, and its samples. ``max_tokens`` is resolved against the context."""

    def __init__(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams, max_tokens: int
    ):
        self.request_id, self.prompt, self.prompt_token_ids = request_id, prompt, prompt_token_ids
        self.params, self.max_tokens = params, max_tokens
        self.sequences: list[Sequence] = []

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    @property
    def num_generated(self) -> int:
        """Tokens of all its samples."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    def output(self) -> RequestOutput:
        """What it has come to."""
        outputs = [sequence.output() for sequence in self.sequences]
        return RequestOutput(self.request_id, self.prompt, list(self.prompt_token_ids), outputs, self.finished)


def _items(field: str, value: object) -> tuple:
    if value is not None and not isinstance(value, list | tuple | set | frozenset):
        raise InvalidRequest(field, value, "a list")
    return tuple(value or ())


def _is_integer(value: Any, low: int, high: float = math.inf) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # NaN is in no range
