"""The sync client against a real Redis; a thread stands in for the worker."""

from __future__ import annotations

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import redis as redis_py
from helpers.responder import Responder, Seen, advert, announce
from helpers.wait import until

from inferq.producer import (
    Cancelled,
    Client,
    ClientClosed,
    DeadlineExceeded,
    EngineError,
    InferqError,
    InvalidInput,
    ModelNotFound,
    PayloadTooLarge,
    QueueFull,
    RedisUnavailable,
    ResultTimeout,
    State,
)
from inferq.producer.outgoing import INLINE_LIMIT
from inferq.shared import codec
from inferq.shared.names import Names
from inferq.shared.schema import Array, Signature, TensorSpec

X = np.arange(8, dtype=np.float32).reshape(2, 4)
NAMES = Names()


@pytest.fixture
def echo(redis: redis_py.Redis) -> redis_py.Redis:
    """A client of a Redis in which a worker announces the model `echo`."""
    announce(redis, advert())
    return redis


def test_arrays_go_out_and_come_back_with_a_receipt(echo: redis_py.Redis, redis_url: str) -> None:
    with Responder(redis_url), Client(redis_url) as client:
        result = client.infer("echo", {"x": X}, timeout=10)
    np.testing.assert_array_equal(result.outputs["x"], X)
    assert result.outputs["x"].dtype == np.float32
    assert result.receipt is not None
    assert result.receipt.worker == "stand-in"
    assert 0 < result.latency_ms < 10_000


def test_a_message_carries_its_times_by_redis_clock_and_names_the_reply_channel(
    echo: redis_py.Redis, redis_url: str
) -> None:
    with Responder(redis_url) as responder, Client(redis_url) as client:
        client.infer("echo", {"x": X}, timeout=10, timeout_ms=30_000, priority=7)
        seconds, micros = echo.time()
    headers = responder.seen[0].headers
    assert headers.inferq_sent_ms is not None
    assert headers.inferq_sent_ms == pytest.approx(seconds * 1000 + micros / 1000, abs=2_000)
    assert headers.inferq_deadline_ms == pytest.approx(headers.inferq_sent_ms + 30_000, abs=0.01)
    assert headers.kwargsrepr == "{'model': 'echo', x=<2x4 float32>}"
    assert (headers.inferq_reply or "").startswith(NAMES.reply(""))
    assert responder.seen[0].priority == 7


def test_priorities_go_to_kombus_lists(echo: redis_py.Redis, redis_url: str) -> None:
    with Client(redis_url) as client:
        for priority in (0, 2, 3, 8, 9):
            client.submit("echo", {"x": X}, priority=priority)
        depths = {step: echo.llen(NAMES.queue("echo", step)) for step in (0, 3, 6, 9)}
    assert depths == {0: 2, 3: 1, 6: 1, 9: 1}


def test_lists_are_taken_for_the_models_dtype(echo: redis_py.Redis, redis_url: str) -> None:
    with Responder(redis_url), Client(redis_url) as client:
        result = client.infer("echo", {"x": [[1, 2, 3, 4.5]]}, timeout=10)
    np.testing.assert_array_equal(result.outputs["x"], np.array([[1, 2, 3, 4.5]], np.float32))


@pytest.mark.parametrize(
    "stored",
    [
        EngineError("the engine raised"),
        DeadlineExceeded("too late"),
        PayloadTooLarge("too large", size=5, limit=3),
        InvalidInput("input 'x': wrong"),
    ],
    ids=lambda error: error.code,
)
def test_a_workers_error_arrives_as_the_class_that_was_raised(
    echo: redis_py.Redis, redis_url: str, stored: InferqError
) -> None:
    def answer(seen: Seen) -> dict[str, Array] | None:
        raise stored

    with Responder(redis_url, answer=answer), Client(redis_url) as client:
        pending = client.submit("echo", {"x": X})
        with pytest.raises(type(stored)) as caught:
            pending.result(10)
        assert pending.state is State.FAILED
    assert type(caught.value) is type(stored)
    assert caught.value.message == stored.message
    assert caught.value.detail == stored.detail


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ({"y": X}, InvalidInput, "missing 'x'; unknown 'y'"),
        ({"x": X.astype(np.float64)}, InvalidInput, "'x'.*dtype float64; expected float32"),
        ({"x": X[:, :3]}, InvalidInput, "'x'.*has 3 at dim 1; expected 4"),
        ({"x": np.zeros((0, 4), np.float32)}, InvalidInput, "is 0; expected at least 1"),
        ({"x": np.array([["a"] * 4])}, InvalidInput, "'x': dtype str"),
        ({"x": [["a"] * 4]}, InvalidInput, "'x'"),
    ],
)
def test_a_bad_request_is_named_to_the_caller_and_never_pushed(
    echo: redis_py.Redis,
    redis_url: str,
    inputs: dict[str, Array],
    error: type[InferqError],
    words: str,
) -> None:
    with Client(redis_url) as client, pytest.raises(error, match=words):
        client.submit("echo", inputs)
    assert echo.llen(NAMES.queue("echo")) == 0


