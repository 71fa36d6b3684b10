"""What the Redis users of each role may do, and what they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import redis as redis_py
from helpers.acl import Users, roles
from helpers.envelopes import request

from inferq.shared.names import Names

NAMES = Names()
QUEUE = NAMES.queue("m")
META = NAMES.meta("a")
PAYLOAD = NAMES.payload("a", "x")
PIDBOX = "/0.celery.pidbox"
#: What no role may do, whatever Redis holds. ALIEN stands for a key that is nobody's here.
ALIEN = "billing"
ALWAYS_FORBIDDEN = (
    ("GET", ALIEN), ("SET", ALIEN, "x"), ("LPUSH", ALIEN, "x"), ("DEL", ALIEN), ("KEYS", "*"),
    ("FLUSHALL",), ("FLUSHDB",), ("CONFIG", "GET", "*"), ("CONFIG", "SET", "maxmemory", "1"),
    ("CLIENT", "LIST"), ("CLIENT", "KILL", "TYPE", "normal"), ("ACL", "LIST"), ("ACL", "WHOAMI"),
    ("ACL", "SETUSER", "default", "off"), ("SHUTDOWN", "NOSAVE"),
    ("MONITOR",), ("MODULE", "LIST"), ("FUNCTION", "FLUSH"), ("REPLICAOF", "NO", "ONE"),
    ("SLOWLOG", "GET"), ("BGREWRITEAOF",), ("PSUBSCRIBE", "*"), ("SWAPDB", "0", "1"),
)  # fmt: skip
#: What beside that a producer that may only push is refused, and a producer, and so on.
NO_PRODUCER = (
    ("LRANGE", QUEUE, "0", "-1"), ("LINDEX", QUEUE, "0"), ("RPOP", QUEUE), ("DEL", QUEUE),
    ("LTRIM", QUEUE, "1", "0"), ("RPUSH", QUEUE, "x"), ("LPUSH", NAMES.scheduled, "x"),
    ("LPUSH", "unacked", "x"), ("LPUSH", "celery", "x"), ("LPUSH", NAMES.attempts("m"), "x"),
    ("SET", NAMES.fence("i"), "0"), ("GET", PAYLOAD), ("LRANGE", NAMES.dead("m"), "0", "-1"),
    ("SCAN", "0"), ("EVAL", "return 1", "0"), ("SCRIPT", "LOAD", "return 1"),
    ("SUBSCRIBE", PIDBOX), ("SUBSCRIBE", "/0.celeryev/task.#"), ("PUBLISH", NAMES.reply("a"), "x"),
)  # fmt: skip
NO_CANCELLING = (("SET", META, "x"), ("PUBLISH", META, "x"), ("PUBLISH", PIDBOX, "x"))
NO_READING = (
    ("PING",), ("INFO",), ("TIME",), ("LLEN", QUEUE), ("GET", META), ("SET", PAYLOAD, "x"),
    ("GET", NAMES.model("m")), ("SUBSCRIBE", NAMES.reply("a")), ("SUBSCRIBE", META), ("MULTI",),
)  # fmt: skip
NO_WATCHER = (
    ("LPUSH", QUEUE, "x"), ("LRANGE", QUEUE, "0", "-1"), ("RPOP", QUEUE), ("DEL", QUEUE),
    ("DEL", NAMES.scheduled), ("SET", PAYLOAD, "x"), ("SET", NAMES.model("m"), "x"), ("GET", META),
    ("GET", PAYLOAD), ("LINDEX", NAMES.dead("m"), "0"), ("SET", NAMES.fence("i"), "0"),
    ("SET", META, "x"), ("PUBLISH", META, "x"), ("PUBLISH", "/0.celeryev/task.succeeded", "x"),
    ("HGET", "unacked", "x"), ("SUBSCRIBE", META), ("EVAL", "return 1", "0"),
)  # fmt: skip
FORBIDDEN = {
    "push-only": ALWAYS_FORBIDDEN + NO_PRODUCER + NO_CANCELLING + NO_READING,
    "producer": ALWAYS_FORBIDDEN + NO_PRODUCER + NO_CANCELLING,
    "canceller": ALWAYS_FORBIDDEN + NO_PRODUCER,
    "worker": (*ALWAYS_FORBIDDEN, ("RPOP", "celery"), ("SUBSCRIBE", "another")),
    "watcher": ALWAYS_FORBIDDEN + NO_WATCHER,
}


def test_a_producer_that_may_only_push_pushes_to_queues(
    redis: redis_py.Redis, push_only: redis_py.Redis
) -> None:
    for model in ("m", "another-model"):
        for step in NAMES.priority_steps:
            assert push_only.lpush(NAMES.queue(model, step), request(1)) == 1
    assert len(redis.keys("*")) == 2 * len(NAMES.priority_steps)


@pytest.mark.parametrize(
    ("role", "command"),
    [(role, each) for role, all_ in FORBIDDEN.items() for each in all_],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_role_is_refused_what_it_does_not_need(
    redis: redis_py.Redis, users: Users, role: str, command: tuple[str, ...]
) -> None:
    client: Any = users.push_only() if role == "push-only" else users.connect(role)
    with pytest.raises(redis_py.exceptions.NoPermissionError):
        client.execute_command(*command)
    assert not redis.keys("*")


def test_a_script_of_a_watcher_changes_nothing(redis: redis_py.Redis, users: Users) -> None:
    redis.lpush(QUEUE, "x")
    watcher = users.connect("watcher")
    for command in ("DEL", "RPOP", "LPOP"):
        script = watcher.script_load(f"return redis.call('{command}', KEYS[1])")
        with pytest.raises(redis_py.exceptions.ResponseError, match="ACL failure in script"):
            watcher.evalsha(script, 1, QUEUE)
    assert redis.lrange(QUEUE, 0, -1) == [b"x"]


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
def test_every_role_may_connect(users: Users, role: str) -> None:
    assert users.connect(role).ping()
    assert users.refused() == []


def test_every_role_is_tried() -> None:
    assert set(FORBIDDEN) == {"push-only", *roles()}
