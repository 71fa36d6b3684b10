"""A worker's metrics are all that the docs say, and their sums are what the client has counted."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pytest
from helpers import envelopes
from helpers.gpus import NO_CARD
from helpers.metrics import Scraped, documented, free_ports, metrics_url, read, scrape
from helpers.proxy import CommandProxy
from helpers.repository import fake_model, message, numbered
from helpers.results import nothing_is_held
from helpers.stock import stock_app
from helpers.wait import until
from helpers.worker import SupervisedWorker, Worker
from redis import Redis

from inferq.producer import Client, EngineError, InvalidInput
from inferq.producer.pending import Pending
from inferq.shared.names import TASK, Names, queue_of
from inferq.workers.data_plane.counts import WorkerStats
from inferq.workers.engines.fake import FAULT_RAISE
from inferq.workers.metrics.published import EXPIRES_S, read_stats
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
ANY_PORT = {"INFERQ_METRICS": "127.0.0.1:0"}
TWO_GPUS = {
    "PYTHONPATH": os.pathsep.join([str(NO_CARD), *(entry for entry in sys.path if entry)]),
    "FAKE_GPUS": "2",
}
KNOBS = "lanes = 2\nmax_batch_size = 8\nbuckets = [8]\nwarm_up = false"
OUTCOMES = ("success", "failure", "revoked", "dead_letter", "overtaken")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    fake_model(tmp_path / "models", "m", knobs=KNOBS, fake="faults = true\ndelay_ms = 2")
    return tmp_path / "models"


@pytest.fixture
def worker(redis_url: str, models: Path) -> Iterator[Worker]:
    with Worker(redis_url, models, env=ANY_PORT) as worker:
        yield worker


def outcomes(seen: Scraped) -> dict[str, float]:
    """Requests of m by outcome, without those that are none."""
    found = {each: seen("inferq_requests_total", model="m", outcome=each) for each in OUTCOMES}
    return {outcome: count for outcome, count in found.items() if count}


def once_counted(worker: Worker, requests: int) -> Scraped:
    """A scrape that knows how so many requests ended, and of all their batches."""
    url = metrics_url(worker)

    def all_told() -> Scraped | None:
        seen = scrape(url)
        return seen if sum(outcomes(seen).values()) >= requests else None

    seen = until(all_told, 30, f"{requests} requests are counted")
    assert seen is not None
    return seen


def answers(pending: list[Pending]) -> dict[str, int]:
    """How `pending` ended for their client, by the class of the error; "" for a result."""
    found: dict[str, int] = {}
    for each in pending:
        try:
            each.result(60)
            name = ""
        except (EngineError, InvalidInput) as error:
            name = type(error).__name__
        found[name] = found.get(name, 0) + 1
    return found


def test_every_documented_metric_is_exposed_under_load_and_no_other(
    redis_url: str, models: Path
) -> None:
    env = {**TWO_GPUS, **ANY_PORT, "INFERQ_GPU": "1"}
    (models / "bad" / "1").mkdir(parents=True)
    with Worker(redis_url, models, env=env, bad=["bad"]) as worker, Client(redis_url) as client:
        values = [numbered(FAULT_RAISE if n == 0 else n) for n in range(500)]
        pending = [client.submit("m", {"x": value}) for value in values]
        with pytest.raises(EngineError):
            pending[0].result(30)
        busy = until(
            lambda: (seen := scrape(metrics_url(worker)))("inferq_request_failures_total") and seen
        )
        assert isinstance(busy, Scraped)
        assert busy.described() == {**documented("worker"), **documented("GPU worker")}
        assert busy("inferq_gpu_memory_total_bytes", gpu="1") == 80 << 30
        assert busy("inferq_worker_info", device="gpu1 No Card 1") == 1
        answers(pending)


def test_names_follow_prometheus_conventions(worker: Worker) -> None:
    text = read(metrics_url(worker))
    for name, family in scrape(metrics_url(worker)).families.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert family.documentation.strip()
        assert name.endswith("_total") == (family.type == "counter")
        assert not re.search(r"_(ms|milliseconds|micros|percent|mb|kb|mhz)(_|$)", name)
        assert text.count(f"# TYPE {name} ") == 1
    opened = {"Accept": "application/openmetrics-text; version=1.0.0"}
    assert read(metrics_url(worker), opened).endswith("# EOF\n")


def test_sums_are_what_the_client_counted(redis_url: str, worker: Worker) -> None:
    values = [
        np.full((1 + n % 3, 4), FAULT_RAISE if n % 50 == 7 else n, np.float32) for n in range(600)
    ]
    place = urlsplit(metrics_url(worker))
    with ExitStack() as stack, Client(redis_url) as client:
        for _ in range(8):  # scrapers that hang
            peer = socket.create_connection((place.hostname, place.port), timeout=10)
            stack.enter_context(peer).sendall(b"GET /metrics HTTP/1.1\r\n")
        got = answers([client.submit("m", {"x": value}) for value in values])
    assert got == {"": 588, "EngineError": 12}
    rows = sum(len(value) for value in values if value[0, 0] != FAULT_RAISE)
    seen = once_counted(worker, 600)
    assert outcomes(seen) == {"success": 588, "failure": 12}
    assert seen("inferq_request_failures_total", code="engine_error") == 12
    assert seen("inferq_request_duration_seconds_count") == 600
    parts = ["queue", "compute_input", "compute_infer", "compute_output", "settle"]
    for part in parts:
        assert seen(f"inferq_request_{part}_seconds_count") == 588
    assert seen("inferq_batch_rows_sum") == rows
    batches = seen("inferq_batch_rows_count")
    assert seen("inferq_batch_padding_rows_count") == batches
    assert rows + seen("inferq_batch_padding_rows_sum") == 8 * batches
    assert seen("inferq_requests_waiting") == seen("inferq_requests_computing") == 0
    busy = seen("inferq_lane_busy_seconds_total")
    assert busy >= 0.002 * batches
    assert seen("inferq_lanes") == 2
    assert seen("inferq_batch_max_rows") == seen("inferq_batch_target_rows") == 8


def test_the_parts_of_a_requests_time_add_up(redis_url: str, worker: Worker) -> None:
    began = time.monotonic()
    with Client(redis_url) as client:
        answers([client.submit("m", {"x": numbered(n)}) for n in range(300)])
    took = time.monotonic() - began
    seen = once_counted(worker, 300)
    parts = ["queue", "compute_input", "compute_infer", "compute_output", "settle"]
    sums = {part: seen(f"inferq_request_{part}_seconds_sum") for part in parts}
    whole = seen("inferq_request_duration_seconds_sum")
    assert sum(sums.values()) == pytest.approx(whole, rel=1e-6)
    assert sums["compute_infer"] >= 300 * 0.002
    assert 300 * 0.002 < whole < 300 * took


def test_what_ends_without_being_computed_counts_and_what_goes_on_does_not(
    redis: Redis, redis_url: str, worker: Worker
) -> None:
    seconds, _ = redis.time()
    passed: dict[str, Any] = {
        "sent_ms": seconds * 1000.0 - 5_000,
        "deadline_ms": seconds * 1000.0 - 1_000,
    }
    given_up, poison = message("m", numbered(1))
    redis.hset(NAMES.attempts("m"), given_up, 3)
    again, second = message("m", numbered(2))
    redis.hset(NAMES.attempts("m"), again, 1)
    _, late = message("m", numbered(3), **passed)
    expired = envelopes.request(4, headers={"expires": "2020-01-01T00:00:00+00:00"})
    wrong = envelopes.envelope(envelopes.body({"inputs": {"x": "no tensor"}}))
    foreign = envelopes.envelope(envelopes.body({}), headers={"task": "celery.ping"})
    for raw in (b"no message", poison, second, late, expired, wrong, foreign):
        redis.lpush(NAMES.queue("m"), raw)
    with stock_app(redis_url) as app:
        x = {"x": {"dtype": "<f4", "shape": [1, 4], "data": "AACAPwAAgD8AAIA/AACAPw=="}}
        app.send_task(TASK, kwargs={"inputs": x}, queue=queue_of("m"), countdown=3600)
        done = app.send_task(TASK, kwargs={"inputs": x}, queue=queue_of("m"))
        done.get(timeout=30)
    until(lambda: redis.zcard(NAMES.scheduled) == 1, what="the one with an ETA is kept")
    seen = once_counted(worker, 8)
    assert outcomes(seen) == {"success": 2, "failure": 3, "revoked": 1, "dead_letter": 2}
    assert seen("inferq_request_failures_total", code="deadline_exceeded") == 1
    assert seen("inferq_request_failures_total", code="invalid_input") == 1
    assert seen("inferq_request_failures_total", code="not_registered") == 1
    assert seen("inferq_request_retries_total") == 3, "two of three for the dead letter, and one"
    assert seen("inferq_request_duration_seconds_count") == 8
    assert seen("inferq_request_queue_seconds_count") == 2
    assert seen("inferq_batch_rows_sum") == 2


def test_a_cancelled_request_that_is_computed_all_the_same_is_overtaken(
    redis_url: str, worker: Worker
) -> None:
    url = metrics_url(worker)
    with Client(redis_url) as client:
        client.infer("m", {"x": numbered(0)}, timeout=30)
        worker.pause()
        try:
            pending = client.submit("m", {"x": numbered(1)})
            assert pending.cancel()
        finally:
            worker.resume()
        assert outcomes(once_counted(worker, 2)) == {"success": 1, "overtaken": 1}
        seen = scrape(url)
        assert seen("inferq_request_settle_seconds_count") == 2


def test_a_result_whose_answer_was_lost_is_sent_again_and_counts_once(
    redis: Redis, redis_url: str, redis_server: EmbeddedRedis, models: Path
) -> None:
    proxy = CommandProxy(("127.0.0.1", redis_server.port))
    try:
        with Worker(proxy.url, models, env=ANY_PORT) as worker, Client(redis_url) as client:
            client.infer("m", {"x": numbered(0)}, timeout=30)
            for n in range(3):
                proxy.arm(10_000, lost_trip=1)  # that of the claim passes
                pending = client.submit("m", {"x": numbered(n)})
                stored = partial(redis.exists, NAMES.meta(pending.request_id))
                until(stored, what="its result is stored")
                assert proxy.seen.count("MULTI") == 2, "and the worker has not heard of it"
                proxy.disarm()
                proxy.cut()
                pending.result(30)
                until(lambda: nothing_is_held(redis), what="it is settled again")
            seen = once_counted(worker, 4)
            assert outcomes(seen) == {"success": 4}
            assert seen("inferq_request_settle_seconds_count") == 4
    finally:
        proxy.close()


def test_stats_are_published_while_the_worker_lives(
    redis: Redis, redis_url: str, models: Path
) -> None:
    with (
        Worker(redis_url, models, name="one") as one,
        Worker(redis_url, models, name="two") as two,
        Client(redis_url) as client,
    ):
        answers([client.submit("m", {"x": numbered(n)}) for n in range(100)])

        def all_told() -> list[WorkerStats]:
            found = read_stats(redis, NAMES)
            told = sum(each.outcomes["success"] for stats in found for each in stats.models)
            return found if told == 100 and len(found) == 2 else []

        found = until(all_told, 30, "both have published")
        assert [stats.node.partition("@")[0] for stats in found] == ["one", "two"]
        assert [stats.pid for stats in found] == [one.pid, two.pid]
        assert all(stats.state == "serving" and stats.redis_up for stats in found)
        key = NAMES.stats(found[0].incarnation)
        assert 0 < redis.ttl(key) <= EXPIRES_S
        stranger = msgspec.msgpack.encode({"of": "another version"})
        for raw in (b"\xc1 no msgpack", stranger):
            redis.zadd(NAMES.leases, {f"stranger{len(raw)}": 9e15})
            redis.set(NAMES.stats(f"stranger{len(raw)}"), raw, ex=EXPIRES_S)
        assert len(read_stats(redis, NAMES)) == 2
        assert one.stop() == 0
        assert not redis.exists(key)


def test_a_port_that_is_taken_ends_the_worker_with_one_line(worker: Worker) -> None:
    assert worker.models is not None
    taken = re.sub(r"http://|/metrics", "", metrics_url(worker))
    second = Worker(worker.redis_url, worker.models, env={"INFERQ_METRICS": taken}, name="second")
    try:
        second.start()
        until(lambda: not second.alive, 30, "it ends")
        assert second.process.returncode == 1
        said = f"inferq: INFERQ_METRICS is '{taken}'; expected a HOST:PORT that is free here"
        assert said in second.log
        assert "Traceback" not in second.log
    finally:
        second.close()
    assert worker.alive


def test_the_child_after_a_killed_one_has_its_port(redis_url: str, models: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)}"
    url = f"http://{address}/metrics"
    with (
        SupervisedWorker(redis_url, models, args=["--metrics", address]) as worker,
        Client(redis_url) as client,
    ):
        first = worker.child()
        client.infer("m", {"x": numbered(1)}, timeout=30)
        born = scrape(url)("process_start_time_seconds")
        os.kill(first, signal.SIGKILL)
        until(lambda: worker.child() != first, 60, "another child serves")
        assert scrape(url)("process_start_time_seconds") > born
        client.infer("m", {"x": numbered(1)}, timeout=30)
        until(lambda: outcomes(scrape(url)) == {"success": 1}, what="it counts from its own start")


def test_of_several_gpus_the_port_counts_up(redis: Redis, redis_url: str, models: Path) -> None:
    class OnTwoGpus(Worker):
        def _command(self) -> list[str]:
            return [
                sys.executable, "-m", "inferq.workers.cli", "worker", "--models", str(models),
                "--gpu", "0,1", "--metrics", f"127.0.0.1:{port}",
            ]  # fmt: skip

    port = free_ports(2)
    with OnTwoGpus(redis_url, models, env={**TWO_GPUS, "TMPDIR": str(models.parent)}):
        until(lambda: redis.zcard(NAMES.serving("m")) == 2, 60, "both serve")
        for n in range(2):
            seen = scrape(f"http://127.0.0.1:{port + n}/metrics")
            assert seen("inferq_worker_info", device=f"gpu{n} No Card {n}") == 1


def test_health_is_told_while_it_loads_serves_and_stops(redis_url: str, tmp_path: Path) -> None:
    fake_model(
        tmp_path / "slow", "m", fake="delay_ms = 5000", knobs="max_batch_size = 1\nwarm_up = false"
    )

    def health(url: str) -> tuple[int, str]:
        try:
            return 200, read(url.replace("/metrics", "/healthz"))
        except HTTPError as problem:
            return problem.code, problem.read().decode()

    worker = Worker(redis_url, tmp_path / "slow", env=ANY_PORT)
    with worker:
        url = metrics_url(worker)
        until(lambda: health(url) == (200, "ok\n"), what="it says that it serves")
        with Client(redis_url) as client:
            pending = client.submit("m", {"x": numbered(1)})
            until(lambda: scrape(url)("inferq_requests_computing") == 1, what="it computes")
            worker.process.terminate()
            until(lambda: health(url) == (503, "it is stopping\n"), what="it says that it stops")
            assert scrape(url)("inferq_worker_state", state="stopping") == 1
            pending.result(30)