def test_a_request_above_the_models_limit_is_never_pushed(
    redis: redis_py.Redis, redis_url: str
) -> None:
    announce(redis, advert(max_request_bytes=31))
    with Client(redis_url) as client, pytest.raises(PayloadTooLarge, match="32 bytes"):
        client.submit("echo", {"x": X})
    assert redis.llen(NAMES.queue("echo")) == 0


def test_a_model_that_nobody_announced_is_not_found_at_the_caller(redis_url: str) -> None:
    with Client(redis_url) as client:
        with pytest.raises(ModelNotFound, match="'nothing'"):
            client.infer("nothing", {"x": X})
        with pytest.raises(ModelNotFound, match="letters"):
            client.infer("no such name", {"x": X})


def test_a_request_whose_workers_are_all_away_is_queued_and_says_so(
    redis: redis_py.Redis, redis_url: str
) -> None:
    announce(redis, advert(), live=False)
    with Client(redis_url) as client:
        pending = client.submit("echo", {"x": X})
        assert str(pending.state) == "queued_no_worker"
        assert not pending.done()
        announce(redis, advert())
        until(lambda: str(pending.state) == "queued", what="the client hears of the worker")
        with Responder(redis_url):
            pending.result(10)
        assert str(pending.state) == "done"


def test_a_full_queue_refuses_with_its_depth_and_an_estimate(
    redis: redis_py.Redis, redis_url: str
) -> None:
    announce(redis, advert(max_queue_depth=3, seconds_per_row=0.25))
    with Client(redis_url) as client:
        for priority in (0, 5, 9):
            client.submit("echo", {"x": X[:1]}, priority=priority)
        with pytest.raises(QueueFull, match="expected fewer than 3") as caught:
            client.submit("echo", {"x": X[:1]})
    detail = caught.value.detail
    assert (detail["depth"], detail["limit"], detail["estimated_wait_s"]) == (3, 3, 0.75)
    assert redis.llen(NAMES.queue("echo")) == 1


def test_a_queue_of_too_many_bytes_refuses_with_an_estimate_of_them(
    redis: redis_py.Redis, redis_url: str
) -> None:
    announce(redis, advert(max_queue_bytes=1 << 20, max_batch_size=25_000))
    large = np.zeros((25_000, 4), np.float32)
    with Client(redis_url) as client:
        for _ in range(3):
            client.submit("echo", {"x": large})
        with pytest.raises(
            QueueFull, match=r"fewer than 1048576 bytes \(max_queue_bytes\)"
        ) as caught:
            client.submit("echo", {"x": large})
    assert caught.value.detail["limit_bytes"] == 1 << 20
    assert 1_200_000 < caught.value.detail["estimated_bytes"] < 1_300_000
    assert redis.llen(NAMES.queue("echo")) == 3


def test_a_callers_wait_ends_and_the_request_goes_on(echo: redis_py.Redis, redis_url: str) -> None:
    with Responder(redis_url) as responder, Client(redis_url) as client:
        responder.pause()
        pending = client.submit("echo", {"x": X})
        with pytest.raises(ResultTimeout, match="goes on"):
            pending.result(0.01)
        with pytest.raises(TimeoutError):
            pending.result(0)
        responder.resume()
        assert pending.result(10).request_id == pending.request_id


def test_many_threads_share_a_client_and_may_wait_for_one_request(
    echo: redis_py.Redis, redis_url: str
) -> None:
    before = set(threading.enumerate())
    with Responder(redis_url), Client(redis_url) as client, ThreadPoolExecutor(16) as pool:

        def one(n: int) -> float:
            x = np.full((1, 4), n, np.float32)
            return float(client.infer("echo", {"x": x}, timeout=20).outputs["x"][0, 0])

        assert list(pool.map(one, range(400))) == list(range(400))
        pending = client.submit("echo", {"x": X})
        waits = [pool.submit(pending.result, 20) for _ in range(8)]
        assert {id(wait.result(20)) for wait in waits} == {id(pending.result(0))}
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith("inferq")]


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_a_client_holds_one_subscribed_connection_however_much_it_awaits(
    echo: redis_py.Redis, redis_url: str
) -> None:
    with Responder(redis_url) as responder, Client(redis_url) as client:
        responder.pause()
        pendings = [client.submit("echo", {"x": X}) for _ in range(50)]
        until(lambda: len(echo.client_list("pubsub")) == 1, what="one subscription")
        assert thread_names().count("inferq-results") == 1
        responder.resume()
        for pending in pendings:
            pending.result(10)
        assert len(echo.client_list("pubsub")) == 1


