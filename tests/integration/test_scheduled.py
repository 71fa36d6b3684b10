"""A request with an ETA waits in Redis and returns to its own queue, as it was, when it is due."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import redis as redis_py
from helpers.wait import until

from inferq.shared.names import Names
from inferq.workers.claims.claim import Claim, Slot
from inferq.workers.claims.clock import RedisClock
from inferq.workers.claims.scheduled import ScheduledKeeper

NAMES = Names()


@pytest.fixture
def clock(redis: redis_py.Redis) -> RedisClock:
    return RedisClock()


@pytest.fixture
def scheduled(redis_url: str, clock: RedisClock) -> Iterator[ScheduledKeeper]:
    with redis_py.Redis.from_url(redis_url) as client:
        scheduled = ScheduledKeeper(client, NAMES, clock)
        yield scheduled
        scheduled.stop()


def keep(
    scheduled: ScheduledKeeper,
    redis: redis_py.Redis,
    message: bytes,
    due_ms: float,
    step: int = 0,
    *,
    times: int = 2,
) -> None:
    """What the data plane does with such a request, its MULTI sent twice.

    One that is due between the two is put back twice.
    """
    settlement = scheduled.keep(Slot(Claim("claim", "m", step, 1), 0), message, due_ms)
    for _ in range(times):
        with redis.pipeline(transaction=True) as pipe:
            for command in settlement.before:
                pipe.execute_command(*command)  # type: ignore[no-untyped-call]
            pipe.execute()
    assert settlement.after is not None
    settlement.after()


def queued(redis: redis_py.Redis, step: int = 0) -> list[bytes]:
    """The messages in a queue, in the order in which they would be claimed."""
    items: list[bytes] = redis.lrange(NAMES.queue("m", step), 0, -1)  # type: ignore[assignment]
    return items[::-1]


def test_a_request_returns_when_it_is_due_and_not_before(
    redis: redis_py.Redis, scheduled: ScheduledKeeper, clock: RedisClock
) -> None:
    scheduled.start()
    due = clock.now() + 1500
    keep(scheduled, redis, b"one", due)
    assert until(partial(queued, redis)) == [b"one"]
    assert due <= clock.now() < due + 1000
    until(lambda: not redis.keys(f"{NAMES.scheduled}*"), what="nothing of it is kept")


def test_requests_return_to_their_priority_in_the_order_of_their_etas(
    redis: redis_py.Redis, scheduled: ScheduledKeeper, clock: RedisClock
) -> None:
    """Ahead of what is queued already: they have waited long enough."""
    redis.lpush(NAMES.queue("m"), b"queued")
    now = clock.now()
    for n, step in ((3, 0), (1, 0), (2, 6), (2, 0)):
        keep(scheduled, redis, b"%d" % n, now - 100 + n, step)
    scheduled.start()
    until(lambda: len(queued(redis)) == 4)
    assert queued(redis) == [b"1", b"2", b"3", b"queued"]
    assert queued(redis, 6) == [b"2"]


@pytest.mark.usefixtures("kills_connections")
def test_many_that_are_due_at_once_all_return_though_connections_die(
    redis: redis_py.Redis, scheduled: ScheduledKeeper, clock: RedisClock
) -> None:
    for n in range(1000):
        keep(scheduled, redis, b"%d" % n, clock.now() + 300)
    scheduled.start()
    for _ in range(5):
        redis.client_kill_filter(_type="normal", skipme=True)
    until(lambda: len(queued(redis)) >= 1000)
    assert sorted(map(int, queued(redis))) == list(range(1000))
    assert not redis.keys(f"{NAMES.scheduled}*")


def test_two_workers_put_a_request_back_once(
    redis: redis_py.Redis, redis_url: str, scheduled: ScheduledKeeper, clock: RedisClock
) -> None:
    with redis_py.Redis.from_url(redis_url) as client:
        other = ScheduledKeeper(client, NAMES, clock)
        scheduled.start()
        other.start()
        for n in range(300):
            keep(scheduled, redis, b"%d" % n, clock.now() + n, times=1)
        until(lambda: not redis.exists(NAMES.scheduled))
        other.stop()
    assert sorted(map(int, queued(redis))) == list(range(300))
