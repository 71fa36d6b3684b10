"""Other tasks than inferq's on our queues: answered and not run, unless a worker is told to."""

from __future__ import annotations

import base64
import bz2
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from celery import Celery, chain, chord
from celery.exceptions import NotRegistered
from helpers.acl import Users
from helpers.envelopes import JSON, envelope
from helpers.foreign import BUILTINS, NAMES, QUEUE, WAIT_S, foreign, result_of, serves
from helpers.process import memory_mb
from helpers.repository import fake_model
from helpers.results import dead_letters, nothing_is_held
from helpers.stock import stock_app
from helpers.wait import until
from helpers.worker import Worker

from inferq.workers.process.embedded import EmbeddedRedis

MB = 1 << 20


def bomb(request_id: str, size: int) -> bytes:
    """A message of a kilobyte or so that becomes `size` bytes where it is decompressed."""
    packed = bz2.compress(bytes(size), 1)
    headers = {"id": request_id, "task": "celery.accumulate", "compression": "application/x-bz2"}
    return envelope(packed, kind=JSON, headers=headers)


# --- as it is ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    models = tmp_path_factory.mktemp("models")
    fake_model(models, "m", knobs="warm_up = false")
    with EmbeddedRedis(redis_kind) as server, Worker(server.url, models) as worker:
        yield worker


@pytest.fixture
def producer(served: Worker) -> Iterator[redis_py.Redis]:
    """May push to the queues, and nothing else."""
    with Users(served.redis_url) as users:
        yield users.push_only()


@pytest.fixture
def store(served: Worker) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(served.redis_url, socket_timeout=30) as client:
        client.delete(NAMES.dead("m"))
        yield client
        assert served.alive
        until(lambda: nothing_is_held(client), what="nothing is held any more")
        assert not client.exists("unacked", "unacked_index")


@pytest.fixture
def app(served: Worker) -> Iterator[Celery]:
    with stock_app(served.redis_url) as app:
        yield app


@pytest.mark.parametrize("content", ["json", "msgpack"])
def test_a_stock_application_is_told_that_another_task_is_not_registered(
    app: Celery, store: redis_py.Redis, content: str
) -> None:
    app.conf.update(accept_content=["json", "msgpack"], result_serializer=content)
    told = app.send_task("someone.elses", args=[1], queue="inferq.m", serializer=content)
    with pytest.raises(NotRegistered, match=r"someone\.elses"):
        told.get(timeout=WAIT_S)


def test_celerys_own_tasks_are_not_run(producer: redis_py.Redis, store: redis_py.Redis) -> None:
    """One with an interval of a millisecond would be run, and pushed again, for ever."""
    ids = [f"builtin {name}" for name in BUILTINS]
    for request_id, name in zip(ids, BUILTINS, strict=True):
        args = ["group", {"task": "x"}] if name == "celery.chord_unlock" else []
        kwargs: dict[str, Any] = (
            {"interval": 0.001, "max_retries": None, "result": []} if args else {}
        )
        producer.lpush(QUEUE, foreign(request_id, name, args=args, kwargs=kwargs))
    for request_id, name in zip(ids, BUILTINS, strict=True):
        assert result_of(store, request_id) == ("NotRegistered", [name])
    serves(producer, store)


def test_a_compressed_task_takes_no_memory(
    served: Worker, producer: redis_py.Redis, store: redis_py.Redis
) -> None:
    serves(producer, store)
    before = memory_mb(served.pid)
    raw = bomb("bomb", 400 * MB)
    producer.lpush(QUEUE, raw)
    assert len(raw) < 400 * MB / 10_000
    assert result_of(store, "bomb")[0] == "NotRegistered"
    serves(producer, store)
    assert peak_mb(served.pid) < before + 100


