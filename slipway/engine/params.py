"""Sampling parameters of one request: fields, ranges and contradictions.

Not here: their application to logits (logit_rules.py, sample.py), to the end of an output
(request.py), and checks against the engine's limits (admission.py).

The public names are vLLM's, so that scripts written for vLLM keep working.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from slipway.codec.grammar import StructuredOutputs
from slipway.codec.reasoning import Reasoning
from slipway.engine.config import MAX_LOGPROBS
from slipway.errors import InvalidRequest

MAX_N, MAX_TEMPERATURE = 1024, 1e6
MAX_LOGIT_BIAS, MAX_BAD_WORDS, MAX_STOPS = 1024, 128, 64
# Field of generation_config.json -> field of SamplingParams.
GENERATION_DEFAULTS = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of one request: how its tokens are sampled, and where its outputs end.

    Raises InvalidRequest, naming the field, for a value out of its range. Changes of the logits are
    applied in vLLM's order: allowed tokens, bad words, min_tokens, logit_bias, penalties
    (repetition, frequency, presence), temperature, min_p, top_k, top_p.
    """

    n: int = 1
    """Number of independent samples of the prompt."""
    best_of: int | None = None
    """Samples to draw, of which the n likeliest are returned, by the sum of their log
    probabilities; default n."""
    max_tokens: int | None = 16
    """Longest output in tokens; None: up to the context length."""
    min_tokens: int = 0
    """Tokens of the output before which no end token, stop token or stop string ends it."""
    temperature: float = 1.0
    """0: the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 or -1: all."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Divisor of positive logits, and factor of negative ones, of tokens in the prompt or output
    (Keskar et al., CTRL, 2019)."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it is in the output."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token in the output."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of these tokens."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Sample these tokens only; None: all."""
    bad_words: tuple[str, ...] = ()
    """Texts that are kept out: the last token of one is never sampled after its other tokens."""
    structured_outputs: StructuredOutputs | None = None
    """Form of the output: a JSON schema, a regex, one of several texts, or a grammar."""
    reasoning: Reasoning | None = None
    """Set if the output begins with reasoning: structured_outputs apply after its end, and its
    budget limits its length."""
    seed: int | None = None
    """Seed of the random numbers. The same seed gives the same tokens in every batch."""
    stop: str | tuple[str, ...] = ()
    """Strings that end the output."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output, beside the model's end tokens."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Continue after the model's end tokens."""
    logprobs: int | None = None
    """Number of the likeliest tokens to report beside each sampled one, 0 to 20; -1: the whole
    vocabulary, if the engine's max_logprobs is -1. None: no log probabilities."""
    prompt_logprobs: int | None = None
    """Like ``logprobs``, for each token of the prompt except the first."""
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
        """Number of sequences to run: ``best_of``, or ``n`` without it."""
        return self.n if self.best_of is None else self.best_of

    @property
    def penalizes(self) -> bool:
        """Whether any penalty depends on the tokens so far."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (
            1.0,
            0.0,
            0.0,
        )

    @property
    def is_guided(self) -> bool:
        """Whether a grammar or a budget of reasoning limits the tokens."""
        return self.structured_outputs is not None or (
            self.reasoning is not None and self.reasoning.budget is not None
        )

    def _normalize(self) -> None:
        """Convert lists to tuples, and numbers of NumPy to those of Python."""
        put = object.__setattr__
        put(self, "stop", _items("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        put(self, "bad_words", _items("bad_words", self.bad_words))
        put(self, "stop_token_ids", _plain(_items("stop_token_ids", self.stop_token_ids)))
        if self.allowed_token_ids is not None:
            allowed = _items("allowed_token_ids", self.allowed_token_ids)
            put(self, "allowed_token_ids", _plain(allowed))
        if not isinstance(self.logit_bias, Mapping | None):
            raise InvalidRequest(
                "logit_bias", self.logit_bias, "a mapping from token ids to numbers"
            )
        bias = self.logit_bias or {}
        put(self, "logit_bias", dict(zip(_plain(bias), _plain(bias.values()))))
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), np.integer | np.floating):
                put(self, field.name, value.item())

    def _checks(self) -> dict[str, tuple[bool, str]]:
        """Return, for each field with a range: whether its value is fine, and what is expected."""
        return self._number_checks() | self._list_checks() | self._logprobs_checks()

    def _number_checks(self) -> dict[str, tuple[bool, str]]:
        """Return the checks of fields that are numbers."""
        integer, number = _is_integer, _is_number
        least = self.n if type(self.n) is int else 1
        most = self.max_tokens if type(self.max_tokens) is int else math.inf
        penalty = "a number from -2 to 2"
        return {
            "n": (integer(self.n, 1, MAX_N), f"an integer from 1 to {MAX_N}"),
            "best_of": (
                self.best_of is None or integer(self.best_of, least, MAX_N),
                f"an integer from n ({self.n}) to {MAX_N}, or None",
            ),
            "max_tokens": (
                self.max_tokens is None or integer(self.max_tokens, 1),
                "an integer of at least 1, or None",
            ),
            "min_tokens": (
                integer(self.min_tokens, 0, most),
                f"an integer from 0 to max_tokens ({self.max_tokens})",
            ),
            "temperature": (
                number(self.temperature, 0, MAX_TEMPERATURE),
                f"a number from 0 to {MAX_TEMPERATURE:g}",
            ),
            "top_k": (integer(self.top_k, -1, 2**31 - 1), "an integer from -1 to 2**31 - 1"),
            "top_p": (number(self.top_p, 0, 1) and self.top_p > 0, "a number above 0, at most 1"),
            "min_p": (number(self.min_p, 0, 1), "a number from 0 to 1"),
            "repetition_penalty": (
                number(self.repetition_penalty, 0, 1e3) and self.repetition_penalty > 0,
                "a number above 0, at most 1000",
            ),
            "frequency_penalty": (number(self.frequency_penalty, -2, 2), penalty),
            "presence_penalty": (number(self.presence_penalty, -2, 2), penalty),
        }

    def _list_checks(self) -> dict[str, tuple[bool, str]]:
        """Return the checks of lists, mappings and objects, and of the seed."""
        bias, allowed = self.logit_bias, self.allowed_token_ids
        structured = self.structured_outputs
        return {
            "logit_bias": (
                len(bias) <= MAX_LOGIT_BIAS
                and all(_is_integer(t, 0) and _is_number(b, -100, 100) for t, b in bias.items()),
                f"at most {MAX_LOGIT_BIAS} token ids, each with a number from -100 to 100",
            ),
            "allowed_token_ids": (
                allowed is None or (bool(allowed) and _are_token_ids(allowed)),
                "token ids, at least one",
            ),
            "bad_words": (
                len(self.bad_words) <= MAX_BAD_WORDS and _are_texts(self.bad_words),
                f"at most {MAX_BAD_WORDS} texts that are not empty",
            ),
            "structured_outputs": (
                structured is None or isinstance(structured, StructuredOutputs),
                "StructuredOutputs, or None",
            ),
            "reasoning": (
                self.reasoning is None or isinstance(self.reasoning, Reasoning),
                "Reasoning, or None",
            ),
            "seed": (
                self.seed is None or _is_integer(self.seed, 0, 2**32 - 1),
                "an integer from 0 to 2**32 - 1, or None",
            ),
            "stop": (
                len(self.stop) <= MAX_STOPS and _are_texts(self.stop),
                f"at most {MAX_STOPS} strings that are not empty",
            ),
            "stop_token_ids": (_are_token_ids(self.stop_token_ids), "token ids"),
        }

    def _logprobs_checks(self) -> dict[str, tuple[bool, str]]:
        """Return the checks of the numbers of log probabilities."""
        expected = f"0 to {MAX_LOGPROBS}, -1 for the whole vocabulary, or None"
        fields = ("logprobs", "prompt_logprobs")
        values = [getattr(self, field) for field in fields]
        fine = [value is None or _is_integer(value, -1, MAX_LOGPROBS) for value in values]
        return {field: (is_fine, expected) for field, is_fine in zip(fields, fine)}


def check_logprobs(field: str, value: int | None, limit: int) -> None:
    """Raise InvalidRequest if ``value`` log probabilities exceed ``limit``, the max_logprobs."""
    if value is not None and limit >= 0 and not 0 <= value <= limit:
        expected = (
            f"0 to {limit} (max_logprobs); -1, the whole vocabulary, only where max_logprobs is -1"
        )
        raise InvalidRequest(field, value, expected)


def generation_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of SamplingParams that generation_config.json sets.

    As in vLLM, ``do_sample`` is not read.
    """
    found = {ours: generation_config.get(theirs) for theirs, ours in GENERATION_DEFAULTS.items()}
    return {field: value for field, value in found.items() if value is not None}


def _items(field: str, value: object) -> tuple:
    if value is not None and not isinstance(value, list | tuple | set | frozenset):
        raise InvalidRequest(field, value, "a list")
    return tuple(value or ())


def _plain(values: Any) -> tuple:
    return tuple(
        value.item() if isinstance(value, np.integer | np.floating) else value for value in values
    )


def _is_integer(value: Any, low: int, high: float = math.inf) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high  # NaN is in no range


def _are_token_ids(values: tuple) -> bool:
    return all(_is_integer(value, 0) for value in values)


def _are_texts(values: Collection[str]) -> bool:
    return all(isinstance(value, str) and value for value in values)
