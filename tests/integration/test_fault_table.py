"""Where stock Celery or celery-batches lose, wedge or repeat a request: one test for each fault."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import redis as redis_py
from helpers.repository import fake_model, message, numbered, push
from helpers.results import expect, held_by, meta_of, nothing_is_held, outputs_of
from helpers.wait import until
from helpers.worker import SupervisedWorker, Worker
from redis import Redis

from inferq.shared.names import Names
from inferq.workers.engines.fake import FAULT_RAISE
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
KNOBS = "lanes = 1\nmax_batch_size = 8\nwarm_up = false"
SHORT_LEASE = {"INFERQ_LEASE_S": "0.5"}
#: The promise, with the default lease.
RECOVERED_WITHIN_S = 15.0


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    fake_model(root, "m", knobs=KNOBS, fake="faults = true\ndelay_ms = 30")
    fake_model(root, "slow", knobs=KNOBS, fake="delay_ms = 3000")
    return root


def test_a_request_pushed_to_a_stopped_worker_that_is_then_killed_is_not_lost(
    redis_url: str, redis: Redis, models: Path
) -> None:
    """Stock: SIGSTOP a worker, push one, SIGKILL it, and the message is gone in 2 of 3 runs."""
    for n in range(3):
        with Worker(redis_url, models, ["m"], name=f"first{n}", env=SHORT_LEASE) as first:
            first.pause()
            sent = push(redis, "m", [float(n)])
            first.kill()
            with Worker(redis_url, models, ["m"], name=f"second{n}", env=SHORT_LEASE):
                expect(redis, sent)
    until(partial(nothing_is_held, redis), what="nothing is held")


def test_a_full_redis_at_delivery_neither_ends_the_worker_nor_loses_the_message(
    new_redis: Callable[..., EmbeddedRedis], models: Path
) -> None:
    """Stock: the worker exits and the message is lost."""
    server = new_redis(maxmemory=64 << 20)
    with redis_py.Redis.from_url(server.url) as redis, Worker(server.url, models, ["m"]) as worker:
        worker.pause()
        sent = push(redis, "m", [1.0, 2.0, 3.0])
        redis.set("filler", b"x" * (8 << 20))
        redis.config_set("maxmemory", 4 << 20)
        worker.resume()
        expect(redis, sent)
        assert worker.alive


def test_an_item_that_is_not_json_is_set_aside_and_the_worker_lives(
    redis_url: str, redis: Redis, models: Path
) -> None:
    """Stock: the worker dies."""
    with Worker(redis_url, models, ["m"]) as worker:
        redis.lpush(NAMES.queue("m"), b"\x80 not json")
        sent = push(redis, "m", [1.0])
        expect(redis, sent)
        until(lambda: redis.llen(NAMES.dead("m")) == 1, what="it is quarantined")
        assert worker.alive


def test_redis_killed_with_work_in_flight_ends_no_worker(
    new_redis: Callable[..., EmbeddedRedis], models: Path
) -> None:
    """Stock, with prefetch: the worker exits with an AttributeError."""
    server = new_redis(appendonly=True, args=("--appendfsync", "always"))
    with redis_py.Redis.from_url(server.url) as redis, Worker(server.url, models, ["m"]) as worker:
        for _ in range(3):
            sent = push(redis, "m", range(40))
            until(lambda: redis.keys(NAMES.running("*")), what="some compute")
            server.kill()
            server.start()
            expect(redis, sent)
        assert worker.alive


def test_a_batch_that_raises_leaves_nobody_pending(
    redis_url: str, redis: Redis, models: Path
) -> None:
    """celery-batches: all are acknowledged and stay PENDING for ever."""
    with Worker(redis_url, models, ["m"]):
        bad = push(redis, "m", [float(FAULT_RAISE)])
        sent = push(redis, "m", range(7))
        expect(redis, sent)
        (request_id,) = bad
        assert meta_of(redis, request_id)["result"]["exc_type"] == "EngineError"


def test_a_child_that_dies_in_a_batch_is_told_of_and_its_requests_are_served(
    redis_url: str, redis: Redis, models: Path
) -> None:
    """celery-batches: they stay unacknowledged and PENDING, and no line is logged."""
    with SupervisedWorker(redis_url, models, ["slow"]) as worker:
        sent = push(redis, "slow", [1.0, 2.0])
        until(lambda: held_by(redis, worker.incarnation) == 2, what="it holds both")
        os.kill(worker.child(), signal.SIGKILL)
        expect(redis, sent, 40)
        assert "ended by SIGKILL" in worker.log
        until(lambda: "recovered 2 requests" in worker.log, what="it says so")


@pytest.mark.parametrize(
    ("old", "new", "names_reason"),
    [
        (b"application/x-msgpack", b"application/x-python-serialize", "content type"),
        (b'"body":"', b'"body":"%%%', "body"),
    ],
    ids=["content disallowed", "decode error"],
)
def test_content_that_cannot_be_taken_is_a_failure_its_client_gets(
    redis_url: str, redis: Redis, models: Path, old: bytes, new: bytes, names_reason: str
) -> None:
    """Stock: rejected or acknowledged without a FAILURE, and the client waits for ever."""
    request_id, raw = message("m", numbered(1))
    assert old in raw
    with Worker(redis_url, models, ["m"]) as worker:
        redis.lpush(NAMES.queue("m"), raw.replace(old, new))
        meta = meta_of(redis, request_id)
        assert meta["status"] == "FAILURE"
        assert names_reason in str(meta["result"]["exc_message"])
        assert worker.alive


def test_what_a_killed_worker_held_is_served_within_15_s(
    redis_url: str, redis: Redis, models: Path
) -> None:
    """Stock with acks_late: redelivered after 3,600 s and up to 100 s more."""
    with (
        Worker(redis_url, models, ["slow"], name="first") as first,
        Worker(redis_url, models, ["m"], name="spare") as spare,
    ):
        sent = push(redis, "slow", [1.0, 2.0])
        until(lambda: held_by(redis, first.incarnation) == 2, what="it holds both")
        first.kill()
        killed = time.monotonic()
        until(lambda: redis.llen(NAMES.queue("slow")) == 2, 30, "both are in their queue again")
        assert time.monotonic() - killed <= RECOVERED_WITHIN_S
        until(lambda: "recovered 2 requests" in spare.log, what="the spare one says so")
        with Worker(redis_url, models, ["slow"], name="second"):
            expect(redis, sent)


def test_a_job_longer_than_its_lease_is_run_once(
    redis_url: str, redis: Redis, models: Path
) -> None:
    """Stock: a job longer than the visibility timeout runs twice. (An engine call of 60 s with the
    default lease: test_lease.)"""
    with (
        Worker(redis_url, models, ["slow"], name="a", env=SHORT_LEASE),
        Worker(redis_url, models, ["slow"], name="b", env=SHORT_LEASE) as b,
    ):
        (request_id,) = push(redis, "slow", [1.0])
        meta = meta_of(redis, request_id)
        assert meta["receipt"]["compute_ms"] >= 6 * 500
        assert meta["receipt"]["attempt"] == 1
        assert "recovered" not in b.log


def test_a_request_that_is_pushed_twice_has_one_result_the_first(
    redis_url: str, redis: Redis, models: Path
) -> None:
    """Stock: the second run's result replaces the first's."""
    request_id, raw = message("m", numbered(1))
    _, other = message("m", numbered(2), request_id)
    with Worker(redis_url, models, ["m"]):
        redis.lpush(NAMES.queue("m"), raw)
        outputs_of(redis, request_id)
        first = redis.get(NAMES.meta(request_id))
        with redis.pubsub(ignore_subscribe_messages=True) as waiting:  # type: ignore[no-untyped-call]
            waiting.subscribe(NAMES.meta(request_id))
            until(lambda: redis.pubsub_numsub(NAMES.meta(request_id))[0][1] == 1)
            redis.lpush(NAMES.queue("m"), raw, other)
            until(lambda: redis.llen(NAMES.queue("m")) == 0, what="they are claimed")
            until(partial(nothing_is_held, redis), what="they are settled")
            told = until(lambda: waiting.get_message(timeout=1), what="who waits is told")
        assert redis.get(NAMES.meta(request_id)) == first == told["data"]
