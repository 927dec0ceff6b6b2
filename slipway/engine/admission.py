"""Admission of requests: checks against the engine's limits, and their sequences.

Not here: which sequences run (scheduler.py), the bounds of what is queued (async_engine.py,
server/).
"""

import dataclasses
import math
import time
from typing import Any

from slipway.codec.detokenizer import Detokenizer
from slipway.codec.grammar import Grammars
from slipway.codec.reasoning import Constraint
from slipway.codec.tokenizer import Tokenizer
from slipway.engine import logit_rules
from slipway.engine.batch import Sizes
from slipway.engine.params import SamplingParams, check_logprobs
from slipway.engine.request import Request, RequestSpec, Sequence
from slipway.errors import ContextTooLong, InvalidRequest


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a running engine; printed at start.

    ``windows`` and ``num_pages`` are of each numbering of pages (kv_cache.page_windows).
    """

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_rows: int  # rows of results of a step
    page_size: int
    num_pages: tuple[int, ...]
    windows: tuple[int | None, ...]
    copies: int
    prefix_caching: bool
    stream_interval: int
    max_logprobs: int  # -1: the whole vocabulary
    speculation: dict[str, Any] | None  # options of speculative decoding, None if it is off
    bodies: dict[str, str]  # which serves each op

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache of one copy of the weights holds."""
        return self.num_pages[0] * self.page_size

    @property
    def sizes(self) -> Sizes:
        """Sizes of every batch."""
        width = -(-self.max_model_len // self.page_size)
        num_logprobs = self.vocab_size if self.max_logprobs < 0 else self.max_logprobs
        return Sizes(
            page_size=self.page_size,
            num_pages=self.num_pages,
            table_width=width,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            num_logprobs=num_logprobs,
        )


class Admission:
    """Makes a request of each spec."""

    def __init__(
        self, limits: Limits, tokenizer: Tokenizer | None, eos_ids: frozenset[int], seed: int
    ):
        self._limits = limits
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._seed = seed
        self._grammars: Grammars | None = None  # made when the first request wants one

    def request(self, number: int, spec: RequestSpec) -> Request:
        """Return the ``number``-th request, with its sequences. Raises InvalidRequest."""
        params, timeout_s = spec.params, spec.timeout_s
        if type(spec.priority) is not int:
            raise InvalidRequest("priority", spec.priority, "an integer")
        if timeout_s is not None and not (type(timeout_s) in (int, float) and timeout_s > 0):
            raise InvalidRequest("timeout_s", timeout_s, "seconds above 0, or None")
        if not isinstance(spec.cache_salt, str):
            raise InvalidRequest("cache_salt", spec.cache_salt, "a text")
        max_tokens = self._check(spec.token_ids, params)
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        request = Request(str(number), spec, max_tokens, arrival=number, deadline=deadline)
        stop_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else self._eos_ids
        )
        if logit_rules.needed(params):
            vocab_size = self._limits.vocab_size
            request.rules = logit_rules.Rules(
                params, stop_ids, self._tokenizer, vocab_size=vocab_size
            )
        matchers = self._matchers(params)
        for index in range(params.num_samples):
            # without a seed of its own a request gets one from the engine's seed and its number
            seed = params.seed if params.seed is not None else _mix(self._seed, number)
            sequence = Sequence(
                request,
                index,
                seed=(seed + index) % 2**32,
                stop_ids=stop_ids,
                detokenizer=self._detokenizer(spec),
            )
            sequence.matcher = matchers[index] if matchers else None
            request.sequences.append(sequence)
        return request

    def _check(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        """Return the longest output that the request may have. Raises InvalidRequest."""
        limits, length = self._limits, len(prompt_token_ids)
        if not length:
            raise InvalidRequest("prompt_token_ids", prompt_token_ids, "at least one token")
        for token in prompt_token_ids:
            if type(token) is not int or not 0 <= token < limits.vocab_size:
                raise InvalidRequest(
                    "prompt_token_ids", token, f"token ids from 0 to {limits.vocab_size - 1}"
                )
        if length >= limits.max_model_len:
            raise ContextTooLong("prompt", f"{length} tokens", limits.max_model_len)
        check_logprobs("logprobs", params.logprobs, limits.max_logprobs)
        check_logprobs("prompt_logprobs", params.prompt_logprobs, limits.max_logprobs)
        if params.stop and self._tokenizer is None:
            raise InvalidRequest(
                "stop", params.stop, "no stop strings without a tokenizer (skip_tokenizer_init)"
            )
        longest = limits.max_model_len - length
        max_tokens = longest if params.max_tokens is None else min(params.max_tokens, longest)
        room = limits.num_tokens
        if length + max_tokens > room:
            got = f"{length} prompt tokens + {max_tokens} max_tokens"
            raise InvalidRequest(
                "max_tokens", got, f"at most the {room} tokens that the cache holds"
            )
        return max_tokens

    def _matchers(self, params: SamplingParams) -> list[Constraint]:
        """Return a matcher for each sample if a grammar or a budget of reasoning limits outputs."""
        if not params.is_guided:
            return []
        if self._tokenizer is None:
            raise InvalidRequest(
                "structured_outputs", params.structured_outputs, "none without a tokenizer"
            )
        if self._grammars is None:
            self._grammars = Grammars(
                self._tokenizer, self._limits.vocab_size, sorted(self._eos_ids)
            )
        return [
            self._grammars.matcher(params.structured_outputs, params.reasoning)
            for _ in range(params.num_samples)
        ]

    def _detokenizer(self, spec: RequestSpec) -> Detokenizer | None:
        params = spec.params
        if self._tokenizer is None:
            return None
        return Detokenizer(
            self._tokenizer,
            params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
            prompt=spec.token_ids,
        )


def _mix(seed: int, number: int) -> int:
    """Return a seed for the n-th request.

    The constant is 2**32 / golden ratio (Knuth, TAOCP 3, 6.4).
    """
    return (seed ^ (number * 0x9E3779B1)) % 2**32
