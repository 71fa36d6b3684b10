"""What Redis forgot is settled again whatever breaks meanwhile, and however often."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from helpers.aof import AOF_ARGS, after_last, aof_size, crash_back_to
from helpers.envelopes import request
from helpers.hostile import links
from helpers.proxy import CommandProxy
from helpers.repository import claim_checked, fake_model, message, numbered
from helpers.results import meta_of, nothing_is_held
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.shared.names import Names
from inferq.workers.claims.rollback import KEEP_S
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
SERVER = {"appendonly": True, "args": AOF_ARGS}
#: MULTIs that settle, one request in each; a break every so many commands of settling them again.
MULTIS = 4
STEP, CUTS = 5, 40


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    fake_model(root, "m", knobs="lanes = 1\nmax_batch_size = 4\nwarm_up = false")
    fake_model(
        root, "slow", knobs="lanes = 1\nmax_batch_size = 4\nwarm_up = false", fake="delay_ms = 1000"
    )
    return root


@pytest.fixture
def proxy(server: EmbeddedRedis) -> Iterator[CommandProxy]:
    proxy = CommandProxy(("127.0.0.1", server.port))
    yield proxy
    proxy.close()


def settled_one_by_one(redis: Redis) -> dict[str, bytes]:
    """As many MULTIs settle as there are requests; what is stored of each."""
    stored: dict[str, bytes] = {}
    for n in range(MULTIS):
        request_id, raw = message("m", numbered(n))
        redis.lpush(NAMES.queue("m"), raw)
        meta_of(redis, request_id)
        until(partial(nothing_is_held, redis))
        stored[request_id] = raw_result(redis, request_id)
    return stored


def raw_result(redis: Redis, request_id: str) -> bytes:
    found = redis.get(NAMES.meta(request_id))
    return found if isinstance(found, bytes) else b""


def expect(redis: Redis, stored: dict[str, bytes], what: str) -> None:
    for request_id, raw in stored.items():
        found = until(partial(raw_result, redis, request_id), what=f"a result after {what}")
        assert found == raw, f"another result after {what}"


def cut(proxy: CommandProxy) -> None:
    proxy.disarm()
    proxy.cut()


@pytest.mark.parametrize("twice", [False, True], ids=["cut", "cut and back once more"])
def test_a_connection_that_breaks_anywhere_while_it_is_settled_again_costs_no_result(
    server: EmbeddedRedis, redis: Redis, models: Path, proxy: CommandProxy, twice: bool
) -> None:
    """Redis does not know these requests any more: only their worker can store them again."""
    with Worker(proxy.url, models, ["m"]) as worker:
        begun = aof_size(server)
        for k in range(0, CUTS, STEP):
            stored = settled_one_by_one(redis)
            proxy.arm(k, partial(cut, proxy))
            crash_back_to(server, begun)
            if twice and proxy.limited.wait(2.0):
                crash_back_to(server, begun)
            expect(redis, stored, f"a cut before command {k}")
            assert proxy.limited.is_set()
        assert worker.alive
        assert "is lost" not in worker.log


def test_an_answer_that_is_lost_while_it_is_settled_again_costs_no_result(
    server: EmbeddedRedis, redis: Redis, models: Path, proxy: CommandProxy
) -> None:
    with Worker(proxy.url, models, ["m"]):
        begun = aof_size(server)
        for trip in range(MULTIS):
            stored = settled_one_by_one(redis)
            proxy.arm(10_000, lost_trip=trip)
            crash_back_to(server, begun)
            until(partial(executed, proxy, trip), what=f"{trip} were settled again, and one more")
            cut(proxy)
            expect(redis, stored, f"the answer to number {trip} was lost")


def executed(proxy: CommandProxy, trip: int) -> bool:
    return proxy.seen.count("EXEC") > trip


def test_a_lease_that_is_lost_while_it_is_settled_again_costs_no_result(
    server: EmbeddedRedis, redis: Redis, models: Path, proxy: CommandProxy
) -> None:
    """Another worker took over what this one held; what that knew of results, nobody else does."""
    with Worker(proxy.url, models, ["m"]) as worker:
        begun = aof_size(server)
        stored = settled_one_by_one(redis)

        def lose() -> None:
            redis.delete(NAMES.fence(worker.incarnation))
            cut(proxy)

        proxy.arm(2, lose)
        crash_back_to(server, begun)
        assert proxy.limited.wait(15.0)
        expect(redis, stored, "the lease was lost")
        assert "is lost" in worker.log


def test_what_is_settled_again_is_kept_as_long_as_what_is_settled_first(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    """A Redis that was away for longer than results are kept crashes once more when it is back."""
    with Worker(server.url, models, ["m"]):
        begun = aof_size(server)
        stored = settled_one_by_one(redis)
        crash_back_to(server, begun, KEEP_S + 1.0)
        expect(redis, stored, "it was away")
        for request_id in settled_one_by_one(redis):
            assert redis.exists(NAMES.meta(request_id)), "so that what is old enough was dropped"
        crash_back_to(server, begun)
        expect(redis, stored, "it crashed once more")


def test_links_that_redis_forgot_are_published_again_and_nothing_is_computed_again(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    with Worker(server.url, models, ["m"]):
        request_id = str(uuid.uuid4())
        raw = request(1, embed={"callbacks": links(1)}, request_id=request_id)
        redis.lpush(NAMES.queue("m"), raw)
        meta_of(redis, request_id)
        stored = {request_id: raw_result(redis, request_id)}
        until(partial(nothing_is_held, redis))
        crash_back_to(server, after_last(server, b"LMOVE", b"EXEC"))
        until(lambda: redis.llen("nobody") == 1, what="its link is published")
        expect(redis, stored, "Redis went back")
        until(partial(nothing_is_held, redis))


def test_links_that_redis_forgot_before_their_request_was_settled_are_published_again(
    server: EmbeddedRedis, redis: Redis, models: Path, proxy: CommandProxy
) -> None:
    with Worker(proxy.url, models, ["slow"]):
        request_id = str(uuid.uuid4())
        raw = request(1, embed={"callbacks": links(1)}, request_id=request_id)
        redis.lpush(NAMES.queue("slow"), raw)
        until(lambda: redis.keys("inferq:1:claim:*"), what="it is claimed")
        claimed = aof_size(server)
        proxy.arm(0)
        until(lambda: redis.llen("nobody") == 1, what="its link is published")
        assert proxy.limited.wait(15.0), "it is to be settled"
        assert not redis.exists(NAMES.meta(request_id))
        proxy.disarm()
        crash_back_to(server, claimed)
        meta_of(redis, request_id)
        assert redis.llen("nobody") == 1, "published before it was settled"
        until(partial(nothing_is_held, redis))


def test_a_payload_that_came_back_with_redis_is_deleted_again(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    with Worker(server.url, models, ["m"]):
        request_id, raw, key = claim_checked(redis, "m", numbered(1))
        redis.lpush(NAMES.queue("m"), raw)
        meta_of(redis, request_id)
        until(partial(nothing_is_held, redis))
        assert not redis.exists(key)
        stored = {request_id: raw_result(redis, request_id)}
        crash_back_to(server, after_last(server, b"LMOVE", b"EXEC"))
        expect(redis, stored, "Redis went back")
        until(lambda: not redis.exists(key), what="its payload is deleted")
