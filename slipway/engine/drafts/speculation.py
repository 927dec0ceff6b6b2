"""Speculation of one engine: proposes drafts for its sequences and learns from what came true.

Not here: where drafts come from (ngram.py), how many of them pay (lengths.py).
"""

import dataclasses
from collections.abc import Sequence as Many
from typing import Protocol

import numpy as np

from slipway.engine.drafts.lengths import STALE, WEIGHT, Lengths, observed
from slipway.engine.drafts.model_drafter import ModelDrafter
from slipway.engine.request import Sequence
from slipway.engine.results import Dispatched

# Rate of acceptance before anything was observed.
FIRST_RATE = 0.6


class Drafter(Protocol):
    """Source of drafts."""

    def draft(self, sequences: Many[Sequence]) -> list[list[int]]:
        """Return drafts of the tokens that follow the newest one of each sequence."""

    def end(self, sequence: Sequence) -> None:
        """Take note that a sequence has ended."""


@dataclasses.dataclass(slots=True)
class Row:
    """Drafts of one sequence, proposed when it had ``length`` tokens, and its rate of acceptance.

    ``rate``: moving average of the probability that a draft is right if those before it were.
    """

    drafts: list[int]
    length: int
    rate: float


class Speculation:
    """Drafts of the running sequences of one engine.

    In every step, plain ones too, the drafts are compared with the tokens that followed: so the
    rate of a row is known while its drafts are not used.
    """

    def __init__(self, drafter: Drafter):
        self.lengths = Lengths()
        self._drafter = drafter
        # Set if drafts are made on the device, by a call after each step.
        self.on_device = drafter if isinstance(drafter, ModelDrafter) else None
        self._rows: dict[Sequence, Row] = {}
        self._rate = FIRST_RATE
        # How often in a row the device was not asked for drafts.
        self._unused = 0

    def pays(self, sequences: Many[Sequence], num_rows: int) -> bool:
        """Whether the next step of running sequences should verify or make drafts.

        It then needs the results of the step before. ``num_rows``: the most of them on one copy of
        the weights.
        """
        if self.on_device is not None:
            return bool(sequences) and self.num_to_draft(num_rows) > 0
        rows = [self._rows[sequence] for sequence in sequences if sequence in self._rows]
        return bool(rows) and bool(self._counts(rows).any())

    def propose(self, sequences: Many[Sequence]) -> None:
        """Set ``drafts`` of sequences that await a step: those which that step verifies."""
        self._refresh(sequences)
        rows = [self._rows[sequence] for sequence in sequences]
        for sequence, row, count in zip(sequences, rows, self._counts(rows).tolist()):
            sequence.drafts = row.drafts[:count]

    def num_to_draft(self, num_rows: int) -> int:
        """Return how many drafts the device should make for each row after a step.

        0 if drafts come from elsewhere, or do not pay.
        """
        if self.on_device is None:
            return 0
        rates = np.full(num_rows, self._rate)
        count = int(self.lengths.choose(rates, np.full(num_rows, self.on_device.most)).max())
        self._unused = 0 if count else self._unused + 1
        if self._unused > STALE:
            # Drafts that are not made cannot show that they are right more often than before.
            self._rate = max(self._rate, FIRST_RATE)
            self._unused = 0
        return count

    def put(self, sequence: Sequence, drafts: list[int] | None) -> None:
        """Keep drafts that the device made of the tokens after the newest one of a sequence."""
        if self.on_device is not None and drafts and sequence.finish_reason is None:
            self.on_device.put(sequence, drafts)

    def verified(self, sequence: Sequence, count: int, accepted: int) -> None:
        """Learn from drafts that were verified, if the host does not see them all otherwise."""
        if self.on_device is not None:
            right = [True] * accepted + [False] * (accepted < count)
            self._rate = observed(self._rate, right, [True] * len(right), weight=WEIGHT / 4)

    def observe(self, step: Dispatched, new_tokens: int, seconds: float) -> None:
        """Learn from the results of a step.

        ``new_tokens``: that its sequences got. ``seconds``: from the end of the step before to its
        own end.
        """
        if step.follows and step.only_decodes:
            rows = max(map(len, step.chunks))
            if step.rounds is not None:
                each = seconds / step.num_steps
                tokens = rows * (1 + step.num_drafts)
                self.lengths.drafted(rows, tokens, new_tokens // step.num_steps, seconds=each)
            elif step.has_drafts:
                counts = [sum(chunk.num_tokens for chunk in chunks) for chunks in step.chunks]
                self.lengths.drafted(rows, max(counts), new_tokens=new_tokens, seconds=seconds)
            else:
                self.lengths.plain(rows, step.num_steps, seconds)
        sequences = [chunk.sequence for chunks in step.chunks for chunk in chunks]
        self._refresh([s for s in sequences if s.finish_reason is None])

    def end(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        if self._rows.pop(sequence, None) is not None:
            self._drafter.end(sequence)

    def _counts(self, rows: Many[Row]) -> np.ndarray:
        rates = np.array([row.rate for row in rows])
        return self.lengths.choose(rates, np.array([len(row.drafts) for row in rows]))

    def _refresh(self, sequences: Many[Sequence]) -> None:
        """Compare the drafts of sequences with their new tokens, and draft what follows these."""
        stale = []
        for sequence in sequences:
            row = self._rows.get(sequence)
            if row is None:
                row = self._rows[sequence] = Row([], 0, self._rate)
            if row.length == sequence.num_tokens:
                continue
            if row.drafts and self.on_device is None:
                tokens = sequence.tokens[row.length : sequence.num_tokens].tolist()
                row.rate = observed(row.rate, row.drafts, tokens)
                self._rate += WEIGHT**2 * (row.rate - self._rate)
            row.length = sequence.num_tokens
            stale.append(sequence)
        for sequence, drafts in zip(stale, self._drafter.draft(stale) if stale else ()):
            self._rows[sequence].drafts = drafts