def test_large_tensors_are_claim_checked_and_small_ones_travel_inside(
    redis: redis_py.Redis, redis_url: str
) -> None:
    specs = tuple(
        TensorSpec(name=name, dtype="uint8", shape=("batch", None)) for name in ("small", "large")
    )
    announce(redis, advert(signature=Signature(inputs=specs, outputs=specs)))
    inputs = {
        "small": np.ones((1, 10), np.uint8),
        "large": np.arange(INLINE_LIMIT, dtype=np.uint32).astype(np.uint8).reshape(1, -1),
    }
    with Responder(redis_url) as responder, Client(redis_url) as client:
        responder.pause()
        pending = client.submit("echo", inputs, timeout_ms=60_000)
        key = NAMES.payload(pending.request_id, "large")
        assert [one.decode() for one in redis.scan_iter(NAMES.payload("*", "*"))] == [key]
        ttl = redis.ttl(key)
        assert 24 * 3600 < ttl <= 24 * 3600 + 60
        raw = redis.lindex(NAMES.queue("echo"), 0)
        assert isinstance(raw, bytes)
        assert len(raw) < 2_000
        responder.resume()
        result = pending.result(10)
    assert responder.seen[0].payload_keys == [key]
    for name, array in inputs.items():
        np.testing.assert_array_equal(result.outputs[name], array)


def test_a_cancelled_request_raises_cancelled_and_others_are_told(
    echo: redis_py.Redis, redis_url: str
) -> None:
    celery: Any = echo.pubsub()  # type: ignore[no-untyped-call]
    with Client(redis_url) as client, celery:
        pending = client.submit("echo", {"x": X})
        celery.subscribe(NAMES.meta(pending.request_id))
        until(lambda: celery.get_message(timeout=1), what="subscription confirmed")
        assert pending.cancel() is True
        assert pending.cancel() is True
        assert pending.state is State.CANCELLED
        with pytest.raises(Cancelled):
            pending.result(0)
        meta = codec.decode_meta(echo.get(NAMES.meta(pending.request_id)))  # type: ignore[arg-type]
        assert meta["status"] == "REVOKED"
        assert 0 < echo.ttl(NAMES.meta(pending.request_id)) <= 600
        told = until(lambda: celery.get_message(timeout=1), what="Celery's channel is told")
        assert codec.decode_meta(told["data"])["status"] == "REVOKED"


def test_what_is_done_cannot_be_cancelled(echo: redis_py.Redis, redis_url: str) -> None:
    with Responder(redis_url, tell=False) as responder, Client(redis_url) as client:
        pending = client.submit("echo", {"x": X})
        until(lambda: echo.exists(NAMES.meta(pending.request_id)), what="the result is stored")
        assert responder.seen
        assert pending.cancel() is False
        np.testing.assert_array_equal(pending.result(10).outputs["x"], X)


def test_a_closed_client_leaves_nobody_waiting(echo: redis_py.Redis, redis_url: str) -> None:
    client = Client(redis_url)
    pending = client.submit("echo", {"x": X})
    with ThreadPoolExecutor(1) as pool:
        wait = pool.submit(pending.result, 30)
        client.close()
        with pytest.raises(ClientClosed, match="goes on"):
            wait.result(10)
    client.close()
    with pytest.raises(ClientClosed):
        client.submit("echo", {"x": X})
    assert "inferq-results" not in thread_names()


def test_a_client_that_is_forgotten_stops_its_thread(echo: redis_py.Redis, redis_url: str) -> None:
    with Responder(redis_url):
        Client(redis_url).infer("echo", {"x": X}, timeout=10)
        until(lambda: "inferq-results" not in thread_names(), what="the thread ended")


def test_an_unreachable_redis_fails_fast() -> None:
    with Client("redis://127.0.0.1:1") as client:
        began = time.monotonic()
        with pytest.raises(RedisUnavailable, match="cannot be reached"):
            client.infer("echo", {"x": X})
        assert time.monotonic() - began < 2


def _infer_in_child(client: Client, x: Array, parents: object, box: object) -> None:
    try:
        parents.result(5)  # type: ignore[attr-defined]
    except ClientClosed as problem:
        answer = problem.message
    x = client.infer("echo", {"x": x}, timeout=10).outputs["x"]
    client.close()
    box.put((answer, x.tolist()))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_uses_the_client_with_connections_of_its_own(
    echo: redis_py.Redis, redis_url: str
) -> None:
    context = multiprocessing.get_context("fork")
    box = context.Queue()
    with Responder(redis_url) as responder, Client(redis_url) as client:
        client.infer("echo", {"x": X}, timeout=10)
        responder.pause()
        pending = client.submit("echo", {"x": X})
        child = context.Process(target=_infer_in_child, args=(client, X + 1, pending, box))
        child.start()
        responder.resume()
        answer, outputs = box.get(timeout=20)
        child.join(10)
        assert child.exitcode == 0
        assert "forked" in answer
        assert outputs == (X + 1).tolist()
        pending.result(10)
        np.testing.assert_array_equal(client.infer("echo", {"x": X}).outputs["x"], X)
