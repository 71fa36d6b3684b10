"""Whatever is broadcast to a worker, or stands in Redis for its Celery side, costs only itself."""

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
from celery import Celery
from helpers.process import memory_mb
from helpers.repository import fake_model, message, numbered
from helpers.results import NAMES, meta_of
from helpers.stock import stock_app
from helpers.wait import until
from helpers.worker import START_TIMEOUT_S, SupervisedWorker, Worker

from inferq.shared.settings import Settings
from inferq.workers.control_plane.revokes import MAX_REVOKED
from inferq.workers.doctor.workers import workers
from inferq.workers.logs.flood import BURST, WINDOW_S
from inferq.workers.process.embedded import EmbeddedRedis

PIDBOX = "/0.celery.pidbox"
EVENTS = "/0.celeryev/worker.heartbeat"
ANSWER_S = 10.0
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def worker(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    models = tmp_path_factory.mktemp("models")
    fake_model(models, "m", knobs="warm_up = false")
    with EmbeddedRedis(redis_kind) as server, Worker(server.url, models, args=["-E"]) as worker:
        until(lambda: "ready." in worker.log, START_TIMEOUT_S, "Celery is up")
        yield worker


@pytest.fixture
def store(worker: Worker) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(worker.redis_url) as client:
        yield client


@pytest.fixture
def app(worker: Worker) -> Iterator[Celery]:
    with stock_app(worker.redis_url) as app:
        yield app


def wrapped(content: object, text: bytes | None = None, /, **changed: Any) -> dict[str, Any]:
    """A broadcast as kombu wraps it; `text`: the body's bytes."""
    raw = json.dumps(content).encode() if text is None else text
    return {
        "body": base64.b64encode(raw).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"clock": 1, "expires": 0},
        "properties": {
            "delivery_mode": 2,
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": "tag",
            "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""},
        },
        **changed,
    }


def command(method: object, arguments: object = None, **changed: Any) -> bytes:
    body = {"method": method, "arguments": arguments, "destination": None, "pattern": None,
            "matcher": None, **changed}  # fmt: skip
    return json.dumps(wrapped(body)).encode()


def with_properties(**changed: Any) -> bytes:
    whole = wrapped({"method": "ping"})
    whole["properties"].update(changed)
    return json.dumps(whole).encode()


ENVELOPES: dict[str, bytes] = {
    "garbage": b"garbage",
    "not UTF-8": b"\xff\xfe",
    "brackets": b"[" * 100_000,
    "nested": DEEP.encode(),
    "a number": b"5",
    "a list": b"[]",
    "null": b"null",
    "nothing in it": b"{}",
    "no properties": json.dumps(wrapped({}, properties=None)).encode(),
    "properties a number": json.dumps(wrapped({}, properties=5)).encode(),
    "no tag": with_properties(delivery_tag=None),
    "a tag that is a list": with_properties(delivery_tag=[1]),
    "delivery_info a number": with_properties(delivery_info=5),
    "unknown encoding": with_properties(body_encoding="rot13"),
    "an encoding that is a number": with_properties(body_encoding=5),
    "headers a number": json.dumps(wrapped({"method": "ping"}, headers=5)).encode(),
    "a clock that is text": json.dumps(
        wrapped({"method": "ping"}, headers={"clock": "x"})
    ).encode(),
    "a clock beyond all": b'{"headers": {"clock": 1e999}, '
    + json.dumps(wrapped({"method": "ping"}, headers={})).encode()[1:],
    "a clock of 400 digits": json.dumps(
        wrapped({"method": "ping"}, headers={"clock": 10**400})
    ).encode(),
    "body no base64": json.dumps(wrapped({}, body="!")).encode(),
    "body a number": json.dumps(wrapped({}, body=5)).encode(),
    "no body": json.dumps(wrapped({}, body=None)).encode(),
    "pickle": json.dumps(
        wrapped({}, b"cos\nabort\n(tR.", **{"content-type": "application/x-python-serialize"})
    ).encode(),
    "a bomb": json.dumps(
        wrapped(
            {},
            bz2.compress(bytes(400 << 20), 1),
            headers={"compression": "application/x-bz2", "clock": 1},
        )
    ).encode(),
    "a body of zlib": json.dumps(
        wrapped({}, **{"content-type": "text/plain", "content-encoding": "bz2"})
    ).encode(),
    "a body of 10 MB": json.dumps(wrapped({"method": "ping", "arguments": "x" * 10**7})).encode(),
    "a body that is no JSON": json.dumps(wrapped({}, b"{")).encode(),
    "a nested body": json.dumps(wrapped({}, DEEP.encode())).encode(),
    "a body that is a list": json.dumps(wrapped([])).encode(),
    "a body that is text": json.dumps(wrapped("ping")).encode(),
    "a body that is null": json.dumps(wrapped(None)).encode(),
}

