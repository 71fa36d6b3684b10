"""One test for each private thing of Celery and kombu that `celery_private` uses.

Each compares with what Celery itself does, so an upgrade that changes any of it fails here.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import redis as redis_py
from celery import Celery, chord, group
from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.bin.worker import WorkersPool
from celery.concurrency import get_implementation
from celery.exceptions import WorkerShutdown, WorkerTerminate
from celery.worker import control
from celery.worker import state as worker_state
from click import Command
from click import Context as ClickContext
from helpers.stock import let_go
from kombu import Connection, Consumer, Queue
from kombu.exceptions import ContentDisallowed

from inferq.shared.celery_app import make_app
from inferq.shared.names import Names
from inferq.shared.settings import Settings
from inferq.workers.canvas import celery_canvas
from inferq.workers.canvas.chord_claims import ChordClaims
from inferq.workers.canvas.following import following
from inferq.workers.canvas.link_queues import LinkQueues
from inferq.workers.canvas.pace import Pace
from inferq.workers.canvas.place import place_of
from inferq.workers.canvas.sender import LinkSender
from inferq.workers.control_plane import celery_private

QUEUE = "inferq.m"
OUTPUTS = {"x": {"dtype": "<f4", "shape": [1], "data": "AACAPw=="}}


@pytest.fixture
def app(redis_url: str) -> Iterator[Celery]:
    app = make_app(Settings.load(redis_url=redis_url))
    yield app
    let_go(app)


@pytest.fixture
def connection(app: Celery) -> Iterator[Connection]:
    with app.connection_for_read() as connection:
        yield connection


@pytest.fixture(autouse=True)
def worker_state_as_it_was() -> Iterator[None]:
    """Celery's own, and global."""
    yield
    worker_state.should_stop = worker_state.should_terminate = None
    worker_state.revoked.clear()
    worker_state.requests.clear()
    worker_state.reset_state()


def pushed(app: Celery, redis: redis_py.Redis, **options: Any) -> bytes:
    """A message as it stands in our queue."""
    app.send_task("celery.accumulate", args=[1], queue=QUEUE, **options)
    step = options.get("priority", 0)
    message = redis.rpop(Names().queue("m", step))
    assert isinstance(message, bytes)
    return message


# --- the state of a worker -----------------------------------------------------------------------


class Held:
    """A request, as far as Celery's bookkeeping looks at it."""

    name = "inferq.infer"
    id = "one"


def test_a_revoked_id_is_known_by_celerys_set_of_them() -> None:
    worker_state.revoked.add("one")
    assert celery_private.is_revoked("one")
    assert not celery_private.is_revoked("two")


def test_what_celerys_handler_holds_is_in_its_requests() -> None:
    worker_state.task_reserved(Held())
    assert celery_private.is_held("one")
    assert not celery_private.is_held("two")


def test_counted_tasks_are_those_that_celery_counts() -> None:
    worker_state.task_accepted(Held())
    celery_private.count_tasks("inferq.infer", 4)
    assert worker_state.total_count["inferq.infer"] == 5
    assert worker_state.all_total_count == [5]


def test_a_worker_that_is_stopped_ends_with_the_status() -> None:
    celery_private.stop_worker(70)
    with pytest.raises(WorkerShutdown) as ended:
        worker_state.maybe_shutdown()
    assert ended.value.code == 70


def test_a_cold_shutdown_is_seen() -> None:
    assert not celery_private.is_terminating()
    worker_state.should_terminate = 0
    assert celery_private.is_terminating()
    with pytest.raises(WorkerTerminate):
        worker_state.maybe_shutdown()


# --- the command line ----------------------------------------------------------------------------


def test_selected_queues_are_those_of_minus_q(app: Celery) -> None:
    assert celery_private.selected_queues(app) is None
    app.amqp.queues.select(["inferq.a", "inferq.b"])
    assert celery_private.selected_queues(app) == ["inferq.a", "inferq.b"]


