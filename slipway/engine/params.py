"""How one request's tokens are chosen and where they end: the fields, their ranges, what contradicts; knows no engine.

The public names follow vLLM's, so that its users' scripts read on.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from slipway.codec.grammar import StructuredOutputs
from slipway.codec.reasoning import Reasoning
from slipway.engine.config import MAX_LOGPROBS
from slipway.errors import InvalidRequest

MAX_N, MAX_TEMPERATURE = 1024, 1e6
MAX_LOGIT_BIAS, MAX_BAD_WORDS, MAX_STOPS = 1024, 128, 64
GENERATION_DEFAULTS = {  # of generation_config.json, by its names
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen and where they end.

    Raises InvalidRequest, naming the field, on a value out of its range. What changes the logits is applied in vLLM's
    order: allowed tokens, bad words, min_tokens, logit_bias, penalties (repetition, frequency, presence), temperature,
    min_p, top_k, top_p.
    """

    n: int = 1
    """Independent samples of the prompt."""
    best_of: int | None = None
    """Draw as many and give back the n likeliest, by the sum of their log probabilities; default n."""
    max_tokens: int | None = 16
    """Longest output; None: up to the model's context."""
    min_tokens: int = 0
    """No end token, stop token or stop string before as many."""
    temperature: float = 1.0
    """0: the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 or -1: all."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Divide the positive logits of tokens in prompt or output by it, multiply the negative ones (Keskar et al.,
    CTRL, 2019)."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time that it is in the output."""
    presence_penalty: float = 0.0
    """Taken off a token's logit if it is in the output."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of these tokens."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Choose among these tokens alone."""
    bad_words: tuple[str, ...] = ()
    """Texts whose last token is never chosen after the ones before it."""
    structured_outputs: StructuredOutputs | None = None
    """What the output must be: a JSON schema, a regex, one of several texts, a grammar."""
    reasoning: Reasoning | None = None
    """That the output reasons first: structured_outputs hold from its end on, and a budget bounds it."""
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
    """How many of the likeliest tokens to report beside the chosen one, at most 20; -1: the whole vocabulary, where
    the engine's max_logprobs is -1."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first."""
    skip_special_tokens: bool = True

    def __post_init__(self):
        self._normalize()
        for field, (fine, expected) in self._checks().items():
            if not fine:
                raise InvalidRequest(field, getattr(self, field), expected)
        for field in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, field), bool):
                raise InvalidRequest(field, getattr(self, field), "True or False")

    @property
    def num_samples(self) -> int:
        """Sequences to run: ``best_of``, else ``n``."""
        return self.n if self.best_of is None else self.best_of

    @property
    def penalizes(self) -> bool:
        """Whether what is in the text already counts."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)

    @property
    def is_guided(self) -> bool:
        """Whether a grammar, or a budget of reasoning, says which tokens may come."""
        return self.structured_outputs is not None or (self.reasoning is not None and self.reasoning.budget is not None)

    def _normalize(self) -> None:
        """Lists to tuples, NumPy's numbers to Python's."""
        put = object.__setattr__
        put(self, "stop", _items("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        put(self, "bad_words", _items("bad_words", self.bad_words))
        put(self, "stop_token_ids", _plain(_items("stop_token_ids", self.stop_token_ids)))
        if self.allowed_token_ids is not None:
            put(self, "allowed_token_ids", _plain(_items("allowed_token_ids", self.allowed_token_ids)))
        if not isinstance(self.logit_bias, Mapping | None):
            raise InvalidRequest("logit_bias", self.logit_bias, "a mapping from token ids to numbers")
        put(self, "logit_bias", dict(zip(_plain(self.logit_bias or ()), _plain((self.logit_bias or {}).values()))))
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), np.integer | np.floating):
                put(self, field.name, value.item())

    def _checks(self) -> dict[str, tuple[bool, str]]:
        integer, number, bias, allowed = _is_integer, _is_number, self.logit_bias, self.allowed_token_ids
        penalty, top = "a number from -2 to 2", f"0 to {MAX_LOGPROBS}, -1 for the whole vocabulary, or None"
        return {
            "n": (integer(self.n, 1, MAX_N), f"an integer from 1 to {MAX_N}"),
            "best_of": (
                self.best_of is None or integer(self.best_of, self.n if type(self.n) is int else 1, MAX_N),
                f"an integer from n ({self.n}) to {MAX_N}, or None",
            ),
            "max_tokens": (self.max_tokens is None or integer(self.max_tokens, 1), "an integer of at least 1, or None"),
            "min_tokens": (
                integer(self.min_tokens, 0, math.inf if type(self.max_tokens) is not int else self.max_tokens),
                f"an integer from 0 to max_tokens ({self.max_tokens})",
            ),
            "temperature": (number(self.temperature, 0, MAX_TEMPERATURE), f"a number from 0 to {MAX_TEMPERATURE:g}"),
            "top_k": (integer(self.top_k, -1, 2**31 - 1), "an integer from -1 to 2**31 - 1"),
            "top_p": (number(self.top_p, 0, 1) and self.top_p > 0, "a number above 0, at most 1"),
            "min_p": (number(self.min_p, 0, 1), "a number from 0 to 1"),
            "repetition_penalty": (
                number(self.repetition_penalty, 0, 1e3) and self.repetition_penalty > 0,
                "a number above 0, at most 1000",
            ),
            "frequency_penalty": (number(self.frequency_penalty, -2, 2), penalty),
            "presence_penalty": (number(self.presence_penalty, -2, 2), penalty),
            "logit_bias": (
                len(bias) <= MAX_LOGIT_BIAS and all(integer(t, 0) and number(b, -100, 100) for t, b in bias.items()),
                f"at most {MAX_LOGIT_BIAS} token ids, each with a number from -100 to 100",
            ),
            "allowed_token_ids": (
                allowed is None or (bool(allowed) and all(integer(t, 0) for t in allowed)), "token ids, at least one",
            ),
            "bad_words": (
                len(self.bad_words) <= MAX_BAD_WORDS and all(isinstance(w, str) and w for w in self.bad_words),
                f"at most {MAX_BAD_WORDS} texts that are not empty",
            ),
            "structured_outputs": (
                self.structured_outputs is None or isinstance(self.structured_outputs, StructuredOutputs),
                "StructuredOutputs, or None",
            ),
            "reasoning": (self.reasoning is None or isinstance(self.reasoning, Reasoning), "Reasoning, or None"),
            "seed": (self.seed is None or integer(self.seed, 0, 2**32 - 1), "an integer from 0 to 2**32 - 1, or None"),
            "stop": (
                len(self.stop) <= MAX_STOPS and all(isinstance(s, str) and s for s in self.stop),
                f"at most {MAX_STOPS} strings that are not empty",
            ),
            "stop_token_ids": (all(integer(t, 0) for t in self.stop_token_ids), "token ids"),
            "logprobs": (self.logprobs is None or integer(self.logprobs, -1, MAX_LOGPROBS), top),
            "prompt_logprobs": (self.prompt_logprobs is None or integer(self.prompt_logprobs, -1, MAX_LOGPROBS), top),
        }  # fmt: skip


def check_logprobs(field: str, value: int | None, limit: int) -> None:
    """Raise InvalidRequest if a number of log probabilities is beyond the engine's max_logprobs, ``limit``."""
    if value is not None and limit >= 0 and not 0 <= value <= limit:
        expected = f"0 to {limit} (max_logprobs); -1, the whole vocabulary, only where max_logprobs is -1"
        raise InvalidRequest(field, value, expected)


def generation_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of SamplingParams that generation_config.json sets. As in vLLM, do_sample says nothing."""
    found = {ours: generation_config.get(theirs) for theirs, ours in GENERATION_DEFAULTS.items()}
    return {field: value for field, value in found.items() if value is not None}


def _items(field: str, value: object) -> tuple:
    if value is not None and not isinstance(value, list | tuple | set | frozenset):
        raise InvalidRequest(field, value, "a list")
    return tuple(value or ())


def _plain(values: Any) -> tuple:
    return tuple(value.item() if isinstance(value, np.integer | np.floating) else value for value in values)


def _is_integer(value: Any, low: int, high: float = math.inf) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # NaN is in no range
