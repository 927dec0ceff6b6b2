"""Speculation of one engine: proposes drafts for its sequences and learns from what came true.

Not here: where drafts come from (ngram.py), how many of them pay (lengths.py).
"""

import dataclasses
import time
from collections.abc import Sequence as Many
from typing import Protocol

import numpy as np

from slipway.engine.drafts.lengths import STALE, WEIGHT, Lengths, chances, observe
from slipway.engine.drafts.model_drafter import ModelDrafter
from slipway.engine.request import Sequence
from slipway.engine.results import Dispatched

# Rate of acceptance of a model's drafts before anything was observed.
FIRST_RATE = 0.6
# Rates of acceptance are known by basis, up to this one.
MAX_BASIS = 32
# Most rounds of a call while the time of a round is not known.
TRIAL_ROUNDS = 4
# While no drafts are verified, looking them up takes at most this share of the time.
HOST_SHARE = 0.01


class Drafter(Protocol):
    """Source of drafts."""

    def draft(self, sequences: Many[Sequence]) -> list[tuple[list[int], int]]:
        """Return drafts of the tokens that follow the newest one of each sequence, and their basis.

        The basis is a number from 0 to MAX_BASIS: a draft is right more often on a larger one. If a
        draft is right, the next one's is larger by 1.
        """

    def end(self, sequence: Sequence) -> None:
        """Take note that a sequence has ended."""


@dataclasses.dataclass(slots=True)
class Row:
    """Drafts of one sequence, proposed when it had ``length`` tokens, and its rates of acceptance.

    ``rates``: by basis, moving averages of the probability that a draft is right if those before it
    were.
    """

    drafts: list[int]
    basis: int
    length: int
    rates: np.ndarray


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
        # By basis, over all sequences; before anything was observed, those of a model are equal.
        basis = np.arange(MAX_BASIS + 1)
        self._first_rates = (
            basis / (basis + 2) if self.on_device is None else basis * 0 + FIRST_RATE
        )
        self._rates = self._first_rates.copy()
        # How often in a row the device was not asked for drafts.
        self._unused = 0
        # Whether any drafts were chosen last, and whether there are other drafts since.
        self._chosen = False
        self._is_new = False
        # Seconds that the host took to look drafts up last, and seconds of the steps since then.
        self._cost_s = 0.0
        self._since_s = 0.0

    def pays(self, sequences: Many[Sequence], num_rows: int) -> bool:
        """Whether the next step of running sequences should verify or make drafts.

        It then needs the results of the step before. ``num_rows``: the most of them on one copy of
        the weights.
        """
        if self.on_device is not None:
            return bool(sequences) and self.num_to_draft(sequences, num_rows) > 0
        if self._is_new:
            self.lengths.has_rules = _have_rules(sequences)
            self._counts([self._rows[sequence] for sequence in sequences if sequence in self._rows])
        return self._chosen

    def propose(self, sequences: Many[Sequence]) -> None:
        """Set ``drafts`` of sequences that await a step: those which that step verifies."""
        self._refresh(sequences)
        self.lengths.has_rules = _have_rules(sequences)
        rows = [self._rows[sequence] for sequence in sequences]
        for sequence, row, count in zip(sequences, rows, self._counts(rows).tolist()):
            sequence.drafts = row.drafts[:count]

    def num_to_draft(self, sequences: Many[Sequence], num_rows: int) -> int:
        """Return how many drafts the device should make for each row after a step.

        0 if drafts come from elsewhere, or do not pay. ``sequences``: those of the step;
        ``num_rows``: the most of them on one copy of the weights.
        """
        if self.on_device is None:
            return 0
        self.lengths.has_rules = _have_rules(sequences)
        most = np.full(num_rows, self.on_device.most)
        rates_RK = np.broadcast_to(self._rates, (num_rows, len(self._rates)))
        found = self.lengths.choose(chances(rates_RK, np.zeros(num_rows, np.int64), most), most)
        count = int(found.max())
        self._unused = 0 if count else self._unused + 1
        if self._unused > STALE:
            # Drafts that are not made cannot show that they are right more often than before.
            self._rates = np.maximum(self._rates, self._first_rates)
            self._unused = 0
        return count

    def most_rounds(self, num_tokens: int) -> int | None:
        """Return the most rounds of a call on the device, None for any number.

        ``num_tokens``: that a round verifies. A call that measures its time is short.
        """
        return None if self.lengths.knows(num_tokens) else TRIAL_ROUNDS

    def put(self, sequence: Sequence, drafts: list[int] | None) -> None:
        """Keep drafts that the device made of the tokens after the newest one of a sequence."""
        if self.on_device is not None and drafts and sequence.finish_reason is None:
            self.on_device.put(sequence, drafts)

    def verified(self, sequence: Sequence, count: int, accepted: int) -> None:
        """Learn from drafts that were verified, if the host does not see them all otherwise."""
        if self.on_device is not None:
            right = [True] * accepted + [False] * (accepted < count)
            observe(self._rates, 0, right, tokens=[True] * len(right), weight=WEIGHT / 4)

    def observe(self, step: Dispatched, new_tokens: int, seconds: float) -> None:
        """Learn from the results of a step.

        ``new_tokens``: that its sequences got. ``seconds``: from the end of the step before to its
        own end.
        """
        sequences = [chunk.sequence for chunks in step.chunks for chunk in chunks]
        if step.follows and step.only_decodes:
            self.lengths.has_rules = _have_rules(sequences)
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
        self._since_s += seconds
        if self._chosen or self._since_s * HOST_SHARE >= self._cost_s:
            started = time.perf_counter()
            self._refresh([s for s in sequences if s.finish_reason is None])
            self._cost_s = time.perf_counter() - started
            self._since_s = 0.0

    def end(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        if self._rows.pop(sequence, None) is not None:
            self._drafter.end(sequence)

    def _counts(self, rows: Many[Row]) -> np.ndarray:
        most = np.array([len(row.drafts) for row in rows])
        found = most
        if most.any():
            basis = np.array([row.basis for row in rows])
            rates_RB = np.array([row.rates for row in rows])
            found = self.lengths.choose(chances(rates_RB, basis, most), most)
        self._chosen = bool(found.any())
        self._is_new = False
        return found

    def _refresh(self, sequences: Many[Sequence]) -> None:
        """Compare the drafts of sequences with their new tokens, and draft what follows these."""
        stale = []
        self._is_new = True
        for sequence in sequences:
            row = self._rows.get(sequence)
            if row is None:
                row = self._rows[sequence] = Row([], 0, 0, rates=self._rates.copy())
            if row.length == sequence.num_tokens:
                continue
            if row.drafts and self.on_device is None:
                tokens = sequence.tokens[row.length : sequence.num_tokens].tolist()
                observe(row.rates, row.basis, row.drafts, tokens=tokens)
                observe(self._rates, row.basis, row.drafts, tokens=tokens, weight=WEIGHT / 4)
            row.length = sequence.num_tokens
            stale.append(sequence)
        for sequence, found in zip(stale, self._drafter.draft(stale) if stale else ()):
            row = self._rows[sequence]
            row.drafts, row.basis = found


def _have_rules(sequences: Many[Sequence]) -> bool:
    return any(sequence.request.rules is not None for sequence in sequences)