@pytest.mark.parametrize(("pool", "solo"), [("solo", True), ("prefork", False), ("threads", False)])
def test_the_solo_pool_is_told_from_others(pool: str, solo: bool) -> None:
    assert celery_private.is_solo(get_implementation(pool)) == solo


def test_celery_takes_prefork_for_the_apps_own_pool(app: Celery) -> None:
    """Which is why the command line itself is looked at."""
    context = ClickContext(Command("worker"), obj=SimpleNamespace(app=app))
    assert celery_private.is_solo(WorkersPool().convert("prefork", None, context))
    for given in (["-P", "prefork"], ["-Pprefork"], ["--pool", "prefork"], ["--pool=prefork"]):
        assert celery_private.asks_for_prefork(["celery", "worker", *given, "-Q", "x"])
    assert not celery_private.asks_for_prefork(["celery", "worker", "-P", "solo", "-Q", "prefork"])


# --- messages in kombu's care --------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "tenant:"])
def test_a_message_is_kept_as_kombu_keeps_what_it_delivers(
    redis: redis_py.Redis, redis_url: str, prefix: str
) -> None:
    app = make_app(Settings.load(redis_url=redis_url, global_keyprefix=prefix))
    app.send_task("celery.accumulate", args=[1], queue=QUEUE)
    message = redis.rpop(f"{prefix}{QUEUE}")
    assert isinstance(message, bytes)
    tag = json.loads(message)["properties"]["delivery_tag"]
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        channel.qos.append(channel.Message(json.loads(message), channel=channel), tag)
        theirs = {key: redis.dump(key) for key in redis.keys("*unacked")}
        (scored,) = redis.zrange(f"{prefix}unacked_index", 0, -1, withscores=True)
        redis.delete(*redis.keys("*unacked*"))
        for command in celery_private.unacked_commands(message, prefix):
            redis.execute_command(*command)  # type: ignore[no-untyped-call]
        assert {key: redis.dump(key) for key in redis.keys("*unacked")} == theirs
        (ours,) = redis.zrange(f"{prefix}unacked_index", 0, -1, withscores=True)
        assert ours[0] == scored[0] == tag.encode()
        assert ours[1] == pytest.approx(scored[1], abs=60)
        channel.qos._delivered.clear()
    let_go(app)


def test_what_was_delivered_is_forgotten_as_kombu_forgets_it(
    app: Celery, redis: redis_py.Redis, connection: Connection
) -> None:
    message = pushed(app, redis)
    channel = connection.default_channel
    tag = json.loads(message)["properties"]["delivery_tag"]
    channel.qos.append(channel.Message(json.loads(message), channel=channel), tag)
    channel.qos._delivered.clear()
    assert redis.hlen("unacked") == redis.zcard("unacked_index") == 1
    for command in celery_private.acked_commands(message, ""):
        redis.execute_command(*command)  # type: ignore[no-untyped-call]
    assert not redis.exists("unacked", "unacked_index")


@pytest.mark.parametrize("kind", ["json", "msgpack"])
def test_a_body_is_read_as_the_handler_reads_it(
    app: Celery, redis: redis_py.Redis, connection: Connection, kind: str
) -> None:
    raw = json.loads(pushed(app, redis, serializer=kind))
    channel = connection.default_channel
    stock = channel.Message(raw, channel=channel, accept={raw["content-type"]}).decode()
    assert celery_private.read_body(raw) == stock
    assert stock[0] == [1]
    with pytest.raises(ContentDisallowed):
        celery_private.read_body({**raw, "content-type": "application/x-python-serialize"})


