"""With INFERQ_FOREIGN_TASKS=1 Celery's own handler runs foreign tasks of the worker's app."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from celery import Celery
from celery.exceptions import NotRegistered
from helpers.acl import Users
from helpers.foreign import BUILTINS, NAMES, QUEUE, WAIT_S, foreign, result_of, serves
from helpers.repository import fake_model
from helpers.results import meta_of, nothing_is_held
from helpers.stock import stock_app
from helpers.wait import until
from helpers.worker import Worker

from inferq.workers.process.embedded import EmbeddedRedis


def ahead(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


TASKS = """
import time
from pathlib import Path
from inferq.workers.app import app

@app.task(name="mine.add")
def add(x, y):
    return x + y

@app.task(name="mine.slow")
def slow(seconds, n):
    time.sleep(seconds)
    return n

@app.task(name="mine.marked")
def marked(seconds, begun):
    Path(begun).touch()
    time.sleep(seconds)
    return "done"

@app.task(name="mine.again", bind=True, max_retries=1)
def again(self):
    if self.request.retries:
        return self.request.delivery_info["routing_key"]
    raise self.retry(countdown=1)
"""


class MyWorker(Worker):
    """A worker with tasks of its own, which its settings have it run."""

    def __init__(self, redis_url: str, folder: Path, **options: Any) -> None:
        models = folder / "models"
        if not models.exists():
            fake_model(models, "m", knobs="warm_up = false")
            (folder / "mine.py").write_text(TASKS)
        path = os.pathsep.join([str(folder), *(each for each in sys.path if each)])
        env = {"INFERQ_FOREIGN_TASKS": "1", "PYTHONPATH": path}
        super().__init__(redis_url, models, env=env, args=["--include", "mine"], **options)


@pytest.fixture(scope="module")
def mine(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("mine")
    with EmbeddedRedis(redis_kind) as server, MyWorker(server.url, folder) as worker:
        yield worker


@pytest.fixture
def my_store(mine: Worker) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(mine.redis_url, socket_timeout=30) as client:
        client.delete(NAMES.dead("m"))
        yield client
        assert mine.alive
        until(lambda: nothing_is_held(client), what="nothing is held any more")
        until(lambda: not client.exists("unacked", "unacked_index"), what="all are acknowledged")


@pytest.fixture
def my_producer(mine: Worker) -> Iterator[redis_py.Redis]:
    with Users(mine.redis_url) as users:
        yield users.push_only()


@pytest.fixture
def my_app(mine: Worker) -> Iterator[Celery]:
    with stock_app(mine.redis_url) as app:
        yield app


def test_told_to_a_worker_runs_the_tasks_that_its_app_knows(
    my_app: Celery, my_producer: redis_py.Redis, my_store: redis_py.Redis
) -> None:
    known = my_app.send_task("mine.add", args=[1, 2], queue="inferq.m")
    retried = my_app.send_task("mine.again", queue="inferq.m")
    unknown = my_app.send_task("someone.elses", queue="inferq.m")
    assert known.get(timeout=WAIT_S) == 3
    assert retried.get(timeout=WAIT_S) == "inferq.m"
    with pytest.raises(NotRegistered):
        unknown.get(timeout=WAIT_S)
    serves(my_producer, my_store)


@pytest.mark.parametrize("name", BUILTINS)
def test_told_to_a_worker_runs_none_of_celerys_own_tasks(
    my_producer: redis_py.Redis, my_store: redis_py.Redis, name: str
) -> None:
    my_producer.lpush(QUEUE, foreign(f"builtin {name}", name))
    assert result_of(my_store, f"builtin {name}") == ("NotRegistered", [name])


@pytest.mark.parametrize(
    ("raw", "ends"),
    [
        (foreign("odd", "mine.add", headers={"compression": "application/x-bz2"}), "InvalidInput"),
        (foreign("odd", "mine.add", args=["x" * (1 << 20), 1]), "PayloadTooLarge"),
        (foreign("odd", "mine.add", headers={"eta": "never"}), "InvalidInput"),
        (foreign("odd", "mine.add", headers={"expires": "never"}), "InvalidInput"),
        (foreign("odd", "mine.add", body=5), "InvalidInput"),
        (foreign("odd", "mine.add", **{"content-type": "application/data"}), "InvalidInput"),
        (foreign("odd", "mine.add", args=[json.loads("[" * 300 + "]" * 300)]), "InvalidInput"),
        (
            foreign("odd", "mine.add", headers={"x": json.loads("[" * 300 + "]" * 300)}),
            "InvalidInput",
        ),
        (foreign("odd", "mine.add", args=5), "InvalidInput"),
        (foreign("odd", "mine.add", args=["only one"]), "TypeError"),
        (foreign("odd", "mine.add", args=[1, 2], headers={"timelimit": 5}), None),
        (foreign("odd", "mine.add", args=[1, 2], headers={"retries": 10**30}), None),
        (foreign("odd", "mine.add", args=[1, 2], headers={"stamps": 5}), None),
    ],
    ids=range(13),
)
def test_told_to_a_worker_lives_through_tasks_that_are_odd(
    my_producer: redis_py.Redis, my_store: redis_py.Redis, raw: bytes, ends: str | None
) -> None:
    """None: as Celery has it, but answered."""
    my_store.delete(NAMES.meta("odd"))
    my_producer.lpush(QUEUE, raw)
    if ends is None:
        meta_of(my_store, "odd")
    else:
        assert result_of(my_store, "odd")[0] == ends
    serves(my_producer, my_store)


def test_where_a_task_goes_back_to_is_not_its_senders_choice(
    redis_url: str, redis: redis_py.Redis, users: Users, tmp_path: Path
) -> None:
    """Nor the name that it has among kombu's: another task may be called so."""
    producer = users.push_only()
    elsewhere = {"exchange": "", "routing_key": NAMES.attempts("m")}
    odd = {"delivery_info": elsewhere, "delivery_tag": "taken", "reply_to": "billing"}
    redis.hset("unacked", "taken", "another's")
    with MyWorker(redis_url, tmp_path) as worker:
        producer.lpush(QUEUE, foreign("held", "mine.slow", args=[1.5, 1], properties=odd))
        until(lambda: redis.hlen("unacked") == 2, what="Celery has it")
        producer.lpush(QUEUE, foreign("behind", "mine.slow", args=[0, 2], properties=odd))
        until(lambda: redis.hlen("unacked") == 2, what="Celery has the other")
        odd_headers = {
            "callbacks": [{"task": "x", "options": {"queue": "billing"}}],
            "delivery_info": elsewhere,
            "reply_to": "billing",
        }
        raw = foreign("retried", "mine.again", properties=odd, headers=odd_headers)
        producer.lpush(QUEUE, raw)
        until(lambda: meta_of(redis, "retried")["result"] == "inferq.m", what="it is run again")
        for embed in ({"delivery_info": elsewhere}, {"id": "victim"}, {"chord": {"task": "x"}}):
            producer.lpush(QUEUE, foreign(f"with {embed}", "mine.again", embed=embed))
            assert result_of(redis, f"with {embed}")[0] == "InvalidInput"
        assert redis.hget("unacked", "taken") == b"another's"
        worker.stop()
    assert not redis.exists(NAMES.attempts("m"), NAMES.meta("victim"), "billing")