COMMANDS: dict[str, bytes] = {
    "no method": json.dumps(wrapped({})).encode(),
    "a method that is a number": command(5),
    "a method that is a mapping": command({}),
    "an unknown method": command("nonsense"),
    "a very long method": command("x" * 100_000),
    "arguments a number": command("ping", 5),
    "arguments a list": command("ping", [1]),
    "unknown arguments": command("ping", {"state": 5}),
    "more fields": command("ping", timeout=5, self=1, channel=2),
    "destination a number": command("ping", destination=5),
    "destination text": command("ping", destination="test"),
    "destination of nobody": command("ping", destination=[None, [], {}]),
    "pattern a number": command("ping", pattern=5, matcher=5),
    "an unknown matcher": command("ping", pattern="*", matcher="nonsense"),
    "no regular expression": command("ping", pattern="(((", matcher="pcre"),
    "an endless one": command("ping", pattern="(([a-z@0-9]+)*)*!", matcher="pcre"),
    "reply_to a number": command("ping", reply_to=5, ticket="t"),
    "reply_to empty": command("ping", reply_to={"x": 1}, ticket="t"),
    "reply_to of lists": command("ping", reply_to={"exchange": [], "routing_key": []}, ticket="t"),
    "reply_to an unknown exchange": command(
        "ping", reply_to={"exchange": "other", "routing_key": "x"}, ticket="t"
    ),
    "a reply to a key of ours": command(
        "ping", reply_to={"exchange": "", "routing_key": NAMES.attempts("m")}, ticket="t"
    ),
    "a ticket that is a mapping": command(
        "ping", reply_to={"exchange": "reply.celery.pidbox", "routing_key": "x"}, ticket={}
    ),
}
#: Arguments that some command or other might choke on.
NAMED = ("task_id", "ids", "queue", "exchange", "exchange_type", "routing_key", "n", "max", "min",
         "task_name", "rate_limit", "soft", "hard", "signal", "terminate", "headers", "modules",
         "reload", "reloader", "from_node", "revoked", "id", "topic", "action", "taskinfoitems",
         "builtins", "samples", "num", "max_depth", "type", "with_defaults", "msg")  # fmt: skip
VALUES: tuple[object, ...] = (
    None, 5, -1, 1e300, "nonsense", "\x00", "../..", "inferq:1:later", [], [5, None], [[]], {},
    {"a": {"b": 1}}, True, ["KILL"],
)  # fmt: skip
#: What Celery registers, without what ends a worker by its own nature.
STOCK = (
    "report", "conf", "dump_conf", "query_task", "revoke", "revoke_by_stamped_headers",
    "terminate", "rate_limit", "time_limit", "clock", "election", "enable_events",
    "disable_events", "heartbeat", "hello", "ping", "stats", "scheduled", "dump_schedule",
    "reserved", "dump_reserved", "active", "dump_active", "revoked", "dump_revoked",
    "registered", "dump_tasks", "objgraph", "memsample", "memdump", "pool_grow", "pool_shrink",
    "pool_restart", "autoscale", "add_consumer", "cancel_consumer", "active_queues",
)  # fmt: skip


def connections(worker: Worker) -> int:
    return worker.log.count("Connected to redis")


