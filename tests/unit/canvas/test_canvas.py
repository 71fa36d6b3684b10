"""What follows on a request is published before it is settled, also where Redis is in trouble."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count
from queue import SimpleQueue
from typing import Any

import pytest
import redis as redis_py
from celery import Celery
from helpers.stock import let_go
from helpers.wait import until
from redis.client import Pipeline
from redis.connection import Connection

from inferq.shared import codec
from inferq.shared.celery_app import make_app
from inferq.shared.errors import EngineError
from inferq.shared.names import Names
from inferq.shared.settings import Settings
from inferq.workers.canvas import patience
from inferq.workers.canvas.celery_canvas import await_no_results
from inferq.workers.canvas.patience import RETRY_S
from inferq.workers.canvas.publisher import Canvas
from inferq.workers.claims.claim import Claim, Slot
from inferq.workers.claims.settlement import Settlement
from inferq.workers.process.embedded import EmbeddedRedis

NOW = "2026-01-01T00:00:00+00:00"
CLAIM = Claim("claim", "m", 0, 1)


@pytest.fixture
def server(new_redis: Callable[..., EmbeddedRedis]) -> EmbeddedRedis:
    return new_redis()


@pytest.fixture
def store(server: EmbeddedRedis) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(server.url) as client:
        yield client


@pytest.fixture
def app(server: EmbeddedRedis) -> Iterator[Celery]:
    app = make_app(Settings.load(redis_url=server.url))
    yield app
    let_go(app)


class Ready(SimpleQueue[tuple[str, Settlement]]):
    """What the canvas reports as ready to be settled."""

    def __call__(self, incarnation: str, settlement: Settlement) -> None:
        self.put((incarnation, settlement))


@pytest.fixture
def ready() -> Ready:
    return Ready()


@pytest.fixture
def canvas(server: EmbeddedRedis, store: redis_py.Redis, ready: Ready) -> Iterator[Canvas]:
    canvas = Canvas(Settings.load(redis_url=server.url), store, ready)
    canvas.start()
    yield canvas
    canvas.stop()


def linked(app: Celery, store: redis_py.Redis, queue: str, count: int = 1, **options: Any) -> bytes:
    """The message of a request with links into `queue`."""
    links = [app.signature("plain.note", queue=queue) for _ in range(count)]
    app.send_task("inferq.infer", queue="inferq.m", link=links, **options)
    message = store.rpop("inferq.m")
    assert isinstance(message, bytes)
    return message


def succeeded(message: bytes, model: str = "m", result: object = None) -> Settlement:
    task_id = json.loads(message)["headers"]["id"]
    meta = codec.encode_meta("SUCCESS", task_id, result or {"x": 1}, NOW, codec.JSON, None, None)
    return Settlement(Slot(CLAIM, 0), model, task_id, meta)


def test_a_link_is_published_and_then_the_request_is_ready(
    app: Celery, store: redis_py.Redis, canvas: Canvas, ready: Ready
) -> None:
    message = linked(app, store, "plain")
    settlement = succeeded(message)
    canvas.put("i", settlement, message)
    assert ready.get(timeout=10) == ("i", settlement)
    (published,) = store.lrange("plain", 0, -1)
    assert json.loads(published)["headers"]["root_id"] == settlement.request_id


def test_links_wait_for_a_full_redis_and_the_request_with_them(
    app: Celery, store: redis_py.Redis, canvas: Canvas, ready: Ready
) -> None:
    message = linked(app, store, "plain")
    have_it_full(store, True)
    canvas.put("i", succeeded(message), message)
    until(lambda: int(store.info("errorstats").get("errorstat_OOM", {}).get("count", 0)) >= 2)
    assert ready.empty()
    have_it_full(store, False)
    ready.get(timeout=10)
    assert store.llen("plain") == 1


@pytest.mark.usefixtures("kills_connections")
def test_links_ride_out_connections_that_die(
    app: Celery, store: redis_py.Redis, canvas: Canvas, ready: Ready
) -> None:
    for n in range(1, 6):
        message = linked(app, store, "plain")
        store.client_kill_filter(_type="normal", skipme=True)
        canvas.put("i", succeeded(message), message)
        assert codec.decode_meta(ready.get(timeout=10)[1].outcome)["status"] == "SUCCESS"
        assert store.llen("plain") == n


def test_a_canvas_that_is_stopped_while_links_wait_reports_nothing_ready(
    app: Celery, store: redis_py.Redis, canvas: Canvas, ready: Ready
) -> None:
    """The request goes back to its queue with its claim, and its links are published later."""
    message = linked(app, store, "plain")
    have_it_full(store, True)
    canvas.put("i", succeeded(message), message)
    until(lambda: store.info("errorstats").get("errorstat_OOM"), what="it has tried")
    canvas.stop()
    assert ready.empty()


def test_links_that_can_never_be_published_make_the_request_fail(
    app: Celery, store: redis_py.Redis, canvas: Canvas, ready: Ready
) -> None:
    store.set("no list", 1)
    messages = [linked(app, store, "no list"), linked(app, store, "plain")]
    for message in messages:
        canvas.put("i", succeeded(message), message)
    _, failed = ready.get(timeout=10)
    meta = codec.decode_meta(failed.outcome)
    assert (meta["status"], meta["result"]["code"]) == ("FAILURE", EngineError.code)
    assert "WRONGTYPE" in meta["result"]["exc_message"][0]
    _, settled = ready.get(timeout=10)
    assert codec.decode_meta(settled.outcome)["status"] == "SUCCESS"


def test_a_chord_that_cannot_be_written_fails_and_keeps_no_others_links_waiting(
    app: Celery, store: redis_py.Redis, canvas: Canvas, ready: Ready
) -> None:
    store.set("celery-taskset-meta-g.j", 1)
    message = linked(app, store, "plain", chord={"task": "x"}, group_id="g")
    for each in (message, linked(app, store, "plain")):
        canvas.put("i", succeeded(each), each)
    _, failed = ready.get(timeout=10)
    assert codec.decode_meta(failed.outcome)["result"]["code"] == EngineError.code
    _, settled = ready.get(timeout=10)
    assert codec.decode_meta(settled.outcome)["status"] == "SUCCESS"


@pytest.mark.parametrize("ignored", [False, True])
def test_a_failure_is_stored_before_its_errbacks_are_called_unless_it_is_ignored(
    app: Celery, store: redis_py.Redis, canvas: Canvas, ready: Ready, ignored: bool
) -> None:
    message = linked(app, store, "plain", link_error=app.signature("plain.e", queue="plain"))
    task_id = json.loads(message)["headers"]["id"]
    meta = codec.encode_failure(task_id, EngineError("it"), NOW, codec.JSON)
    failed = Settlement(Slot(CLAIM, 0), "m", task_id, meta, ignore_result=ignored)
    canvas.put("i", failed, message)
    ready.get(timeout=10)
    assert store.llen("plain") == 1
    assert bool(store.exists(Names().meta(task_id))) != ignored


@pytest.mark.parametrize("errback", [False, True])
def test_links_follow_the_result_that_was_first(
    app: Celery, store: redis_py.Redis, canvas: Canvas, ready: Ready, errback: bool
) -> None:
    """A copy that fails (its payload was deleted with the first) calls no errback, nor a chord."""
    options = {"link_error": app.signature("plain.e", queue="failed")} if errback else {}
    message = linked(app, store, "plain", **options)
    first = succeeded(message)
    assert first.request_id is not None
    store.set(Names().meta(first.request_id), first.outcome)
    meta = codec.encode_failure(first.request_id, EngineError("it"), NOW, codec.JSON)
    canvas.put("i", Settlement(Slot(CLAIM, 0), "m", first.request_id, meta), message)
    ready.get(timeout=10)
    assert store.llen("failed") == 0
    (published,) = store.lrange("plain", 0, -1)
    assert json.loads(published)["headers"]["task"] == "plain.note"


def have_it_full(store: redis_py.Redis, full: bool) -> None:
    store.config_set("maxmemory", 1 if full else 0)


def test_how_long_links_wait_is_told_but_not_while_redis_is_full(
    canvas: Canvas, app: Celery, store: redis_py.Redis, ready: Ready
) -> None:
    """Where Redis is full a restart of the worker would be of no use."""
    message = linked(app, store, "later")
    assert canvas.waits_s() == 0.0
    have_it_full(store, True)
    canvas.put("i", succeeded(message), message)
    for _ in range(4):  # it begins anew with each try
        until(lambda: canvas.waits_s() > RETRY_S / 2, what="they wait")
        until(lambda: canvas.waits_s() < RETRY_S / 2, what="that does not count")
    have_it_full(store, False)
    assert ready.get(timeout=10)
    until(lambda: not canvas._in_hand._noted.field, what="it rests")
    store.execute_command("CLIENT", "PAUSE", int(6000 * RETRY_S), "WRITE")  # type: ignore[no-untyped-call]
    canvas.put("i", succeeded(message), message)
    until(lambda: canvas.waits_s() > 3 * RETRY_S, what="it is told that they wait")
    assert ready.get(timeout=10)
    until(lambda: canvas.waits_s() == 0.0, what="none wait")


def test_links_wait_out_an_outage_however_long_it_is(
    canvas: Canvas, app: Celery, store: redis_py.Redis, server: EmbeddedRedis, ready: Ready
) -> None:
    """Celery's own patience, 20 s, is cut down here: when that ends, ours must not."""
    for each in canvas._apps.values():
        options = {**each.conf.result_backend_transport_options, "retry_policy": {"max_retries": 1}}
        each.conf.result_backend_transport_options = options
    await_no_results(app)
    first, second = linked(app, store, "plain"), linked(app, store, "plain")
    canvas.put("i", succeeded(first), first)
    assert ready.get(timeout=10)
    server.kill()
    canvas.put("i", succeeded(second), second)
    until(lambda: canvas.waits_s() > 6 * RETRY_S, what="they wait")
    server.start()
    _, settled = ready.get(timeout=20)
    assert codec.decode_meta(settled.outcome)["status"] == "SUCCESS"


