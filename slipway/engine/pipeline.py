"""Pipeline of steps: schedule, build, dispatch, and take the results of the step before.

Not here: which sequences run (scheduler.py), the life of requests (engine.py), the programs (programs.py).

While the device computes a step, the host schedules, builds and dispatches the next one, then reads the results of the
first.
"""

import time
from collections import Counter
from collections.abc import Callable

import jax
import numpy as np

from slipway.engine import batch, logit_rules, results
from slipway.engine.batch import Bucket, Repeat, Sizes
from slipway.engine.programs import FORWARD, REPEAT, SAMPLE
from slipway.engine.request import Request, Sequence
from slipway.engine.results import Dispatched
from slipway.engine.sample import Sampled
from slipway.engine.scheduler import Chunk, Scheduler
from slipway.engine.stats import Stats
from slipway.runtime.runner import Runner

LONG = 100  # times the host's work: the host waits for such a step before it plans the next
LONG_AT_AN_END = 10  # the same for a step that ends an output: its place is free, and often the next request comes
Append = Callable[[Sequence, int, Sampled, int], None]


class Pipeline:
    """Steps of one replica: at most one is on the device with results that the host has not taken.

    ``append(sequence, token, sampled, row)`` is called for each token that a step found; ``row`` is its row of
    ``sampled``. It may end the sequence.
    """

    def __init__(
        self, runner: Runner, schedulers: list[Scheduler], append: Append, *, shapes: list[Bucket],
        repeats: Repeat | None, sizes: Sizes,
    ):  # fmt: skip
        self._runner = runner
        self._schedulers = schedulers
        self._append = append
        self._shapes = shapes
        self._repeats = repeats
        self.stats = Stats()
        self._builders = [batch.Builder(sizes, scheduler.page_tables) for scheduler in schedulers]
        self._dispatched: Dispatched | None = None
        self._host_s = 0.0  # of a step, on average
        self._taken_at = 0.0  # when the last results came
        self._early = (0.0, 0.0)  # seconds of the host and of waiting, of a step taken by a call of its own
        self._seconds: dict[tuple[Bucket, int], float] = {}  # how long the last call of each shape and length took

    def advance(self, moved: dict[str, Request], started: float) -> None:
        """Dispatch a step and take the one before; add the requests with new tokens to ``moved``.

        A step that takes long is taken by a call of its own, before the next is planned: a request that arrives during
        it, or on its results, is in time for the next. ``started``: when the host began to work, in seconds of
        time.perf_counter().
        """
        before, self._dispatched = self._dispatched, None
        if before is not None and self._is_long(before):
            waited = self._take(before, moved)
            self._early = (time.perf_counter() - started - waited, waited)
            return
        waited = self._dispatch(before, moved)
        host_s = time.perf_counter() - started - waited + self._early[0]
        self._host_s += (host_s - self._host_s) / 16
        self.stats.step(host_s, waited + self._early[1])
        self._early = (0.0, 0.0)

    def drain(self, moved: dict[str, Request]) -> None:
        """Take the step that is on the device, if there is one."""
        before, self._dispatched = self._dispatched, None
        if before is not None:
            self._take(before, moved)

    def forget(self) -> None:
        """Drop the results of the step that is on the device."""
        self._dispatched = None

    def _dispatch(self, before: Dispatched | None, moved: dict[str, Request]) -> float:
        """Start what can run next and take the step before; return the seconds spent waiting for that."""
        waited = 0.0
        chunks = [scheduler.schedule() for scheduler in self._schedulers]
        if any(chunks):
            bucket, num_steps = self._shape(chunks)
            built = batch.join([builder.build(rank, bucket) for builder, rank in zip(self._builders, chunks)])
            if num_steps > 1:
                x_TD, steps = None, np.full(len(chunks), num_steps, np.int32)
                (sampled,) = self._runner.call(REPEAT, bucket, built.step, built.sampling, steps)
            else:
                (x_TD,) = self._runner.call(FORWARD, bucket, built.step)
                edits = None
                if rows := logit_rules.edited(chunks, bucket.num_rows):
                    if before is not None:  # what these rows may say next depends on what they said last
                        waited += self._take(before, moved)
                        before = None
                    _, unedited = self._runner.inputs(SAMPLE, bucket.num_rows)
                    edits = logit_rules.build(unedited, rows)
                (sampled,) = self._runner.call(SAMPLE, bucket.num_rows, built.sampling, edits)
            self._dispatched = Dispatched(chunks, bucket, num_steps, sampled, x_TD, time.perf_counter())
            self._count(chunks)
        if before is not None:
            waited += self._take(before, moved)
        return waited

    def _shape(self, chunks: list[list[Chunk]]) -> tuple[Bucket, int]:
        """Return the bucket of the next step, and how many steps go in one call: several where all only decode."""
        bucket, repeats = batch.choose(self._shapes, chunks), self._repeats
        if repeats is None or bucket.num_tokens > repeats.bucket.num_tokens:
            return bucket, 1
        each = list(zip(self._schedulers, chunks))
        more = min(scheduler.spare_steps(rank, repeats.num_steps - 1) for scheduler, rank in each)
        if not more:
            return bucket, 1
        for scheduler, rank in each:
            scheduler.repeat(rank, more)
        return repeats.bucket, 1 + more

    def _count(self, chunks: list[list[Chunk]]) -> None:
        """Count a step that was dispatched, and how long its new sequences had waited."""
        self.stats.steps += 1
        for sequence in (chunk.sequence for rank in chunks for chunk in rank if chunk.sequence.first_run):
            self.stats.queue.add(time.monotonic() - sequence.request.arrived_at)
            sequence.first_run = False

    def _take(self, step: Dispatched, moved: dict[str, Request]) -> float:
        """Give the sequences what a step found; return the seconds that the results took to come."""
        started = time.perf_counter()
        asked = [chunk.sequence for rank in step.chunks for chunk in rank]
        sampled = step.sampled
        if any(sequence.wants_logprobs for sequence in asked):
            sampled = jax.tree.map(np.asarray, sampled)
        tokens = np.asarray(sampled.token_B).tolist()
        x_TD = np.asarray(step.x_TD, np.float32) if any(s.request.spec.pooling for s in asked) else None
        ended = time.perf_counter()
        self._seconds[step.shape] = ended - max(step.at, self._taken_at)
        self._taken_at = ended
        now, gaps = time.monotonic(), Counter[float]()
        for rank, chunks in enumerate(step.chunks):
            row, first_token = rank * step.bucket.num_rows, rank * step.bucket.num_tokens
            for chunk in chunks:
                sequence = chunk.sequence
                if sequence.finish_reason is None:
                    if chunk.scored:
                        results.score(sequence.request, sampled, row, chunk=chunk)
                    if x_TD is not None and sequence.request.spec.pooling:
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
                row, first_token = row + chunk.num_rows, first_token + chunk.num_tokens
        for at, times in gaps.items():
            if at:
                self.stats.inter_token.add(now - at, times)
        return ended - started

    def _is_long(self, step: Dispatched) -> bool:
        """Whether a step takes so much longer than the host's work that no new request should wait for two.

        What is dispatched ahead is decided ahead. On a CPU a prefill of 512 tokens may take 0.7 s, the host 2 ms.
        """
        times = self._seconds.get(step.shape, 0.0) / max(self._host_s, 1e-9)
        if not LONG_AT_AN_END < times <= LONG:
            return times > LONG
        return any(c.sequence.length >= c.sequence.max_length for rank in step.chunks for c in rank)