def lives_through(
    worker: Worker, app: Celery, store: redis_py.Redis, channel: str, *raws: bytes
) -> list[str]:
    """Publish `raws`; the worker's log lines since, but for those of a ping."""
    before, connected = len(worker.log.splitlines()), connections(worker)
    for raw in raws:
        store.publish(channel, raw)
    answers = until(lambda: app.control.ping(timeout=ANSWER_S, limit=1), 3 * ANSWER_S)
    assert worker.alive, worker.log[-3000:]
    assert answers
    assert connections(worker) == connected, "it kept its connection"
    request_id, raw = message("m", numbered(1))
    store.lpush(NAMES.queue("m"), raw)
    assert meta_of(store, request_id)["status"] == "SUCCESS"
    return worker.log.splitlines()[before:]


@pytest.mark.parametrize("case", [*ENVELOPES, *COMMANDS])
def test_a_malformed_control_message_costs_only_itself(
    worker: Worker, app: Celery, store: redis_py.Redis, case: str
) -> None:
    store.hset("unacked", "tag", "another's")
    before = peak_mb(worker.pid)
    lines = lives_through(worker, app, store, PIDBOX, {**ENVELOPES, **COMMANDS}[case])
    assert "Traceback" not in "\n".join(lines)
    assert len(lines) <= 1, lines
    assert all(len(line) < 1_000 for line in lines)
    assert peak_mb(worker.pid) < before + 150
    assert store.hget("unacked", "tag") == b"another's"
    assert not store.exists(NAMES.attempts("m"))
    store.delete("unacked")


def peak_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


@pytest.mark.parametrize("method", STOCK)
def test_no_arguments_of_a_command_cost_more_than_that_command(
    worker: Worker, app: Celery, store: redis_py.Redis, method: str
) -> None:
    raws = [command(method, {name: value}) for name in NAMED for value in VALUES]
    raws += [command(method, dict.fromkeys(NAMED[:n], v)) for n in (2, 3) for v in VALUES]
    raws += [
        command(method, dict(zip(names, (value, value, value), strict=False)))
        for names in (
            ("task_name", "rate_limit"),
            ("task_name", "hard", "soft"),
            ("queue", "exchange", "exchange_type"),
            ("signal", "task_id"),
        )
        for value in VALUES
    ]
    rows = [
        command(method, {"queue": "other", "exchange_type": "nonsense"}),
        command(method, {"queue": "inferq:1:later"}),
        command(method, {"task_name": "inferq.infer", "rate_limit": ["5/s"]}),
        command(method, {"task_name": "inferq.infer", "hard": "x", "soft": {}}),
        command(method, {"task_name": "nonsense", "rate_limit": "5/s", "hard": 1, "soft": 1}),
    ]
    store.zadd("inferq:1:later", {"m:0:x": 4e12})
    log = "\n".join(lives_through(worker, app, store, PIDBOX, *raws, *rows))
    assert "Traceback" not in log
    queues = app.control.inspect(timeout=ANSWER_S, limit=1).active_queues() or {}
    assert [[each["name"] for each in one] for one in queues.values()] == [["inferq.m"]]
    assert int(store.zcard("inferq:1:later")) == 1
    app.control.enable_events()


def test_a_worker_hears_no_events_of_others(
    worker: Worker, app: Celery, store: redis_py.Redis
) -> None:
    """So none that is malformed can end it: gossip is of no use here."""
    assert store.pubsub_numpat() == 1, "only commands"
    lives_through(worker, app, store, EVENTS, *ENVELOPES.values())


def test_a_flood_of_malformed_messages_fills_no_log(
    worker: Worker, app: Celery, store: redis_py.Redis
) -> None:
    began = time.monotonic()
    lines = lives_through(worker, app, store, PIDBOX, *[b"garbage", command("nonsense")] * 500)
    windows = (time.monotonic() - began) // WINDOW_S + 2
    assert len(lines) <= 2 * BURST * windows < 1_000


# --- what a starting worker is told by others ----------------------------------------------------


class Impostor:
    """Answers each `hello` of a starting worker with `reply`, as often as asked."""

    def __init__(self, store: redis_py.Redis, *replies: bytes) -> None:
        self._store = store
        self._replies = replies
        self._heard = store.pubsub()  # type: ignore[no-untyped-call]
        self._heard.subscribe(PIDBOX)

    def answer(self) -> None:
        def asked() -> dict[str, Any] | None:
            got = self._heard.get_message(timeout=0.1, ignore_subscribe_messages=True)
            body = json.loads(base64.b64decode(json.loads(got["data"])["body"])) if got else {}
            return body["reply_to"] if body.get("method") == "hello" else None

        reply_to = until(asked, START_TIMEOUT_S, "it says hello") or {}
        key = f"{reply_to['routing_key']}.{reply_to['exchange']}"
        self._store.lpush(key, *self._replies)
        self._heard.close()


