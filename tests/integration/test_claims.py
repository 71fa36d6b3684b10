"""Claim-checked payloads are read and deleted by their own request only; deadlines cost nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import redis as redis_py
from helpers.repository import fake_model, numbered
from helpers.results import dead_letters, held_by, meta_of, nothing_is_held, outputs_of
from helpers.wait import until
from helpers.worker import Worker

from inferq.producer import Client
from inferq.shared import codec
from inferq.shared.errors import DeadlineExceeded
from inferq.shared.names import Names, queue_of
from inferq.shared.schema import Array
from inferq.workers.engines.fake import FAULT_EXIT
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
#: Columns of a request that the client claim-checks.
WIDE = 16_384


class Served:
    """One worker on a Redis of its own, and a way to push requests no client would."""

    def __init__(self, redis: redis_py.Redis, url: str, worker: Worker) -> None:
        self.redis = redis
        self.url = url
        self.worker = worker

    def push(
        self,
        model: str,
        request_id: str,
        inputs: Mapping[str, Mapping[str, Any]],
        *,
        deadline_ms: float | None = None,
        priority: int = 0,
    ) -> None:
        encoder = codec.RequestEncoder(queue_of(model), "test@loopback", None)
        raw = encoder.encode(
            request_id,
            model,
            inputs,
            shown="x",
            priority=priority,
            sent_ms=0.0,
            deadline_ms=deadline_ms,
        )
        self.redis.lpush(NAMES.queue(model, priority), raw)

    def error_of(self, request_id: str) -> tuple[str, str]:
        """The name and message of the error with which a request ends."""
        meta = meta_of(self.redis, request_id)
        assert meta["status"] == "FAILURE", meta
        return meta["result"]["exc_type"], meta["result"]["exc_message"][0]

    def now_ms(self) -> float:
        seconds, micros = self.redis.time()
        return float(seconds) * 1000 + float(micros) / 1000


@pytest.fixture(scope="module")
def running(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("models")
    knobs = "lanes = 1\nmax_batch_size = 4\nwarm_up = false"
    fake_model(root, "wide", knobs=knobs, width=WIDE)
    fake_model(root, "slow", knobs=knobs, fake="faults = true\ndelay_ms = 400")
    with (
        EmbeddedRedis(redis_kind) as server,
        redis_py.Redis.from_url(server.url) as client,
        Worker(server.url, root) as worker,
    ):
        yield Served(client, server.url, worker)


@pytest.fixture
def served(running: Served) -> Iterator[Served]:
    """After every test the worker lives, and nothing of it is left in Redis."""
    yield running
    until(lambda: nothing_is_held(running.redis), what="nothing is held any more")
    assert running.worker.alive
    assert running.redis.keys("inferq:1:payload:*") == []
    assert running.redis.keys("inferq:1:attempts:*") == []
    assert dead_letters(running.redis, "wide") == dead_letters(running.redis, "slow") == []


def wide(value: float, rows: int = 1) -> Array:
    return np.full((rows, WIDE), value, np.float32)


def test_the_payload_of_a_served_request_is_deleted(served: Served) -> None:
    with Client(served.url) as client:
        pending = [client.submit("wide", {"x": wide(n)}) for n in range(8)]
        for n, each in enumerate(pending):
            np.testing.assert_array_equal(each.result(30).outputs["x"], wide(n))


def test_a_payload_outlives_its_requests_deadline_by_a_day(served: Served) -> None:
    with Client(served.url) as client:
        served.worker.pause()
        try:
            pending = client.submit("wide", {"x": wide(1)}, timeout_ms=60_000)
            (key,) = served.redis.keys(NAMES.payload(pending.request_id, "*"))
            assert 24 * 3600 + 50 < served.redis.ttl(key) <= 25 * 3600
        finally:
            served.worker.resume()
        pending.result(30)


def test_a_payload_that_is_gone_is_payload_expired(served: Served) -> None:
    served.push("wide", "gone", {"x": codec.encode_reference(wide(0), NAMES.payload("gone", "x"))})
    name, message = served.error_of("gone")
    assert name == "PayloadExpired"
    assert NAMES.payload("gone", "x") in message


def test_a_payload_of_the_wrong_size_fails_its_request_and_is_deleted(served: Served) -> None:
    key = NAMES.payload("short", "x")
    served.redis.set(key, b"short")
    served.push("wide", "short", {"x": codec.encode_reference(wide(0), key)})
    assert served.error_of("short")[0] == "InvalidInput"


def test_a_payload_that_is_no_string_fails_its_request(served: Served) -> None:
    key = NAMES.payload("hash", "x")
    served.redis.hset(key, "field", "value")
    served.push("wide", "hash", {"x": codec.encode_reference(wide(0), key)})
    assert served.error_of("hash")[0] == "PayloadExpired"


@pytest.mark.parametrize(
    "key",
    [NAMES.payload("victim", "x"), "celery-task-meta-victim", "secret", "inferq:1:payload:thief"],
)
def test_another_requests_key_and_one_outside_our_prefix_are_neither_read_nor_deleted(
    served: Served, key: str
) -> None:
    data = wide(42).tobytes()
    served.redis.set(key, data)
    request_id = f"thief of {key}"
    served.push("wide", request_id, {"x": codec.encode_reference(wide(0), key)})
    name, message = served.error_of(request_id)
    assert name == "InvalidInput"
    assert "'x'" in message
    assert "not its payload" in message
    assert served.redis.getdel(key) == data


# --- deadlines -----------------------------------------------------------------------------------

#: Were it run, the worker would be gone.
DEADLY = {"x": codec.encode_tensor(numbered(FAULT_EXIT))}


def test_a_request_whose_deadline_passed_in_the_queue_is_never_run(served: Served) -> None:
    served.push("slow", "late", DEADLY, deadline_ms=served.now_ms() - 1)
    assert served.error_of("late")[0] == "DeadlineExceeded"


def test_a_request_whose_deadline_passes_while_it_waits_for_a_lane_is_never_run(
    served: Served,
) -> None:
    """It was claimed in time, and its claim-checked neighbour's payload is deleted all the same."""
    served.push("slow", "before", {"x": codec.encode_tensor(numbered(1))})
    until(lambda: served.redis.scard(NAMES.running(served.worker.incarnation)) == 1)
    key = NAMES.payload("overtaken too", "x")
    served.redis.set(key, numbered(FAULT_EXIT).tobytes())
    deadline_ms = served.now_ms() + 100
    served.push("slow", "overtaken", DEADLY, deadline_ms=deadline_ms)
    served.push(
        "slow",
        "overtaken too",
        {"x": codec.encode_reference(numbered(0), key)},
        deadline_ms=deadline_ms,
    )
    until(lambda: held_by(served.redis, served.worker.incarnation) == 3, what="all are claimed")
    assert served.now_ms() < deadline_ms, "they are claimed in time"
    assert served.error_of("overtaken")[0] == "DeadlineExceeded"
    assert served.error_of("overtaken too")[0] == "DeadlineExceeded"
    np.testing.assert_array_equal(outputs_of(served.redis, "before")["x"], numbered(1))


def test_the_caller_gets_deadline_exceeded_and_in_time_requests_their_result(
    served: Served,
) -> None:
    with Client(served.url) as client:
        first = client.submit("slow", {"x": numbered(1)})
        until(lambda: served.redis.scard(NAMES.running(served.worker.incarnation)) == 1)
        late = client.submit("slow", {"x": numbered(FAULT_EXIT)}, timeout_ms=100)
        fine = client.submit("slow", {"x": numbered(2)}, timeout_ms=30_000)
        first.result(30)
        np.testing.assert_array_equal(fine.result(30).outputs["x"], numbered(2))
        with pytest.raises(DeadlineExceeded):
            late.result(30)


def test_an_expired_celery_message_is_revoked_and_never_run(served: Served) -> None:
    encoder = codec.RequestEncoder(queue_of("slow"), "test@loopback", None)
    raw = encoder.encode(
        "expired", "slow", DEADLY, shown="x", priority=0, sent_ms=0.0, deadline_ms=None
    )
    raw = raw.replace(b'"expires": null', b'"expires": "2020-01-01T00:00:00+00:00"')
    assert b"2020" in raw
    served.redis.lpush(NAMES.queue("slow"), raw)
    assert meta_of(served.redis, "expired")["status"] == "REVOKED"
