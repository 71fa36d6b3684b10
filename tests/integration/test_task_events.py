"""Flower, and whoever else listens to Celery's events, sees the requests that a worker serves."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis as redis_py
from celery import Celery, chain
from helpers.events import Listener
from helpers.repository import fake_model, message, numbered, text_model
from helpers.stock import let_go, stock_app
from helpers.wait import until
from helpers.worker import Worker

from inferq.producer import Client
from inferq.shared.celery_app import make_app
from inferq.shared.errors import InferqError
from inferq.shared.names import Names
from inferq.shared.settings import Settings
from inferq.workers.engines.fake import FAULT_RAISE
from inferq.workers.process.embedded import EmbeddedRedis

#: What a batch of the model "slow" takes, in s.
SLOW_S = 1.0
BATCH_S = 0.03
WIDTH = 800
ROW = [1.0] * WIDTH
SUCCESS = ["task-received", "task-started", "task-succeeded"]
FAILURE = ["task-received", "task-started", "task-failed"]
MAX_EVENT_BYTES = 1_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    knobs = "max_batch_size = 8\nwarm_up = false"
    fake_model(
        models, "m", width=WIDTH, knobs=knobs, fake=f"faults = true\ndelay_ms = {BATCH_S * 1000}"
    )
    fake_model(
        models,
        "slow",
        knobs="max_batch_size = 1\nwarm_up = false",
        fake=f"delay_ms = {SLOW_S * 1000}",
    )
    fake_model(models, "fast", knobs="max_batch_size = 32\nwarm_up = false", fake="faults = true")
    text_model(models, "text")
    text_model(models, "padded", shape='"batch", "words"', knobs="[pad.words]\nbuckets = [4]\n")
    return models


@pytest.fixture(scope="module")
def shared(redis_kind: str, models: Path) -> Iterator[tuple[Worker, Celery, Listener, Client]]:
    """A worker with events, a stock application that listens to them, and a client."""
    with ExitStack() as opened:
        server = opened.enter_context(EmbeddedRedis(redis_kind))
        redis = opened.enter_context(redis_py.Redis.from_url(server.url))
        app = opened.enter_context(stock_app(server.url))
        listener = opened.enter_context(Listener(app, redis))
        worker = opened.enter_context(
            Worker(server.url, models, ["m", "slow", "text", "padded"], args=["-E"])
        )
        until_up(worker)
        yield worker, app, listener, opened.enter_context(Client(server.url))


@pytest.fixture
def worker(shared: tuple[Worker, Celery, Listener, Client]) -> Worker:
    return shared[0]


@pytest.fixture
def app(shared: tuple[Worker, Celery, Listener, Client]) -> Celery:
    return shared[1]


@pytest.fixture
def listener(shared: tuple[Worker, Celery, Listener, Client]) -> Listener:
    return shared[2]


@pytest.fixture
def client(shared: tuple[Worker, Celery, Listener, Client]) -> Client:
    return shared[3]


def until_up(worker: Worker) -> None:
    """Wait until Celery's side of it is, too: for remote control."""
    until(lambda: " ready." in worker.log, what="Celery's side is up")


def until_offline(listener: Listener) -> None:
    """Wait until the end of the one worker was told: by Celery, and behind the last requests."""

    def goodbyes() -> bool:
        told = [event for event in list(listener.events) if event["type"] == "worker-offline"]
        return len(told) == 2

    until(goodbyes, what="the worker is offline")
    assert not any(each.alive for each in listener.workers())


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def in_order(events: list[dict[str, Any]]) -> bool:
    """Whether clocks and timestamps are as the events came."""
    clocks = [event["clock"] for event in events]
    stamps = [event["timestamp"] for event in events]
    return clocks == sorted(set(clocks)) and stamps == sorted(stamps)


# --- each outcome --------------------------------------------------------------------------------


