"""The data plane's own connection wakes at once when a queue changes, however the news comes in."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import redis as redis_py
from helpers.wait import until

from inferq.shared.resp import pack
from inferq.workers.claims.link import Link, Waker

QUEUE = b"inferq.x"
#: Far above what a wake-up takes, far below the wait that it must cut short.
AT_ONCE_S, WAIT_S = 5.0, 30.0


@pytest.fixture
def link(redis: redis_py.Redis, redis_url: str) -> Iterator[Link]:
    waker = Waker()
    client = redis_py.Redis.from_url(redis_url, protocol=3)
    link = Link(client, waker, timeout=10.0)
    link.open()
    yield link
    link.close()
    client.close()
    waker.close()


def assert_wakes(link: Link) -> None:
    before = time.monotonic()
    link.wait(WAIT_S)
    assert link.changed == {QUEUE}
    assert time.monotonic() - before < AT_ONCE_S


def test_a_change_while_it_waits_wakes_it(link: Link, redis: redis_py.Redis) -> None:
    link.call([("LLEN", QUEUE)])
    redis.lpush(QUEUE, "request")
    assert_wakes(link)


def test_a_change_that_came_ahead_of_another_reply_wakes_it(
    link: Link, redis: redis_py.Redis
) -> None:
    """It was parsed while a reply was read, so nothing is left on the socket to wake for."""
    link.call([("LLEN", QUEUE)])
    redis.lpush(QUEUE, "request")
    assert link.call([("PING",)]) == [b"PONG"]
    assert_wakes(link)


def test_a_change_that_came_in_one_packet_behind_a_reply_wakes_it(
    link: Link, redis: redis_py.Redis
) -> None:
    """It lies unparsed in the reader, so nothing is left on the socket to wake for."""
    link.call([("CLIENT", "SETNAME", "link")])
    link.post(pack([("LLEN", QUEUE)]))
    until(lambda: named(redis, "link")["cmd"] == "llen", what="LLEN was run")
    redis.lpush(QUEUE, "request")
    # The reply and the push are both on the socket: one recv takes both.
    until(lambda: named(redis, "link")["omem"] == "0" and readable(link), what="both arrived")
    assert link.read(1) == [0]
    assert_wakes(link)


def test_replies_to_what_was_noted_never_pass_for_those_of_a_round_trip(link: Link) -> None:
    link.note(("ECHO", "noted"))
    link.flush()
    link.note(("ECHO", "noted too"))
    link.post(pack([("ECHO", "a"), ("ECHO", "b")]))
    assert [link.read(1), link.read(1)] == [[b"a"], [b"b"]]
    link.note(("ECHO", "and this"))
    assert link.call([("ECHO", "c")]) == [b"c"]


def test_a_reply_that_does_not_come_in_time_is_a_timeout(redis_url: str) -> None:
    with closing(Waker()) as waker, redis_py.Redis.from_url(redis_url, protocol=3) as client:
        impatient = Link(client, waker, timeout=0.2)
        impatient.open()
        with closing(impatient), pytest.raises(TimeoutError, match="did not answer"):
            impatient.call([("BLPOP", "never", 10)])


def test_without_news_it_waits_no_longer_than_asked(link: Link) -> None:
    before = time.monotonic()
    link.wait(0.05)
    assert link.changed == set()
    assert time.monotonic() - before < AT_ONCE_S


def named(redis: redis_py.Redis, name: str) -> dict[str, str]:
    (client,) = [client for client in redis.client_list() if client["name"] == name]
    return dict(client)


def readable(link: Link) -> bool:
    return bool(select.select([link._socket], [], [], 0)[0])
