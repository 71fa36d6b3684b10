"""What the Redis users of each role may do, and what they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import redis as redis_py
from helpers.acl import Users, roles
from helpers.envelopes import request

from inferq.shared.names import Names

NAMES = Names()
#: Commands with the key, if any, that a producer would attack.
FORBIDDEN = (
    ("PING",), ("INFO",), ("GET", NAMES.queue("m")), ("LRANGE", NAMES.queue("m"), "0", "-1"),
    ("RPOP", NAMES.queue("m")), ("DEL", NAMES.queue("m")), ("RPUSH", NAMES.queue("m"), "x"),
    ("LPUSH", NAMES.later, "x"), ("LPUSH", "billing", "x"), ("LPUSH", "unacked", "x"),
    ("SET", NAMES.meta("a"), "x"), ("SET", NAMES.payload("a", "x"), "x"), ("KEYS", "*"),
    ("SCAN", "0"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("EVAL", "return 1", "0"),
    ("PUBLISH", "/0.celery.pidbox", "x"), ("SUBSCRIBE", NAMES.reply("a")), ("ACL", "WHOAMI"),
    ("CLIENT", "LIST"), ("MULTI",),
)  # fmt: skip


def test_a_producer_that_may_only_push_pushes_to_queues(
    redis: redis_py.Redis, push_only: redis_py.Redis
) -> None:
    for model in ("m", "another-model"):
        for step in NAMES.priority_steps:
            assert push_only.lpush(NAMES.queue(model, step), request(1)) == 1
    assert len(redis.keys("*")) == 2 * len(NAMES.priority_steps)


@pytest.mark.parametrize("command", FORBIDDEN, ids=" ".join)
def test_a_producer_that_may_only_push_is_refused_all_else(
    redis: redis_py.Redis, push_only: redis_py.Redis, command: tuple[str, ...]
) -> None:
    pushing: Any = push_only
    with pytest.raises(redis_py.exceptions.NoPermissionError):
        pushing.execute_command(*command)
    assert not redis.keys("*")


def test_users_are_gone_after_the_test_and_those_of_others_stay(
    redis: redis_py.Redis, redis_url: str
) -> None:
    before = set(redis.acl_users())
    with Users(redis_url) as first:
        with Users(redis_url) as second:
            first.push_only()
            second.push_only()
            assert len(set(redis.acl_users()) - before) == 2
        assert first.push_only().lpush(NAMES.queue("m"), request(1)) == 1
    assert set(redis.acl_users()) == before


def test_what_a_user_is_refused_is_told(users: Users) -> None:
    pushing = users.push_only()
    assert users.refused() == []
    with pytest.raises(redis_py.exceptions.NoPermissionError):
        pushing.get("unrelated")
    (told,) = users.refused()
    assert told.startswith("push-only: command get (")


@pytest.mark.parametrize("role", roles())
def test_every_role_may_connect_and_a_producer_may_not_read_what_is_queued(
    users: Users, role: str
) -> None:
    client = users.connect(role)
    assert client.ping()
    if role in {"producer", "canceller"}:
        with pytest.raises(redis_py.exceptions.NoPermissionError):
            client.lrange(NAMES.queue("m"), 0, -1)