def test_a_delivered_message_reaches_the_handler_and_is_acknowledged(
    app: Celery, redis: redis_py.Redis, connection: Connection
) -> None:
    received: list[Any] = []
    settled: list[bool] = []
    consumer = SimpleNamespace(
        task_consumer=Consumer(
            connection.default_channel, [Queue("none")], on_message=received.append, accept=["json"]
        ),
        connection_errors=connection.connection_errors,
        app=app,
    )
    message = pushed(app, redis)
    celery_private.deliver(consumer, message, lambda: settled.append(True))
    assert received[0].headers["task"] == "celery.accumulate"
    assert received[0].decode()[0] == [1]
    assert redis.hlen("unacked") == redis.zcard("unacked_index") == 1
    assert not settled
    received[0].ack()
    assert settled
    assert not redis.exists("unacked", "unacked_index")


def test_messages_held_for_too_long_are_put_back_where_kombu_consumes_nothing(
    app: Celery, redis: redis_py.Redis, connection: Connection
) -> None:
    message = pushed(app, redis, priority=6)
    for command in celery_private.unacked_commands(message, ""):
        redis.execute_command(*command)  # type: ignore[no-untyped-call]
    channel = connection.default_channel
    consumer = SimpleNamespace(task_consumer=SimpleNamespace(channel=channel))
    celery_private.restore_messages(consumer)
    assert redis.hlen("unacked") == 1, "its time has not come"
    tag = json.loads(message)["properties"]["delivery_tag"]
    redis.zadd("unacked_index", {tag: time.time() - channel.visibility_timeout - 1})
    celery_private.restore_messages(consumer)
    assert not redis.exists("unacked", "unacked_index")
    (back,) = redis.lrange(Names().queue("m", 6), 0, -1)
    assert stripped(back)["body"] == stripped(message)["body"]


# --- canvas: published as celery.app.trace does ---------------------------------------------------


@pytest.fixture
def traced(app: Celery) -> Callable[[Any, Exception | None], None]:
    """Has Celery's own tracer run a request that returns OUTPUTS, or raises."""

    def run(request: Context, error: Exception | None) -> None:
        def infer(*args: Any, **kwargs: Any) -> object:
            if error is not None:
                raise error
            return OUTPUTS

        task = app.task(infer, name=f"traced.{request.id}")
        given = {name: value for name, value in vars(request).items() if name != "kwargs"}
        build_tracer(task.name, task, app=app)(request.id, (), {}, given)

    return run


@pytest.fixture
def ours(app: Celery, redis_url: str, redis: redis_py.Redis) -> Iterator[Celery]:
    """An app of whose canvases the messages go out by our own connections."""
    ours = make_app(Settings.load(redis_url=redis_url))
    sender = LinkSender(redis, Names(), LinkQueues(Names()), 600, lambda attempt: attempt(), Pace())
    celery_canvas.divert(ours, sender.take, sender.push_at_once)
    celery_canvas.be_current(ours)
    celery_canvas.store_by(ours, sender.store)
    celery_canvas.await_no_results(ours)
    yield ours
    celery_canvas.be_current(app)
    let_go(ours)


def asked(app: Celery, redis: redis_py.Redis, build: Callable[[Any], Any]) -> Context:
    """The context of the request whose signature `build` sends, given an `infer` signature."""
    build(app.signature("inferq.infer", kwargs={"inputs": {}}, queue=QUEUE)).apply_async()
    message = redis.rpop(QUEUE)
    assert isinstance(message, bytes)
    raw = json.loads(message)
    channel = app.connection().default_channel
    *_, embed = channel.Message(raw, channel=channel).decode()
    redis.flushall()
    follows = following(embed, len(message), LinkQueues(Names()))
    return celery_canvas.context_of(place_of(message), **msgspec.structs.asdict(follows))


def written(redis: redis_py.Redis, own: str) -> dict[str, Any]:
    """All that stands in Redis but the request's `own` result, less what is random or a time."""
    found: dict[str, Any] = {}
    for key in sorted(str(key, "utf-8") for key in redis.keys("*") if isinstance(key, bytes)):
        if key == f"celery-task-meta-{own}" or key.startswith("_kombu"):
            continue
        kind = redis.type(key)
        if kind == b"list":
            found[key] = [stripped(item) for item in redis.lrange(key, 0, -1)]
        elif kind == b"string":
            found[key] = stripped(redis.get(key))
        elif kind == b"zset":
            found[key] = redis.zrange(key, 0, -1, withscores=True)
        else:
            found[key] = redis.dump(key)
    return found


