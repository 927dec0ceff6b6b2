"""Queue of changes of the engine: new weights, sleep and waking, each made between two steps.

Not here: the sources of new values (convert/weight_sources.py), their exchange
(checkpoint/swap.py), the steps (pipeline.py). While a change is made, nothing runs on the device.
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
    """A change to be made between two steps; ``future`` gets the result or error of ``apply``."""

    apply: Callable[[], Any]
    policy: Policy
    future: Future[Any] = dataclasses.field(default_factory=Future)


class Updates:
    """Changes that wait, in order, and whether the engine has weights to serve with."""

    def __init__(self, weights: Weights, schedulers: Sequence[Scheduler]):
        self._weights = weights
        self._schedulers = schedulers
        self._waiting: collections.deque[Change] = collections.deque()
        # The weights of a sleeping engine, in the host's memory, if they were taken off the
        # devices.
        self._kept: list[np.ndarray] | None = None
        self.sleep_level = 0

    @property
    def wait(self) -> bool:
        """Whether a change is waiting to be applied."""
        return bool(self._waiting)

    @property
    def serves(self) -> bool:
        """Whether steps can run."""
        return self._weights.whole and not self.sleep_level

    def check(self) -> None:
        """Raise EngineBusy or WeightsLost if the engine cannot accept requests."""
        if self.sleep_level:
            raise EngineBusy("the engine sleeps; wake it up first")
        if not self._weights.whole:
            raise WeightsLost("the weights of the engine are incomplete; update them first")

    def add(self, apply: Callable[[], Any], policy: Policy) -> Future[Any]:
        """Queue a change and return the future of its result. Raises InvalidRequest."""
        if policy not in get_args(Policy):
            raise InvalidRequest("policy", policy, " | ".join(get_args(Policy)))
        change = Change(apply, policy)
        self._waiting.append(change)
        return change.future

    def may_begin(self) -> bool:
        """Whether the first change can be made now.

        A change with the policy "finish" waits for the running requests; until then no other
        request is admitted.
        """
        if self._waiting[0].policy != "finish" or not self.serves:
            return True
        for scheduler in self._schedulers:
            scheduler.hold()
        return not any(scheduler.running or scheduler.waiting for scheduler in self._schedulers)

    def begin(self) -> bool:
        """Make the first change; nothing may be on the device.

        Returns False if the change failed and left the engine without whole weights.
        """
        change = self._waiting.popleft()
        try:
            if not change.future.set_running_or_notify_cancel():
                return True
            if change.policy == "recompute":
                for scheduler in self._schedulers:
                    scheduler.preempt_all()
            change.future.set_result(change.apply())
            return True
        # The caller gets the error from the future. Only WeightsLost stops the engine.
        except Exception as error:
            logger.exception("a change of the engine failed")
            change.future.set_exception(error)
            return not isinstance(error, WeightsLost)
        finally:
            for scheduler in self._schedulers:
                scheduler.resume()

    def replace(self, values: Values, version: str, mode: Mode) -> str:
        """Give the weights new values, and forget the prefixes computed with the old ones."""
        started = time.perf_counter()
        try:
            self._weights.replace(values, version, mode)
            # A sleeping engine wakes up with the new values.
            self._kept = None
        finally:
            for scheduler in self._schedulers:
                scheduler.tree.flush()
        logger.info(
            "weights %s: %d arrays in %.3f s",
            version,
            len(self._weights.arrays),
            time.perf_counter() - started,
        )
        return version

    def sleep(self, level: int) -> None:
        """Forget cached prefixes, and free the devices' memory of the weights.

        ``level`` 1 keeps the weights in the host's memory; on a CPU they stay where they are.
        ``level`` 2 drops them.
        """
        for scheduler in self._schedulers:
            scheduler.tree.flush()
        weights = self._weights
        if level == 2:
            self._kept = None
            weights.whole = False
            weights.delete()
        elif weights.whole and not self.sleep_level and not weights.on_cpu:
            self._kept = weights.to_host()
            weights.delete()
        self.sleep_level = level

    def wake_up(self) -> None:
        """End the sleep, and bring weights back that are in the host's memory."""
        if self._kept is not None:
            self._weights.from_host(self._kept)
        self._kept = None
        self.sleep_level = 0

    def fail(self, error: BaseException) -> None:
        """Give ``error`` to every change that waits, and drop them."""
        while self._waiting:
            self._waiting.popleft().future.set_exception(error)
