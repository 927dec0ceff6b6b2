"""Runs requests to their end, step by step: the only place where host state and device arrays meet.

Knows no checkpoint (launch.py made its arrays) and no text but through each sequence's detokenizer. While the device
computes a step, the host schedules, builds and dispatches the next one, then reads the results of the first.
"""

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from copy import deepcopy
from typing import Any, get_args

import jax
import numpy as np

from slipway.checkpoint.swap import Mode, Values, Weights
from slipway.codec.tokenizer import Tokenizer
from slipway.engine import batch as batches
from slipway.engine import edits, results
from slipway.engine.admission import Admission, Limits
from slipway.engine.batch import Bucket
from slipway.engine.nodes import Leading
from slipway.engine.params import SamplingParams
from slipway.engine.request import FinishReason, Request, RequestOutput, Sequence
from slipway.engine.results import Dispatched
from slipway.engine.sample import Sampled
from slipway.engine.scheduler import Chunk, Scheduler
from slipway.engine.stats import Snapshot, Stats
from slipway.engine.step import Step
from slipway.engine.updates import Policy, Updates
from slipway.errors import InvalidRequest

logger = logging.getLogger(__name__)
LONG = 100  # times the host's work: the host waits for such a step before it plans the next
LONG_AT_AN_END = 10  # the same for a step that ends an output: its place is free, and often the next request comes


