"""What replaces parts of kombu and Celery does as these do, with all that is as it should be.

Each compares with stock, so an upgrade that changes what is replaced fails here.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis as redis_py
from celery import Celery
from celery.worker.consumer.mingle import Mingle
from celery.worker.pidbox import Pidbox
from helpers.stock import let_go
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu.transport.redis import Channel, QoS

from inferq.shared.celery_app import make_app
from inferq.shared.names import Names
from inferq.shared.settings import Settings
from inferq.workers.control_plane import kombu_guard, mailbox

REPLACED: tuple[tuple[type, str], ...] = (
    (Channel, "_receive_one"), (Channel, "_queue_bind"), (Channel, "_refresh_bindings"),
    (Channel, "sweep_bindings"), (Channel, "_size"), (Channel, "get_table"),
    (QoS, "restore_visible"), (QoS, "restore_by_tag"), (Pidbox, "on_message"), (Pidbox, "start"),
    (Mingle, "sync"),
)  # fmt: skip
QUEUE = "inferq.m"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Replaces, until the end of the test."""
    for owner, name in REPLACED:
        monkeypatch.setattr(owner, name, getattr(owner, name))

    def replace() -> None:
        kombu_guard.install()
        mailbox.install()

    return replace


@pytest.fixture
def app(redis_url: str) -> Iterator[Celery]:
    app = make_app(Settings.load(redis_url=redis_url))
    yield app
    let_go(app)


@pytest.fixture
def connection(app: Celery) -> Iterator[Connection]:
    with app.connection_for_read() as connection:
        yield connection


def test_all_that_is_replaced_takes_what_stock_takes(install: Callable[[], None]) -> None:
    stock = {
        (owner, name): list(inspect.signature(getattr(owner, name)).parameters)
        for owner, name in REPLACED
    }
    install()
    for (owner, name), parameters in stock.items():
        ours = getattr(owner, name)
        assert ours.__module__.startswith("inferq."), name
        assert len(inspect.signature(ours).parameters) == len(parameters), name


@pytest.mark.parametrize("leftmost", [False, True])
@pytest.mark.parametrize("prefix", ["", "tenant:"])
def test_what_is_put_back_is_what_kombu_puts_back(
    install: Callable[[], None], redis: redis_py.Redis, redis_url: str, leftmost: bool, prefix: str
) -> None:
    app = make_app(Settings.load(redis_url=redis_url, global_keyprefix=prefix))
    found: list[list[Any]] = []
    for replaced in (False, True):
        redis.flushall()
        app.send_task(
            "x", args=[{"__type__": "y", "__value__": 1}], queue=QUEUE, priority=6, task_id="id"
        )
        key = prefix + Names().queue("m", 6)
        raw = json.loads(redis.rpop(key) or b"")  # type: ignore[arg-type]
        raw["properties"].update(delivery_tag="tag", reply_to="r")
        raw["headers"]["origin"] = "o"
        redis.rpush(key, "before")
        if replaced:
            install()
        with app.connection_for_read() as connection:
            qos = connection.default_channel.qos
            redis.hset(f"{prefix}unacked", "tag", json.dumps([raw, "", QUEUE]))
            redis.zadd(f"{prefix}unacked_index", {"tag": time.time() - 4000, "new": time.time()})
            if leftmost:
                qos.restore_by_tag("tag", leftmost=True)
            else:
                qos.restore_visible(interval=1)
            assert not redis.exists(f"{prefix}unacked")
            assert redis.zrange(f"{prefix}unacked_index", 0, -1) == [b"new"]
        items: list[Any] = redis.lrange(key, 0, -1)
        found.append([item if item == b"before" else json.loads(item) for item in items])
    assert found[0] == found[1]
    assert len(found[0]) == 2
    let_go(app)


def test_a_broadcast_is_delivered_as_kombu_delivers_it(
    install: Callable[[], None], connection: Connection, redis: redis_py.Redis
) -> None:
    exchange = Exchange("celery.pidbox", type="fanout")
    heard: list[tuple[Any, Any]] = []

    def note(body: Any, message: Any) -> None:
        heard.append((body, message.headers))

    for replaced in (False, True):
        if replaced:
            install()
        with (
            connection.channel() as channel,
            Consumer(
                channel,
                [Queue("q", exchange, exclusive=True)],
                callbacks=[note],
                accept=["json"],
                no_ack=True,
            ),
        ):
            deadline = time.monotonic() + 10
            before = len(heard)
            while len(heard) == before and time.monotonic() < deadline:
                Producer(channel).publish(
                    {"method": "ping"}, exchange=exchange, headers={"clock": 3}, declare=[exchange]
                )
                try:
                    connection.drain_events(timeout=0.5)
                except TimeoutError:
                    continue
    assert len({json.dumps(each) for each in heard}) == 1
    assert heard[0] == ({"method": "ping"}, {"clock": 3})
    assert len(heard) >= 2


def test_an_answer_goes_where_kombu_sends_it(
    install: Callable[[], None], connection: Connection, redis: redis_py.Redis
) -> None:
    """The table of bindings is read as it stands, and without what is none."""
    channel = connection.default_channel
    exchange = Exchange("reply.celery.pidbox", type="direct", durable=False)
    Queue("asker", exchange, routing_key="one", expires=10)(channel).declare()
    stock = sorted(channel.get_table("reply.celery.pidbox"))
    install()
    assert sorted(channel.get_table("reply.celery.pidbox")) == stock
    redis.sadd("_kombu.binding.reply.celery.pidbox", "odd")
    assert sorted(channel.get_table("reply.celery.pidbox")) == stock
    assert channel._size("asker") == 0
    channel.sweep_bindings()
    channel._refresh_bindings(["asker"])
    assert channel.get_table("reply.celery.pidbox") != []
