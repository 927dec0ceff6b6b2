"""Runs requests to their end, step by step: the only place where host state and device arrays meet.

Knows no checkpoint (launch.py made its arrays) and no text but through each sequence's detokenizer.
"""

import dataclasses
import itertools
import logging
import time
from typing import Any

import jax

from slipway.codec.detokenizer import Detokenizer
from slipway.codec.tokenizer import Tokenizer
from slipway.engine import batch as batches
from slipway.engine.batch import Bucket
from slipway.engine.request import Logprob, Request, RequestOutput, SamplingParams, Sequence
from slipway.engine.sample import Sampled
from slipway.engine.scheduler import Chunk, Scheduler
from slipway.engine.step import Step, host
from slipway.errors import InvalidRequest

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the running engine can hold; printed at start."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    copies: int


@dataclasses.dataclass
class Stats:
    """Sums since the start: steps, tokens, and seconds on the host and waiting for the device."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    host_s: float = 0.0
    device_s: float = 0.0


class Engine:
    """The requests of one replica, its cache and its compiled step. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        step: Step,
        params: Any,
        kv: jax.Array,
        shapes: list[Bucket],
        limits: Limits,
        tokenizer: Tokenizer | None,
        eos_ids: frozenset[int],
        seed: int,
    ):
        self.limits, self.tokenizer, self.stats = limits, tokenizer, Stats()
        self._step, self._params, self._kv, self._shapes = step, jax.tree.leaves(params), kv, shapes
        self._eos_ids, self._seed, self._count = eos_ids, seed, itertools.count()
        self._table_width = -(-limits.max_model_len // limits.page_size)
        self._schedulers = [
            Scheduler(
                limits.num_pages,
                limits.page_size,
                self._table_width,
                limits.max_num_seqs,
                limits.max_num_batched_tokens,
            )
            for _ in range(limits.copies)
        ]
        self._builders = [
            batches.Builder(limits.page_size, limits.num_pages, self._table_width) for _ in range(limits.copies)
        ]
        self._requests: dict[str, Request] = {}

    @property
    def num_compiled(self) -> int:
        """Programs that the engine runs; constant once it has started."""
        return self._step.num_compiled

    def add(self, prompt_token_ids: list[int], params: SamplingParams, prompt: str | None = None) -> str:
        """Queue a request and return its id.

        Raises InvalidRequest if it is empty, longer than the context, holds an unknown id, or could never fit.
        """
        number = next(self._count)
        request = Request(str(number), prompt, prompt_token_ids, params, self._check(prompt_token_ids, params))
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids)
        self.stats.prompt_tokens += params.n * len(prompt_token_ids)
        for index in range(params.n):
            # without a seed of its own a request gets one from the engine's seed and its number
            seed = params.seed if params.seed is not None else _mix(self._seed, number)
            sequence = Sequence(request, index, (seed + index) % 2**32, stop_ids, self._detokenizer(params))
            request.sequences.append(sequence)
            min(self._schedulers, key=lambda scheduler: scheduler.load).add(sequence)
        self._requests[request.request_id] = request
        return request.request_id

    def request(self, request_id: str) -> Request:
        """A running request. Raises KeyError if it is not running."""
        return self._requests[request_id]

    def abort(self, request_id: str) -> RequestOutput:
        """End a request where it stands; its pages are free at once. Raises KeyError if it is not running."""
        request = self._requests.pop(request_id)
        running = [sequence for sequence in request.sequences if sequence.finish_reason is None]
        for scheduler in self._schedulers:
            scheduler.abort(running)
        for sequence in running:
            sequence.finish("abort")
        return request.output()

    def is_running(self, request_id: str) -> bool:
        """Whether a request has not ended."""
        return request_id in self._requests

    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._requests)

    def step(self) -> list[Request]:
        """Compute one step and return the requests that got a token; the finished ones are no longer the engine's."""
        started = time.perf_counter()
        chunks = [scheduler.schedule() for scheduler in self._schedulers]
        if not any(chunks):
            return []
        bucket = batches.choose(self._shapes, chunks)
        batch = batches.join([builder.build(rank, bucket) for builder, rank in zip(self._builders, chunks)])
        dispatched = time.perf_counter()
        self._kv, sampled = self._step(self._params, self._kv, bucket, batch)
        sampled = host(sampled)
        received = time.perf_counter()
        touched: dict[str, Request] = {}
        for rank, (scheduler, rank_chunks) in enumerate(zip(self._schedulers, chunks)):
            self._take(rank_chunks, sampled, rank * bucket.num_rows, touched)
            scheduler.commit(rank_chunks)
        for request in touched.values():
            if request.finished:
                del self._requests[request.request_id]
        self.stats.steps += 1
        self.stats.device_s += received - dispatched
        self.stats.host_s += dispatched - started + time.perf_counter() - received
        return list(touched.values())

    def _take(self, chunks: list[Chunk], sampled: Sampled, first_row: int, touched: dict[str, Request]) -> None:
        """Give each sequence the token that its row sampled."""
        tokens = sampled.token_B.tolist()
        for row, chunk in enumerate(chunks, first_row):
            if not chunk.samples:
                continue  # its prompt goes on
            sequence, request = chunk.sequence, chunk.sequence.request
            top = request.params.logprobs
            sequence.append(tokens[row], None if top is None else _logprobs(sampled, row, top))
            self.stats.generated_tokens += 1
            touched[request.request_id] = request

    def _check(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        """The longest output that the request may have."""
        limits, length = self.limits, len(prompt_token_ids)
        if not length:
            raise InvalidRequest("prompt_token_ids", prompt_token_ids, "at least one token")
        for token in prompt_token_ids:
            if type(token) is not int or not 0 <= token < limits.vocab_size:
                raise InvalidRequest("prompt_token_ids", token, f"token ids from 0 to {limits.vocab_size - 1}")
        if length >= limits.max_model_len:
            raise InvalidRequest("prompt", f"{length} tokens", f"fewer than max_model_len ({limits.max_model_len})")
        if params.stop and self.tokenizer is None:
            raise InvalidRequest("stop", params.stop, "no stop strings without a tokenizer (skip_tokenizer_init)")
        longest = limits.max_model_len - length
        max_tokens = longest if params.max_tokens is None else min(params.max_tokens, longest)
        room = limits.num_pages * limits.page_size
        if length + max_tokens > room:
            got = f"{length} prompt tokens + {max_tokens} max_tokens"
            raise InvalidRequest("max_tokens", got, f"at most the {room} tokens that the cache holds")
        return max_tokens

    def _detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        return Detokenizer(self.tokenizer, params.stop, params.include_stop_str_in_output, params.skip_special_tokens)


def _logprobs(sampled: Sampled, row: int, top: int) -> dict[int, Logprob]:
    """The chosen token and the ``top`` likeliest, each with its rank."""
    ids, values = sampled.top_id_BX[row, :top].tolist(), sampled.top_logprob_BX[row, :top].tolist()
    found = {token: Logprob(value, rank) for rank, (token, value) in enumerate(zip(ids, values), 1)}
    chosen = int(sampled.token_B[row])
    return {chosen: Logprob(float(sampled.logprob_B[row]), int(sampled.rank_B[row]))} | found


def _mix(seed: int, number: int) -> int:
    """A seed for the n-th request (the constant is 2**32 / golden ratio: Knuth, TAOCP 3, 6.4)."""
    return (seed ^ (number * 0x9E3779B1)) % 2**32
