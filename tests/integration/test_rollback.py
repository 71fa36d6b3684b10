"""A Redis that comes back as it was some seconds ago (AOF everysec, failover) costs nothing."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.aof import AOF_ARGS, after_last, aof_size, crash_back_to
from helpers.metrics import metrics_url, scrape
from helpers.repository import fake_model, message, numbered
from helpers.results import held_by, meta_of, nothing_is_held, outputs_of
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.producer import Client
from inferq.shared.connect import redis_client
from inferq.shared.names import Names
from inferq.workers.claims import recovery
from inferq.workers.claims.rollback import KEEP_REQUESTS
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
SERVER = {"appendonly": True, "args": AOF_ARGS}
#: Columns of a request that is claim-checked.
WIDE = 16_384
#: Requests that are settled beside a claim, so that what was settled before is kept no more.
MANY = KEEP_REQUESTS + 600


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    fake_model(
        root, "m", knobs="lanes = 1\nmax_batch_size = 4\nwarm_up = false", fake="delay_ms = 10"
    )
    fake_model(
        root, "slow", knobs="lanes = 1\nmax_batch_size = 4\nwarm_up = false", fake="delay_ms = 1000"
    )
    fake_model(root, "wide", knobs="warm_up = false", width=WIDE)
    fake_model(root, "quick", knobs="lanes = 1\nmax_batch_size = 64\nwarm_up = false")
    fake_model(
        root, "long", knobs="lanes = 1\nmax_batch_size = 4\nwarm_up = false", fake="delay_ms = 4000"
    )
    return root


def test_results_that_redis_forgot_are_stored_again_as_they_were(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    """Also of a claim that was settled whole: nothing of it runs again. No result counts again."""
    env = {"INFERQ_METRICS": "127.0.0.1:0"}
    with Worker(server.url, models, ["m"], env=env) as worker:
        sent = dict(message("m", numbered(n)) for n in range(10))
        redis.lpush(NAMES.queue("m"), *sent.values())
        before = aof_size(server)
        stored = {request_id: meta_of(redis, request_id) for request_id in sent}
        until(partial(nothing_is_held, redis))
        crash_back_to(server, before)
        assert {request_id: meta_of(redis, request_id) for request_id in sent} == stored
        until(partial(nothing_is_held, redis), what="nothing is held any more")
        seen = scrape(metrics_url(worker))
        assert seen("inferq_requests_total", outcome="success") == 10
        assert seen("inferq_requests_total", outcome="failure") == 0
        assert worker.alive


def test_a_claim_that_was_half_settled_is_settled_whole(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    """The worker knows it as half settled, Redis does not: both halves get their results."""
    with Worker(server.url, models, ["slow"]) as worker:
        late, raw = message("slow", numbered(0), deadline_ms=1.0)
        sent = dict(message("slow", numbered(n)) for n in range(3))
        redis.lpush(NAMES.queue("slow"), raw, *sent.values())
        stored = meta_of(redis, late)
        assert stored["result"]["exc_type"] == "DeadlineExceeded"
        crash_back_to(server, after_last(server, b"LMOVE", b"EXEC"))
        assert held_by(redis, worker.incarnation) == 4, "as it was right after the claim"
        for n, request_id in enumerate(sent):
            np.testing.assert_array_equal(outputs_of(redis, request_id)["x"], numbered(n))
        assert meta_of(redis, late) == stored
        until(partial(nothing_is_held, redis), what="nothing is held any more")


def settle_many(redis: Redis) -> None:
    """So much that what was settled before is not kept any more."""
    sent = dict(message("quick", numbered(n)) for n in range(MANY))
    redis.lpush(NAMES.queue("quick"), *sent.values())
    stored = partial(redis.exists, *map(NAMES.meta, sent))
    until(lambda: stored() == MANY, timeout=60.0, what="the others are settled")


@pytest.mark.parametrize("ended", [False, True], ids=["the rest computes", "the rest ended"])
def test_what_was_settled_longer_ago_than_is_kept_is_computed_again(
    server: EmbeddedRedis, redis: Redis, models: Path, ended: bool
) -> None:
    """Also where the end of its claim, at which that is deleted, is kept to be settled again."""
    with Worker(server.url, models, ["long", "quick"]) as worker:
        late, raw = message("long", numbered(0), deadline_ms=1.0)
        sent = dict(message("long", numbered(n)) for n in range(3))
        redis.lpush(NAMES.queue("long"), raw, *sent.values())
        assert meta_of(redis, late)["result"]["exc_type"] == "DeadlineExceeded"
        mark = after_last(server, b"LMOVE", b"EXEC")
        settle_many(redis)
        if ended:
            until(lambda: redis.exists(*map(NAMES.meta, sent)) == len(sent))
        crash_back_to(server, mark)
        assert held_by(redis, worker.incarnation) == 4, "as it was right after the claim"
        assert meta_of(redis, late, 30.0)["result"]["exc_type"] == "DeadlineExceeded"
        for n, request_id in enumerate(sent):
            np.testing.assert_array_equal(outputs_of(redis, request_id)["x"], numbered(n))
        until(partial(nothing_is_held, redis), timeout=30.0, what="nothing is held any more")
        assert worker.alive


def test_a_worker_whose_birth_was_forgotten_is_born_again(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    redis.set("something", "so that there is a file")
    before = aof_size(server)
    with Worker(server.url, models, ["m"]) as worker:
        crash_back_to(server, before)
        sent = dict(message("m", numbered(n)) for n in range(10))
        redis.lpush(NAMES.queue("m"), *sent.values())
        for n, request_id in enumerate(sent):
            np.testing.assert_array_equal(outputs_of(redis, request_id)["x"], numbered(n))
        assert not redis.exists(NAMES.fence(worker.incarnation))
        until(partial(nothing_is_held, redis), what="nothing is held any more")


def test_results_of_a_worker_whose_birth_was_forgotten_are_stored_again(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    redis.set("something", "so that there is a file")
    before = aof_size(server)
    with Worker(server.url, models, ["m"]):
        sent = dict(message("m", numbered(n)) for n in range(10))
        redis.lpush(NAMES.queue("m"), *sent.values())
        stored = {request_id: meta_of(redis, request_id) for request_id in sent}
        until(partial(nothing_is_held, redis))
        crash_back_to(server, before)
        assert not redis.exists(NAMES.queue("m")), "not even the requests are known"
        assert {request_id: meta_of(redis, request_id) for request_id in sent} == stored
        until(partial(nothing_is_held, redis), what="nothing is held any more")


def test_a_restart_that_forgets_nothing_repeats_nothing(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    """A request with an ETA that was settled just before is not put back once more."""
    redis.config_set("appendfsync", "always")
    with Worker(server.url, models, ["m"]) as worker:
        due = datetime.fromtimestamp(time.time() + 1, UTC).isoformat()
        early, raw = message("m", numbered(1))
        redis.lpush(NAMES.queue("m"), raw.replace(b'"eta": null', f'"eta": "{due}"'.encode()))
        until(lambda: redis.zcard(NAMES.scheduled) == 1, what="it is kept until it is due")
        meta_of(redis, early)
        server.kill()
        server.start()
        request_id, raw = message("m", numbered(2))
        redis.lpush(NAMES.queue("m"), raw)
        meta_of(redis, request_id)
        assert redis.keys(NAMES.scheduled + "*") == []
        until(partial(nothing_is_held, redis), what="nothing is held any more")
        assert worker.alive


def test_a_lease_that_ran_out_as_redis_went_back_may_be_renewed_first(
    server: EmbeddedRedis, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Redis is back before anybody who watches leases has noticed."""
    monkeypatch.setattr(recovery, "SCAN_EVERY_S", 2.0)
    lease_s = 4.0

    def scans() -> int:
        return int(redis.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0))

    with redis_client(server.url) as client:
        recoverer = recovery.Recoverer(client, NAMES, lease_s)
        recoverer.start()
        try:
            until(lambda: scans() >= 3, what="it has watched for a lease")
            redis.set(NAMES.fence("alive"), 1)
            redis.zadd(NAMES.leases, {"alive": time.time() * 1000 + 300})
            mark = aof_size(server)
            redis.zadd(NAMES.leases, {"alive": time.time() * 1000 + 60_000})
            renewed = time.monotonic()
            until(lambda: time.monotonic() > renewed + 0.4)
            crash_back_to(server, mark)
            back = time.monotonic()
            until(lambda: not redis.exists(NAMES.fence("alive")), what="it is taken for dead")
            assert time.monotonic() - back >= lease_s - 0.1
        finally:
            recoverer.stop()


def test_a_client_pushes_again_what_was_forgotten_with_its_payload(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    with Worker(server.url, models, ["wide"]) as worker, Client(server.url) as client:
        client.infer("wide", {"x": numbered(0, WIDE)}, timeout=15)
        before = aof_size(server)
        worker.pause()
        pending = [client.submit("wide", {"x": numbered(n, WIDE)}) for n in range(10)]
        assert redis.llen(NAMES.queue("wide")) == 10
        crash_back_to(server, before)
        worker.resume()
        for n, each in enumerate(pending):
            np.testing.assert_array_equal(each.result(30).outputs["x"], numbered(n, WIDE))
        until(lambda: not redis.keys("inferq:1:payload:*"), what="no payload is left")