@pytest.mark.parametrize("links", [1, 3])
def test_nobody_subscribes_to_the_results_of_what_follows(
    canvas: Canvas, app: Celery, store: redis_py.Redis, ready: Ready, links: int
) -> None:
    message = linked(app, store, "plain", links)
    store.config_resetstat()
    canvas.put("i", succeeded(message), message)
    assert ready.get(timeout=10)
    assert "cmdstat_subscribe" not in store.info("commandstats")


def test_models_take_turns_in_having_their_links_published(
    server: EmbeddedRedis, app: Celery, store: redis_py.Redis, ready: Ready
) -> None:
    canvas = Canvas(Settings.load(redis_url=server.url), store, ready)
    for model in ("a", "a", "a", "b", "c", "c"):
        message = linked(app, store, "plain")
        canvas.put("i", succeeded(message, model), message)
    canvas.start()
    order = [ready.get(timeout=10)[1].model for _ in range(6)]
    canvas.stop()
    assert order == ["a", "b", "c", "a", "c", "a"]


def test_links_that_redis_never_takes_are_given_up_though_it_answers(
    monkeypatch: pytest.MonkeyPatch,
    canvas: Canvas,
    app: Celery,
    store: redis_py.Redis,
    ready: Ready,
) -> None:
    """Something in between ends each connection on which this message comes."""
    send, marker = Connection.send_packed_command, b"never let through"

    def cut(connection: Connection, command: Any, *given: Any, **options: Any) -> None:
        if marker in b"".join(command):
            connection.disconnect()  # type: ignore[no-untyped-call]
            raise redis_py.ConnectionError("the peer has ended it")
        send(connection, command, *given, **options)  # type: ignore[no-untyped-call]

    message = linked(app, store, "plain", task_id=marker.decode())
    monkeypatch.setattr(Connection, "send_packed_command", cut)
    monkeypatch.setattr(patience, "GIVE_UP_S", 2 * RETRY_S)
    canvas.put("i", succeeded(message), message)
    after = linked(app, store, "plain")
    canvas.put("i", succeeded(after), after)
    _, failed = ready.get(timeout=30)
    result = codec.decode_meta(failed.outcome)["result"]
    assert result["code"] == EngineError.code
    assert "though Redis answers" in result["exc_message"][0]
    _, settled = ready.get(timeout=10)
    assert codec.decode_meta(settled.outcome)["status"] == "SUCCESS"
    assert store.llen("plain") == 1


def test_what_redis_has_is_not_pushed_again_when_a_try_breaks_off(
    monkeypatch: pytest.MonkeyPatch,
    canvas: Canvas,
    app: Celery,
    store: redis_py.Redis,
    ready: Ready,
) -> None:
    execute, trips = Pipeline.execute, count(1)

    def broken(pipe: Any, *given: Any, **options: Any) -> Any:
        if next(trips) in {2, 3}:
            raise redis_py.ConnectionError("it broke")
        return execute(pipe, *given, **options)

    message = linked(app, store, "plain", 250)
    monkeypatch.setattr(Pipeline, "execute", broken)
    canvas.put("i", succeeded(message), message)
    _, settled = ready.get(timeout=10)
    assert codec.decode_meta(settled.outcome)["status"] == "SUCCESS"
    ids = [json.loads(each)["headers"]["id"] for each in store.lrange("plain", 0, -1)]
    assert len(ids) == len(set(ids)) == 250
    assert next(trips) > 4
