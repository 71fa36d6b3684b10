"""Other tasks than inferq's on our queues: answered and not run, unless a worker is told to."""

from __future__ import annotations

import base64
import bz2
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

import numpy as np
import pytest
import redis as redis_py
from celery import Celery, chain, chord
from celery.exceptions import NotRegistered
from helpers.acl import Users
from helpers.envelopes import JSON, envelope
from helpers.process import memory_mb
from helpers.repository import fake_model, message, numbered
from helpers.results import dead_letters, meta_of, nothing_is_held, outputs_of
from helpers.stock import stock_app
from helpers.wait import until
from helpers.worker import Worker

from inferq.shared.names import Names
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
QUEUE = NAMES.queue("m")
WAIT_S = 30.0
#: What Celery registers in every app, and no stranger may have run.
BUILTINS = (
    "celery.accumulate", "celery.backend_cleanup", "celery.chain", "celery.chord",
    "celery.chord_unlock", "celery.chunks", "celery.group", "celery.map", "celery.starmap",
)  # fmt: skip
MB = 1 << 20


def foreign(
    request_id: str,
    task: str = "someone.elses",
    *,
    args: object = (),
    kwargs: object = None,
    embed: object = None,
    **given: Any,
) -> bytes:
    """Another task, as a stock application sends it, unless `given` says otherwise."""
    headers = {"id": request_id, "task": task, **given.pop("headers", {})}
    content = json.dumps([args, kwargs or {}, embed]).encode()
    return envelope(content, kind=JSON, headers=headers, request_id=request_id, **given)


def bomb(request_id: str, size: int) -> bytes:
    """A message of a kilobyte or so that becomes `size` bytes where it is decompressed."""
    packed = bz2.compress(bytes(size), 1)
    headers = {"id": request_id, "task": "celery.accumulate", "compression": "application/x-bz2"}
    return envelope(packed, kind=JSON, headers=headers)


def ahead(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def result_of(store: redis_py.Redis, request_id: str) -> tuple[str, list[str]]:
    """The class and the arguments of the error that a task is answered with."""
    meta = meta_of(store, request_id)
    assert meta["status"] == "FAILURE", meta
    return meta["result"]["exc_type"], meta["result"]["exc_message"]


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


def serves(producer: redis_py.Redis, store: redis_py.Redis) -> None:
    request_id, raw = message("m", numbered(7))
    producer.lpush(QUEUE, raw)
    np.testing.assert_array_equal(outputs_of(store, request_id)["x"], numbered(7))


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


# --- INFERQ_FOREIGN_TASKS=1 --------------------------------------------------------------------

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
