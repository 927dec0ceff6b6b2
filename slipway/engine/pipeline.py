"""Pipeline of steps: schedule, build, dispatch, and take the results of the step before.

Not here: which sequences run (scheduler.py), the life of requests (engine.py), the programs
(programs.py).

While the device computes a step, the host schedules, builds and dispatches the next one, then reads
the results of the first.
"""

import functools
import logging
import time
from collections import Counter
from collections.abc import Sequence as Many
from typing import Protocol

import numpy as np

from slipway.engine import batch, logit_rules, results
from slipway.engine.batch import Bucket, Repeat, Sizes
from slipway.engine.drafts.device_drafts import DeviceDrafts, Rounds
from slipway.engine.drafts.speculation import Speculation
from slipway.engine.programs import FORWARD, REPEAT, SAMPLE
from slipway.engine.request import DraftCounts, Request, Sequence
from slipway.engine.results import Dispatched, Taken
from slipway.engine.sample import Sampled
from slipway.engine.scheduler import Chunk, Scheduler
from slipway.engine.stats import Stats
from slipway.runtime.runner import Runner

logger = logging.getLogger(__name__)

# Least time between two log lines about the acceptance of drafts.
LOG_INTERVAL_S = 10.0
# A step is long if it takes more than LONG times the host's work: the host then waits for its
# results before it plans the next step.
LONG = 100
# The same bound for a step that ends an output: that frees a slot, and often the caller then sends
# its next request.
LONG_AT_AN_END = 10


class Append(Protocol):
    """Function that the pipeline calls for each token that a step sampled."""

    def __call__(self, sequence: Sequence, token: int, sampled: Sampled, row: int) -> None:
        """Append ``token``, from row ``row`` of ``sampled``, to a sequence, which may end it."""


