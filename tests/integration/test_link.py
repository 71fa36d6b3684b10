"""The data plane's own connection wakes at once when a queue changes, however the news comes in."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator

import pytest
import redis as redis_py
from helpers.wait import until

from inferq.workers.link import Link, Waker

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
    link.post([("LLEN", QUEUE)])
    until(lambda: named(redis, "link")["cmd"] == "llen", what="LLEN was run")
    redis.lpush(QUEUE, "request")
    # The reply and the push are both on the socket: one recv takes both.
    until(lambda: named(redis, "link")["omem"] == "0" and readable(link), what="both arrived")
    assert link.read(1) == [0]
    assert_wakes(link)


def test_what_is_told_while_replies_are_read_in_parts_comes_behind_all_of_them(
    redis_url: str,
) -> None:
    """Or the replies of one round trip would be taken for those of another command."""
    waker = Waker()
    client = redis_py.Redis.from_url(redis_url, protocol=3)

    def tell() -> None:
        mine.note(("ECHO", "told"))
        mine.flush()

    mine = Link(client, waker, 10.0, tell)
    mine.open()
    mine.post([("ECHO", "a"), ("BLPOP", "never", 0.1), ("ECHO", "c"), ("ECHO", "d")])
    waker.set()
    assert [mine.read(2), mine.read(2)] == [[b"a", None], [b"c", b"d"]]
    waker.set()
    assert mine.call([("ECHO", "e")]) == [b"e"]
    mine.close()
    client.close()
    waker.close()


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
