"""Number of drafts that a step verifies, chosen from acceptance and measured times of steps.

Not here: the drafts (speculation.py and its drafters).

Drafts cost time: a step that verifies n tokens takes longer than one that decodes. They pay if the
expected tokens per second of such a step exceed those of a step, or of a call of several steps,
without drafts. All three numbers are measured while the engine runs.
"""

import dataclasses
from collections.abc import Sequence as Many

import numpy as np

# Weight of a new value in the moving averages.
WEIGHT = 1 / 8
# A draft is verified if the product of the rates up to it is at least one of these numbers: the
# candidates among which ``choose`` finds the best.
LEAST_CHANCES = (0.9, 0.75, 0.6, 0.45, 0.3, 0.2, 0.1)
# Drafts must promise this gain over a plain step before they are used.
MARGIN = 1.03
# Calls after which a measured time is measured again, as load and lengths of sequences change.
STALE = 400
# Plain calls in a row that measure their time: the first of them does not overlap with the host's
# work for the one before.
PLAIN_CALLS = 3


@dataclasses.dataclass
class Measured:
    """Moving average of a time in seconds, and the number of the call that measured it last."""

    seconds: float
    at: int


class Lengths:
    """Times of steps, with and without drafts, and the choice between them."""

    def __init__(self) -> None:
        self._calls = 0
        # By size class of the number of rows: seconds for one token of each row, without drafts.
        self._plain: dict[int, Measured] = {}
        # By size class of the number of tokens: seconds of a step that verifies drafts.
        self._drafted: dict[int, Measured] = {}
        # Plain calls left that measure their time.
        self._measuring = 0

    def measured(self, num_tokens: int, num_steps: int, seconds: float, has_drafts: bool) -> None:
        """Add the time of a call that decoded, from the end of the call before to its own end.

        ``num_tokens``: of all rows in each of its ``num_steps`` steps.
        """
        self._calls += 1
        if has_drafts:
            self._add(self._drafted, num_tokens, seconds)
            return
        self._measuring = max(0, self._measuring - 1)
        if self._measuring < PLAIN_CALLS - 1:
            self._add(self._plain, num_tokens, seconds / num_steps)

    def choose(self, rates: np.ndarray, most: np.ndarray) -> np.ndarray:
        """Return the number of drafts of each row that the next step verifies.

        ``rates``: for each row, the probability that a draft is accepted if those before it were.
        ``most``: the number of drafts that each row has.
        """
        rows = len(rates)
        none = np.zeros(rows, np.int64)
        plain = self._fresh(self._plain, rows)
        if plain is None:
            self._measuring = self._measuring or PLAIN_CALLS
        if plain is None or self._measuring or not most.any():
            return none
        best, best_rate = none, MARGIN * rows / plain
        odds = np.clip(rates, 0.01, 0.99)
        for chance in LEAST_CHANCES:
            counts = np.minimum(most, (np.log(chance) / np.log(odds)).astype(np.int64))
            expected = rows + float((odds * (1 - odds**counts) / (1 - odds)).sum())
            seconds = self._seconds_with_drafts(rows + int(counts.sum()), plain)
            if expected / seconds > best_rate and counts.any():
                best, best_rate = counts, expected / seconds
        return best

    def _seconds_with_drafts(self, num_tokens: int, plain: float) -> float:
        """Return the seconds of a step with ``num_tokens`` tokens.

        Not measured yet, it is taken to cost as much as the next smaller measured one, or as a
        plain step: so it is tried, and then measured.
        """
        for size in range(_size_class(num_tokens), -1, -1):
            found = self._fresh_class(self._drafted, size)
            if found is not None:
                return found
        return plain

    def _add(self, times: dict[int, Measured], count: int, seconds: float) -> None:
        size = _size_class(count)
        held = self._fresh_class(times, size)
        if held is not None:
            # A pause of the host is no property of the step.
            seconds = held + WEIGHT * (min(seconds, 3 * held) - held)
        times[size] = Measured(seconds, self._calls)

    def _fresh(self, times: dict[int, Measured], count: int) -> float | None:
        return self._fresh_class(times, _size_class(count))

    def _fresh_class(self, times: dict[int, Measured], size: int) -> float | None:
        held = times.get(size)
        return None if held is None or self._calls - held.at > STALE else held.seconds


def observed(rate: float, drafts: Many[int], tokens: Many[int]) -> float:
    """Return the rate of a row after ``tokens`` followed where ``drafts`` were proposed.

    Each draft up to the first wrong one is a trial: it was right or not, given those before it.
    """
    for draft, token in zip(drafts, tokens):
        rate += WEIGHT * ((draft == token) - rate)
        if draft != token:
            break
    return rate


def _size_class(count: int) -> int:
    """Return the class of a number of tokens: 1, 2, 3 to 4, 5 to 8, ..."""
    return (count - 1).bit_length()