def peak_mb(pid: int) -> float:
    """The most memory that a process ever had in use, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


@pytest.mark.parametrize(
    "raw",
    [
        foreign("odd", headers={"eta": "9999-01-01T00:00:00+00:00"}),
        foreign("odd", headers={"eta": "never", "expires": "never", "timelimit": 5}),
        foreign("odd", headers={"task": "x" * 1_000_000}),
        foreign("odd", headers={"task": ""}),
        foreign("odd", headers={"compression": "application/x-gzip"}),
        foreign("odd", headers={"inferq_reply": "unrelated"}),
        foreign("odd", body=5),
        foreign("odd", body="!"),
        foreign("odd", **{"content-type": "application/x-python-serialize"}),
        foreign("odd", properties={"delivery_tag": None}),
        foreign("odd", properties={"delivery_info": 5, "body_encoding": "rot13"}),
        foreign("odd", headers={"x": json.loads("[" * 400 + "]" * 400)}),
        foreign("odd", embed={"errbacks": 5, "chain": "x", "chord": [5]}),
        foreign("odd", embed=[5]),
    ],
    ids=range(14),
)
def test_another_task_is_answered_whatever_else_is_in_it(
    producer: redis_py.Redis, store: redis_py.Redis, raw: bytes
) -> None:
    store.delete(NAMES.meta("odd"))
    producer.lpush(QUEUE, raw)
    name, (message,) = result_of(store, "odd")
    assert (name, len(message) <= 200) == ("NotRegistered", True)
    serves(producer, store)
    assert dead_letters(store, "m") == []


def test_what_follows_on_another_task_is_told_of_its_failure(
    app: Celery, store: redis_py.Redis
) -> None:
    """As with any request that fails; stock Celery would leave all of these waiting."""
    wrong = app.signature("someone.elses", queue="inferq.m")
    plain = app.signature("plain.next", queue="plain")
    last = chain(wrong, plain).apply_async()
    body = chord([wrong.clone()], app.signature("plain.body", queue="plain"))()
    wrong.clone().apply_async(link_error=app.signature("plain.error", queue="plain"))
    for waiting in (last, body):
        with pytest.raises(Exception, match=r"someone\.elses"):
            waiting.get(timeout=WAIT_S)
    (errback,) = until(lambda: store.lrange("plain", 0, -1), what="the errback is called")
    assert json.loads(errback)["headers"]["task"] == "plain.error"
    store.delete("plain")


def test_an_event_and_a_count_tell_of_another_task(
    redis_url: str, redis: redis_py.Redis, tmp_path: Path
) -> None:
    fake_model(tmp_path, "m", knobs="warm_up = false")
    with (
        Worker(redis_url, tmp_path, args=["-E"]) as worker,
        stock_app(redis_url) as app,
        redis.pubsub() as heard,  # type: ignore[no-untyped-call]
    ):
        heard.psubscribe("*celeryev*")
        until(lambda: app.control.ping(timeout=2, limit=1), what="it hears commands")
        told = app.send_task("someone.elses", queue="inferq.m")
        told.get(timeout=WAIT_S, propagate=False)
        events: dict[str, dict[str, Any]] = {}

        def ended() -> bool:
            got = heard.get_message(timeout=1)
            if got and got["type"] == "pmessage" and b"task.multi" in got["channel"]:
                body = json.loads(base64.b64decode(json.loads(got["data"])["body"]))
                events.update((e["type"], e) for e in body if e["uuid"] == told.id)
            return "task-failed" in events

        until(ended, what="its failure is told")
        assert events["task-received"]["name"] == "someone.elses"
        assert events["task-failed"]["exception"] == "NotRegistered('someone.elses')"
        stats = app.control.inspect(timeout=5, limit=1).stats()
        (stat,) = (stats or {}).values()
        assert stat["total"] == {"inferq.infer": 0}
        assert "task 'someone.elses' on the queue of m is not run" in worker.log


def test_what_an_older_worker_left_in_kombus_care_is_answered(
    producer: redis_py.Redis, store: redis_py.Redis
) -> None:
    """It comes back to our queue once kombu's visibility timeout has passed, and is refused."""
    raw = json.loads(foreign("left", "celery.chord_unlock", args=["g", {}]))
    store.hset("unacked", "left", json.dumps([raw, "", "inferq.m"]))
    store.zadd("unacked_index", {"left": time.time() - 3601})
    assert result_of(store, "left") == ("NotRegistered", ["celery.chord_unlock"])
