"""What /metrics publishes, for Prometheus; decides names, counts nothing but HTTP itself.

The engine's figures are read off its snapshot when somebody asks. With ``vllm_metric_names`` the ones that dashboards
know are there a second time, under vLLM's names.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from slipway.engine.stats import Histogram, Snapshot

GAUGES = {
    "running": "num_requests_running", "waiting": "num_requests_waiting", "kv_cache_usage": "kv_cache_usage_perc",
}  # fmt: skip
COUNTERS = {
    "queried_tokens": "prefix_cache_queries", "cached_tokens": "prefix_cache_hits", "preemptions": "num_preemptions",
    "prompt_tokens": "prompt_tokens", "generated_tokens": "generation_tokens", "compilations": None,
    "computed_tokens": None, "steps": None,
}  # fmt: skip
HISTOGRAMS = {
    "first_token": "time_to_first_token_seconds", "inter_token": "inter_token_latency_seconds",
    "e2e": "e2e_request_latency_seconds", "queue": "request_queue_time_seconds", "step_host": None, "step_device": None,
}  # fmt: skip


class Metrics:
    """HTTP's counters, and the engines' on request."""

    def __init__(self, model_name: str, vllm_names: bool):
        self._labels, self._prefixes = (
            {"model_name": model_name},
            ["slipway_", "vllm:"][: 1 + vllm_names],
        )
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "slipway_http_requests",
            "Requests, by route and status.",
            ["route", "status"],
            registry=self._registry,
        )

    def text(self, snapshots: list[Snapshot], starts: int) -> bytes:
        """Everything in Prometheus' text format. ``snapshots``: of the engines that run; ``starts``: of all ever."""
        registry = CollectorRegistry()
        registry.register(_Fixed(list(self._families(snapshots, starts))))
        return generate_latest(self._registry) + generate_latest(registry)

    def _families(self, snapshots: list[Snapshot], starts: int) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        yield GaugeMetricFamily(
            "slipway_engines_running", "Engine processes that answer.", value=len(snapshots)
        )
        yield CounterMetricFamily(
            "slipway_engine_starts", "Engine processes started.", value=starts
        )
        sums = {name: sum(_sum(snapshot, name) for snapshot in snapshots) for name in COUNTERS}
        pages = sum(snapshot.pages for snapshot in snapshots)
        gauges = {
            "running": sum(s.running for s in snapshots), "waiting": sum(s.waiting for s in snapshots),
            "kv_cache_usage": sum(s.pages_used for s in snapshots) / pages if pages else 0.0,
        }  # fmt: skip
        for prefix in self._prefixes:
            ours = prefix == "slipway_"
            for name, theirs in GAUGES.items():
                gauge = GaugeMetricFamily(prefix + (name if ours else theirs), name, labels=names)
                gauge.add_metric(values, gauges[name])
                yield gauge
            for name, known in COUNTERS.items():
                if ours or known:
                    counter = CounterMetricFamily(
                        prefix + (name if ours else str(known)), name, labels=names
                    )
                    counter.add_metric(values, sums[name])
                    yield counter
            for name, known in HISTOGRAMS.items():
                if ours or known:
                    title = f"{name}_seconds" if ours else str(known)
                    histogram = HistogramMetricFamily(prefix + title, name, labels=names)
                    histogram.add_metric(
                        values, *_joined([getattr(s.stats, name) for s in snapshots])
                    )
                    yield histogram
            ended = CounterMetricFamily(
                prefix + ("sequences" if ours else "request_success"), "Ended, by reason.",
                labels=[*names, "finished_reason"],
            )  # fmt: skip
            for reason in sorted({reason for s in snapshots for reason in s.stats.finished}):
                ended.add_metric(
                    [*values, reason], sum(s.stats.finished.get(reason, 0) for s in snapshots)
                )
            yield ended


class _Fixed(Collector):
    """A collector of what was computed already."""

    def __init__(self, families: list[Metric]):
        self._families = families

    def collect(self) -> list[Metric]:
        """All of it."""
        return self._families


def _sum(snapshot: Snapshot, name: str) -> int:
    return (vars(snapshot.stats) | vars(snapshot))[name]


def _joined(histograms: list[Histogram]) -> tuple[list[tuple[str, float]], float]:
    """Cumulative buckets as Prometheus has them, and the sum."""
    if not histograms:
        return [("+Inf", 0.0)], 0.0
    bounds = [*(str(bound) for bound in histograms[0].bounds), "+Inf"]
    counts = [sum(column) for column in zip(*(histogram.counts for histogram in histograms))]
    reached, buckets = 0, []
    for bound, count in zip(bounds, counts):
        reached += count
        buckets.append((bound, float(reached)))
    return buckets, sum(histogram.sum for histogram in histograms)
