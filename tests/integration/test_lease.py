"""A worker may settle exactly as long as it renews its lease, however long its batches take."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import redis as redis_py
from celery import Celery
from helpers.repository import fake_model, message, numbered
from helpers.results import held_by, meta_of, nothing_is_held, outputs_of
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.shared.names import Names
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
#: Shorter than the default of 10 s: what counts is how many leases the call lasts.
LEASE_S = 6.0
LONG_S = 6 * LEASE_S
KNOBS = "lanes = 1\nmax_batch_size = 4\nwarm_up = false"


@dataclass
class LongCall:
    """One engine call of six leases on its own Redis, and what was seen of the lease meanwhile."""

    redis: redis_py.Redis
    worker: Worker
    second: Worker
    request_id: str
    #: Lowest ms that were left of the lease, and how often it was seen renewed.
    least_left_ms: float = float("inf")
    renewals: int = 0
    #: What went wrong meanwhile.
    problems: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        last, deadline = 0.0, time.monotonic() + LONG_S + 30
        while time.monotonic() < deadline and not self.ended.wait(0.1):
            if self.redis.exists(NAMES.meta(self.request_id)):
                return
            seconds, micros = self.redis.time()
            ends = self.redis.zscore(NAMES.leases, self.worker.incarnation) or 0.0
            self.least_left_ms = min(self.least_left_ms, ends - seconds * 1000 - micros / 1000)
            self.renewals += ends > last
            last = ends
            if not self.redis.exists(NAMES.fence(self.worker.incarnation)):
                self.problems.append("the fence is gone")
            if held := held_by(self.redis, self.second.incarnation):
                self.problems.append(f"the second worker holds {held}")


@pytest.fixture(scope="module", autouse=True)
def long_call(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LongCall]:
    """Begins with the module's first test and runs beside the others."""
    root = tmp_path_factory.mktemp("models")
    fake_model(root, "long", knobs=KNOBS, fake=f"delay_ms = {LONG_S * 1000}")
    env = {"INFERQ_LEASE_S": str(LEASE_S)}
    with (
        EmbeddedRedis(redis_kind) as server,
        redis_py.Redis.from_url(server.url) as client,
        Worker(server.url, root, name="long1", env=env) as first,
    ):
        request_id, raw = message("long", numbered(1))
        client.lpush(NAMES.queue("long"), raw)
        until(lambda: held_by(client, first.incarnation) == 1, what="the first worker took it")
        with Worker(server.url, root, name="long2", env=env) as second:
            call = LongCall(client, first, second, request_id)
            watcher = threading.Thread(target=call.watch)
            watcher.start()
            try:
                yield call
            finally:
                call.ended.set()
                watcher.join(10)
                first.kill()  # its drain would wait for a call that nobody asks about any more


def test_one_engine_call_of_six_leases_keeps_its_lease_and_is_not_run_twice(
    long_call: LongCall,
) -> None:
    meta = meta_of(long_call.redis, long_call.request_id, LONG_S + 20)
    assert meta["status"] == "SUCCESS"
    assert meta["receipt"]["attempt"] == 1
    assert meta["receipt"]["compute_ms"] >= LONG_S * 1000
    assert meta["receipt"]["worker"].startswith("long1@")
    assert long_call.problems == []
    assert long_call.renewals >= LONG_S / LEASE_S, "it is renewed every third of it"
    assert long_call.least_left_ms > 300 * LEASE_S, "and never runs low"
    app = Celery(broker=f"redis://127.0.0.1:{_port(long_call.redis)}/0", set_as_current=False)
    stats = app.control.inspect(timeout=10, limit=2).stats() or {}
    claimed = {name.partition("@")[0]: each["inferq_claimed"] for name, each in stats.items()}
    assert claimed == {"long1": 1, "long2": 0}
    assert "recovered" not in long_call.second.log
    app.close()


def _port(client: redis_py.Redis) -> int:
    return int(client.connection_pool.connection_kwargs["port"])


# --- a lease that is lost ------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    fake_model(root, "m", knobs=KNOBS, fake="delay_ms = 300")
    return root


def test_a_worker_that_slept_past_its_lease_overwrites_nothing_and_serves_on(
    redis_url: str, redis: Redis, models: Path
) -> None:
    env = {"INFERQ_LEASE_S": "1"}
    with Worker(redis_url, models, name="sleeper", env=env) as sleeper:
        sent = dict(message("m", numbered(n)) for n in range(4))
        redis.lpush(NAMES.queue("m"), *sent.values())
        running = NAMES.running(sleeper.incarnation)
        until(lambda: redis.scard(running) > 0, what="it computes")
        sleeper.pause()
        held = held_by(redis, sleeper.incarnation)
        assert held > 0
        with Worker(redis_url, models, name="other", env=env) as other:
            results = {each: outputs_of(redis, each)["x"] for each in sent}
            before = {each: redis.get(NAMES.meta(each)) for each in sent}
            for n, result in enumerate(results.values()):
                np.testing.assert_array_equal(result, numbered(n))
            assert "recovered" in other.log
            sleeper.resume()
            until(lambda: f"lease of {sleeper.incarnation} is lost" in sleeper.log)
            known = {sleeper.incarnation, other.incarnation}
            (reborn,) = until(lambda: serving(redis) - known, what="a new incarnation")
            # As if its last words, written before it knew, had come in late.
            redis.hset(
                NAMES.claims(sleeper.incarnation), NAMES.claim(sleeper.incarnation, 1, "m", 0), 1
            )
            redis.sadd(NAMES.running(sleeper.incarnation), "m/long settled")
            other.stop()
        assert {each: redis.get(NAMES.meta(each)) for each in sent} == before
        again, raw = message("m", numbered(9))
        redis.lpush(NAMES.queue("m"), raw)
        meta = meta_of(redis, again)
        assert meta["status"] == "SUCCESS"
        assert meta["receipt"]["worker"].startswith("sleeper@")
        assert serving(redis) == {reborn}
        until(lambda: redis.zrange(NAMES.leases, 0, -1) == [reborn.encode()], what="all is done")
        assert redis.keys(NAMES.fence("*")) == [NAMES.fence(reborn).encode()]
        until(lambda: nothing_is_held(redis), what="nothing is held any more")


def serving(redis: Redis) -> set[str]:
    """The incarnations that serve model m."""
    members = redis.zrange(NAMES.serving("m"), 0, -1)
    return {member.decode() for member in members if isinstance(member, bytes)}