def test_a_served_request_is_received_started_and_succeeded(
    client: Client, listener: Listener, worker: Worker
) -> None:
    before = time.time()
    pending = client.submit("m", {"x": numbered(3, WIDTH)})
    pending.result(timeout=10)
    events = listener.whole(pending.request_id)
    assert types(events) == SUCCESS
    assert in_order(events)
    received, started, succeeded = events
    assert before - 1 < received["timestamp"] < time.time() + 1
    assert (received["name"], received["args"]) == ("inferq.infer", "()")
    assert received["kwargs"] == f"{{'model': 'm', x=<1x{WIDTH} float32>}}"
    assert (received["retries"], received["routing_key"]) == (0, "inferq.m")
    assert (received["root_id"], received["parent_id"]) == (pending.request_id, None)
    assert BATCH_S <= succeeded["runtime"] < BATCH_S + 0.5
    assert succeeded["timestamp"] - started["timestamp"] >= BATCH_S
    assert succeeded["result"] == f"{{'x': <1x{WIDTH} float32>}}"
    for event in events:
        assert event["pid"] == worker.pid
        assert event["hostname"].startswith("test@")
        assert event["utcoffset"] == 0 or time.localtime().tm_gmtoff
    task = listener.task(pending.request_id)
    assert (task.state, task.worker.hostname) == ("SUCCESS", received["hostname"])


def test_a_request_that_the_engine_fails(client: Client, listener: Listener) -> None:
    pending = client.submit("m", {"x": numbered(FAULT_RAISE, WIDTH)})
    with pytest.raises(InferqError):
        pending.result(timeout=10)
    events = listener.whole(pending.request_id)
    assert types(events) == FAILURE
    assert in_order(events)
    assert events[2]["exception"].startswith("EngineError('ValueError")
    assert "EngineError: ValueError" in events[2]["traceback"]
    assert listener.task(pending.request_id).state == "FAILURE"


def test_a_request_that_is_no_good_never_starts(app: Celery, listener: Listener) -> None:
    kwargs = {"inputs": {"x": [["secret"] * 10_000]}}
    sent = app.send_task("inferq.infer", kwargs=kwargs, queue="inferq.m")
    events = listener.whole(sent.id)
    assert types(events) == ["task-received", "task-failed"]
    assert events[1]["exception"].startswith("InvalidInput(")


def test_numbers_and_long_texts_never_get_into_events(app: Celery, listener: Listener) -> None:
    """Nor what a stranger writes into the headers, however long it is."""
    kwargs = {"inputs": {"x": [ROW] * 8}, "model": "m"}
    long = "x" * 100_000
    sent = [
        app.send_task("inferq.infer", kwargs=kwargs, queue="inferq.m"),
        app.send_task("inferq.infer", kwargs=kwargs, queue="inferq.m", kwargsrepr=long),
        app.send_task("inferq.infer", kwargs={long: long}, queue="inferq.m", kwargsrepr=long),
        app.send_task("inferq.infer", args=[{long: ROW}], queue="inferq.m", argsrepr=long),
    ]
    for each in sent:
        events = listener.whole(each.id)
        assert all(len(json.dumps(event)) < 2 * MAX_EVENT_BYTES for event in events)
        assert len(json.dumps(events[0])) < MAX_EVENT_BYTES
    shape = f"{{'model': 'm', x=<8x{WIDTH} float32>}}"
    assert [listener.task(each.id).kwargs for each in sent[:2]] == [shape, shape]


@pytest.mark.parametrize(
    ("model", "x", "shape"), [("text", ["secret"], "1"), ("padded", [["secret", ""]], "1x")]
)
def test_strings_never_get_into_events(
    app: Celery, listener: Listener, model: str, x: object, shape: str
) -> None:
    """Though stock Celery writes them into its headers."""
    sent = app.send_task("inferq.infer", kwargs={"inputs": {"x": x}}, queue=f"inferq.{model}")
    events = listener.whole(sent.id)
    assert types(events) == SUCCESS
    assert events[0]["kwargs"].startswith(f"{{'model': '{model}', x=<{shape}")
    assert events[0]["kwargs"].endswith(" string>}")
    assert "secret" not in json.dumps(events)


def test_expired_and_revoked_requests(app: Celery, listener: Listener, client: Client) -> None:
    client.submit("slow", {"x": numbered(1)})
    send = partial(app.send_task, "inferq.infer", kwargs={"inputs": {"x": [[1.0] * 4]}})
    expired = send(queue="inferq.slow", expires=0.001)
    revoked = send(queue="inferq.slow")
    app.control.revoke(revoked.id)
    assert types(listener.whole(expired.id)) == ["task-received", "task-revoked"]
    assert types(listener.whole(revoked.id)) == ["task-received", "task-revoked"]
    assert listener.of(expired.id)[1]["expired"] is True
    assert listener.of(revoked.id)[1]["expired"] is False
    assert listener.task(revoked.id).state == "REVOKED"


