"""AsyncClient does what Client does; a thread stands in for the worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import redis as redis_py
from helpers.responder import RESPONDER, Responder, Seen, advert, announce

from inferq.producer import (
    AsyncClient,
    Cancelled,
    ClientClosed,
    EngineError,
    InvalidInput,
    ModelNotFound,
    QueueFull,
    RedisUnavailable,
    Result,
    ResultTimeout,
    State,
)
from inferq.producer.async_wire import AsyncWire
from inferq.shared.connect import async_redis_client
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


def run(url: str, body: Callable[[AsyncClient], Awaitable[None]]) -> None:
    """Run `body` with a client, in a loop of its own, for at most 60 s."""

    async def main() -> None:
        async with asyncio.timeout(60), AsyncClient(url) as client:
            await body(client)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, f"left behind: {others}"

    asyncio.run(main())


def test_many_tasks_share_one_connection(echo: redis_py.Redis, redis_url: str) -> None:
    before = {one["id"] for one in echo.client_list()}  # other tests' idle pools among them

    async def body(client: AsyncClient) -> None:
        results = await asyncio.gather(*[client.infer("echo", x(n)) for n in range(300)])
        assert [number(result) for result in results] == list(range(300))
        assert results[0].receipt is not None
        new = [one for one in echo.client_list() if one["id"] not in before]
        assert len([one for one in new if one["name"] != RESPONDER]) == 1

    with Responder(redis_url):
        run(redis_url, body)


@pytest.mark.parametrize("in_flight", [1, 7, 64])
def test_map_keeps_order_for_items_of_either_kind(
    echo: redis_py.Redis, redis_url: str, in_flight: int
) -> None:
    async def asynchronous() -> AsyncIterator[dict[str, Array]]:
        for n in range(200):
            await asyncio.sleep(0)
            yield x(n)

    async def body(client: AsyncClient) -> None:
        for items in ((x(n) for n in range(200)), asynchronous()):
            results = client.map("echo", items, in_flight=in_flight, timeout=20)
            assert [number(result) async for result in results] == list(range(200))

    with Responder(redis_url, block=5):
        run(redis_url, body)


def test_map_raises_or_yields_errors_at_their_place(echo: redis_py.Redis, redis_url: str) -> None:
    def answer(seen: Seen) -> dict[str, Array]:
        if seen.inputs["x"][0, 0] == 2:
            raise EngineError("unlucky")
        return seen.inputs

    async def body(client: AsyncClient) -> None:
        items = [x(n) for n in range(4)]
        got = [type(one).__name__ async for one in client.map("echo", items, return_errors=True)]
        assert got == ["Result", "Result", "EngineError", "Result"]
        results = client.map("echo", items)
        await anext(results)
        await anext(results)
        with pytest.raises(EngineError, match="unlucky"):
            await anext(results)

    with Responder(redis_url, answer=answer):
        run(redis_url, body)


def test_errors_are_those_of_the_sync_client(redis: redis_py.Redis, redis_url: str) -> None:
    announce(redis, advert())
    announce(redis, advert("small", max_queue_depth=1))

    async def body(client: AsyncClient) -> None:
        with pytest.raises(ModelNotFound):
            await client.infer("nothing", x(1))
        with pytest.raises(InvalidInput, match="dtype float64"):
            await client.submit("echo", {"x": np.zeros((1, 4))})
        await client.submit("small", x(1))
        with pytest.raises(QueueFull):
            await client.submit("small", x(1))

    run(redis_url, body)
    assert redis.llen(QUEUE) == 0


def test_a_wait_ends_and_the_request_goes_on(echo: redis_py.Redis, redis_url: str) -> None:
    async def body(client: AsyncClient) -> None:
        pending = await client.submit("echo", x(1))
        assert pending.state is State.QUEUED
        with pytest.raises(ResultTimeout):
            await pending.result(0.01)
        with Responder(redis_url):
            assert number(await pending.result(20)) == 1
        assert pending.done()

    run(redis_url, body)


def test_a_cancelled_request_raises_cancelled(echo: redis_py.Redis, redis_url: str) -> None:
    async def body(client: AsyncClient) -> None:
        pending = await client.submit("echo", x(1))
        assert await pending.cancel() is True
        assert pending.state is State.CANCELLED
        with pytest.raises(Cancelled):
            await pending.result()

    run(redis_url, body)


def test_a_cancelled_task_leaves_the_shared_connection_in_order(
    echo: redis_py.Redis, redis_url: str
) -> None:
    async def body(client: AsyncClient) -> None:
        for n in range(50):
            task = asyncio.create_task(client.infer("echo", x(-1)))
            for _ in range(n % 7):
                await asyncio.sleep(0)
            task.cancel()
            assert number(await client.infer("echo", x(n), timeout=20)) == n
            await asyncio.wait([task])

    with Responder(redis_url):
        run(redis_url, body)


def test_a_closed_client_leaves_nobody_waiting(echo: redis_py.Redis, redis_url: str) -> None:
    async def body(client: AsyncClient) -> None:
        pending = await client.submit("echo", x(1))
        wait = asyncio.create_task(pending.result(30))
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(ClientClosed):
            await wait
        with pytest.raises(ClientClosed):
            await client.submit("echo", x(1))

    run(redis_url, body)


def test_an_unreachable_redis_fails_fast() -> None:
    async def body(client: AsyncClient) -> None:
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(RedisUnavailable, match="cannot be reached"):
                await client.infer("echo", x(1))
            assert time.monotonic() - began < 3

    run("redis://127.0.0.1:1", body)


def test_a_client_without_a_request_connects_to_nothing() -> None:
    async def body(client: AsyncClient) -> None:
        await asyncio.sleep(0)

    run("redis://127.0.0.1:1", body)


def test_what_cannot_be_read_breaks_the_connection_at_once(redis_url: str) -> None:
    """Rather than leave nobody to read on, and each caller to its timeout."""

    def refuse(push: list[Any]) -> None:
        raise LookupError("odd")

    async def main() -> None:
        wire = AsyncWire(async_redis_client(redis_url), refuse, lambda: None)
        await wire.open()
        began = time.monotonic()
        # The confirmation of the first is a push; what answers the second comes much later.
        with pytest.raises(redis_py.ConnectionError, match="LookupError"):
            await wire.call([("SUBSCRIBE", "c"), ("BLPOP", "never", 4)])
        assert time.monotonic() - began < 4
        await wire.close()

    asyncio.run(main())
