"""kombu and Celery read what the codec writes, and the codec reads what they write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kombu
import numpy as np
import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError
from helpers.repository import message, numbered
from redis import Redis

from inferq.shared import codec
from inferq.shared.codec import JSON, MSGPACK
from inferq.shared.errors import InvalidInput
from inferq.shared.names import Names

NAMES = Names()
DATE = "2026-01-01T00:00:00+00:00"
SERIALIZERS = {"msgpack": MSGPACK, "json": JSON}
TENSOR = {"dtype": "<f4", "shape": [1, 4], "data": [[0.0, 1.0, 2.0, 3.0]]}


@pytest.fixture(params=list(SERIALIZERS))
def serializer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def app(redis_url: str, serializer: str) -> Iterator[Celery]:
    """A stock app: as it comes for JSON, told of msgpack otherwise."""
    app = Celery(broker=redis_url, backend=redis_url, set_as_current=False)
    if serializer == "msgpack":
        app.conf.update(
            accept_content=["json", "msgpack"],
            task_serializer="msgpack",
            result_serializer="msgpack",
        )
    yield app
    app.close()


def test_kombus_consumer_reads_our_message(redis_url: str, redis: Redis) -> None:
    request_id, raw = message("m", numbered(3), priority=3)
    redis.lpush(NAMES.queue("m", 3), raw)
    got: list[kombu.Message] = []
    with kombu.Connection(redis_url) as connection:
        queue = kombu.Queue("inferq.m")
        with kombu.Consumer(connection, [queue], accept=[MSGPACK], callbacks=[_into(got)]):
            connection.drain_events(timeout=10)
    (read,) = got
    args, kwargs, embed = read.payload
    assert (read.headers["id"], read.headers["task"]) == (request_id, "inferq.infer")
    assert read.properties["correlation_id"] == request_id
    assert (read.properties["priority"], read.delivery_info["routing_key"]) == (3, "inferq.m")
    assert (args, kwargs["model"]) == ([], "m")
    assert not any(embed.values())
    np.testing.assert_array_equal(codec.decode_tensor("x", kwargs["inputs"]["x"]), numbered(3))


def _into(got: list[kombu.Message]) -> Any:
    def take(body: object, read: kombu.Message) -> None:
        got.append(read)
        read.ack()

    return take


def test_what_send_task_pushes_is_read(app: Celery, serializer: str, redis: Redis) -> None:
    sent = app.send_task(
        "inferq.infer",
        kwargs={"model": "m", "inputs": {"x": TENSOR}},
        queue="inferq.m",
        priority=6,
        expires=60,
    )
    (raw,) = redis.lrange(NAMES.queue("m", 6), 0, -1)
    assert isinstance(raw, bytes)
    envelope = codec.decode_envelope(raw)
    assert envelope.content_type == SERIALIZERS[serializer]
    assert (envelope.headers.id, envelope.properties.priority) == (sent.id, 6)
    assert envelope.headers.expires is not None
    body = codec.decode_body(envelope)
    assert (body.kwargs["model"], body.has_canvas) == ("m", False)
    array = codec.decode_tensor("x", body.kwargs["inputs"]["x"])
    np.testing.assert_array_equal(array, [[0.0, 1.0, 2.0, 3.0]])


def test_a_chain_and_links_are_seen_in_what_celery_pushes(app: Celery, redis: Redis) -> None:
    infer = app.signature("inferq.infer", kwargs={"inputs": {}}, queue="inferq.m")
    then = app.signature("then")
    (infer | then).apply_async()
    infer.apply_async(link=then)
    infer.apply_async(link_error=then)
    for raw in redis.lrange(NAMES.queue("m"), 0, -1):
        assert isinstance(raw, bytes)
        assert codec.decode_body(codec.decode_envelope(raw)).has_canvas


def test_celerys_backend_reads_our_success(app: Celery, serializer: str, redis: Redis) -> None:
    x = numbered(2.5)
    data = codec.encode_success(
        "one",
        {"y": x},
        {"batch_size": 4},
        DATE,
        SERIALIZERS[serializer],
        lists=True,
        extra={"group_id": "g", "parent_id": "p"},
    )
    meta = app.backend.decode_result(data)
    assert (meta["status"], meta["task_id"], meta["date_done"]) == ("SUCCESS", "one", DATE)
    assert (meta["receipt"], meta["group_id"], meta["parent_id"]) == ({"batch_size": 4}, "g", "p")
    redis.set(NAMES.meta("one"), data)
    result = app.AsyncResult("one")
    got = result.get(timeout=10)["y"]
    assert (got["dtype"], got["shape"]) == ("<f4", [1, 4])
    np.testing.assert_array_equal(codec.decode_tensor("y", got), x)
    assert result.successful()


def test_celerys_backend_raises_our_failure_by_its_name(
    app: Celery, serializer: str, redis: Redis
) -> None:
    error = InvalidInput("input 'x': wrong", model="m")
    data = codec.encode_failure("one", error, DATE, SERIALIZERS[serializer])
    redis.set(NAMES.meta("one"), data)
    result = app.AsyncResult("one")
    with pytest.raises(Exception, match="input 'x': wrong") as caught:
        result.get(timeout=10)
    assert type(caught.value).__name__ == "InvalidInput"
    assert result.failed()


def test_celerys_backend_raises_our_revoked_as_its_own(
    app: Celery, serializer: str, redis: Redis
) -> None:
    redis.set(
        NAMES.meta("one"), codec.encode_revoked("one", "expired", DATE, SERIALIZERS[serializer])
    )
    with pytest.raises(TaskRevokedError, match="expired"):
        app.AsyncResult("one").get(timeout=10)


def test_our_client_reads_what_celerys_backend_stores(app: Celery, redis: Redis) -> None:
    """A request that Celery itself ended (a worker of another kind took it) has a result, too."""
    app.backend.store_result("one", ValueError("broken"), "FAILURE")
    app.backend.store_result("two", {"y": TENSOR}, "SUCCESS")
    failed = redis.get(NAMES.meta("one"))
    done = redis.get(NAMES.meta("two"))
    assert isinstance(failed, bytes)
    assert isinstance(done, bytes)
    meta = codec.decode_meta(failed)
    assert (meta["status"], meta["result"]["exc_type"]) == ("FAILURE", "ValueError")
    outputs = codec.decode_outputs(codec.decode_meta(done)["result"])
    np.testing.assert_array_equal(outputs["y"], [[0.0, 1.0, 2.0, 3.0]])
