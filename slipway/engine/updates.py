"""Decides when what runs may be changed: new weights, sleep and waking lie between two steps, with nothing on the
device. Knows the scheduler's queues; not where values come from.
"""

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, get_args

import numpy as np

from slipway.checkpoint.swap import Mode, Values, Weights
from slipway.engine.scheduler import Scheduler
from slipway.errors import EngineBusy, InvalidRequest, WeightsLost

logger = logging.getLogger(__name__)

Policy = Literal["finish", "recompute", "continue"]


@dataclasses.dataclass(frozen=True)
class Change:
    """Something to be done between two steps. ``future`` gets what ``apply`` returns, or raises."""

    apply: Callable[[], Any]
    policy: Policy
    future: Future[Any] = dataclasses.field(default_factory=Future)


class Updates:
    """The changes that wait, in order, and whether there is something to serve with."""

    def __init__(self, weights: Weights, schedulers: Sequence[Scheduler]):
        self._weights, self._schedulers = weights, schedulers
        self._waiting: collections.deque[Change] = collections.deque()
        self._kept: list[np.ndarray] | None = None  # the weights of a sleeping engine that left its devices
        self.sleep_level = 0

    @property
    def wait(self) -> bool:
        """Whether a change does."""
        return bool(self._waiting)

    @property
    def serves(self) -> bool:
        """Whether steps can run."""
        return self._weights.whole and not self.sleep_level

    def check(self) -> None:
        """Raises EngineBusy or WeightsLost where no request can be taken."""
        if self.sleep_level:
            raise EngineBusy("the engine sleeps")
        if not self._weights.whole:
            raise WeightsLost("the engine holds no whole version of the weights: update them")

    def add(self, apply: Callable[[], Any], policy: Policy) -> Future[Any]:
        """Queue a change; what it comes to."""
        if policy not in get_args(Policy):
            raise InvalidRequest("policy", policy, " | ".join(get_args(Policy)))
        change = Change(apply, policy)
        self._waiting.append(change)
        return change.future

    def may_begin(self) -> bool:
        """Whether all have ended that the first change lets finish; meanwhile nobody begins."""
        if self._waiting[0].policy != "finish" or not self.serves:
            return True
        for scheduler in self._schedulers:
            scheduler.hold()
        return not any(scheduler.running or scheduler.waiting for scheduler in self._schedulers)

    def begin(self) -> bool:
        """Make the first change; nothing may be on the device. False: it has cost the engine its weights."""
        change = self._waiting.popleft()
        try:
            if not change.future.set_running_or_notify_cancel():
                return True
            if change.policy == "recompute":
                for scheduler in self._schedulers:
                    scheduler.preempt_all()
            change.future.set_result(change.apply())
            return True
        except Exception as error:  # the caller's to hear of; whether the engine can go on, its weights say
            logger.exception("a change failed")
            change.future.set_exception(error)
            return not isinstance(error, WeightsLost)
        finally:
            for scheduler in self._schedulers:
                scheduler.resume()

    def replace(self, values: Values, version: str, mode: Mode) -> str:
        """Give the weights new values, and forget what was computed with the old ones."""
        started = time.perf_counter()
        try:
            self._weights.replace(values, version, mode)
            self._kept = None  # a sleeping engine wakes up with these
        finally:
            for scheduler in self._schedulers:
                scheduler.tree.flush()
        logger.info(
            "weights %s: %d arrays in %.3f s", version, len(self._weights.arrays), time.perf_counter() - started
        )
        return version

    def sleep(self, level: int) -> None:
        """Forget what is computed and let go of the devices' weights; those of a CPU stay where they are at level 1."""
        for scheduler in self._schedulers:
            scheduler.tree.flush()
        weights = self._weights
        if level == 2:
            self._kept, weights.whole = None, False
            weights.delete()
        elif weights.whole and not self.sleep_level and not weights.on_cpu:
            self._kept = weights.to_host()
            weights.delete()
        self.sleep_level = level

    def wake_up(self) -> None:
        """Bring the weights back, where there are any."""
        if self._kept is not None:
            self._weights.from_host(self._kept)
        self._kept, self.sleep_level = None, 0

    def fail(self, error: BaseException) -> None:
        """End the changes that wait."""
        while self._waiting:
            self._waiting.popleft().future.set_exception(error)
