"""`Client.map` against a real Redis; a thread stands in for the worker."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import redis as redis_py
from helpers.responder import Responder, Seen, advert, announce
from helpers.wait import until

from inferq.producer import (
    Client,
    EngineError,
    InferqError,
    InvalidInput,
    ModelNotFound,
    RedisUnavailable,
    Result,
    ResultTimeout,
)
from inferq.shared.names import Names
from inferq.shared.schema import Array

QUEUE = Names().queue("echo")


def x(n: float) -> dict[str, Array]:
    return {"x": np.full((1, 4), n, np.float32)}


def number(result: Result) -> float:
    return float(result.outputs["x"][0, 0])


@pytest.fixture
def echo(redis: redis_py.Redis) -> redis_py.Redis:
    announce(redis, advert())
    return redis


@pytest.mark.parametrize("in_flight", [1, 7, 64, 1000])
@pytest.mark.parametrize("block", [1, 5, 64])
def test_results_come_in_the_order_of_the_items(
    echo: redis_py.Redis, redis_url: str, in_flight: int, block: int
) -> None:
    with Responder(redis_url, block=block), Client(redis_url) as client:
        items = (x(n) for n in range(500))
        results = client.map("echo", items, in_flight=in_flight, timeout=20)
        assert [number(result) for result in results] == list(range(500))


def test_no_items_no_results(echo: redis_py.Redis, redis_url: str) -> None:
    with Client(redis_url) as client:
        assert list(client.map("echo", [])) == []


def test_no_more_than_in_flight_are_pushed_and_items_are_read_as_needed(
    echo: redis_py.Redis, redis_url: str
) -> None:
    taken = 0

    def endless() -> Iterator[dict[str, Array]]:
        nonlocal taken
        while True:
            taken += 1
            yield x(taken)

    with Responder(redis_url) as responder, Client(redis_url) as client:
        responder.pause()
        results = client.map("echo", endless(), in_flight=40, timeout=0.5)
        assert taken == 0
        with pytest.raises(ResultTimeout):
            next(results)
        assert echo.llen(QUEUE) == 40
        assert taken == 40
        responder.resume()
        results = client.map("echo", endless(), in_flight=40, timeout=20)
        start = taken
        assert [number(next(results)) - start for _ in range(100)] == list(range(1, 101))
        assert taken <= start + 100 + 4 * 40


def test_a_failed_request_raises_at_its_place(echo: redis_py.Redis, redis_url: str) -> None:
    with Responder(redis_url, answer=fail_on_13), Client(redis_url) as client:
        results = client.map("echo", (x(n) for n in range(30)), in_flight=8, timeout=20)
        assert [number(next(results)) for _ in range(13)] == list(range(13))
        with pytest.raises(EngineError, match="unlucky"):
            next(results)


def fail_on_13(seen: Seen) -> dict[str, Array]:
    if seen.inputs["x"][0, 0] == 13:
        raise EngineError("unlucky")
    return seen.inputs


def test_with_return_errors_a_failed_request_yields_its_error_and_the_rest_goes_on(
    echo: redis_py.Redis, redis_url: str
) -> None:
    items = [x(n) for n in range(30)]
    items[5] = {"wrong": np.zeros(1)}
    with Responder(redis_url, answer=fail_on_13), Client(redis_url) as client:
        outcomes = list(client.map("echo", items, in_flight=8, timeout=20, return_errors=True))
    assert len(outcomes) == 30
    assert isinstance(outcomes[5], InvalidInput)
    assert isinstance(outcomes[13], EngineError)
    good = [number(one) for one in outcomes if isinstance(one, Result)]
    assert good == [n for n in range(30) if n not in (5, 13)]


def test_an_unknown_model_raises_at_the_first_result(redis_url: str) -> None:
    with Client(redis_url) as client, pytest.raises(ModelNotFound):
        next(client.map("nothing", [x(1)]))


def test_an_unreachable_redis_is_told_at_each_place() -> None:
    with Client("redis://127.0.0.1:1") as client:
        outcomes = list(client.map("echo", [x(1)] * 3, return_errors=True))
    assert [type(one) for one in outcomes] == [RedisUnavailable] * 3


def test_a_full_queue_is_waited_for(redis: redis_py.Redis, redis_url: str) -> None:
    announce(redis, advert(max_queue_depth=5))
    with Responder(redis_url, block=2), Client(redis_url) as client:
        results = client.map("echo", (x(n) for n in range(60)), in_flight=50, timeout=20)
        assert [number(result) for result in results] == list(range(60))


def test_a_map_that_is_left_forgets_its_requests(echo: redis_py.Redis, redis_url: str) -> None:
    with Responder(redis_url) as responder, Client(redis_url) as client:
        results = client.map("echo", (x(n) for n in range(100)), in_flight=20, timeout=20)
        next(results)
        responder.pause()
        results.close()  # type: ignore[attr-defined]
        assert client._session.core.unresolved() == []
        responder.resume()
        until(lambda: echo.llen(QUEUE) == 0, what="the requests are computed all the same")


def test_an_error_in_the_items_reaches_the_caller(echo: redis_py.Redis, redis_url: str) -> None:
    def items() -> Iterator[dict[str, Array]]:
        yield x(0)
        raise OSError("disk")

    with Responder(redis_url), Client(redis_url) as client, pytest.raises(OSError, match="disk"):
        list(client.map("echo", items(), timeout=20))


def outcomes_of(results: Iterator[Result | InferqError]) -> list[str]:
    return [type(one).__name__ for one in results]


def test_a_result_that_is_late_is_a_timeout_at_its_place(
    echo: redis_py.Redis, redis_url: str
) -> None:
    def answer(seen: Seen) -> dict[str, Array] | None:
        return None if seen.inputs["x"][0, 0] == 1 else seen.inputs

    with Responder(redis_url, answer=answer), Client(redis_url) as client:
        items = [x(n) for n in range(3)]
        results = client.map("echo", items, timeout=0.5, return_errors=True)
        assert outcomes_of(results) == ["Result", "ResultTimeout", "Result"]
