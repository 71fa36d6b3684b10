"""What a dead worker held goes back to where it came from, in the order it had there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.repository import fake_model, message, numbered
from helpers.results import held_by
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.shared.lua import source
from inferq.shared.names import Names
from inferq.workers.claims.recovery import (
    RECOVERY_LEASE_MS,
    SCAN_EVERY_S,
    Recoverer,
    decoding_field,
)

NAMES = Names()
STEPS = (0, 3, 6, 9)
Recover = Callable[..., int | None]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    knobs = "lanes = 1\nmax_batch_size = 4\nwarm_up = false"
    fake_model(root, "m", knobs=knobs, fake="delay_ms = 300")
    return root


@pytest.fixture
def recover(redis_url: str) -> Iterator[Recover]:
    """What any worker does once it finds a lease run out, or is told that its holder is dead."""
    with Redis.from_url(redis_url) as client:
        yield Recoverer(client, NAMES, lease_s=10.0).recover


def items(redis: Redis, step: int = 0) -> list[bytes]:
    found = redis.lrange(NAMES.queue("m", step), 0, -1)
    return [item for item in found if isinstance(item, bytes)]


def keys(redis: Redis, pattern: str = "*") -> set[str]:
    return {key.decode() for key in redis.keys(pattern) if isinstance(key, bytes)}


def test_claims_of_a_killed_worker_come_back_in_order_to_the_right_priority(
    redis_url: str, redis: Redis, models: Path, recover: Recover
) -> None:
    for n in range(24):
        step = (0, 3, 6, 9)[n % 4]
        redis.lpush(NAMES.queue("m", step), message("m", numbered(n), priority=step)[1])
    before = [items(redis, step) for step in STEPS]
    with Worker(redis_url, models) as worker:
        until(lambda: held_by(redis, worker.incarnation) >= 8, what="it computes and has claimed")
        worker.kill()
        assert held_by(redis, worker.incarnation) > 0
        assert [items(redis, step) for step in STEPS] != before
        assert keys(redis, NAMES.meta("*")) == set()
        assert recover(worker.incarnation, dead=True)
        assert recover(worker.incarnation, dead=True) is None, "once is enough"
    assert [items(redis, step) for step in STEPS] == before
    attempts = NAMES.attempts("m")
    assert keys(redis, "inferq:1:*") <= {NAMES.model("m"), NAMES.serving("m"), attempts}
    counted = {str(name, "utf-8"): int(n) for name, n in redis.hgetall(attempts).items()}  # type: ignore[arg-type]
    computing = [name for name in counted if not name.startswith("#")]
    assert 1 <= len(computing) <= 8, "one batch was computing and one was the lane's next"
    assert set(counted.values()) == {1}


def test_a_claim_that_was_half_settled_comes_back_without_what_was_settled(
    redis_url: str, redis: Redis, models: Path, recover: Recover
) -> None:
    sent = dict(message("m", numbered(n)) for n in range(8))
    redis.lpush(NAMES.queue("m"), *sent.values())
    with Worker(redis_url, models) as worker:
        until(lambda: redis.keys(NAMES.meta("*")), what="something is settled")
        worker.kill()
        settled = {each for each in sent if redis.exists(NAMES.meta(each))}
        recover(worker.incarnation, dead=True)
    assert 0 < len(settled) < len(sent)
    left = [raw for each, raw in sent.items() if each not in settled]
    assert items(redis) == left[::-1]


def hold(redis: Redis, i: str, claims: dict[tuple[int, int], list[bytes]], ends_ms: float) -> None:
    """What an incarnation holds in Redis: (number, step) → messages, oldest first; not decoded."""
    redis.set(NAMES.fence(i), 1)
    redis.zadd(NAMES.leases, {i: ends_ms})
    for (number, step), messages in claims.items():
        key = NAMES.claim(i, number, "m", step)
        redis.hset(NAMES.claims(i), key, 0)
        redis.lpush(key, *messages)


def test_a_lease_that_has_not_run_out_is_nobody_elses(redis: Redis, recover: Recover) -> None:
    hold(redis, "alive", {(1, 0): [b"a"]}, ends_ms=4e12)
    assert recover("alive") is None
    assert recover("unknown") is None
    assert redis.exists(NAMES.fence("alive")) == 1
    assert redis.llen(NAMES.claim("alive", 1, "m", 0)) == 1


def test_older_claims_go_before_newer_ones_and_both_before_what_was_not_claimed(
    redis: Redis, recover: Recover
) -> None:
    redis.lpush(NAMES.queue("m"), b"f", b"g")
    hold(
        redis,
        "dead",
        {(2, 0): [b"", b"b"], (10, 0): [b"c", b"", b"e"], (9, 3): [b"x"], (3, 3): [b"", b""]},
        ends_ms=1.0,
    )
    assert recover("dead") == 4
    assert items(redis) == [b"g", b"f", b"e", b"c", b"b"]
    assert items(redis, 3) == [b"x"]
    left = (NAMES.queue("m"), NAMES.queue("m", 3), NAMES.attempts("m"))
    assert keys(redis) == set(left)


def test_what_was_not_decoded_is_suspected_once_and_only_a_proven_culprit_is_counted_on(
    redis: Redis, recover: Recover
) -> None:
    """However many poisons stand in one claim, no innocent neighbour reaches max_attempts."""
    for death in range(1, 4):
        redis.delete(NAMES.queue("m"))
        hold(redis, f"dead{death}", {(1, 0): [b"poison", b"innocent"]}, ends_ms=1.0)
        field = decoding_field(b"poison")
        if death > 1:
            redis.sadd(NAMES.running(f"dead{death}"), f"m/{field}")
        assert recover(f"dead{death}") == 2
        counts = redis.hgetall(NAMES.attempts("m"))
        assert counts == {
            field.encode(): str(death).encode(),
            decoding_field(b"innocent").encode(): b"1",
        }


def test_a_recoverer_that_died_halfway_is_followed_by_another(
    redis: Redis, recover: Recover
) -> None:
    hold(redis, "dead", {(1, 0): [b"a", b"b"]}, ends_ms=1.0)
    redis.sadd(NAMES.running("dead"), "m/one")
    revoke = redis.register_script(source("revoke"))
    granted = revoke(
        keys=[NAMES.leases, NAMES.fence("dead"), NAMES.running("dead")],
        args=["dead", 10_000, NAMES.attempts(""), 0, 60],
    )
    assert granted == 1
    assert recover("dead") is None, "the recovery has a lease of its own"
    redis.zadd(NAMES.leases, {"dead": 1.0})
    assert recover("dead") == 2
    assert items(redis) == [b"b", b"a"]
    assert redis.hget(NAMES.attempts("m"), "one") == b"1", "counted once"
    assert redis.ttl(NAMES.attempts("m")) > 0


def test_a_recoverer_that_died_halfway_costs_no_more_than_is_promised(
    redis_url: str, redis: Redis
) -> None:
    hold(redis, "dead", {(1, 0): [b"message"]}, ends_ms=1.0)
    revoke = redis.register_script(source("revoke"))
    granted = revoke(
        keys=[NAMES.leases, NAMES.fence("dead"), NAMES.running("dead")],
        args=["dead", RECOVERY_LEASE_MS, NAMES.attempts(""), 0, 60],
    )
    assert granted == 1
    lease_s, recovery_s = 10.0, RECOVERY_LEASE_MS / 1000
    assert lease_s + recovery_s + 2 * SCAN_EVERY_S <= 15.0
    with Redis.from_url(redis_url) as client:
        recoverer = Recoverer(client, NAMES, lease_s=0.5)
        recoverer.start()
        try:
            within = recovery_s + 2 * SCAN_EVERY_S + 2.0
            until(lambda: items(redis) == [b"message"], within, "another has recovered it")
        finally:
            recoverer.stop()


def test_what_one_left_behind_does_not_keep_the_others_from_being_recovered(
    redis_url: str, redis: Redis
) -> None:
    for i in ("a", "b", "dead"):
        hold(redis, i, {(1, 0): [b"message"]} if i == "dead" else {}, ends_ms=1.0)
    redis.hset(NAMES.claims("a"), "no claim's name", 0)
    redis.set(NAMES.running("b"), "no set")
    with Redis.from_url(redis_url) as client:
        recoverer = Recoverer(client, NAMES, lease_s=0.5)
        recoverer.start()
        try:
            until(lambda: items(redis) == [b"message"], what="the third is recovered")
        finally:
            recoverer.stop()
