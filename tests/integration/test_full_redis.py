"""A Redis at its maxmemory (noeviction) loses nothing and crashes nobody: what waits is served."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import redis as redis_py
from helpers.repository import fake_model, message, numbered
from helpers.results import held_by, meta_of, nothing_is_held, outputs_of
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.producer import Client
from inferq.shared.errors import RedisUnavailable
from inferq.shared.names import Names
from inferq.workers.embedded import EmbeddedRedis
from inferq.workers.engines.fake import FAULT_EXIT

NAMES = Names()
MAXMEMORY = 64 << 20
SERVER = {"maxmemory": MAXMEMORY}
SHORT_LEASE = {"INFERQ_LEASE_S": "1"}
#: Columns that make a result larger than what is sent once and published by a script.
WIDE = 8_192


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    fake_model(root, "m", knobs="lanes = 1\nmax_batch_size = 4\nwarm_up = false",
               fake="faults = true\ndelay_ms = 20")  # fmt: skip
    fake_model(root, "wide", knobs="lanes = 1\nmax_batch_size = 4\nwarm_up = false", width=WIDE)
    return root


def fill(redis: Redis) -> None:
    """Full, and far beyond: what is freed while serving makes no room."""
    redis.set("filler", b"x" * (MAXMEMORY // 8))
    redis.config_set("maxmemory", MAXMEMORY // 16)
    with pytest.raises(redis_py.OutOfMemoryError):
        redis.set("another", b"x")


@pytest.mark.parametrize("model", ["m", "wide"])
def test_what_is_queued_is_served_while_redis_is_full(
    server: EmbeddedRedis, redis: Redis, models: Path, model: str
) -> None:
    width = WIDE if model == "wide" else 4
    sent = dict(message(model, numbered(n, width)) for n in range(40))
    with Worker(server.url, models, [model]) as worker:
        worker.pause()
        redis.lpush(NAMES.queue(model), *sent.values())
        fill(redis)
        worker.resume()
        for n, request_id in enumerate(sent):
            outputs = outputs_of(redis, request_id)
            np.testing.assert_array_equal(outputs["x"], numbered(n, width))
        until(lambda: nothing_is_held(redis), what="nothing is held any more")
        assert worker.alive
        assert "Redis is full" in worker.log


def test_a_worker_that_starts_while_redis_is_full_serves_and_keeps_its_lease(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    sent = dict(message("m", numbered(n)) for n in range(10))
    redis.lpush(NAMES.queue("m"), *sent.values())
    fill(redis)
    with Worker(server.url, models, ["m"], env=SHORT_LEASE) as worker:
        for n, request_id in enumerate(sent):
            np.testing.assert_array_equal(outputs_of(redis, request_id)["x"], numbered(n))
        before = redis.zscore(NAMES.leases, worker.incarnation)
        assert before is not None
        until(partial(_renewed, redis, worker.incarnation, before), what="the lease is renewed")
        with redis_py.Redis.from_url(server.url) as other:
            assert other.exists(NAMES.fence(worker.incarnation))
        assert worker.stop() == 0
    assert redis.zcard(NAMES.leases) == 0


def _renewed(redis: Redis, incarnation: str, before: float) -> bool:
    score = redis.zscore(NAMES.leases, incarnation)
    assert score is not None, "its lease is gone"
    return score > before + 1_500


def test_a_dead_workers_claims_are_recovered_while_redis_is_full(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    with Worker(server.url, models, ["m"], name="first", env=SHORT_LEASE) as first:
        # The poison is counted although what is noted of it needs memory that is not there.
        sent = dict(message("m", numbered(FAULT_EXIT if n == 1 else n)) for n in range(12))
        first.pause()
        redis.lpush(NAMES.queue("m"), *sent.values())
        fill(redis)
        first.resume()
        first.process.wait(20)
    for survivors in range(3):
        with Worker(server.url, models, ["m"], name=f"next{survivors}", env=SHORT_LEASE) as worker:
            until(lambda w=worker: not w.alive or _all_done(redis, sent))  # type: ignore[misc]
            if worker.alive:
                break
    for n, request_id in enumerate(sent):
        if n == 1:
            assert meta_of(redis, request_id)["result"]["exc_type"] == "DeadLettered"
        else:
            np.testing.assert_array_equal(outputs_of(redis, request_id)["x"], numbered(n))


def _all_done(redis: Redis, sent: dict[str, bytes]) -> bool:
    return all(redis.exists(NAMES.meta(request_id)) for request_id in sent)


def test_a_push_that_a_full_redis_refuses_is_an_error_and_what_was_accepted_comes(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    with Worker(server.url, models, ["m"]) as worker, Client(server.url) as client:
        accepted = [client.submit("m", {"x": numbered(n)}) for n in range(20)]
        fill(redis)
        with pytest.raises(RedisUnavailable, match="maxmemory"):
            client.submit("m", {"x": numbered(1)})
        for n, pending in enumerate(accepted):
            np.testing.assert_array_equal(pending.result(15).outputs["x"], numbered(n))
        redis.config_set("maxmemory", 0)
        assert client.infer("m", {"x": numbered(5)}, timeout=10).outputs["x"][0, 0] == 5
        until(lambda: held_by(redis, worker.incarnation) == 0)
