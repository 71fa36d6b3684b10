"""What is told of a GPU and of the queues: as documented, and whether or not Redis is there."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from helpers.gpus import fake_nvml
from helpers.metrics import Scraped, documented
from helpers.repository import message, numbered
from prometheus_client import CollectorRegistry, generate_latest
from redis import Redis

from inferq.shared.codec import encode_advert
from inferq.shared.connect import redis_client
from inferq.shared.names import Names
from inferq.shared.schema import ModelAdvert, Signature, TensorSpec
from inferq.workers.cuda.telemetry import GpuTelemetry
from inferq.workers.data_plane.counts import ModelCounts, WorkerStats
from inferq.workers.metrics import prometheus
from inferq.workers.metrics.prometheus import DepthCollector, WorkerCollector
from inferq.workers.process.embedded import EmbeddedRedis
from inferq.workers.queues import depths

NAMES = Names()


def exposed(collector: Any) -> Scraped:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(collector)
    return Scraped.of(generate_latest(registry).decode())


def told(gpu: dict[str, float] | None) -> WorkerStats:
    return WorkerStats(
        incarnation="i",
        node="n",
        host="h",
        pid=1,
        started_at=1.0,
        at=2.0,
        state="serving",
        redis_up=True,
        device="gpu0",
        versions={"python": "3"},
        gpu=gpu,
        models=[ModelCounts().stats("m", 1, "fake")],
    )


def test_all_that_a_card_tells_is_told_in_base_units(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml(monkeypatch)
    nvml.CARDS[1].reasons = nvml.nvmlClocksEventReasonSwPowerCap
    telemetry = GpuTelemetry(1)
    seen = exposed(WorkerCollector(lambda: told(telemetry.numbers())))
    telemetry.close()
    values = {name: seen(name, gpu="1") for name in seen.families if name.startswith("inferq_gpu_")}
    assert values == {
        "inferq_gpu_utilization_ratio": 0.4,
        "inferq_gpu_memory_used_bytes": 3 << 30,
        "inferq_gpu_memory_total_bytes": 80 << 30,
        "inferq_gpu_temperature_celsius": 61,
        "inferq_gpu_power_watts": 312.5,
        "inferq_gpu_sm_clock_hertz": 1.98e9,
        "inferq_gpu_throttled": 1,
        "inferq_gpu_ecc_uncorrected_errors": 0,
        "inferq_gpu_ecc_uncorrected_lifetime_errors": 2,
        "inferq_gpu_last_xid": 0,
    }


def test_what_a_card_does_not_tell_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml(monkeypatch)
    nvml.CARDS[0].silent = {"nvmlDeviceGetPowerUsage", "nvmlDeviceGetCurrentClocksEventReasons"}
    telemetry = GpuTelemetry(0)
    seen = exposed(WorkerCollector(lambda: told(telemetry.numbers())))
    telemetry.close()
    assert "inferq_gpu_power_watts" not in seen.families
    assert seen("inferq_gpu_memory_total_bytes") == 80 << 30
    assert not [
        name
        for name in exposed(WorkerCollector(lambda: told(None))).families
        if name.startswith("inferq_gpu")
    ]


@pytest.fixture
def queued(redis: Redis) -> Redis:
    """Three requests of m in two priorities, a letter and an announcement; no worker."""
    seconds, _ = redis.time()
    for priority, age_s in ((0, 5), (9, 60), (9, 30)):
        sent = (seconds - age_s) * 1000.0
        _, raw = message("m", numbered(1), priority=priority, sent_ms=sent)
        redis.lpush(NAMES.queue("m", priority), raw)
    redis.lpush(NAMES.dead("m"), b"a letter")
    spec = TensorSpec("x", "float32", ("batch", 4))
    advert = ModelAdvert(
        name="m",
        version=1,
        engine="fake",
        signature=Signature((spec,), (spec,)),
        max_batch_size=8,
        batchable=True,
        max_queue_depth=100,
        max_request_bytes=1 << 20,
        default_priority=0,
        default_timeout_ms=0,
        seconds_per_row=0.0,
    )
    redis.set(NAMES.model("m"), encode_advert(advert))
    return redis


def test_depths_are_told_without_a_worker(queued: Redis) -> None:
    seen = exposed(DepthCollector(queued, NAMES))
    assert seen.described() == documented("Flower")
    assert [seen("inferq_queue_depth", model="m", priority=step) for step in "0369"] == [1, 0, 0, 2]
    assert 60 <= seen("inferq_queue_oldest_age_seconds") < 70
    assert seen("inferq_dead_letters") == 1
    assert seen("inferq_queue_limit") == 100
    assert seen("inferq_queue_consumers") == seen("inferq_queue_claimed") == 0
    assert seen("inferq_redis_up") == 1


def test_what_is_not_known_is_absent(redis: Redis) -> None:
    redis.lpush(NAMES.dead("m"), b"a letter")
    seen = exposed(DepthCollector(redis, NAMES))
    for name in ("inferq_queue_oldest_age_seconds", "inferq_queue_limit"):
        assert not seen.families[name].samples
    assert seen("inferq_queue_depth", priority="0") == 0


def test_queues_that_anybody_may_make_are_no_labels(
    queued: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depths, "STRAYS", 100)
    with queued.pipeline(transaction=False) as pipe:
        for n in range(250):
            pipe.lpush(NAMES.queue(f"stray{n}", 9), b"x")
        pipe.execute()
    seen = exposed(DepthCollector(queued, NAMES))
    assert {sample.labels["model"] for sample in seen.families["inferq_queue_depth"].samples} == {
        "m"
    }
    assert seen("inferq_queues_unannounced") == 250
    for n in range(5):
        queued.set(NAMES.model(f"known{n}"), "x")
    monkeypatch.setattr(prometheus, "MODELS", 3)
    seen = exposed(DepthCollector(queued, NAMES))
    assert len(seen.families["inferq_queue_consumers"].samples) == 3
    assert seen("inferq_queues_unannounced") == 250 + 3


def test_without_redis_only_that_is_told(new_redis: Callable[..., EmbeddedRedis]) -> None:
    server = new_redis()
    with redis_client(server.url) as client:
        collector = DepthCollector(client, NAMES)
        assert exposed(collector)("inferq_redis_up") == 1
        server.kill()
        assert exposed(collector).described() == {"inferq_redis_up": ("gauge", frozenset())}
        assert exposed(collector)("inferq_redis_up") == 0
        server.start()
        assert exposed(collector)("inferq_redis_up") == 1


def test_a_redis_that_does_not_answer_keeps_no_scrape_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prometheus, "READ_WITHIN_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with redis_client(f"redis://127.0.0.1:{port}/0", socket_timeout=30) as client:
            collector = DepthCollector(client, NAMES)
            for _ in range(5):
                assert exposed(collector)("inferq_redis_up") == 0
            readings = [t for t in threading.enumerate() if t.name == "inferq-depths"]
            assert len(readings) == 1, "the scrapes share one reading"
