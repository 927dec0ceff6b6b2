"""What the engine counts and times; decides the names and the bounds, prints and serves nothing."""

import bisect
import dataclasses

STEP_BOUNDS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
WAIT_BOUNDS_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


@dataclasses.dataclass
class Histogram:
    """How often a value fell up to each of ``bounds``, and beyond the last; with the sum of all."""

    bounds: tuple[float, ...]
    counts: list[int] = dataclasses.field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self):
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)


@dataclasses.dataclass
class Stats:
    """Sums since the start. Seconds of the host are those of a step in which it did not wait for the device."""

    steps: int = 0  # several decode steps in one call count once, and so does their time
    prompt_tokens: int = 0
    generated_tokens: int = 0
    host_s: float = 0.0
    device_s: float = 0.0
    finished: dict[str, int] = dataclasses.field(default_factory=dict)  # sequences, by finish_reason
    step_host: Histogram = dataclasses.field(default_factory=lambda: Histogram(STEP_BOUNDS_S))
    step_device: Histogram = dataclasses.field(default_factory=lambda: Histogram(STEP_BOUNDS_S))
    queue: Histogram = dataclasses.field(default_factory=lambda: Histogram(WAIT_BOUNDS_S))  # arrival to first chunk
    first_token: Histogram = dataclasses.field(default_factory=lambda: Histogram(WAIT_BOUNDS_S))  # arrival to there
    e2e: Histogram = dataclasses.field(default_factory=lambda: Histogram(WAIT_BOUNDS_S))  # arrival to its end
    inter_token: Histogram = dataclasses.field(default_factory=lambda: Histogram(WAIT_BOUNDS_S))  # of one sequence

    def step(self, host_s: float, device_s: float) -> None:
        """Count a step's time."""
        self.host_s += host_s
        self.device_s += device_s
        self.step_host.add(host_s)
        self.step_device.add(device_s)

    def finish(self, reason: str, seconds: float) -> None:
        """Count a sequence's end, and the time since its request came."""
        self.e2e.add(seconds)
        self.finished[reason] = self.finished.get(reason, 0) + 1


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The engine as it is now: gauges, and the sums since its start. Pages and tokens of all copies of the weights."""

    running: int
    waiting: int
    pages: int
    pages_free: int
    pages_cached: int  # held by the tree, and nobody reads them
    queried_tokens: int
    cached_tokens: int
    computed_tokens: int
    preemptions: int
    compilations: int
    stats: Stats

    @property
    def pages_used(self) -> int:
        """Pages that running sequences hold."""
        return self.pages - self.pages_free - self.pages_cached

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that the cache held when they first ran."""
        return self.cached_tokens / self.queried_tokens if self.queried_tokens else 0.0
