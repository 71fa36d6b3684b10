"""Task events never hold up who sends them, whatever becomes of Redis."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import redis as redis_py
from helpers.wait import until

from inferq.shared.connect import redis_client
from inferq.workers.control_plane import event_publisher
from inferq.workers.control_plane.event_publisher import MAX_AT_ONCE, MAX_QUEUED, EventPublisher


def publisher(url: str, left_out: int = 0) -> EventPublisher:
    client = redis_client(url, socket_timeout=0.3)
    clock = count(1)
    return EventPublisher(
        client, "", "w@h", forward=lambda: next(clock), left_out=lambda: left_out, per_s=500
    )


def events(number: int) -> list[dict[str, Any]]:
    return [{"type": "task-started", "uuid": str(n), "timestamp": 1.0} for n in range(number)]


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The URL of a Redis that takes what is sent and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


@pytest.fixture
def nobody() -> str:
    """The URL of a Redis that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


@pytest.mark.parametrize("where", ["black_hole", "nobody"])
def test_events_are_dropped_and_counted_without_redis(
    where: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    sending = publisher(request.getfixturevalue(where))
    sending.start()
    with caplog.at_level(logging.INFO, event_publisher.__name__):
        began = time.monotonic()
        assert sending.put(events(3))
        assert time.monotonic() - began < 0.2
        until(lambda: sending.dropped == 3, what="they are counted")
        until(lambda: "3 task events were dropped" in caplog.text, what="it is said")
        began = time.monotonic()
        sending.stop()
        assert time.monotonic() - began < event_publisher.LAST_S


def test_a_full_queue_takes_no_more_and_first_no_new_requests() -> None:
    sending = publisher("redis://127.0.0.1:1/0")
    half = MAX_QUEUED // 2
    assert sending.put(events(half), begin=True)
    assert not sending.put(events(1), begin=True)
    assert sending.put(events(half))
    assert not sending.put(events(2))
    assert sending.dropped == 3


def test_many_events_go_out_in_order_in_messages_of_a_size(
    redis: redis_py.Redis, redis_url: str
) -> None:
    sending = publisher(redis_url)
    with redis.pubsub() as listening:  # type: ignore[no-untyped-call]
        listening.psubscribe("/0.celeryev/*")
        assert listening.get_message(timeout=5) is not None
        assert sending.put(events(MAX_AT_ONCE + 1))
        sending.start()
        topics: list[bytes] = []
        while len(topics) < 2:
            message = listening.get_message(timeout=5)
            assert message is not None
            topics.append(message["channel"])
        sending.stop()
        last = listening.get_message(timeout=5)
        assert last is not None
        assert topics == [b"/0.celeryev/task.multi"] * 2
        assert last["channel"] == b"/0.celeryev/worker.offline"
    assert sending.dropped == 0


def test_it_is_said_how_many_requests_were_left_out(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    sending = publisher(redis_url, left_out=7)
    with caplog.at_level(logging.INFO, event_publisher.__name__):
        sending.start()
        for _ in range(3):
            sending.put(events(1))
            until(lambda: "no task events of 7 requests" in caplog.text, what="it is said")
        sending.stop()
    assert caplog.text.count("no task events of") == 1


def test_it_ends_though_it_was_never_started() -> None:
    publisher("redis://127.0.0.1:1/0").stop()