def test_tasks_with_an_eta_wait_in_redis_and_not_in_the_worker(
    mine: Worker, my_producer: redis_py.Redis, my_store: redis_py.Redis
) -> None:
    far, soon = ahead(3600), ahead(2)
    many = [foreign(f"far {n}", "mine.add", headers={"eta": far}) for n in range(2_000)]
    due = [foreign(f"soon {n}", "mine.add", args=[n, 1], headers={"eta": soon}) for n in range(20)]
    my_producer.lpush(QUEUE, *many, *due)
    until(lambda: my_store.zcard(NAMES.scheduled) >= 2_000, what="they wait in Redis")
    assert meta_of(my_store, "soon 19")["result"] == 20
    until(lambda: not my_store.exists("unacked"), what="Celery holds none")
    assert int(my_store.zcard(NAMES.scheduled)) == 2_000
    with stock_app(mine.redis_url) as app:
        (scheduled,) = (app.control.inspect(timeout=5, limit=1).scheduled() or {}).values()
    assert scheduled == []
    my_store.delete(NAMES.scheduled, *my_store.keys(f"{NAMES.scheduled}:*"))


def test_a_crowd_of_tasks_is_held_by_a_few_and_all_are_run(
    mine: Worker, my_producer: redis_py.Redis, my_store: redis_py.Redis
) -> None:
    """The rest wait in Redis; a request behind them is served at once, and commands are heard."""
    count = 600
    many = [foreign(f"crowd {n}", "mine.slow", args=[0.01, n]) for n in range(count)]
    with stock_app(mine.redis_url) as app:
        until(lambda: app.control.ping(timeout=1, limit=1), what="it hears commands")
    my_producer.lpush(QUEUE, *many)
    serves(my_producer, my_store)
    most = 0

    def all_done() -> bool:
        nonlocal most
        most = max(most, int(my_store.hlen("unacked")))
        return bool(my_store.exists(*(NAMES.meta(f"crowd {n}") for n in range(count))) == count)

    with stock_app(mine.redis_url) as app:
        assert app.control.ping(timeout=5, limit=1), "between two tasks"
    until(all_done, 60.0, "all are run")
    assert [meta_of(my_store, f"crowd {n}")["result"] for n in range(count)] == list(range(count))
    assert 10 < most <= 100


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGQUIT, signal.SIGKILL])
def test_tasks_that_wait_for_celery_at_the_end_go_back_to_their_queue(
    redis_url: str, redis: redis_py.Redis, tmp_path: Path, how: signal.Signals
) -> None:
    """At once, or where the worker was killed, once kombu's visibility timeout has passed."""
    count = 200
    many = [foreign(f"task {n}", "mine.slow", args=[0.02, n]) for n in range(count)]
    with MyWorker(redis_url, tmp_path) as worker:
        redis.lpush(QUEUE, *many)
        until(lambda: redis.exists(NAMES.meta("task 3")), what="some are run")
        worker.process.send_signal(how)
        worker.process.wait(WAIT_S)
        assert bool(redis.exists("unacked", "unacked_index")) == (how == signal.SIGKILL)
        done = {n for n in range(count) if redis.exists(NAMES.meta(f"task {n}"))}
        assert len(done) < count
    for tag in redis.hkeys("unacked"):
        redis.execute_command("ZADD", "unacked_index", time.time() - 3601, tag)  # type: ignore[no-untyped-call]
    with MyWorker(redis_url, tmp_path, name="second"):
        # One that a killed worker was running is lost: Celery acknowledges before it runs a task.
        lost = int(how == signal.SIGKILL)
        keys = [NAMES.meta(f"task {n}") for n in range(count)]
        until(lambda: int(redis.exists(*keys)) >= count - lost, WAIT_S, "all others are run")
        run = [n for n, key in enumerate(keys) if redis.exists(key)]
        assert [meta_of(redis, f"task {n}")["result"] for n in run] == run


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGQUIT])
def test_what_celery_executes_at_the_end_is_executed_to_its_end(
    redis_url: str, redis: redis_py.Redis, tmp_path: Path, how: signal.Signals
) -> None:
    with MyWorker(redis_url, tmp_path) as worker:
        redis.lpush(QUEUE, foreign("long", "mine.marked", args=[1.0, str(tmp_path / "begun")]))
        until((tmp_path / "begun").exists, what="it executes")
        worker.process.send_signal(how)
        worker.process.wait(WAIT_S)
        assert meta_of(redis, "long")["result"] == "done"
    assert not redis.exists("unacked", "unacked_index")


def test_tasks_outlive_celerys_connections(redis_kind: str, tmp_path: Path) -> None:
    """Celery connects anew, and is given again what it had not run."""
    count = 200
    many = [foreign(f"task {n}", "mine.slow", args=[0.02, n]) for n in range(count)]
    with (
        EmbeddedRedis(redis_kind) as server,
        redis_py.Redis.from_url(server.url) as store,
        MyWorker(server.url, tmp_path) as worker,
    ):
        until(lambda: "ready." in worker.log, what="Celery is up")
        store.lpush(QUEUE, *many)
        for n in (3, 60):
            until(partial(store.exists, NAMES.meta(f"task {n}")), what="some are run")
            for connection in store.client_list(_type="pubsub"):
                store.client_kill_filter(_id=connection["id"])
        for n in range(count):
            assert meta_of(store, f"task {n}", WAIT_S)["result"] == n
        assert "Connection to broker lost" in worker.log
        until(lambda: not store.exists("unacked", "unacked_index"), what="all are acknowledged")