def test_a_request_whose_deadline_passes_in_the_queue(client: Client, listener: Listener) -> None:
    ahead = client.submit("slow", {"x": numbered(1)})
    late = client.submit("slow", {"x": numbered(2)}, timeout_ms=100)
    assert listener.whole(late.request_id)[-1]["exception"].startswith("DeadlineExceeded(")
    assert "task-started" not in listener.types(late.request_id)
    assert types(listener.whole(ahead.request_id)) == SUCCESS


def test_a_chain_is_known_as_one(app: Celery, listener: Listener) -> None:
    infer = partial(app.signature, "inferq.infer", queue="inferq.m")
    first = infer(kwargs={"inputs": {"x": [ROW]}})
    last = chain(first, infer()).apply_async()
    task = listener.task(last.id)
    assert (task.root_id, task.parent_id) == (last.parent.id, last.parent.id)


def test_a_request_with_an_eta_is_received_when_it_is_due(app: Celery, listener: Listener) -> None:
    kwargs = {"inputs": {"x": [ROW]}}
    began = time.time()
    sent = app.send_task("inferq.infer", kwargs=kwargs, queue="inferq.m", countdown=1)
    events = listener.whole(sent.id)
    assert types(events) == SUCCESS
    assert events[0]["eta"] is not None
    assert events[0]["timestamp"] > began + 0.9


def test_a_batch_is_told_in_one_message(worker: Worker, client: Client, listener: Listener) -> None:
    with redis_py.Redis.from_url(worker.redis_url) as redis, redis.pubsub() as raw:
        raw.psubscribe("/0.celeryev/task.*")
        sent = [client.submit("m", {"x": numbered(n, WIDTH)}) for n in range(40)]
        for pending in sent:
            assert types(listener.whole(pending.request_id)) == SUCCESS
        messages = 0
        while (got := raw.get_message(timeout=0.1)) is not None:
            messages += got["type"] == "pmessage"
        assert messages < 40


# --- the worker's end ----------------------------------------------------------------------------


def test_a_request_that_cost_a_worker_its_life_is_shown_as_tried_again(
    redis: redis_py.Redis, redis_url: str, models: Path
) -> None:
    fast_lease = {"INFERQ_LEASE_S": "1"}
    with (
        stock_app(redis_url) as app,
        Listener(app, redis) as listener,
        Client(redis_url) as client,
        Worker(redis_url, models, ["slow"], name="first", env=fast_lease, args=["-E"]) as first,
    ):
        until_up(first)
        pending = client.submit("slow", {"x": numbered(1)})
        until(lambda: "task-started" in listener.types(pending.request_id), what="it computes")
        first.kill()
        with Worker(redis_url, models, ["slow"], name="second", env=fast_lease, args=["-E"]):
            events = listener.whole(pending.request_id)
    assert types(events) == [*SUCCESS[:2], "task-retried", *SUCCESS]
    assert [event["hostname"].split("@")[0] for event in events] == ["first"] * 2 + ["second"] * 4
    assert events[3]["retries"] == 1
    task = listener.task(pending.request_id)
    assert (task.state, task.retries) == ("SUCCESS", 1)
    assert task.worker.hostname.startswith("second@")


def test_a_stopping_worker_tells_what_it_still_ends_and_is_offline_then(
    redis: redis_py.Redis, redis_url: str, models: Path
) -> None:
    with (
        stock_app(redis_url) as app,
        Listener(app, redis) as listener,
        Client(redis_url) as client,
        Worker(redis_url, models, ["slow"], args=["-E"]) as worker,
    ):
        until_up(worker)
        pending = client.submit("slow", {"x": numbered(1)})
        until(lambda: "task-started" in listener.types(pending.request_id), what="it computes")
        assert worker.stop() == 0
        assert types(listener.whole(pending.request_id)) == SUCCESS
        until_offline(listener)


