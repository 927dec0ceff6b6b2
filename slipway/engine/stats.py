"""Statistics of the engine: counters, histograms of times, and a snapshot of its state.

Not here: their names and text for Prometheus (server/metrics.py).
"""

import bisect
import dataclasses
from typing import Any

import numpy as np

STEP_BOUNDS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
WAIT_BOUNDS_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


@dataclasses.dataclass
class Histogram:
    """Numbers of values by bucket, and their sum.

    Bucket i counts values above bound i - 1 and at most bound i; the last, values above all bounds.
    """

    bounds: tuple[float, ...]
    counts: list[int] = dataclasses.field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self):
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, ``times`` times."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        """Number of values counted."""
        return sum(self.counts)


def _histogram(bounds: tuple[float, ...]) -> Any:
    """Return a dataclass field with an empty histogram as default."""
    return dataclasses.field(default_factory=lambda: Histogram(bounds))


@dataclasses.dataclass
class Stats:
    """Sums and histograms since the start.

    ``steps``: calls of the device; several decode steps in one call count once, and so does their
    time. ``host_s``: seconds of the host's work, without those that it waited for the device
    (``device_s``). ``finished``: sequences by finish_reason. ``spec_decode_num_drafts``: how often
    drafts of a sequence were verified (vLLM's names); ``spec_decode_accepted_per_pos``: accepted
    drafts by their place after the last token. Times run from the arrival of a
    request to its first chunk (``queue``), first token (``first_token``) and end (``e2e``);
    ``inter_token`` is the time between two tokens of a sequence.
    """

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    host_s: float = 0.0
    device_s: float = 0.0
    finished: dict[str, int] = dataclasses.field(default_factory=dict)
    spec_decode_num_drafts: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0
    spec_decode_accepted_per_pos: list[int] = dataclasses.field(default_factory=list)
    step_host: Histogram = _histogram(STEP_BOUNDS_S)
    step_device: Histogram = _histogram(STEP_BOUNDS_S)
    queue: Histogram = _histogram(WAIT_BOUNDS_S)
    first_token: Histogram = _histogram(WAIT_BOUNDS_S)
    e2e: Histogram = _histogram(WAIT_BOUNDS_S)
    inter_token: Histogram = _histogram(WAIT_BOUNDS_S)

    def step(self, host_s: float, device_s: float) -> None:
        """Add the seconds of the host's work and of waiting for the device, of one step."""
        self.host_s += host_s
        self.device_s += device_s
        self.step_host.add(host_s)
        self.step_device.add(device_s)

    def verify(self, count: int, accepted: int) -> None:
        """Count a verification of ``count`` drafts, the first ``accepted`` of which were right."""
        self.spec_decode_num_drafts += 1
        self.spec_decode_num_draft_tokens += count
        self.spec_decode_num_accepted_tokens += accepted
        places = self.spec_decode_accepted_per_pos
        places += [0] * (accepted - len(places))
        for place in range(accepted):
            places[place] += 1

    @property
    def acceptance_length(self) -> float:
        """Tokens of a sequence in a step that verifies drafts, on average; 1 without any."""
        return 1 + self.spec_decode_num_accepted_tokens / max(1, self.spec_decode_num_drafts)

    def finish(self, reason: str, seconds: float) -> None:
        """Count the end of a sequence, ``seconds`` after its request arrived."""
        self.e2e.add(seconds)
        self.finished[reason] = self.finished.get(reason, 0) + 1


class ExpertCounts:
    """Tokens of each expert of each layer, summed over counters of a device that wrap at 2^32."""

    def __init__(self) -> None:
        self._tokens_LE: np.ndarray | None = None
        self._seen: list[np.ndarray] = []

    def read(self, counters: list[np.ndarray]) -> None:
        """Add the differences to the last counters, uint32 [layers, experts] of each copy."""
        seen = self._seen or [np.zeros_like(each) for each in counters]
        added = sum((now - before).astype(np.int64) for now, before in zip(counters, seen))
        self._tokens_LE = added if self._tokens_LE is None else self._tokens_LE + added
        self._seen = counters

    def restart(self) -> None:
        """Take note that the device's counters begin at 0 again."""
        self._seen = []

    def reset(self) -> None:
        """Count from zero."""
        self._tokens_LE = None if self._tokens_LE is None else self._tokens_LE * 0

    def of_experts(self) -> list[int]:
        """Return the tokens of each expert, all layers together; empty without experts."""
        return [] if self._tokens_LE is None else self._tokens_LE.sum(axis=0).tolist()

    def imbalance(self) -> float:
        """Return the load of a layer's busiest expert by that of its average one.

        It is the mean over the layers: 1 if all experts have computed as many tokens, 0 if there
        were none.
        """
        if self._tokens_LE is None or not self._tokens_LE.any():
            return 0.0
        means = np.maximum(self._tokens_LE.mean(axis=1), 1e-9)
        return float((self._tokens_LE.max(axis=1) / means).mean())


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """State of the engine at one moment: gauges, and the sums since its start.

    Pages and tokens are those of all copies of the weights. ``expert_tokens``: of each expert, all
    layers together; ``expert_imbalance``: as ``ExpertCounts.imbalance`` returns it.
    """

    running: int
    waiting: int
    pages: int
    pages_free: int
    pages_cached: int  # held by the prefix tree, and by no running sequence
    queried_tokens: int
    cached_tokens: int
    computed_tokens: int
    preemptions: int
    compilations: int
    expert_tokens: list[int]
    expert_imbalance: float
    stats: Stats

    @property
    def pages_used(self) -> int:
        """Pages that running sequences hold."""
        return self.pages - self.pages_free - self.pages_cached

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that the cache held when they first ran."""
        return self.cached_tokens / self.queried_tokens if self.queried_tokens else 0.0
