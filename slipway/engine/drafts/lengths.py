"""Number of drafts that a step verifies, chosen from acceptance and measured times of steps.

Not here: the drafts (speculation.py and its drafters).

Drafts cost time: a step that verifies n tokens takes longer than one that decodes. They pay if the
expected tokens per second of a sequence in such a step exceed those in a step, or in a call of
several steps, without drafts; of several sequences, the geometric mean counts. All three numbers
are measured while the engine runs.
"""

import dataclasses
from collections.abc import Sequence as Many

import numpy as np

# Weight of a new value in the moving averages.
WEIGHT = 1 / 8
# Weight of a time that is shorter than the average: on a shared host the shorter times are those of
# the step, the longer ones have pauses in them.
WEIGHT_OF_SHORTER = 1 / 2
# A draft is verified if the product of the rates up to it is at least one of these numbers: the
# candidates among which ``choose`` finds the best.
LEAST_CHANCES = np.array([0.9, 0.75, 0.6, 0.45, 0.3, 0.2, 0.1])
# Drafts must promise this gain over a plain step before they are used.
MARGIN = 1.05
# Calls after which a time is measured again, as load and lengths of sequences change.
STALE = 400
# Calls that measure a time before it is used: the first of several plain calls does not overlap
# with the host's work for the call before.
CALLS = 3
# Numbers of drafts that were never tried are tried while all such trials together have cost at most
# this share of the time, and the time of a few plain steps.
TRIAL_SHARE = 0.01
TRIAL_STEPS = 5


@dataclasses.dataclass
class Time:
    """Moving average of the seconds of a call: with how many tokens, how often and when measured.

    ``at``: the number of the last call.
    """

    num_tokens: int
    seconds: float
    count: int
    at: int


