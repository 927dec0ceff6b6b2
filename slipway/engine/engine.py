"""Engine: requests from their arrival to their end, and changes of weights between two steps.

Not here: the steps themselves (pipeline.py), loading of a model (launch.py), threads and processes
(async_engine.py).
"""

import itertools
import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future
from copy import deepcopy
from typing import Any, get_args

import numpy as np

from slipway.checkpoint.swap import Mode, Values, Weights
from slipway.codec.tokenizer import Tokenizer
from slipway.engine import programs, results
from slipway.engine.admission import Admission, Limits
from slipway.engine.batch import Bucket, Repeat
from slipway.engine.drafts.device_drafts import Rounds
from slipway.engine.drafts.loading import DraftState
from slipway.engine.drafts.speculation import Speculation
from slipway.engine.pipeline import Pipeline
from slipway.engine.programs import CACHES, NEWEST, WEIGHTS
from slipway.engine.request import FinishReason, Request, RequestOutput, RequestSpec, Sequence
from slipway.engine.sample import Sampled
from slipway.engine.scheduler import Scheduler
from slipway.engine.stats import ExpertCounts, Snapshot, Stats
from slipway.engine.updates import Policy, Updates
from slipway.errors import InvalidRequest
from slipway.ops import ExpertLoad
from slipway.runtime.multihost import Leader
from slipway.runtime.runner import Runner

logger = logging.getLogger(__name__)


