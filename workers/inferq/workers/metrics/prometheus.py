"""Prometheus' view of a worker and of the queues. docs/metrics.md has every name in one table."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final

import redis
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from redis.exceptions import RedisError

from inferq.shared.names import Names
from inferq.workers.data_plane.counts import (
    PADDING,
    ROWS,
    SECONDS,
    Histogram,
    ModelStats,
    WorkerStats,
)
from inferq.workers.process.versions import PACKAGES
from inferq.workers.queues.depths import Depth, DepthReader
from inferq.workers.supervision.health import LOADING, SERVING, STOPPING

#: Most models whose depths are exported: each adds some time series.
MODELS: Final = 500
#: Seconds that one scrape waits for Redis.
READ_WITHIN_S: Final = 3.0

#: Histograms of `ModelStats`, by model: field, bounds, metric name and help.
_HISTOGRAMS: Final = (
    ("queue_s", SECONDS, "inferq_request_queue_seconds",
     "From when a request was sent until it was computed."),
    ("compute_input_s", SECONDS, "inferq_request_compute_input_seconds",
     "Of a request's batch: putting the inputs together and, on a GPU, copying them to it."),
    ("compute_infer_s", SECONDS, "inferq_request_compute_infer_seconds",
     "Of a request's batch: the engine's computing."),
    ("compute_output_s", SECONDS, "inferq_request_compute_output_seconds",
     "Of a request's batch: copying the outputs from the GPU; elsewhere nothing."),
    ("settle_s", SECONDS, "inferq_request_settle_seconds",
     "From the end of computing until Redis had the request's result."),
    ("total_s", SECONDS, "inferq_request_duration_seconds",
     "From when a request was sent until Redis had its result."),
    ("batch_size", ROWS, "inferq_batch_rows", "Rows of a batch, without padding."),
    ("padding", PADDING, "inferq_batch_padding_rows", "Rows of padding of a batch."),
)  # fmt: skip
#: Counters of `ModelStats`, by model.
_COUNTERS: Final = (
    (
        "attempts",
        "inferq_request_retries",
        "How often a request was begun again since its worker had died.",
    ),
    ("busy_s", "inferq_lane_busy_seconds", "Time that lanes have computed, all lanes together."),
    ("audit_s", "inferq_audit_seconds", "Time that audits of answers have taken, all together."),
)
_GAUGES: Final = (
    ("lanes", "inferq_lanes", "Lanes, each of which computes one batch at a time."),
    ("lanes_busy", "inferq_lanes_busy", "Lanes that compute."),
    ("waiting", "inferq_requests_waiting", "Requests that were claimed and wait for a lane."),
    ("computing", "inferq_requests_computing", "Requests that are being computed."),
    ("target_batch_size", "inferq_batch_target_rows", "Rows that a batch aims at."),
    ("max_batch_size", "inferq_batch_max_rows", "Most rows of a batch."),
    ("unbatched", "inferq_model_unbatched",
     "1: an audit found that answers depend on their batch, and ended batches."),
    ("off_gpu", "inferq_model_off_gpu",
     "1: it runs on the CPU, though its worker is pinned to a GPU."),
)  # fmt: skip
#: Gauges of `WorkerStats.gpu`: field, factor, metric name and help.
_GPU: Final = (
    ("utilisation_percent", 0.01, "inferq_gpu_utilization_ratio",
     "Part of the last moments in which the GPU ran something."),
    ("memory_used_bytes", 1, "inferq_gpu_memory_used_bytes", "GPU memory in use, by anybody."),
    ("memory_total_bytes", 1, "inferq_gpu_memory_total_bytes", "GPU memory."),
    ("temperature_c", 1, "inferq_gpu_temperature_celsius", "The GPU's temperature."),
    ("power_w", 1, "inferq_gpu_power_watts", "What the GPU takes."),
    ("sm_clock_mhz", 1e6, "inferq_gpu_sm_clock_hertz", "Clock of the GPU's multiprocessors."),
    ("throttled", 1, "inferq_gpu_throttled", "1: something holds the GPU's clocks down."),
    ("ecc_uncorrected", 1, "inferq_gpu_ecc_uncorrected_errors",
     "Uncorrected memory errors since the driver was loaded."),
    ("ecc_uncorrected_lifetime", 1, "inferq_gpu_ecc_uncorrected_lifetime_errors",
     "Uncorrected memory errors in the card's life."),
    ("last_xid", 1, "inferq_gpu_last_xid", "NVIDIA's number of the last critical error."),
)  # fmt: skip
#: Gauges of `Depth`, by model.
_DEPTHS: Final = (
    ("oldest_age_s", "inferq_queue_oldest_age_seconds",
     "Time since the oldest of the requests that are claimed next was sent."),
    ("later", "inferq_queue_later", "Requests whose ETA is ahead."),
    ("claimed", "inferq_queue_claimed", "Requests that workers hold."),
    ("dead", "inferq_dead_letters", "Dead letters that are kept."),
    ("consumers", "inferq_queue_consumers", "Live workers that serve the model."),
    ("max_queue_depth", "inferq_queue_limit", "Requests at which no more are accepted."),
)  # fmt: skip


def worker_registry(take: Callable[[], WorkerStats]) -> CollectorRegistry:
    """What a worker's endpoint exports: its own stats, and those of its process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    registry.register(WorkerCollector(take))
    return registry


class WorkerCollector(Collector):
    """Exports one worker's stats, which `take` returns."""

    def __init__(self, take: Callable[[], WorkerStats]) -> None:
        self._take = take

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        stats = self._take()
        yield from _worker(stats)
        yield from _models(stats.models)
        if stats.gpu is not None:
            yield from _gpu(stats.gpu)