class Lengths:
    """Times of steps, with and without drafts, and the choice between them.

    ``has_rules``: whether a row of the steps in question has rules for its logits. Such steps need
    the host after each, and have times of their own.
    """

    def __init__(self) -> None:
        self.has_rules = False
        self._calls = 0
        # By size class of the number of rows: seconds for one token of each row, without drafts;
        # by size class of the number of tokens: seconds of a step that verifies drafts.
        self._times: dict[bool, tuple[dict[int, Time], dict[int, Time]]] = {
            False: ({}, {}),
            True: ({}, {}),
        }
        # Plain calls left that measure their time.
        self._measuring = 0
        # Seconds of all calls, and those that trials lost against plain steps.
        self._total = 0.0
        self._lost = 0.0

    @property
    def _plain(self) -> dict[int, Time]:
        return self._times[self.has_rules][0]

    @property
    def _drafted(self) -> dict[int, Time]:
        return self._times[self.has_rules][1]

    def knows(self, num_tokens: int) -> bool:
        """Whether the time of a step that verifies so many tokens is known."""
        return self._fresh(self._drafted, num_tokens) is not None

    def plain(self, rows: int, num_steps: int, seconds: float) -> None:
        """Add the time of a call of ``num_steps`` steps without drafts.

        ``seconds``: from the end of the call before to its own end.
        """
        self._calls += 1
        self._total += seconds
        self._measuring = max(0, self._measuring - 1)
        self._add(self._plain, rows, seconds / num_steps)

    def drafted(self, rows: int, num_tokens: int, new_tokens: int, seconds: float) -> None:
        """Add the time of a step that verified drafts.

        ``num_tokens``: that it computed, drafts included; ``new_tokens``: that the rows got.
        """
        self._calls += 1
        self._total += seconds
        plain = self._fresh(self._plain, rows)
        if plain is not None and self._fresh(self._drafted, num_tokens) is None:
            self._lost += max(0.0, seconds - plain * new_tokens / rows)
        self._add(self._drafted, num_tokens, seconds)

    def choose(self, chances_RK: np.ndarray, most: np.ndarray) -> np.ndarray:
        """Return the number of drafts of each row that the next step verifies.

        ``chances_RK``: of each draft, the probability that it and those before it are right; 0 for
        none. ``most``: the number of drafts that each row has.
        """
        rows = len(chances_RK)
        none = np.zeros(rows, np.int64)
        plain = self._fresh(self._plain, rows)
        if plain is None and not self._measuring:
            self._measuring = CALLS
        if plain is None or self._measuring or not most.any():
            return none
        best, best_rate = none, MARGIN / plain
        # For each of the least chances: the drafts that have it, and the tokens to expect.
        verified_CRK = chances_RK[None] >= LEAST_CHANCES[:, None, None]
        counts_CR = verified_CRK.sum(axis=2)
        expected_CR = 1 + (verified_CRK * chances_RK[None]).sum(axis=2)
        # The geometric mean: drafts of some rows hold up the others.
        expected_C = np.exp(np.log(expected_CR).mean(axis=1)).tolist()
        for at, num_drafts in enumerate(counts_CR.sum(axis=1).tolist()):
            seconds = self._seconds(rows + num_drafts, rows, plain)
            if num_drafts and expected_C[at] / seconds > best_rate:
                best, best_rate = counts_CR[at], expected_C[at] / seconds
        return best

    def _seconds(self, num_tokens: int, rows: int, plain: float) -> float:
        """Return the seconds of a step that verifies drafts: measured, or estimated.

        A step that may be tried is taken to cost as much as a plain one, or as one that verifies
        fewer drafts. Otherwise seconds are interpolated between those that are known, and grow in
        proportion beyond these.
        """
        known = self._fresh(self._drafted, num_tokens)
        if known is not None:
            return known
        if self._lost <= TRIAL_SHARE * self._total + TRIAL_STEPS * plain:
            smaller = [t for t in self._drafted.values() if t.num_tokens < num_tokens]
            fresh = [self._fresh(self._drafted, each.num_tokens) for each in smaller]
            return max([plain, *(seconds for seconds in fresh if seconds is not None)])
        points = {rows: plain}
        for time in self._drafted.values():
            if time.num_tokens > rows and time.count >= CALLS:
                points[time.num_tokens] = time.seconds
        last = max(points)
        points[1000 * last] = 1000 * points[last]
        sizes = sorted(points)
        return float(np.interp(num_tokens, sizes, [points[size] for size in sizes]))

    def _add(self, times: dict[int, Time], num_tokens: int, seconds: float) -> None:
        size = _size_class(num_tokens)
        held = times.get(size)
        if held is None or self._calls - held.at > STALE:
            times[size] = Time(num_tokens, seconds, count=1, at=self._calls)
            return
        if held.count == 1:
            # The first call of a program takes longer.
            held.seconds = seconds
        shorter = seconds < held.seconds
        # A long pause of the host must not count for many calls.
        change = min(seconds, 3 * held.seconds) - held.seconds
        held.seconds += (WEIGHT_OF_SHORTER if shorter else WEIGHT) * change
        held.num_tokens = num_tokens
        held.count += 1
        held.at = self._calls

    def _fresh(self, times: dict[int, Time], num_tokens: int) -> float | None:
        """Return the seconds of a number of tokens, None if they are to be measured."""
        held = times.get(_size_class(num_tokens))
        if held is None or held.count < CALLS or self._calls - held.at > STALE:
            return None
        return held.seconds


def chances(rates_RB: np.ndarray, basis: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Return, for each draft of each row, the probability that it and those before it are right.

    ``rates_RB``: of each row by basis, that a draft is right if those before it were. ``basis``: of
    the first draft of each row; ``most``: the number of its drafts, behind which chances are 0.
    """
    at_K = np.arange(most.max())
    basis_RK = np.minimum(basis[:, None] + at_K, rates_RB.shape[1] - 1)
    chances_RK = np.cumprod(np.take_along_axis(rates_RB, basis_RK, axis=1), axis=1)
    return np.where(at_K < most[:, None], chances_RK, 0.0)


def observe(
    rates: np.ndarray,
    basis: int,
    drafts: Many[int],
    *,
    tokens: Many[int],
    weight: float = WEIGHT,
) -> None:
    """Change rates, by basis, after ``tokens`` followed where ``drafts`` were proposed.

    Each draft up to the first wrong one is a trial: it was right or not, given those before it.
    """
    for at, (draft, token) in enumerate(zip(drafts, tokens), basis):
        at = min(at, len(rates) - 1)
        rates[at] += weight * ((draft == token) - rates[at])
        if draft != token:
            break


def _size_class(count: int) -> int:
    """Return the class of a number of tokens: 1, 2, 3 to 4, 5 to 8, ..."""
    return (count - 1).bit_length()
