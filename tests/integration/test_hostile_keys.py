"""One odd key or member in Redis costs at most its own: named once, passed over, never deleted."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from helpers.repository import fake_model, message, numbered
from helpers.results import NAMES, meta_of
from helpers.stock import stock_app
from helpers.wait import until
from helpers.worker import START_TIMEOUT_S, Worker
from redis import Redis

from inferq.producer import Client

ANSWER_S = 10.0
SEP = "\x06\x16"
REPLIES = "_kombu.binding.reply.celery.pidbox"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    fake_model(tmp_path / "models", "m", knobs="warm_up = false")
    return tmp_path / "models"


@pytest.fixture
def app(redis_url: str) -> Iterator[Celery]:
    with stock_app(redis_url) as app:
        yield app


def serves(redis: Redis) -> None:
    request_id, raw = message("m", numbered(1))
    redis.lpush(NAMES.queue("m"), raw)
    assert meta_of(redis, request_id)["status"] == "SUCCESS"


def is_up(worker: Worker) -> None:
    until(lambda: "ready." in worker.log, START_TIMEOUT_S, "Celery is up")


def lines(worker: Worker, words: str) -> list[str]:
    return [line for line in worker.log.splitlines() if words in line]


def was_undisturbed(worker: Worker) -> None:
    assert worker.alive
    assert "Traceback" not in worker.log
    assert worker.log.count("Connected to redis") == 1, "it kept its connection"


# --- Celery's side -------------------------------------------------------------------------------


def message_of(request_id: str) -> str:
    return message("m", numbered(1), request_id)[1].decode()


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_odd_records_of_what_dead_workers_held_keep_none_of_the_others(
    redis_url: str, redis: Redis, models: Path, when: str
) -> None:
    redis.set(NAMES.queue("full"), "a string")
    good = json.loads(message_of("good"))
    odd: dict[str, Any] = {
        "garbage": b"\xff\xfe",
        "no JSON": b"[",
        "nested": "[" * 100_000,
        "a number": "5",
        "two": "[1, 2]",
        "numbers": "[1, 2, 3]",
        "no headers": json.dumps([{}, "", "inferq.m"]),
        "headers a number": json.dumps([{**good, "headers": 5}, "", "inferq.m"]),
        "no properties": json.dumps([{**good, "properties": 5}, "", "inferq.m"]),
        "an exchange of nobody": json.dumps([good, "nobody's", "x"]),
        "a queue that is a string": json.dumps([good, "", "inferq.full"]),
    }

    def held() -> None:
        for n in range(150):
            redis.hset("unacked", f"many {n}", b"odd")
        for tag, value in odd.items():
            redis.hset("unacked", tag, value)
        redis.hset("unacked", "good", json.dumps([good, "", "inferq.m"]))
        long_ago = time.time() - 3700
        tags: list[bytes] = [*redis.hkeys("unacked"), b"no record"]  # type: ignore[list-item]
        redis.zadd("unacked_index", dict.fromkeys(tags, long_ago))

    if when == "at the start":
        held()
    with Worker(redis_url, models) as worker:
        is_up(worker)
        if when == "later":
            held()
        assert meta_of(redis, "good", 30.0)["status"] == "SUCCESS"
        serves(redis)
        until(lambda: redis.zcard("unacked_index") == len(odd) + 150, what="the rest stays")
        assert set(redis.hkeys("unacked")) >= {tag.encode() for tag in odd}
        assert len(lines(worker, "b'garbage' in unacked is not put back")) <= 1
        assert 0 < len(lines(worker, "in unacked is not put back, and stays there")) < 50
        assert redis.get(NAMES.queue("full")) == b"a string"
        was_undisturbed(worker)


#: Keys of Celery's side, and those that a worker's remote control needs.
CELERYS = ("unacked", "unacked_index", "unacked_mutex", "_kombu.binding.celery.pidbox",
           "_kombu.binding_permanent.celery.pidbox", "_kombu.binding_deadlines", REPLIES,
           "_kombu.binding.inferq.m", "_kombu.binding.celeryev")  # fmt: skip


#: Those of which who asks a worker has need, too.
ASKERS = (REPLIES, "_kombu.binding_deadlines", "unacked_index")


@pytest.mark.parametrize("key", [*CELERYS, "{node}.celery.pidbox"])
def test_a_key_of_celerys_side_of_another_type_disturbs_no_worker(
    redis_url: str, redis: Redis, models: Path, app: Celery, key: str
) -> None:
    key = key.replace("{node}", f"test@{socket.gethostname()}")
    if key == "unacked_mutex":
        redis.lpush(key, "x")
    else:
        redis.set(key, "x")
    record = json.dumps([json.loads(message_of("held")), "", "inferq.m"])
    if keeps_records := not key.startswith("unacked") or key == "unacked_mutex":
        # Before it starts: a worker looks for what dead ones held then, and every 10 s.
        redis.hset("unacked", "held", record)
        redis.zadd("unacked_index", {"held": time.time() - 3700})
    with Worker(redis_url, models) as worker:
        is_up(worker)
        serves(redis)
        if key not in ASKERS:
            assert app.control.ping(timeout=ANSWER_S, limit=1)
        if keeps_records:
            assert meta_of(redis, "held", 30.0)["status"] == "SUCCESS"
        until(redis.pubsub_numpat, what="it has subscribed")
        redis.publish("/0.celery.pidbox", "odd")
        until(lambda: lines(worker, "a broadcast is no message"), what="it listens")
        was_undisturbed(worker)
        assert redis.exists(key), "nobody removed it"
        redis.delete(key)
        until(lambda: app.control.ping(timeout=2.0, limit=1), 30.0, "it is heard, and answers")


def test_odd_members_of_a_table_of_bindings_keep_no_answer_from_its_asker(
    redis_url: str, redis: Redis, models: Path, app: Celery
) -> None:
    odd = [b"x", b"\xff", SEP.join("abcde").encode(), b""]
    with Worker(redis_url, models) as worker:
        is_up(worker)
        redis.sadd(REPLIES, *odd)
        assert app.control.ping(timeout=ANSWER_S, limit=1)
        assert app.control.ping(timeout=ANSWER_S, limit=1)
        assert len(lines(worker, f"in {REPLIES} is no binding")) == len(odd)
        assert set(odd) <= set(redis.smembers(REPLIES))
        was_undisturbed(worker)


# --- ours ----------------------------------------------------------------------------------------


def test_odd_members_beside_what_a_worker_holds_change_nothing(
    redis_url: str, redis: Redis, models: Path
) -> None:
    with Worker(redis_url, models) as worker:
        i = worker.incarnation
        odd = [b"\xff", b"garbage", b"m/", b"/", b"../x/y", b""]
        redis.sadd(NAMES.running(i), *odd)
        redis.hset(NAMES.claims(i), mapping=dict.fromkeys(odd, "1"))
        redis.hset(NAMES.attempts("m"), mapping=dict.fromkeys(odd, "many"))
        redis.zadd(NAMES.serving("m"), dict.fromkeys([b"\xff", b"x"], 4e12))
        redis.zadd(NAMES.leases, {b"inf": float("inf"), b"-inf": float("-inf")})
        redis.zadd(NAMES.scheduled, {b"m:0:inf": float("-inf"), b"x": float("inf")})
        redis.zadd(NAMES.scheduled, {b"m:0:gone": 0, b"m:77:step": 0})
        redis.set(NAMES.scheduled_message("m:0:odd"), "a string")
        redis.zadd(NAMES.scheduled, {b"m:0:odd": 0})
        for _ in range(3):
            serves(redis)
        redis.client_kill_filter(_type="normal", skipme=True)
        serves(redis)
        assert worker.alive
        assert "Traceback" not in worker.log
        assert redis.get(NAMES.scheduled_message("m:0:odd")) == b"a string"


@pytest.mark.parametrize("how", ["dead", "alive"])
def test_a_claim_of_another_type_is_not_deleted(
    redis_url: str, redis: Redis, models: Path, how: str
) -> None:
    """Whether its worker lives and looks through what it holds, or another one recovers it."""
    with Worker(redis_url, models, env={"INFERQ_LEASE_S": "1"}) as worker:
        name = worker.incarnation if how == "alive" else "dead"
        odd, good = NAMES.claim(name, 9_000, "m", 0), NAMES.claim(name, 9_001, "m", 0)
        redis.set(odd, "precious")
        redis.rpush(good, message_of("good"))
        redis.hset(NAMES.claims(name), mapping={odd: 1, good: 1})
        if how == "dead":
            redis.set(NAMES.fence(name), 0)
            redis.zadd(NAMES.leases, {name: 1})
        else:
            redis.client_kill_filter(_type="normal", skipme=True)
        assert meta_of(redis, "good")["status"] == "SUCCESS"
        serves(redis)
        assert redis.get(odd) == b"precious"
        assert len(lines(worker, f"key {odd!r} is a string; expected a list")) == 1


def test_clients_and_commands_live_with_announcements_that_are_none(
    redis_url: str, redis: Redis, models: Path
) -> None:
    with Worker(redis_url, models) as worker, Client(redis_url) as client:
        client.infer("m", {"x": numbered(1)}, timeout=30)
        redis.set(NAMES.model("other"), b"\xff")
        redis.set(NAMES.stats("garbage"), b"\xff" * 100)
        redis.zadd(NAMES.leases, {"garbage": 4e12})
        redis.zadd(NAMES.serving("other"), {b"\xff": 4e12})
        redis.lpush(NAMES.dead("m"), b"garbage", b"\xff", b"")
        redis.set(f"{NAMES.dead('')}".encode() + b"\xff", "x")
        redis.set(NAMES.dead("other"), "a string")
        for command in (["queues"], ["dead", "list"], ["dead", "show", "x"], ["doctor"]):
            told = ask(redis_url, *command)
            assert "Traceback" not in told.stderr, told.stderr
            assert told.stdout or told.stderr
        client.infer("m", {"x": numbered(2)}, timeout=30)
        assert worker.alive


def ask(redis_url: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inferq.workers.cli", *args, "--redis-url", redis_url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_result_key_of_another_type_is_left_alone_and_stops_nothing(
    redis_url: str, redis: Redis, models: Path
) -> None:
    with Worker(redis_url, models) as worker, stock_app(redis_url) as app:
        redis.lpush(NAMES.meta("taken"), "another's")
        kwargs = {"inputs": {"x": [[1.0] * 4]}, "model": "m"}
        options = {"queue": "inferq.m", "task_id": "taken"}
        app.send_task("inferq.infer", kwargs=kwargs, **options)
        link = app.signature("plain", queue="plain")
        app.send_task("inferq.infer", kwargs=kwargs, link=link, link_error=link, **options)
        serves(redis)
        until(lambda: not redis.keys(NAMES.claims("*")), what="nothing is held")
        assert redis.lrange(NAMES.meta("taken"), 0, -1) == [b"another's"]
        assert worker.alive