# --- switching it on and off ---------------------------------------------------------------------


def ask(app: Celery, command: str) -> str:
    (answers,) = app.control.broadcast(command, reply=True, limit=1, timeout=10)
    (answer,) = answers.values()
    return str(answer["ok"])


@pytest.mark.parametrize("at_first", [True, False])
def test_events_are_enabled_and_disabled_as_stock_celery_has_it(
    redis: redis_py.Redis, redis_url: str, models: Path, at_first: bool
) -> None:
    """Heartbeats go on either way."""
    args = ["-E"] if at_first else []
    with (
        stock_app(redis_url) as app,
        Listener(app, redis) as listener,
        Client(redis_url) as client,
        Worker(redis_url, models, ["m"], args=args) as worker,
    ):
        until_up(worker)

        def serve() -> str:
            pending = client.submit("m", {"x": numbered(1, WIDTH)})
            pending.result(timeout=10)
            return pending.request_id

        ids = [serve()]
        for command in ["disable_events", "enable_events"] * 2:
            assert command.split("_")[0] in ask(app, command)
            ids.append(serve())
        told = [at_first, False, True, False, True]
        for request_id, expected in zip(ids, told, strict=True):
            if expected:
                assert types(listener.whole(request_id)) == SUCCESS
        assert [request_id in listener.tasks for request_id in ids] == told
        beats = len(listener.events)
        until(lambda: len(listener.events) > beats, what="another heartbeat")


def test_a_prefix_of_all_keys_is_before_the_events_topic_too(
    redis: redis_py.Redis, redis_url: str, models: Path
) -> None:
    prefix = "team1:"
    settings = Settings.load(redis_url=redis_url, global_keyprefix=prefix)
    app = make_app(settings)
    env = {"INFERQ_GLOBAL_KEYPREFIX": prefix}
    names = Names(prefix=prefix)
    with (
        Listener(app, redis, prefix) as listener,
        Worker(redis_url, models, ["m"], args=["-E"], env=env, names=names),
    ):
        request_id, raw = message("m", numbered(1, WIDTH))
        redis.lpush(names.queue("m"), raw)
        assert types(listener.whole(request_id)) == SUCCESS
    let_go(app)


# --- more than anybody looks at ------------------------------------------------------------------


def serve_many(client: Client, count: int, value: Callable[[int], float]) -> list[str]:
    """Ask "fast" for `count` requests at once; their ids, once all are answered."""
    rows = [np.full((1, 4), value(n), np.float32) for n in range(count)]
    pending = [client.submit("fast", {"x": row}) for row in rows]
    for each in pending:
        try:
            each.result(timeout=30)
        except InferqError as error:
            assert error.code == "engine_error"  # noqa: PT017
    return [each.request_id for each in pending]


def test_above_the_cap_requests_are_left_out_whole_and_what_fails_never_is(
    redis: redis_py.Redis, redis_url: str, models: Path
) -> None:
    cap, count, every = 50, 3_000, 100
    began = time.monotonic()
    with (
        stock_app(redis_url) as app,
        Listener(app, redis) as listener,
        Client(redis_url) as client,
        Worker(
            redis_url, models, ["fast"], args=["-E"], env={"INFERQ_EVENTS_PER_S": str(cap)}
        ) as worker,
    ):
        until_up(worker)
        ids = serve_many(client, count, lambda n: float(FAULT_RAISE if n % every == 0 else n))
        failed = ids[::every]
        for request_id in failed:
            events = listener.whole(request_id)
            assert types(events) == FAILURE
            assert in_order(events)
        assert worker.stop() == 0
        until_offline(listener)
        took = time.monotonic() - began
        succeeded = {each: events for each, events in listener.tasks.items() if each not in failed}
        assert all(types(events) == SUCCESS for events in succeeded.values())
        assert 10 <= len(succeeded) <= cap * (took + 1)
        assert "no task events of " in worker.log


def test_at_a_cap_of_nothing_only_failures_are_told(
    redis: redis_py.Redis, redis_url: str, models: Path
) -> None:
    with (
        stock_app(redis_url) as app,
        Listener(app, redis) as listener,
        Client(redis_url) as client,
        Worker(
            redis_url, models, ["fast"], args=["-E"], env={"INFERQ_EVENTS_PER_S": "0"}
        ) as worker,
    ):
        until_up(worker)
        ids = serve_many(client, 20, lambda n: float(FAULT_RAISE if n == 19 else n))
        assert types(listener.whole(ids[19])) == FAILURE
        assert set(listener.tasks) == {ids[19]}


