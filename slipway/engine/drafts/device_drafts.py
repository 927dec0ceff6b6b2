"""Calls of the programs that draft on the device.

Not here: the programs (draft_program.py, rounds_program.py), the steps around them (pipeline.py),
how many drafts are wanted (lengths.py).
"""

import dataclasses
from collections.abc import Sequence as Many

import jax

from slipway.engine import batch
from slipway.engine.batch import Bucket, Builder, Sizes
from slipway.engine.drafts import draft_program, rounds_program
from slipway.engine.drafts.draft_program import DRAFT, FILL
from slipway.engine.drafts.rounds_program import ROUNDS, RoundsOutput
from slipway.engine.scheduler import Chunk, Scheduler
from slipway.ops import StepInput
from slipway.runtime.runner import Runner


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Rounds of speculation in one call: the buckets, smallest first, and the largest numbers.

    Each bucket has as many tokens for each row as one and ``max_drafts``. There are several, as
    padding costs time: nano alone in 32 rows drafts 0.7 times as fast as in 2 (docs/log.md).
    """

    buckets: tuple[Bucket, ...]
    max_rounds: int
    max_drafts: int


class DeviceDrafts:
    """Calls that draft, for the steps of one replica."""

    def __init__(
        self,
        runner: Runner,
        schedulers: Many[Scheduler],
        builders: Many[Builder],
        *,
        sizes: Sizes,
        rounds: Rounds,
    ):
        self._runner = runner
        self._schedulers = schedulers
        self._builders = builders
        self._sizes = sizes
        self._rounds = rounds

    def after(
        self, chunks: list[list[Chunk]], step: StepInput, bucket: Bucket, count: int
    ) -> jax.Array | None:
        """Let the device draft ``count`` tokens after each row of a step; return the drafts.

        A step with a part of a prompt needs the call for the caches of the draft model, even if no
        drafts are wanted; other steps without drafts return None.
        """
        if not count and all(chunk.decodes for rank in chunks for chunk in rank):
            return None
        size = self._sizes.page_size
        inputs = [
            draft_program.build_input(rank, builder, bucket, page_size=size, num_steps=count)
            for rank, builder in zip(chunks, self._builders)
        ]
        found = self._runner.call(DRAFT if count else FILL, bucket, step, batch.join(inputs))
        return found[0] if count else None

    def num_rounds(self, chunks: list[list[Chunk]], count: int, most: int | None = None) -> int:
        """Return how many rounds with ``count`` drafts of each row may be one call, up to ``most``.

        0 if a chunk does anything but decode; if the logits of a row depend on the tokens before
        (penalties, grammars); if a sequence waits; or if too few pages are free.
        """
        rounds = self._rounds
        if not count or max(map(len, chunks)) > rounds.buckets[-1].num_rows:
            return 0
        if not all(chunk.decodes for rank in chunks for chunk in rank):
            return 0
        if any(chunk.sequence.request.rules is not None for rank in chunks for chunk in rank):
            return 0
        longest = max(
            c.sequence.max_length - c.sequence.num_tokens for rank in chunks for c in rank
        )
        number = min(rounds.max_rounds, longest, most or rounds.max_rounds)
        fits = [
            scheduler.can_extend(rank, number * (1 + count))
            for scheduler, rank in zip(self._schedulers, chunks)
        ]
        return number if all(fits) else 0

    def start(
        self, chunks: list[list[Chunk]], num_rounds: int, count: int
    ) -> tuple[Bucket, RoundsOutput]:
        """Start a call of rounds; return its bucket and the results to come."""
        rounds, inputs = self._rounds, []
        rows = max(map(len, chunks))
        bucket = next(each for each in rounds.buckets if each.num_rows >= rows)
        for scheduler, rank, builder in zip(self._schedulers, chunks, self._builders):
            scheduler.extend(rank, num_rounds * (1 + count))
            inputs.append(
                rounds_program.build_input(
                    rank,
                    builder,
                    rounds_program.empty_input(bucket, self._sizes, rounds.max_drafts),
                    page_size=self._sizes.page_size,
                    num_rounds=num_rounds,
                    num_steps=count,
                )
            )
        (output,) = self._runner.call(ROUNDS, bucket, batch.join(inputs))
        return bucket, output