def reply(body: object, **changed: Any) -> bytes:
    return json.dumps(wrapped(body, **changed)).encode()


@pytest.mark.parametrize(
    "raws",
    [
        [b"garbage"],
        [DEEP.encode()],
        [b"5"],
        [reply([5])],
        [reply(5)],
        [reply({"other@host": 5})],
        [reply({"other@host": {"clock": "x", "revoked": 5}})],
        [reply({"other@host": {"clock": 10**400, "revoked": [[], {}, None]}})],
        [reply({"other@host": {"clock": 5, "revoked": ["x" * 10**6] * 3}})],
        [reply({f"{n}@host": {"clock": 1, "revoked": [f"r{n}"]}}) for n in range(2_000)],
    ],
    ids=range(10),
)
def test_what_others_tell_a_starting_worker_does_not_end_it(
    redis_url: str, redis: redis_py.Redis, tmp_path: Path, raws: list[bytes]
) -> None:
    fake_model(tmp_path, "m", knobs="warm_up = false")
    impostor = Impostor(redis, *raws)
    with Worker(redis_url, tmp_path) as worker:
        impostor.answer()
        until(lambda: "ready." in worker.log or not worker.alive, 30, "Celery is up")
        assert worker.alive
        with stock_app(redis_url) as app:
            assert app.control.ping(timeout=ANSWER_S, limit=1)
            (clock,) = (app.control.inspect(timeout=ANSWER_S, limit=1).clock() or {}).values()
            (known,) = (app.control.inspect(timeout=ANSWER_S, limit=1).revoked() or {}).values()
        assert clock["clock"] < 1e6
        assert all(len(each) < 1_001 for each in known)
        assert connections(worker) == 1
        assert "Traceback" not in worker.log


def test_a_starting_worker_learns_of_revoked_requests_from_others(
    redis_url: str, redis: redis_py.Redis, tmp_path: Path
) -> None:
    fake_model(tmp_path, "m", knobs="warm_up = false")
    with stock_app(redis_url) as app, Worker(redis_url, tmp_path, name="one") as one:
        until(lambda: "ready." in one.log, START_TIMEOUT_S, "the first is up")
        app.control.revoke("gone")
        with Worker(redis_url, tmp_path, name="two") as two:
            until(lambda: "ready." in two.log, START_TIMEOUT_S, "the second is up")
            told = app.control.inspect(timeout=ANSWER_S, limit=2).revoked() or {}
            assert list(told.values()) == [["gone"], ["gone"]]


# --- how much may be revoked ---------------------------------------------------------------------


def test_a_revoke_of_too_many_ids_is_refused(
    worker: Worker, app: Celery, store: redis_py.Redis
) -> None:
    before = memory_mb(worker.pid)
    many = [f"{n:x}" for n in range(300_000)]
    (answer,) = app.control.broadcast(
        "revoke", arguments={"task_id": many}, reply=True, timeout=ANSWER_S, limit=1
    )
    (told,) = answer.values()
    assert f"at most {MAX_REVOKED}" in told["error"]
    huge = app.control.broadcast(
        "revoke", arguments={"task_id": ["x" * 5_000]}, reply=True, timeout=ANSWER_S, limit=1
    )
    assert "error" in next(iter(huge[0].values()))
    assert memory_mb(worker.pid) < before + 100