class Pipeline:
    """Steps of one replica, at most one of them with results that the host has not taken yet."""

    def __init__(
        self,
        runner: Runner,
        schedulers: list[Scheduler],
        append: Append,
        *,
        shapes: list[Bucket],
        repeats: Repeat | None,
        sizes: Sizes,
        speculation: Speculation | None = None,
        rounds: Rounds | None = None,
    ):
        self._runner = runner
        self._schedulers = schedulers
        self._append = append
        self._shapes = shapes
        self._repeats = repeats
        self._speculation = speculation
        self.stats = Stats()
        self._builders = [batch.Builder(sizes, scheduler.page_tables) for scheduler in schedulers]
        # Set if drafts are made on the device.
        self._device_drafts = None
        if rounds is not None:
            self._device_drafts = DeviceDrafts(
                runner, schedulers, self._builders, sizes=sizes, rounds=rounds
            )
        self._dispatched: Dispatched | None = None
        # Moving average of the host's work for a step, in seconds.
        self._host_s = 0.0
        # When the last results arrived, in seconds of time.perf_counter().
        self._taken_at = 0.0
        # Seconds of (host's work, waiting) of the last call, if it took the results of a long step.
        self._early = (0.0, 0.0)
        # Seconds that the last device call of each bucket and number of steps took.
        self._seconds: dict[tuple[Bucket, int], float] = {}
        # When the acceptance of drafts was last logged, in seconds of time.perf_counter().
        self._logged_at = 0.0

    def advance(self, moved: dict[str, Request], started: float) -> None:
        """Dispatch a step and take the results of the one before.

        Requests with new tokens are added to ``moved``. If the step before is long, its results are
        taken and nothing is dispatched: the next call plans the next step, so a request that
        arrives meanwhile can still be part of it. ``started``: when the host's work for this step
        began, in seconds of time.perf_counter().
        """
        before = self._dispatched
        self._dispatched = None
        if before is not None and self._is_long(before):
            waited = self._take(before, moved)
            self._early = (time.perf_counter() - started - waited, waited)
            return
        follows = before is not None or self._early != (0.0, 0.0)
        waited = self._dispatch(before, moved, follows)
        host_s = time.perf_counter() - started - waited + self._early[0]
        self._host_s += (host_s - self._host_s) / 16
        self.stats.step(host_s, waited + self._early[1])
        self._early = (0.0, 0.0)

    def drain(self, moved: dict[str, Request]) -> None:
        """Take the results of the step that is on the device, if there is one."""
        before = self._dispatched
        self._dispatched = None
        if before is not None:
            self._take(before, moved)

    def forget(self) -> None:
        """Drop the results of the step that is on the device."""
        self._dispatched = None

    def _dispatch(
        self, before: Dispatched | None, moved: dict[str, Request], follows: bool
    ) -> float:
        """Schedule and start the next step, if any sequence can run, and take the one before.

        ``follows``: as in Dispatched. Returns the seconds spent waiting for results.
        """
        waited, count = 0.0, 0
        if before is not None and self._needs_results(before):
            waited = self._take(before, moved)
            before = None
        if before is None and self._speculation is not None:
            self._speculation.propose([s for s in self._running() if s.awaits_a_step])
        chunks = [scheduler.schedule() for scheduler in self._schedulers]
        if any(chunks):
            dispatched = None
            if before is None and self._speculation is not None:
                # Rounds begin with the newest tokens, which the host must have.
                sequences = [chunk.sequence for rank in chunks for chunk in rank]
                count = self._speculation.num_to_draft(sequences, max(map(len, chunks)))
                dispatched = self._rounds(chunks, count, follows)
            if dispatched is None:
                dispatched, waited_here, before = self._step(
                    chunks, before, moved, follows=follows, count=count
                )
                waited += waited_here
            self._dispatched = dispatched
            self._count(chunks)
        if before is not None:
            waited += self._take(before, moved)
        return waited

    def _step(
        self,
        chunks: list[list[Chunk]],
        before: Dispatched | None,
        moved: dict[str, Request],
        *,
        follows: bool,
        count: int,
    ) -> tuple[Dispatched, float, Dispatched | None]:
        """Start a step, or several decode steps in one call.

        ``count``: the drafts that the device makes for each row after it. Returns the step, the
        seconds spent waiting for results, and the step before if its results were not taken yet.
        """
        waited = 0.0
        bucket, num_steps = self._shape(chunks, allows_several=not count)
        built = batch.join(
            [builder.build(rank, bucket) for builder, rank in zip(self._builders, chunks)]
        )
        started = functools.partial(Dispatched, chunks, bucket, num_steps, follows=follows)
        if num_steps > 1:
            steps = np.full(len(chunks), num_steps, np.int32)
            (sampled,) = self._runner.call(REPEAT, bucket, built.step, built.sampling, steps)
            return started(sampled, at=time.perf_counter()), waited, before
        (x_TD,) = self._runner.call(FORWARD, bucket, built.step)
        edits = None
        if rows := logit_rules.edited(chunks, bucket.num_rows):
            # The logits of these rows depend on the tokens that the step before sampled.
            if before is not None:
                waited = self._take(before, moved)
                before = None
            _, unedited = self._runner.inputs(SAMPLE, bucket.num_rows)
            edits = logit_rules.build(unedited, rows)
        (sampled,) = self._runner.call(SAMPLE, bucket.num_rows, built.sampling, edits)
        drafts_BK = None
        if self._device_drafts is not None:
            drafts_BK = self._device_drafts.after(chunks, built.step, bucket, count=count)
        step = started(
            sampled, x_TD=x_TD, drafts_BK=drafts_BK, num_drafts=count, at=time.perf_counter()
        )
        return step, waited, before

    def _rounds(self, chunks: list[list[Chunk]], count: int, follows: bool) -> Dispatched | None:
        """Start rounds of speculation, if the device drafts and all sequences only decode.

        ``count``: drafts of each row in a round.
        """
        if self._device_drafts is None or self._speculation is None:
            return None
        most = self._speculation.most_rounds(max(map(len, chunks)) * (1 + count))
        number = self._device_drafts.num_rounds(chunks, count, most)
        if not number:
            return None
        bucket, output = self._device_drafts.start(chunks, number, count)
        return Dispatched(
            chunks,
            bucket,
            number,
            sampled=output.sampled,
            at=time.perf_counter(),
            follows=follows,
            rounds=output,
            drafts_BK=output.drafts_BK,
            num_drafts=count,
        )

    def _needs_results(self, before: Dispatched) -> bool:
        """Whether the results of the step before decide which tokens the next step computes."""
        if self._speculation is None:
            return False
        rows = max(len(scheduler.running) for scheduler in self._schedulers)
        return before.has_drafts or self._speculation.pays(self._running(), rows)

    def _running(self) -> list[Sequence]:
        return [s for scheduler in self._schedulers for s in scheduler.running]

    def _shape(self, chunks: list[list[Chunk]], *, allows_several: bool) -> tuple[Bucket, int]:
        """Return the bucket of the next step and the number of steps in its call.

        Several if all sequences only decode, and if that is allowed.
        """
        bucket, repeats = batch.choose(self._shapes, chunks), self._repeats
        if not allows_several or repeats is None or bucket.num_tokens > repeats.bucket.num_tokens:
            return bucket, 1
        each = list(zip(self._schedulers, chunks))
        more = min(scheduler.spare_steps(rank, repeats.num_steps - 1) for scheduler, rank in each)
        if not more:
            return bucket, 1
        for scheduler, rank in each:
            scheduler.repeat(rank, more)
        return repeats.bucket, 1 + more

    def _count(self, chunks: list[list[Chunk]]) -> None:
        """Count a dispatched step, and the queueing time of the sequences that run first in it."""
        self.stats.steps += 1
        for sequence in (
            chunk.sequence for rank in chunks for chunk in rank if chunk.sequence.first_run
        ):
            self.stats.queue.add(time.monotonic() - sequence.request.arrived_at)
            sequence.first_run = False

    def _take(self, step: Dispatched, moved: dict[str, Request]) -> float:
        """Give the sequences the results of a step; return the seconds spent waiting for them."""
        started = time.perf_counter()
        taken = Taken(step)
        ended = time.perf_counter()
        self._seconds[step.shape] = ended - max(step.at, self._taken_at)
        cycle_s = ended - self._taken_at
        self._taken_at = ended
        now, gaps = time.monotonic(), Counter[float]()
        for rank, chunks in enumerate(step.chunks):
            row, first_token = rank * step.bucket.num_rows, rank * step.bucket.num_tokens
            for index, chunk in enumerate(chunks):
                sequence = chunk.sequence
                if sequence.finish_reason is None:
                    if chunk.scored:
                        results.score(sequence.request, taken.sampled, row, chunk=chunk)
                    if taken.x_TD is not None and sequence.pooling:
                        x_CD = taken.x_TD[first_token : first_token + chunk.num_tokens]
                        results.pool(sequence, x_CD, chunk)
                    if chunk.samples:
                        moved[sequence.request.request_id] = sequence.request
                    rows, verified = taken.of(rank, index, row)
                    if step.has_drafts and chunk.samples:
                        self._settle(chunk, len(rows), verified)
                    for found in rows:
                        # Counted by time: nearly all sequences share one value.
                        gaps[sequence.last_token_at] += 1
                        sequence.last_token_at = now
                        self._append(
                            sequence, taken.tokens[found], sampled=taken.sampled, row=found
                        )
                        # Tokens of the same call after the end of the output are dropped.
                        if sequence.finish_reason is not None:
                            break
                    if self._speculation is not None and chunk.samples:
                        self._speculation.put(sequence, taken.drafts(rank, index))
                row += chunk.num_rows
                first_token += chunk.num_tokens
        for at, times in gaps.items():
            if at:
                self.stats.inter_token.add(now - at, times)
        if self._speculation is not None:
            self._speculation.observe(step, gaps.total(), cycle_s)
            if step.has_drafts and ended - self._logged_at > LOG_INTERVAL_S:
                self._logged_at = ended
                self._log_acceptance()
        return ended - started

    def _log_acceptance(self) -> None:
        """Log how many drafts were accepted since the statistics began."""
        stats = self.stats
        logger.info(
            "speculation: acceptance length %.2f, %d of %d drafts accepted in %d verifications",
            stats.acceptance_length,
            stats.spec_decode_num_accepted_tokens,
            stats.spec_decode_num_draft_tokens,
            stats.spec_decode_num_drafts,
        )

    def _settle(self, chunk: Chunk, new_tokens: int, verified: Many[tuple[int, int]]) -> None:
        """Take back what a sequence computed for rejected drafts, and count the accepted ones.

        ``new_tokens``: that it gets.
        """
        sequence = chunk.sequence
        computed = chunk.start + chunk.num_tokens - 1 - len(chunk.drafts) + new_tokens
        self._schedulers[sequence.request.copy].reject(sequence, sequence.num_computed - computed)
        sequence.num_pending += new_tokens - 1
        for count, accepted in verified:
            sequence.draft_counts = sequence.draft_counts.plus(DraftCounts(1, count, accepted))
            self.stats.verify(count, accepted)
            if self._speculation is not None:
                self._speculation.verified(sequence, count, accepted)

    def _is_long(self, step: Dispatched) -> bool:
        """Whether the host should wait for a step before it plans the next one.

        A request that arrives while a step runs cannot join the next step if that was dispatched
        ahead, so it waits for two. Where a step takes far longer than the host's work, dispatching
        ahead gains too little for that: on a CPU a prefill of 512 tokens may take 0.7 s, the host's
        work 2 ms.
        """
        times = self._seconds.get(step.shape, 0.0) / max(self._host_s, 1e-9)
        if not LONG_AT_AN_END < times <= LONG:
            return times > LONG
        return any(c.sequence.length >= c.sequence.max_length for rank in step.chunks for c in rank)