def _worker(stats: WorkerStats) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "inferq_worker_info", "1; what the worker is.", labels=["node", "device", *PACKAGES]
    )
    versions = [stats.versions.get(package, "") for package in PACKAGES]
    info.add_metric([stats.node, stats.device, *versions], 1)
    yield info
    state = GaugeMetricFamily(
        "inferq_worker_state", "1 for the state that the worker is in.", labels=["state"]
    )
    for each in (LOADING, SERVING, STOPPING):
        state.add_metric([each], each == stats.state)
    yield state
    yield _redis_up(stats.redis_up)
    missing = GaugeMetricFamily(
        "inferq_model_not_served",
        "1: the worker was to serve that model, or that newest version of it, and does not.",
        labels=["model", "version"],
    )
    for found in stats.not_served:
        missing.add_metric([found.model, "" if found.version is None else str(found.version)], 1)
    yield missing


def _models(models: Sequence[ModelStats]) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "inferq_model_info", "1; what the model is.", labels=["model", "version", "engine"]
    )
    requests = CounterMetricFamily(
        "inferq_requests", "Requests by how they ended.", labels=["model", "outcome"]
    )
    failures = CounterMetricFamily(
        "inferq_request_failures", "Failed requests by error.", labels=["model", "code"]
    )
    audits = CounterMetricFamily(
        "inferq_audits",
        "Requests that were run again alone, by what came of it.",
        labels=["model", "result"],
    )
    for each in models:
        info.add_metric([each.model, str(each.version), each.engine], 1)
        for result, count in each.audits.items():
            audits.add_metric([each.model, result], count)
        for outcome, count in each.outcomes.items():
            requests.add_metric([each.model, outcome], count)
        for code, count in each.errors.items():
            failures.add_metric([each.model, code], count)
    yield from (info, requests, failures, audits)
    yield from _by_model(models)


def _by_model(models: Sequence[ModelStats]) -> Iterator[Metric]:
    """The metrics whose only label is the model."""
    for field, name, says in _COUNTERS:
        counter = CounterMetricFamily(name, says, labels=["model"])
        for each in models:
            counter.add_metric([each.model], getattr(each, field))
        yield counter
    for field, name, says in _GAUGES:
        gauge = GaugeMetricFamily(name, says, labels=["model"])
        for each in models:
            gauge.add_metric([each.model], getattr(each, field))
        yield gauge
    for field, bounds, name, says in _HISTOGRAMS:
        histogram = HistogramMetricFamily(name, says, labels=["model"])
        for each in models:
            observed: Histogram = getattr(each, field)
            histogram.add_metric([each.model], _buckets(observed, bounds), observed.sum)
        yield histogram


def _buckets(observed: Histogram, bounds: Sequence[float]) -> list[tuple[str, float]]:
    upper = [*map(floatToGoString, bounds), "+Inf"]
    return [(le, float(n)) for le, n in zip(upper, accumulate(observed.counts), strict=True)]


def _gpu(told: dict[str, float]) -> Iterator[Metric]:
    for field, factor, name, says in _GPU:
        if field in told:
            gauge = GaugeMetricFamily(name, says, labels=["gpu"])
            gauge.add_metric([f"{told['index']:.0f}"], told[field] * factor)
            yield gauge


def _redis_up(is_up: bool) -> Metric:
    return GaugeMetricFamily("inferq_redis_up", "1: Redis answers.", value=is_up)


class DepthCollector(Collector):
    """Exports the depths of all models that workers know, whether or not a worker runs.

    Anybody who may push can make queues of any name, so models that no worker announced are only
    counted. Each scrape reads Redis in a thread of its own, and goes on without depths after
    `READ_WITHIN_S`. One such collector is enough for each Redis: a sum over several would count
    each request several times.
    """

    def __init__(self, client: redis.Redis, names: Names) -> None:
        self._reader = DepthReader(client, names)
        self._lock = threading.Lock()
        self._reading: _Reading | None = None

    def describe(self) -> Iterable[Metric]:
        return ()  # else registering it would read Redis

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            if self._reading is None or self._reading.read.is_set():
                self._reading = _Reading(self._reader)
                self._reading.start()
            reading = self._reading
        reading.read.wait(READ_WITHIN_S)
        yield _redis_up(reading.depths is not None)
        if reading.depths is not None:
            yield from _depths(reading.depths)
            yield GaugeMetricFamily(
                "inferq_queues_unannounced",
                "Queues of models that no worker announced, or that are too many to be told apart.",
                value=reading.not_listed,
            )


class _Reading(threading.Thread):
    """One reading of the depths; several scrapes at once share it."""

    def __init__(self, reader: DepthReader) -> None:
        super().__init__(name="inferq-depths", daemon=True)
        self._reader = reader
        self.read = threading.Event()
        self.depths: Sequence[Depth] | None = None
        self.not_listed = 0

    def run(self) -> None:
        try:
            found = self._reader.find()
            self.not_listed = len(found.strays) + found.unlisted + len(found.known[MODELS:])
            self.depths = self._reader.read(found.known[:MODELS]).models
        except (RedisError, OSError):
            pass
        finally:
            self.read.set()


def _depths(depths: Sequence[Depth]) -> Iterator[Metric]:
    waiting = GaugeMetricFamily(
        "inferq_queue_depth", "Requests in the queue.", labels=["model", "priority"]
    )
    for each in depths:
        for priority, count in each.by_priority.items():
            waiting.add_metric([each.model, str(priority)], count)
    yield waiting
    for field, name, says in _DEPTHS:
        gauge = GaugeMetricFamily(name, says, labels=["model"])
        for each in depths:
            value = getattr(each, field)
            if value is not None:
                gauge.add_metric([each.model], value)
        yield gauge