class Engine:
    """Requests, caches and programs of one replica. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        runner: Runner,
        weights: Weights,
        *,
        shapes: list[Bucket],
        repeats: Repeat | None,
        limits: Limits,
        tokenizer: Tokenizer | None,
        eos_ids: frozenset[int],
        seed: int,
        defaults: Mapping[str, Any],
        leader: Leader | None,
        speculation: Speculation | None,
        draft_state: DraftState | None,
        rounds: Rounds | None,
    ):
        self.limits = limits
        self.tokenizer = tokenizer
        self.weights = weights
        self.defaults = dict(defaults)
        self.repeats = repeats
        self.runner = runner
        self._leader = leader  # where other processes repeat the calls of this one
        self._admission = Admission(limits, tokenizer, eos_ids, seed=seed)
        self._count = itertools.count()
        self.schedulers = [
            Scheduler(
                num_pages=limits.num_pages[0],
                page_size=limits.page_size,
                table_width=limits.sizes.table_width,
                max_num_seqs=limits.max_num_seqs,
                max_num_tokens=limits.max_num_batched_tokens,
                max_rows=limits.max_rows,
                prefix_caching=limits.prefix_caching,
                windows=[(w, n) for w, n in zip(limits.windows, limits.num_pages) if w is not None],
            )
            for _ in range(limits.copies)
        ]
        self._pipeline = Pipeline(
            runner,
            self.schedulers,
            self._append,
            shapes=shapes,
            repeats=repeats,
            sizes=limits.sizes,
            speculation=speculation,
            rounds=rounds,
        )
        self._speculation = speculation
        self._draft_state = draft_state
        self._versions = itertools.count(1)
        self._requests: dict[str, Request] = {}
        self._has_deadlines = False
        self._updates = Updates(weights, self.schedulers)
        self._expert_counts = ExpertCounts()
        # State of ``weights`` of which the programs have the arrays.
        self._changes_seen = weights.changes

    @property
    def num_compiled(self) -> int:
        """Programs that the engine runs; constant once it has started."""
        return self.runner.num_compiled

    @property
    def stats(self) -> Stats:
        """Counters and times since the start, or since ``reset_stats``."""
        return self._pipeline.stats

    def reset_stats(self) -> None:
        """Count and time from zero."""
        self._pipeline.stats = Stats()
        self._read_expert_load()
        self._expert_counts.reset()

    def add(self, spec: RequestSpec) -> str:
        """Queue a request and return its id.

        Raises InvalidRequest if the prompt is empty, longer than the context, holds an unknown id,
        or could never fit; EngineBusy while the engine sleeps; WeightsLost while the weights are
        incomplete.
        """
        self._updates.check()
        request = self._admission.request(next(self._count), spec)
        self._has_deadlines |= spec.timeout_s is not None
        self.stats.prompt_tokens += spec.params.num_samples * len(spec.token_ids)
        # samples share their prompt's pages, so they run on one copy of the weights
        request.copy = self._place(request)
        for sequence in request.sequences:
            sequence.change_weights(self.weights.version)
            self.schedulers[request.copy].add(sequence)
        self._requests[request.request_id] = request
        return request.request_id

    def request(self, request_id: str) -> Request:
        """Return a running request. Raises KeyError if it is not running."""
        return self._requests[request_id]

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> RequestOutput:
        """End a request and free its pages at once. Raises KeyError if it is not running."""
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
        """Return what runs, waits and is cached now, and the sums since the start."""
        each = self.schedulers
        return Snapshot(
            running=sum(len(s.running) for s in each),
            waiting=sum(s.num_waiting for s in each),
            pages=sum(s.pages.num_pages for s in each),
            pages_free=sum(s.pages.num_free for s in each),
            pages_cached=sum(s.tree.num_unlocked for s in each),
            queried_tokens=sum(s.counts.queried_tokens for s in each),
            cached_tokens=sum(s.counts.cached_tokens for s in each),
            computed_tokens=sum(s.counts.computed_tokens for s in each),
            preemptions=sum(s.counts.preemptions for s in each),
            compilations=self.num_compiled,
            expert_tokens=self._read_expert_load(),
            expert_imbalance=self._expert_counts.imbalance(),
            stats=deepcopy(self.stats),
        )

    def _read_expert_load(self) -> list[int]:
        """Return the tokens of each expert, all layers together; empty without experts.

        Waits for the step on the device.
        """
        caches = self.runner.state.get(CACHES, ())
        if caches and isinstance(caches[-1], ExpertLoad):
            counts = caches[-1].counts_LE
            copies = {shard.index[0].start: shard.data for shard in counts.addressable_shards}
            self._expert_counts.read([np.asarray(copy) for copy in copies.values()])
        return self._expert_counts.of_experts()

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._updates.wait or (bool(self._requests) and self._updates.serves)

    def close(self) -> None:
        """Free the device's memory: weights, cache, results. The engine cannot run afterwards."""
        self.weights.delete()
        self.runner.free(CACHES)
        self.runner.free(NEWEST)
        if self._draft_state is not None:
            self._draft_state.delete()
        self._pipeline.forget()
        if self._leader is not None:
            self._leader.close()

    def update_weights(
        self,
        values: Values,
        *,
        version: str | None = None,
        mode: Mode = "inplace",
        policy: Policy = "finish",
    ) -> Future[str]:
        """Replace the weights by checked values between two steps; the result is their new version.

        ``policy`` is for running requests. ``finish``: they end on the old version first, while no
        other begins. ``recompute``: their keys and values are computed anew, their output so far
        stays. ``continue``: they go on with the keys and values of the old version. ``mode`` as in
        ``Weights.replace``; if that fails half-way, all requests are aborted and new ones refused
        until an update succeeds. Cached prefixes are forgotten. A prediction layer that drafts gets
        its values too, if they are among those of the source.
        """
        self._need_one_process("update_weights")
        if mode not in get_args(Mode):
            raise InvalidRequest("mode", mode, " | ".join(get_args(Mode)))
        version = version or str(next(self._versions))

        def apply() -> str:
            drafting = self._draft_state
            of_drafts = None if drafting is None else drafting.among(values)
            self._updates.replace(values, version, mode)
            if drafting is not None and of_drafts is not None:
                drafting.replace(of_drafts, version, mode)
            for sequence in (
                sequence for request in self._requests.values() for sequence in request.sequences
            ):
                sequence.change_weights(version)
            return version

        return self._updates.add(apply, policy)

    def sleep(self, level: int = 1) -> Future[None]:
        """Free the devices' memory of caches and weights; requests wait until ``wake_up``.

        ``level`` 1 keeps the weights in the host's memory. Level 2 drops them: the engine needs an
        update to serve again.
        """
        self._need_one_process("sleep")
        if level not in (1, 2):
            raise InvalidRequest(
                "level", level, "1, which keeps the weights on the host, or 2, which drops them"
            )

        def apply() -> None:
            if not self._updates.sleep_level:
                self.runner.free(CACHES)
                if self._draft_state is not None:
                    self._draft_state.sleep()
                self._expert_counts.restart()
            self._updates.sleep(level)

        return self._updates.add(apply, "recompute")

    def wake_up(self) -> Future[None]:
        """Bring back weights and caches after ``sleep``."""

        def apply() -> None:
            if self._updates.sleep_level:
                self._updates.wake_up()
                self.runner.allocate(CACHES)
                if self._draft_state is not None:
                    self._draft_state.wake_up()

        return self._updates.add(apply, "continue")

    @property
    def changes_now(self) -> bool:
        """Whether the next step is a change of weights, sleep or waking."""
        return self._updates.wait and self._updates.may_begin()

    def fail_updates(self, error: BaseException) -> None:
        """Let every waiting change fail with an error."""
        self._updates.fail(error)

    def flush(self) -> int:
        """Forget cached prefixes that no request uses; return the number of freed pages."""
        return sum(scheduler.tree.flush() for scheduler in self.schedulers)

    def step(self) -> list[Request]:
        """Dispatch a step, take the results of the one before, return requests with new output.

        Finished requests are among them, and no longer the engine's. The results of a long step are
        taken by a call of their own, before the next step is planned. The first call after a pause
        returns an empty list.
        """
        started, moved = time.perf_counter(), dict[str, Request]()
        if self._has_deadlines:
            self._end_overdue(moved)
        if self.changes_now:
            self._change(moved)
            return self._due(moved)
        self._updates.check()
        if self._changes_seen != self.weights.changes:
            self.runner.state[WEIGHTS] = programs.operands(self.weights)
            self._changes_seen = self.weights.changes
        self._pipeline.advance(moved, started)
        return self._due(moved)

    def _due(self, moved: dict[str, Request]) -> list[Request]:
        """Return the requests that have enough new tokens for a delta (``stream_interval``)."""
        interval = self.limits.stream_interval
        return [request for request in moved.values() if interval == 1 or request.is_due(interval)]

    def _change(self, moved: dict[str, Request]) -> None:
        """Apply the first waiting change, after taking the results of the step on the device."""
        self._pipeline.drain(moved)
        if not self._updates.begin():
            for request in list(self._requests.values()):
                self.abort(request.request_id)
                moved[request.request_id] = request

    def _need_one_process(self, what: str) -> None:
        if self._leader is not None:
            raise InvalidRequest(what, "an engine of several processes", "one process (nnodes 1)")

    def _append(self, sequence: Sequence, token: int, sampled: Sampled, row: int) -> None:
        """Append a sampled token to its sequence; release the sequence if that was its last."""
        sequence.num_pending -= 1
        params = sequence.params
        if sequence.pooling:
            sequence.finish(FinishReason.STOP)
        else:
            if params.best_of is not None:
                sequence.cumulative_logprob += float(sampled.logprob_B[row])
            sequence.append(
                token,
                None
                if params.logprobs is None
                else results.logprobs(sampled, row, params.logprobs),
            )
            if sequence.matcher is not None and sequence.finish_reason is None:
                if not sequence.matcher.accept(token):
                    sequence.finish(FinishReason.ABORT, "the grammar's limits")
                elif sequence.matcher.is_done:
                    sequence.finish(FinishReason.STOP)
            self._pipeline.stats.generated_tokens += 1
        if math.isnan(sequence.request.first_token_at):
            sequence.request.first_token_at = sequence.last_token_at
            self.stats.first_token.add(sequence.last_token_at - sequence.request.arrived_at)
        if sequence.finish_reason is not None:
            self._release(sequence)
            if sequence.request.finished:
                self._requests.pop(sequence.request.request_id, None)

    def _end_overdue(self, moved: dict[str, Request]) -> None:
        now = time.monotonic()
        for request in [request for request in self._requests.values() if request.deadline <= now]:
            self.abort(request.request_id, FinishReason.TIMEOUT)
            moved[request.request_id] = request
        self._has_deadlines = any(
            request.deadline < math.inf for request in self._requests.values()
        )

    def _release(self, sequence: Sequence) -> None:
        self.stats.finish(
            sequence.finish_reason or "", time.monotonic() - sequence.request.arrived_at
        )
        self.schedulers[sequence.request.copy].release(sequence)
        if self._speculation is not None:
            self._speculation.end(sequence)

    def _place(self, request: Request) -> int:
        """Return the copy of the weights with the fewest tokens left to compute."""
        if len(self.schedulers) == 1:
            return 0
        prompt = np.array(request.spec.token_ids, np.int32)
        left = [
            scheduler.load - scheduler.cached(request.spec.cache_salt, prompt)
            for scheduler in self.schedulers
        ]
        return left.index(min(left))
