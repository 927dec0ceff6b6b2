"""Metrics of /metrics in Prometheus' format.

The engines' figures are taken from their snapshots at each call of /metrics. ``vllm_metric_names``
adds the metrics that dashboards for vLLM use, under vLLM's names.

Not here: counting inside the engine (engine/stats.py).
"""

import itertools
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from slipway.engine.stats import Histogram, Snapshot

# Slipway's names -> vLLM's; None where vLLM has no such metric.
GAUGES = {
    "running": "num_requests_running",
    "waiting": "num_requests_waiting",
    "kv_cache_usage": "kv_cache_usage_perc",
}
COUNTERS = {
    "queried_tokens": "prefix_cache_queries",
    "cached_tokens": "prefix_cache_hits",
    "preemptions": "num_preemptions",
    "prompt_tokens": "prompt_tokens",
    "generated_tokens": "generation_tokens",
    "spec_decode_num_drafts": "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens": "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens": "spec_decode_num_accepted_tokens",
    "compilations": None,
    "computed_tokens": None,
    "steps": None,
}
HISTOGRAMS = {
    "first_token": "time_to_first_token_seconds",
    "inter_token": "inter_token_latency_seconds",
    "e2e": "e2e_request_latency_seconds",
    "queue": "request_queue_time_seconds",
    "step_host": None,
    "step_device": None,
}


class Metrics:
    """Counters of HTTP requests, and text of all metrics."""

    def __init__(self, model_name: str, vllm_names: bool):
        self._labels = {"model_name": model_name}
        self._vllm_names = vllm_names
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "slipway_http_requests",
            "Requests, by route and status.",
            ["route", "status"],
            registry=self._registry,
        )

    def text(self, snapshots: list[Snapshot], starts: int) -> bytes:
        """Return all metrics in Prometheus' text format.

        ``snapshots``: of the engines that are ready. ``starts``: number of engine processes
        started.
        """
        registry = CollectorRegistry()
        registry.register(_Fixed(list(self._families(snapshots, starts))))
        return generate_latest(self._registry) + generate_latest(registry)

    def _families(self, snapshots: list[Snapshot], starts: int) -> Iterator[Metric]:
        running = len(snapshots)
        yield GaugeMetricFamily(
            "slipway_engines_running", "Engine processes that answer.", value=running
        )
        yield CounterMetricFamily(
            "slipway_engine_starts", "Engine processes started.", value=starts
        )
        yield from self._engine_families(snapshots, vllm=False)
        if self._vllm_names:
            yield from self._engine_families(snapshots, vllm=True)

    def _engine_families(self, snapshots: list[Snapshot], *, vllm: bool) -> Iterator[Metric]:
        """Yield the metrics of all engines together, under Slipway's or vLLM's names."""
        prefix = "vllm:" if vllm else "slipway_"
        labels, values = list(self._labels), list(self._labels.values())
        gauges = _gauges(snapshots)
        for name, vllm_gauge in GAUGES.items():
            title = prefix + (vllm_gauge if vllm else name)
            gauge = GaugeMetricFamily(title, name, labels=labels)
            gauge.add_metric(values, gauges[name])
            yield gauge
        for name, vllm_name in COUNTERS.items():
            if not vllm or vllm_name:
                title = prefix + (str(vllm_name) if vllm else name)
                counter = CounterMetricFamily(title, name, labels=labels)
                counter.add_metric(values, sum(_value(each, name) for each in snapshots))
                yield counter
        for name, vllm_name in HISTOGRAMS.items():
            if not vllm or vllm_name:
                title = prefix + (str(vllm_name) if vllm else f"{name}_seconds")
                histogram = HistogramMetricFamily(title, name, labels=labels)
                merged = _merged([getattr(each.stats, name) for each in snapshots])
                histogram.add_metric(values, *merged)
                yield histogram
        accepted = CounterMetricFamily(
            prefix + "spec_decode_num_accepted_tokens_per_pos",
            "Drafts that became tokens, by their place after the last token.",
            labels=[*labels, "position"],
        )
        places = [each.stats.spec_decode_accepted_per_pos for each in snapshots]
        for position, counts in enumerate(itertools.zip_longest(*places, fillvalue=0)):
            accepted.add_metric([*values, str(position)], sum(counts))
        yield accepted
        if not vllm and any(each.expert_tokens for each in snapshots):
            yield from _expert_families(snapshots, self._labels)
        ended = CounterMetricFamily(
            prefix + ("request_success" if vllm else "sequences"),
            "Ended sequences, by reason.",
            labels=[*labels, "finished_reason"],
        )
        for reason in sorted({reason for each in snapshots for reason in each.stats.finished}):
            count = sum(each.stats.finished.get(reason, 0) for each in snapshots)
            ended.add_metric([*values, reason], count)
        yield ended


class _Fixed(Collector):
    """Collector of metrics that are computed already."""

    def __init__(self, families: list[Metric]):
        self._families = families

    def collect(self) -> list[Metric]:
        """Return all metrics."""
        return self._families


def _expert_families(snapshots: Sequence[Snapshot], labels: dict[str, str]) -> Iterator[Metric]:
    """Yield the load of the experts of all engines together."""
    tokens = CounterMetricFamily(
        "slipway_expert_tokens",
        "Tokens that each expert has computed, all layers together.",
        labels=[*labels, "expert"],
    )
    for expert, counts in enumerate(zip(*(each.expert_tokens for each in snapshots))):
        tokens.add_metric([*labels.values(), str(expert)], sum(counts))
    yield tokens
    imbalance = GaugeMetricFamily(
        "slipway_expert_imbalance",
        "Load of a layer's busiest expert by that of its average one, mean over the layers; the "
        "largest of all engines.",
        labels=list(labels),
    )
    imbalance.add_metric([*labels.values()], max(each.expert_imbalance for each in snapshots))
    yield imbalance


def _gauges(snapshots: Sequence[Snapshot]) -> dict[str, float]:
    pages = sum(each.pages for each in snapshots)
    used = sum(each.pages_used for each in snapshots)
    return {
        "running": sum(each.running for each in snapshots),
        "waiting": sum(each.waiting for each in snapshots),
        "kv_cache_usage": used / pages if pages else 0.0,
    }


def _value(snapshot: Snapshot, name: str) -> int:
    return (vars(snapshot.stats) | vars(snapshot))[name]


def _merged(histograms: Sequence[Histogram]) -> tuple[list[tuple[str, float]], float]:
    """Return the cumulative buckets of all histograms, in Prometheus' form, and the sum."""
    if not histograms:
        return [("+Inf", 0.0)], 0.0
    bounds = [*(str(bound) for bound in histograms[0].bounds), "+Inf"]
    counts = [sum(column) for column in zip(*(histogram.counts for histogram in histograms))]
    total, buckets = 0, []
    for bound, count in zip(bounds, counts):
        total += count
        buckets.append((bound, float(total)))
    return buckets, sum(histogram.sum for histogram in histograms)