def test_at_full_load_heartbeats_go_on_and_the_worker_answers(
    redis: redis_py.Redis, redis_url: str, models: Path
) -> None:
    """With a no-op model and two clients, as fast as they can."""
    cap, seconds, in_flight = 50, 8.0, 1_000
    rows = [np.full((1, 4), n, np.float32) for n in range(8)]
    over = threading.Event()

    def ask_on() -> int:
        with Client(redis_url) as client:
            items = (
                {"x": rows[n % 8]}
                for n in itertools.takewhile(lambda _: not over.is_set(), itertools.count())
            )
            return sum(1 for _ in client.map("fast", items, in_flight=in_flight))

    with (
        stock_app(redis_url) as app,
        Listener(app, redis) as listener,
        Worker(
            redis_url, models, ["fast"], args=["-E"], env={"INFERQ_EVENTS_PER_S": str(cap)}
        ) as worker,
        ThreadPoolExecutor(2) as asking,
    ):
        until_up(worker)
        began, before = time.monotonic(), len(listener.events)
        served = [asking.submit(ask_on) for _ in range(2)]
        try:
            while time.monotonic() < began + seconds:
                asked = time.monotonic()
                assert app.control.ping(timeout=5, limit=1)
                assert time.monotonic() - asked < 3
                assert all(each.alive for each in listener.workers())
                over.wait(0.5)
            took, events = time.monotonic() - began, listener.events[before:]
        finally:
            over.set()
        done = sum(each.result(30) for each in served)
        assert done > 10 * cap * took, "the load was heavy"
        beats = sum(event["type"] == "worker-heartbeat" for event in events)
        assert beats >= 2
        assert len(events) - beats <= 3 * cap * (took + 1)
        assert worker.stop() == 0
        until_offline(listener)
        told = listener.tasks.values()
        assert len(told) > cap * took / 2
        assert all(types(each) == SUCCESS for each in told)


# --- faults --------------------------------------------------------------------------------------


def test_requests_are_answered_where_nobody_may_publish_events(
    new_redis: Callable[..., EmbeddedRedis], models: Path
) -> None:
    server = new_redis()
    lean = ["--without-heartbeat", "--without-gossip", "--without-mingle"]
    with (
        redis_py.Redis.from_url(server.url) as redis,
        stock_app(server.url) as app,
        Client(server.url) as client,
        Worker(server.url, models, ["m"], args=["-E", *lean]) as worker,
    ):
        until_up(worker)
        channels = ["&inferq:*", "&celery-task-meta-*", "&/0.celery.pidbox"]
        redis.execute_command("ACL", "SETUSER", "default", "resetchannels", *channels)
        for n in range(3):
            client.infer("m", {"x": numbered(n, WIDTH)}, timeout=10)

        def dropped() -> int:
            (stats,) = app.control.inspect(timeout=5, limit=1).stats().values()
            return int(stats["inferq_events_dropped"])

        until(lambda: dropped() == 9, what="their events are counted")
        assert worker.alive


def test_events_go_on_after_a_restart_of_redis(
    new_redis: Callable[..., EmbeddedRedis], models: Path
) -> None:
    server = new_redis(appendonly=True, args=("--appendfsync", "always"))
    with (
        redis_py.Redis.from_url(server.url) as redis,
        stock_app(server.url) as app,
        Listener(app, redis) as listener,
        Worker(server.url, models, ["m", "slow"], args=["-E"]) as worker,
    ):
        until_up(worker)
        with Client(server.url) as client:
            cut = client.submit("slow", {"x": numbered(1)})
            until(lambda: "task-started" in listener.types(cut.request_id), what="it computes")
            server.kill()
            server.start()
            listener.wait_until_listening()
            cut.result(timeout=30)
            after = client.submit("m", {"x": numbered(2, WIDTH)})
            after.result(timeout=30)
            assert types(listener.whole(after.request_id)) == SUCCESS