def stripped(item: Any) -> Any:
    read = json.loads(item)
    if isinstance(read, dict):
        for name in ("date_done", "traceback"):
            read.pop(name, None)
        properties = read.get("properties", {})
        for name in ("delivery_tag", "reply_to"):
            properties.pop(name, None)
        for name in ("origin", "group"):
            read.get("headers", {}).pop(name, None)
    return read


def plain(app: Celery, name: str) -> Any:
    """A signature that has its id already, so that two publications are alike."""
    return app.signature(f"plain.{name}", queue="plain", task_id=name)


BUILDS: dict[str, Callable[[Celery, Any], Any]] = {
    "link": lambda app, infer: infer.set(link=[plain(app, "a")]),
    "two links": lambda app, infer: infer.set(link=[plain(app, "a"), plain(app, "b")]),
    "group as link": lambda app, infer: infer.set(
        link=[group(plain(app, "a"), plain(app, "b"), app=app)]
    ),
    "chain": lambda app, infer: infer | plain(app, "a") | plain(app, "b"),
    "chain into a group": lambda app, infer: infer | group(plain(app, "a"), plain(app, "b")),
    "errback": lambda app, infer: infer.set(link_error=[plain(app, "a")]),
    "chord": lambda app, infer: chord([infer, plain(app, "a")], plain(app, "body"), app=app),
    "chord of one": lambda app, infer: chord(group([infer], app=app), plain(app, "body"), app=app),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_what_follows_on_a_request_is_what_celery_publishes(
    app: Celery,
    ours: Celery,
    redis: redis_py.Redis,
    traced: Callable[[Any, Exception | None], None],
    build: Callable[[Celery, Any], Any],
    fails: bool,
) -> None:
    """Links, the rest of a chain and its results, errbacks, and a chord's bookkeeping."""
    request = asked(app, redis, lambda infer: build(app, infer))
    error = ValueError("asked to fail") if fails else None
    traced(request, error)
    theirs = written(redis, request.id)
    redis.flushall()
    if error is None:
        celery_canvas.publish_success(ours, request, OUTPUTS)
        celery_canvas.finish_chord(ours, request, "SUCCESS", OUTPUTS)
    else:
        celery_canvas.finish_chord(ours, request, "FAILURE", error)
        celery_canvas.publish_failure(ours, request, error)
    assert written(redis, request.id) == theirs
    assert not redis.keys("_kombu*"), "keys that stay for good"


# --- task events ---------------------------------------------------------------------------------


def heard(redis: redis_py.Redis, send: Callable[[], object]) -> tuple[str, dict[str, Any]]:
    """The first message that `send` publishes: its topic, and what stands in it."""
    with redis.pubsub() as listening:  # type: ignore[no-untyped-call]
        listening.psubscribe("*celeryev*")
        assert listening.get_message(timeout=5) is not None
        send()
        message = listening.get_message(timeout=5)
        assert message is not None
    return message["channel"].decode(), json.loads(message["data"])


@pytest.mark.parametrize("prefix", ["", "team1:"])
def test_events_are_published_as_celerys_dispatcher_does(
    redis: redis_py.Redis, redis_url: str, prefix: str
) -> None:
    app = make_app(Settings.load(redis_url=redis_url, global_keyprefix=prefix))
    events = [
        {"type": "task-started", "uuid": f"ü{n}", "timestamp": 1.5, "eta": None} for n in "ab"
    ]
    with app.connection_for_write() as connection:
        dispatcher = app.events.Dispatcher(
            connection, hostname="w@h", buffer_group=["task"], buffer_limit=2
        )

        def stock() -> None:
            for event in events:
                fields = {name: value for name, value in event.items() if name != "type"}
                dispatcher.send(event["type"], **fields)

        topic, message = heard(redis, stock)
        body = json.loads(base64.b64decode(message["body"]))
    ours = celery_private.event_message(body, "task.multi", "w@h")
    mine = celery_private.event_topic(prefix, 0, "task.multi")
    redis.publish(mine, ours)
    assert heard(redis, lambda: redis.publish(mine, ours))[0] == topic
    got = json.loads(ours)
    assert json.loads(base64.b64decode(got.pop("body"))) == body
    for each in (got, message):
        each.pop("body", None)
        assert each["properties"].pop("delivery_tag")
    assert got == message
    assert [each["uuid"] for each in body] == ["üa", "üb"]
    assert {"hostname", "utcoffset", "pid", "clock"} <= body[0].keys()
    let_go(app)


def test_whether_task_events_are_on_is_what_remote_control_sets(app: Celery) -> None:
    """Stock `disable_events` needs the groups of events by name: with -E there are none."""
    with app.connection_for_write() as connection:
        for groups, at_first in ((None, True), (["worker"], False)):
            dispatcher = app.events.Dispatcher(connection, groups=groups)
            consumer = SimpleNamespace(event_dispatcher=dispatcher)
            state = SimpleNamespace(consumer=consumer)
            assert celery_private.task_events_enabled(consumer) is at_first
            celery_private.name_event_groups(consumer)
            assert celery_private.task_events_enabled(consumer) is at_first
            for command, expected in (
                (control.enable_events, True),
                (control.disable_events, False),
            ):
                assert command(state)["ok"]
                assert celery_private.task_events_enabled(consumer) is expected
            assert "worker" in dispatcher.groups
    assert celery_private.task_events_enabled(SimpleNamespace(event_dispatcher=None)) is None
    assert celery_private.task_events_enabled(None) is None


def test_an_app_can_be_kept_from_awaiting_what_it_sends(app: Celery, redis: redis_py.Redis) -> None:
    def subscribed(act: Callable[[], object]) -> bool:
        redis.config_resetstat()
        act()
        return "cmdstat_subscribe" in redis.info("commandstats")

    assert subscribed(lambda: app.send_task("x", queue="q")), "stock Celery does"
    celery_canvas.await_no_results(app)
    assert not subscribed(lambda: app.send_task("x", queue="q"))


def test_a_chords_body_is_claimed_by_a_token_that_is_handed_to_each_of_celerys_scripts(
    ours: Celery, redis: redis_py.Redis
) -> None:
    """Of a worker that is told to end before the body is in Redis, the claim and parts stay."""
    claims = ChordClaims(redis, Names())
    celery_canvas.claim_by(ours, claims)
    celery_canvas.claim_by(ours, claims)
    request = asked(ours, redis, lambda infer: chord([infer], plain(ours, "body"), app=ours))
    redis.set(f"celery-taskset-meta-{request.group}.s", 1)
    whose = f"celery-taskset-meta-{request.group}.c"

    class Told(BaseException):
        """As `Stopped`."""

    def refuse(_publish: Callable[..., object], *_: object) -> None:
        claims.stays = True
        raise Told

    push = ours.amqp._retry_publish
    ours.amqp._retry_publish = refuse
    claims.begin("first")
    redis.set(Names().fence("first"), 1)
    with pytest.raises(Told):
        celery_canvas.finish_chord(ours, request, "SUCCESS", OUTPUTS)
    assert redis.get(whose) == b"inferq:first"
    ours.amqp._retry_publish = push
    claims.begin("second")
    celery_canvas.finish_chord(ours, request, "SUCCESS", OUTPUTS)
    assert not redis.llen("plain"), "the first one lives"
    redis.delete(Names().fence("first"))
    celery_canvas.finish_chord(ours, request, "SUCCESS", OUTPUTS)
    assert redis.llen("plain") == 1
    assert redis.get(whose) == b"done"
    celery_canvas.finish_chord(ours, request, "SUCCESS", OUTPUTS)
    assert redis.llen("plain") == 1