class Engine:
    """The requests of one replica, its cache and its compiled step. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        step: Step | Leading,
        weights: Weights,
        kv: jax.Array,
        shapes: list[Bucket],
        limits: Limits,
        tokenizer: Tokenizer | None,
        eos_ids: frozenset[int],
        seed: int,
        defaults: Mapping[str, Any],
    ):
        self.limits, self.tokenizer, self.stats, self.defaults = limits, tokenizer, Stats(), dict(defaults)
        self._step, self.weights, self._kv, self._shapes = step, weights, kv, shapes
        self._newest = step.first_newest()
        self._admission, self._count = Admission(limits, tokenizer, eos_ids, seed), itertools.count()
        sizes = limits.sizes
        self._schedulers = [
            Scheduler(
                num_pages=limits.num_pages,
                page_size=limits.page_size,
                table_width=sizes.table_width,
                max_num_seqs=limits.max_num_seqs,
                max_num_tokens=limits.max_num_batched_tokens,
                prefix_caching=limits.prefix_caching,
            )
            for _ in range(limits.copies)
        ]
        self._builders = [batches.Builder(sizes, scheduler.page_table) for scheduler in self._schedulers]
        self._versions = itertools.count(1)
        self._requests: dict[str, Request] = {}
        self._dispatched: Dispatched | None = None
        self._has_deadlines = False
        self._updates = Updates(weights, self._schedulers)
        self._host_s, self._taken_at = 0.0, 0.0  # of a step, on average; when the last results came
        self._early = (0.0, 0.0)  # seconds of the host and of waiting, of a step taken in by a call of its own
        self._seconds: dict[tuple[Bucket, int], float] = {}  # how long the last call of each shape and length took

    @property
    def num_compiled(self) -> int:
        """Programs that the engine runs; constant once it has started."""
        return self._step.num_compiled

    def add(
        self, prompt_token_ids: list[int], params: SamplingParams, prompt: str | None = None, *, priority: int = 0,
        timeout_s: float | None = None, cache_salt: str = "", pooling: str = "",
    ) -> str:  # fmt: skip
        """Queue a request and return its id.

        ``priority``: the smaller runs first. ``timeout_s``: it ends after as many seconds, with what it has.
        ``cache_salt``: only requests of the same salt share cached pages. ``pooling``: last or mean, to get the
        prompt's hidden state instead of an output. Raises InvalidRequest if the request is empty, longer than the
        context, holds an unknown id, or could never fit; EngineBusy while the engine sleeps; WeightsLost where there
        are no whole weights.
        """
        self._updates.check()
        number = next(self._count)
        request = self._admission.request(
            number, prompt_token_ids, params, prompt, priority, timeout_s, cache_salt, pooling
        )  # fmt: skip
        self._has_deadlines |= timeout_s is not None
        self.stats.prompt_tokens += params.num_samples * len(prompt_token_ids)
        # samples share their prompt's pages, so they run on one copy of the weights
        request.copy = self._place(request)
        for sequence in request.sequences:
            sequence.change_weights(self.weights.version)
            self._schedulers[request.copy].add(sequence)
        self._requests[request.request_id] = request
        return request.request_id

    def request(self, request_id: str) -> Request:
        """A running request. Raises KeyError if it is not running."""
        return self._requests[request_id]

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> RequestOutput:
        """End a request where it stands; its pages are free at once. Raises KeyError if it is not running."""
        request = self._requests.pop(request_id)
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.finish(reason)
                self._release(sequence)
        return request.output()

    def is_running(self, request_id: str) -> bool:
        """Whether a request has not ended."""
        return request_id in self._requests

    def snapshot(self) -> Snapshot:
        """What runs, waits and is cached now, and the sums since the start."""
        each = self._schedulers
        return Snapshot(
            running=sum(len(s.running) for s in each), waiting=sum(s.num_waiting for s in each),
            pages=sum(s.pages.num_pages for s in each), pages_free=sum(s.pages.num_free for s in each),
            pages_cached=sum(s.tree.num_unlocked for s in each),
            queried_tokens=sum(s.counts.queried_tokens for s in each),
            cached_tokens=sum(s.counts.cached_tokens for s in each),
            computed_tokens=sum(s.counts.computed_tokens for s in each),
            preemptions=sum(s.counts.preemptions for s in each), compilations=self.num_compiled,
            stats=deepcopy(self.stats),
        )  # fmt: skip

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._updates.wait or (bool(self._requests) and self._updates.serves)

    def close(self) -> None:
        """Free the device's memory: weights, cache, results. The engine cannot run afterwards."""
        self.weights.delete()
        self._step.free_kv(self._kv)
        self._newest.delete()
        self._dispatched = None
        self._step.close()

    def update_weights(
        self, values: Values, *, version: str | None = None, mode: Mode = "inplace", policy: Policy = "finish"
    ) -> Future[str]:
        """Give the weights new values, which have been checked, before some next step; the version they then are.

        ``policy``: what happens to requests that run. ``finish``: they end on the old version first, while nobody
        begins. ``recompute``: their keys and values are computed anew; what they have said stays. ``continue``: they go
        on, on what the old version has computed. ``mode`` as in ``Weights.replace``; if that fails half-way, all
        requests end as aborted and none is taken until an update has succeeded. Cached prefixes are forgotten.
        """
        self._need_one_process("update_weights")
        if mode not in get_args(Mode):
            raise InvalidRequest("mode", mode, " | ".join(get_args(Mode)))
        version = version or str(next(self._versions))

        def apply() -> str:
            self._updates.replace(values, version, mode)
            for sequence in (sequence for request in self._requests.values() for sequence in request.sequences):
                sequence.change_weights(version)
            return version

        return self._updates.add(apply, policy)

    def sleep(self, level: int = 1) -> Future[None]:
        """Free the cache, and the devices of weights, before the next step; requests wait until ``wake_up``.

        ``level`` 1 keeps the weights in the host's memory; 2 drops them: after it, only an update brings any.
        """
        self._need_one_process("sleep")
        if level not in (1, 2):
            raise InvalidRequest("level", level, "1, which keeps the weights on the host, or 2, which drops them")

        def apply() -> None:
            if not self._updates.sleep_level:
                self._step.free_kv(self._kv)
            self._updates.sleep(level)

        return self._updates.add(apply, "recompute")

    def wake_up(self) -> Future[None]:
        """Undo ``sleep``."""

        def apply() -> None:
            if self._updates.sleep_level:
                self._updates.wake_up()
                self._kv = self._step.empty_kv()

        return self._updates.add(apply, "continue")

    @property
    def changes_now(self) -> bool:
        """Whether the next step is a change of weights, sleep or waking."""
        return self._updates.wait and self._updates.may_begin()

    def fail_updates(self, error: BaseException) -> None:
        """End what waits to be changed."""
        self._updates.fail(error)

    def flush(self) -> int:
        """Forget the cached prefixes; how many pages that freed. What runs keeps its own."""
        return sum(scheduler.tree.flush() for scheduler in self._schedulers)

    def step(self) -> list[Request]:
        """Dispatch a step and take in the one before: who has news of it; who finished is no longer the engine's.

        A step that takes long is taken in by a call of its own, before the next is planned, and the first call after
        a pause has nothing to take in and returns an empty list.
        """
        started, moved = time.perf_counter(), dict[str, Request]()
        if self._has_deadlines:
            self._end_overdue(moved)
        if self.changes_now:
            self._change(moved)
            return self._told(moved)
        self._updates.check()
        before, self._dispatched = self._dispatched, None
        if before is not None and self._is_long(before):  # who comes upon its results is in time for the next
            waited = self._take(before, moved)
            self._early = (time.perf_counter() - started - waited, waited)
            return self._told(moved)
        waited = self._dispatch(before, moved)
        host_s = time.perf_counter() - started - waited + self._early[0]
        self._host_s += (host_s - self._host_s) / 16
        self.stats.step(host_s, waited + self._early[1])
        self._early = (0.0, 0.0)
        return self._told(moved)

    def _told(self, moved: dict[str, Request]) -> list[Request]:
        interval = self.limits.stream_interval
        return [request for request in moved.values() if interval == 1 or request.is_due(interval)]

    def _dispatch(self, before: Dispatched | None, moved: dict[str, Request]) -> float:
        """Give the device what can run next, and take in the step before; the seconds spent waiting for that."""
        waited = 0.0
        chunks = [scheduler.schedule() for scheduler in self._schedulers]
        if any(chunks):
            bucket, num_steps = self._shape(chunks)
            batch = batches.join([builder.build(rank, bucket) for builder, rank in zip(self._builders, chunks)])
            if num_steps > 1:
                x_TD, on_device = None, (self.weights.arrays, self._kv, self._newest)
                self._kv, sampled, self._newest = self._step.repeat(*on_device, batch, num_steps)
            else:
                self._kv, x_TD, logits_BV = self._step.forward(
                    self.weights.arrays, self._kv, self._newest, bucket, batch.tokens
                )  # fmt: skip
                edited = None
                if rows := edits.edited(chunks, bucket.num_rows):
                    if before is not None:  # what these rows may say next depends on what they said last
                        waited += self._take(before, moved)
                        before = None
                    edited = edits.build(self._step.no_edits(bucket), rows)
                sampled, self._newest = self._step.choose(logits_BV, self._newest, bucket, batch.sampling, edited)
            self._dispatched = Dispatched(chunks, bucket, num_steps, sampled, x_TD, time.perf_counter())
            self._count_step(chunks)
        if before is not None:
            waited += self._take(before, moved)
        return waited

    def _change(self, moved: dict[str, Request]) -> None:
        """Make the change that comes first, once nothing is on the device."""
        before, self._dispatched = self._dispatched, None
        if before is not None:
            self._take(before, moved)
        if not self._updates.begin():
            for request in list(self._requests.values()):
                self.abort(request.request_id)
                moved[request.request_id] = request

    def _need_one_process(self, what: str) -> None:
        if isinstance(self._step, Leading):
            raise InvalidRequest(what, "an engine of several processes", "one process (nnodes 1)")

    def _shape(self, chunks: list[list[Chunk]]) -> tuple[Bucket, int]:
        """The shape of the next step, and how many of it go in one call: several where all that run only decode."""
        bucket, repeats = batches.choose(self._shapes, chunks), self._step.repeats
        if repeats is None or bucket.num_tokens > repeats.bucket.num_tokens:
            return bucket, 1
        each = list(zip(self._schedulers, chunks))
        more = min(scheduler.spare_steps(rank, repeats.num_steps - 1) for scheduler, rank in each)
        if not more:
            return bucket, 1
        for scheduler, rank in each:
            scheduler.repeat(rank, more)
        return repeats.bucket, 1 + more

    def _count_step(self, chunks: list[list[Chunk]]) -> None:
        """A step was dispatched."""
        self.stats.steps += 1
        for sequence in (chunk.sequence for rank in chunks for chunk in rank if chunk.sequence.first_run):
            self.stats.queue.add(time.monotonic() - sequence.request.arrived_at)
            sequence.first_run = False

    def _take(self, step: Dispatched, moved: dict[str, Request]) -> float:
        """Give the sequences what a step found; the seconds that it took to come."""
        started = time.perf_counter()
        asked = [chunk.sequence for rank in step.chunks for chunk in rank]
        if True in [sequence.wants_logprobs for sequence in asked]:
            sampled = jax.tree.map(np.asarray, step.sampled)
        else:
            sampled = step.sampled
        tokens = np.asarray(sampled.token_B).tolist()
        x_TD = np.asarray(step.x_TD, np.float32) if any(s.request.pooling for s in asked) else None
        ended = time.perf_counter()
        waited, self._seconds[step.shape] = ended - started, ended - max(step.at, self._taken_at)
        self._taken_at = ended
        now, gaps = time.monotonic(), Counter[float]()
        for rank, chunks in enumerate(step.chunks):
            row, first_token = rank * step.bucket.num_rows, rank * step.bucket.num_tokens
            for chunk in chunks:
                sequence = chunk.sequence
                if sequence.finish_reason is None:
                    if chunk.scored:
                        results.score(sequence.request, sampled, row, chunk)
                    if x_TD is not None and sequence.request.pooling:
                        results.pool(sequence, x_TD[first_token : first_token + chunk.num_tokens], chunk)
                    if chunk.samples:
                        moved[sequence.request.request_id] = sequence.request
                    only = (row + len(chunk.scored),) if chunk.samples else ()
                    for found in only if step.num_steps == 1 else step.rows(row, chunk):
                        gaps[sequence.last_token_at] += 1  # one value for nearly all
                        sequence.last_token_at = now
                        self._append(sequence, tokens[found], sampled, found)
                        if sequence.finish_reason is not None:
                            break  # what follows its end in the same call was computed for nothing
                row, first_token = row + len(chunk.scored) + chunk.samples, first_token + chunk.num_tokens
        for at, times in gaps.items():
            if at:
                self.stats.inter_token.add(now - at, times)
        return waited

    def _append(self, sequence: Sequence, token: int, sampled: Sampled, row: int) -> None:
        """Give a sequence its token; if that was its last, its pages are free."""
        sequence.num_pending -= 1
        params = sequence.request.params
        if sequence.request.pooling:
            sequence.finish(FinishReason.STOP)
        else:
            if params.best_of is not None:
                sequence.cumulative_logprob += float(sampled.logprob_B[row])
            sequence.append(token, None if params.logprobs is None else results.logprobs(sampled, row, params.logprobs))
            if sequence.matcher is not None and sequence.finish_reason is None:
                if not sequence.matcher.accept(token):
                    sequence.finish(FinishReason.ABORT, "the grammar's limits")
                elif sequence.matcher.is_done:
                    sequence.finish(FinishReason.STOP)
            self.stats.generated_tokens += 1
        if math.isnan(sequence.request.first_token_at):
            sequence.request.first_token_at = sequence.last_token_at
            self.stats.first_token.add(sequence.last_token_at - sequence.request.arrived_at)
        if sequence.finish_reason is not None:
            self._release(sequence)
            if sequence.request.finished:
                self._requests.pop(sequence.request.request_id, None)

    def _is_long(self, step: Dispatched) -> bool:
        """Whether a step takes so much longer than the host's work that nobody who comes should wait for two.

        What is dispatched ahead is decided ahead. On a CPU a prefill of 512 tokens may take 0.7 s, the host 2 ms.
        """
        times = self._seconds.get(step.shape, 0.0) / max(self._host_s, 1e-9)
        if not LONG_AT_AN_END < times <= LONG:
            return times > LONG
        return any(c.sequence.length >= c.sequence.max_length for rank in step.chunks for c in rank)

    def _end_overdue(self, moved: dict[str, Request]) -> None:
        now = time.monotonic()
        for request in [request for request in self._requests.values() if request.deadline <= now]:
            self.abort(request.request_id, FinishReason.TIMEOUT)
            moved[request.request_id] = request
        self._has_deadlines = any(request.deadline < math.inf for request in self._requests.values())

    def _release(self, sequence: Sequence) -> None:
        self.stats.finish(sequence.finish_reason or "", time.monotonic() - sequence.request.arrived_at)
        self._schedulers[sequence.request.copy].release(sequence)

    def _place(self, request: Request) -> int:
        """The copy of the weights with the least to do, once it has found what it holds of the prompt."""
        if len(self._schedulers) == 1:
            return 0
        prompt = np.array(request.prompt_token_ids, np.int32)
        left = [scheduler.load - scheduler.cached(request.cache_salt, prompt) for scheduler in self._schedulers]
        return left.index(min(left))
