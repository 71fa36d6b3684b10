"""Connections break and Redis restarts: no result is missed, sync and asyncio alike."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import numpy as np
import pytest
import redis as redis_py
from helpers.responder import RESPONDER, Responder, advert, announce
from helpers.wait import until

from inferq.producer import AsyncClient, Client, RedisUnavailable, Settings
from inferq.shared.errors import ConfigError
from inferq.shared.names import Names
from inferq.shared.schema import Array
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
NewRedis = Callable[..., EmbeddedRedis]


def x(n: float) -> dict[str, Array]:
    return {"x": np.full((1, 4), n, np.float32)}


@pytest.fixture
def echo(redis: redis_py.Redis) -> redis_py.Redis:
    announce(redis, advert())
    return redis


def subscribed(redis: redis_py.Redis) -> bool:
    return len(redis.client_list("pubsub")) == 1


def kill_connections(redis: redis_py.Redis) -> None:
    """Break every connection but the stand-in's (it would lose what it holds) and our own."""
    own = str(redis.client_id())
    for one in redis.client_list():
        if one["name"] != RESPONDER and one["id"] != own:
            redis.client_kill_filter(_id=one["id"])


def test_results_stored_while_the_subscription_is_down_are_read_on_reconnect(
    echo: redis_py.Redis, redis_url: str
) -> None:
    with Responder(redis_url) as responder, Client(redis_url) as client:
        responder.pause()
        pendings = [client.submit("echo", x(n)) for n in range(100)]
        until(lambda: subscribed(echo), what="subscription")
        echo.client_kill_filter(_type="pubsub")
        responder.resume()
        for n, pending in enumerate(pendings):
            assert pending.result(4).outputs["x"][0, 0] == n
        until(lambda: subscribed(echo), what="a new subscription")


def test_a_result_that_nobody_told_of_is_found_by_the_sweep(
    echo: redis_py.Redis, redis_url: str
) -> None:
    with Responder(redis_url, tell=False), Client(redis_url) as client:
        assert client.infer("echo", x(3), timeout=15).outputs["x"][0, 0] == 3


def test_map_rides_out_connections_that_are_killed_all_the_time(
    echo: redis_py.Redis, redis_url: str
) -> None:
    with Responder(redis_url, block=4), Client(redis_url) as client:
        got = []
        for result in client.map("echo", (x(n) for n in range(600)), in_flight=32, timeout=20):
            got.append(float(result.outputs["x"][0, 0]))
            if len(got) % 100 == 0:
                kill_connections(echo)
    assert got == list(range(600))


def test_a_push_on_a_connection_that_died_is_made_on_another(
    echo: redis_py.Redis, redis_url: str
) -> None:
    with Responder(redis_url), Client(redis_url) as client:
        for n in range(5):
            assert client.infer("echo", x(n), timeout=10).outputs["x"][0, 0] == n
            kill_connections(echo)


def test_pending_requests_survive_an_outage_and_new_ones_fail_fast(new_redis: NewRedis) -> None:
    server = new_redis(appendonly=True)
    with redis_py.Redis.from_url(server.url) as redis:
        announce(redis, advert())
        with Client(server.url) as client:
            pending = client.submit("echo", x(1))
            redis.config_set("appendfsync", "always")
            assert client.submit("echo", x(2)).cancel()
            server.kill()
            with pytest.raises(RedisUnavailable):
                client.submit("echo", x(3))
            server.start()
            with Responder(server.url):
                assert pending.result(20).outputs["x"][0, 0] == 1


def test_requests_that_a_restarted_redis_lost_are_pushed_again_with_their_ids(
    new_redis: NewRedis,
) -> None:
    server = new_redis()
    with redis_py.Redis.from_url(server.url) as redis:
        announce(redis, advert())
        with Client(server.url) as client:
            pendings = [client.submit("echo", x(n)) for n in range(50)]
            large = client.submit("echo", {"x": np.full((8, 4), 7, np.float32)}, priority=9)
            server.kill()
            server.start()
            assert redis.ping()
            with Responder(server.url) as responder:
                for n, pending in enumerate(pendings):
                    assert pending.result(20).outputs["x"][0, 0] == n
                assert large.result(20).outputs["x"].shape == (8, 4)
    seen = [each.headers.id for each in responder.seen if each.headers.id != large.request_id]
    assert seen[:50] == [pending.request_id for pending in pendings]