def test_revoke_after_revoke_fills_no_worker_and_stops_nothing(
    worker: Worker, app: Celery, store: redis_py.Redis
) -> None:
    """A request is served meanwhile, as quickly as ever."""
    lives_through(worker, app, store, PIDBOX)
    before = memory_mb(worker.pid)
    for batch in range(60):
        ids = [f"flood {batch} {n}" for n in range(MAX_REVOKED)]
        store.publish(PIDBOX, command("revoke", {"task_id": ids}))
    began = time.monotonic()
    request_id, raw = message("m", numbered(1))
    store.lpush(NAMES.queue("m"), raw)
    assert meta_of(store, request_id)["status"] == "SUCCESS"
    assert time.monotonic() - began < 5
    assert app.control.ping(timeout=60, limit=1)
    assert memory_mb(worker.pid) < before + 150
    (known,) = (app.control.inspect(timeout=ANSWER_S, limit=1).revoked() or {}).values()
    assert len(known) <= 50_000


def test_terminate_flags_requests_and_asks_redis_nothing_of_each(
    worker: Worker, app: Celery, store: redis_py.Redis
) -> None:
    """Stock Celery looks up, and stores a result for, each id, whoever's it is."""
    ids = [f"someone {n}" for n in range(500)]
    store.config_resetstat()
    lives_through(
        worker, app, store, PIDBOX, command("terminate", {"signal": "KILL", "task_id": ids})
    )
    assert store.info("commandstats").get("cmdstat_get", {"calls": 0})["calls"] < 100
    assert not store.exists(*(NAMES.meta(each) for each in ids))


# --- ending and switching off --------------------------------------------------------------------


def shut_down(url: str) -> None:
    with stock_app(url) as app:
        until(lambda: app.control.ping(timeout=2, limit=1), START_TIMEOUT_S, "it hears commands")
        app.control.shutdown()


def test_shutdown_by_remote_control_is_a_restart_under_the_supervisor(
    redis_url: str, redis: redis_py.Redis, tmp_path: Path
) -> None:
    fake_model(tmp_path, "m", knobs="warm_up = false")
    with SupervisedWorker(redis_url, tmp_path) as worker:
        first = worker.child()
        shut_down(redis_url)
        until(lambda: worker.child() != first, START_TIMEOUT_S, "another child serves")
        assert worker.alive
        request_id, raw = message("m", numbered(1))
        redis.lpush(NAMES.queue("m"), raw)
        assert meta_of(redis, request_id)["status"] == "SUCCESS"
        assert "--allow-remote-shutdown" in worker.log


def test_shutdown_by_remote_control_ends_a_supervisor_that_allows_it(
    redis_url: str, tmp_path: Path
) -> None:
    fake_model(tmp_path, "m", knobs="warm_up = false")
    with SupervisedWorker(redis_url, tmp_path, args=["--allow-remote-shutdown"]) as worker:
        worker.child()
        shut_down(redis_url)
        assert worker.process.wait(START_TIMEOUT_S) == 0


def test_shutdown_by_remote_control_ends_a_plain_worker(redis_url: str, tmp_path: Path) -> None:
    fake_model(tmp_path, "m", knobs="warm_up = false")
    with Worker(redis_url, tmp_path) as worker:
        shut_down(redis_url)
        assert worker.process.wait(START_TIMEOUT_S) == 0


def test_remote_control_can_be_switched_off(
    redis_url: str, redis: redis_py.Redis, tmp_path: Path
) -> None:
    fake_model(tmp_path, "m", knobs="warm_up = false")
    with Worker(redis_url, tmp_path, args=["-E"], env={"INFERQ_REMOTE_CONTROL": "0"}) as worker:
        until(lambda: "ready." in worker.log, START_TIMEOUT_S, "Celery is up")
        assert redis.pubsub_numpat() == 0
        redis.publish(PIDBOX, command("shutdown"))
        with stock_app(redis_url) as app:
            assert not app.control.ping(timeout=1)
        request_id, raw = message("m", numbered(1))
        redis.lpush(NAMES.queue("m"), raw)
        assert meta_of(redis, request_id)["status"] == "SUCCESS"
        assert worker.alive
        assert "mingle" not in worker.log
        switched_off, on = (list(workers(settings(redis_url, on))) for on in (False, True))
        assert [(each.level, each.found) for each in switched_off] == [
            ("ok", "serving m:1, and answers no remote control")
        ]
        assert [each.level for each in on] == ["ok", "warning"]


def settings(redis_url: str, remote_control: bool) -> Settings:
    return Settings.load(redis_url=redis_url, remote_control=remote_control)