def test_a_lost_payload_is_stored_again_with_its_request(
    new_redis: NewRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferq.producer.outgoing.INLINE_LIMIT", 8)
    server = new_redis()
    with redis_py.Redis.from_url(server.url) as redis:
        announce(redis, advert())
        with Client(server.url) as client:
            pending = client.submit("echo", x(5))
            server.kill()
            server.start()
            assert redis.ping()
            with Responder(server.url) as responder:
                assert pending.result(20).outputs["x"][0, 0] == 5
    assert responder.seen[0].payload_keys == [NAMES.payload(pending.request_id, "x")]


def test_a_full_redis_refuses_the_push_and_takes_it_later(new_redis: NewRedis) -> None:
    server = new_redis()
    with redis_py.Redis.from_url(server.url) as redis:
        announce(redis, advert())
        with Responder(server.url), Client(server.url) as client:
            client.infer("echo", x(0), timeout=10)
            redis.config_set("maxmemory", "1mb")
            with pytest.raises(RedisUnavailable, match="refused the push: OOM"):
                client.submit("echo", x(1))
            assert client._session.core.unresolved() == []
            redis.config_set("maxmemory", "0")
            client.infer("echo", x(2), timeout=10)


def test_a_redis_that_accepts_and_never_answers_fails_within_the_socket_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inferq.shared.connect.SOCKET_TIMEOUT_S", 0.3)
    monkeypatch.setattr("inferq.producer.wire.SOCKET_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url) as client, pytest.raises(RedisUnavailable):
            client.infer("echo", x(1))


def test_a_wrong_password_is_named_and_not_shown(new_redis: NewRedis) -> None:
    server = new_redis()
    with redis_py.Redis.from_url(server.url) as redis:
        redis.config_set("requirepass", "geheim")
        url = server.url.replace("://", "://:falsch@")
        with Client(url) as client, pytest.raises(RedisUnavailable) as caught:
            client.infer("echo", x(1))
        assert "password" in str(caught.value)
        assert "falsch" not in str(caught.value)
        redis.config_set("requirepass", "")


def test_results_whose_time_passed_while_redis_was_away_are_expired(
    new_redis: NewRedis,
) -> None:
    # The client cannot tell this from "still queued" but by the length of the outage.
    server = new_redis(appendonly=True)
    settings = Settings.load(redis_url=server.url, result_expires_s=1)
    with redis_py.Redis.from_url(server.url) as redis:
        announce(redis, advert())
        with Client(settings=settings) as client:
            pending = client.submit("echo", x(1))
            core = client._session.core
            core._complete_at -= 3600
            pending.submitted_at -= 3600
            redis.client_kill_filter(_type="pubsub")
            until(pending.done, what="it is given up")
            assert type(pending.outcome).__name__ == "ResultExpired"


def test_a_cluster_is_refused_before_anything_is_pushed(
    monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    def clustered(server: object, cluster: object) -> None:
        raise ConfigError("this Redis runs in cluster mode")

    monkeypatch.setattr("inferq.producer.core.judge_server", clustered)
    with Client(redis_url) as client, pytest.raises(ConfigError, match="cluster mode"):
        client.infer("echo", x(1))


def test_an_async_client_misses_nothing_either(echo: redis_py.Redis, redis_url: str) -> None:
    async def main() -> None:
        async with AsyncClient(redis_url) as client:
            got = []
            async for result in client.map("echo", (x(n) for n in range(600)), in_flight=32):
                got.append(float(result.outputs["x"][0, 0]))
                if len(got) % 100 == 0:
                    await asyncio.to_thread(kill_connections, echo)
            assert got == list(range(600))

    with Responder(redis_url, block=4):
        asyncio.run(main())


def test_an_async_client_pushes_again_what_a_restarted_redis_lost(new_redis: NewRedis) -> None:
    server = new_redis()

    async def main() -> None:
        async with AsyncClient(server.url) as client:
            pendings = [await client.submit("echo", x(n)) for n in range(50)]
            server.kill()
            await asyncio.to_thread(server.start)
            with Responder(server.url):
                for n, pending in enumerate(pendings):
                    assert (await pending.result(20)).outputs["x"][0, 0] == n

    with redis_py.Redis.from_url(server.url) as redis:
        announce(redis, advert())
    asyncio.run(main())
