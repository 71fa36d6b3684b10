"""An asyncio client that is closed leaves nobody waiting, and says what became of each request."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis as redis_py
from helpers.echo import QUEUE, SOON_S, x
from helpers.responder import Responder, advert, announce

from inferq.producer import AsyncClient, ClientClosed
from inferq.producer.async_session import AsyncSession
from inferq.workers.process.embedded import EmbeddedRedis


@pytest.fixture
def echo(redis: redis_py.Redis) -> redis_py.Redis:
    announce(redis, advert())
    return redis


def run(body: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            await body()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, f"left behind: {others}"

    asyncio.run(main())


async def turns(predicate: Callable[[], object]) -> None:
    """Let others run until `predicate` holds."""
    async with asyncio.timeout(SOON_S):
        while not predicate():
            await asyncio.sleep(0.001)


def pushing(session: AsyncSession) -> bool:
    """Whether it waits for a reply of Redis."""
    return session._wire is not None and bool(session._wire._calls)


def test_tasks_that_wait_for_a_connection_end_when_their_client_is_closed() -> None:
    async def body() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            client = AsyncClient(f"redis://127.0.0.1:{silent.getsockname()[1]}")
            tasks = [asyncio.create_task(client.infer("echo", x(), timeout=None)) for _ in range(3)]
            await turns(lambda: client._session._attempt is not None)
            began = time.monotonic()
            await client.close()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(outcome, ClientClosed), repr(outcome)
                assert "nothing was sent" in outcome.message
            assert time.monotonic() - began < 1.0

    run(body)


def test_a_push_on_its_way_is_answered_before_the_connection_is_closed(
    new_redis: Callable[..., EmbeddedRedis],
) -> None:
    server = new_redis()
    with redis_py.Redis.from_url(server.url) as redis:
        announce(redis, advert())

        async def body() -> None:
            client = AsyncClient(server.url)
            await client.submit("echo", x())
            redis.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
            task = asyncio.create_task(client.submit("echo", x()))
            await turns(lambda: pushing(client._session))
            closing = asyncio.create_task(client.close())
            await asyncio.sleep(0)
            redis.execute_command("CLIENT", "UNPAUSE")
            pending = await task
            with pytest.raises(ClientClosed, match="goes on"):
                await pending.result(None)
            await closing
            assert redis.llen(QUEUE) == 2

        run(body)


def test_a_push_that_is_never_answered_is_not_said_to_be_refused_or_accepted(
    new_redis: Callable[..., EmbeddedRedis], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferq.producer.async_session.CLOSE_S", 0.2)
    server = new_redis()
    with redis_py.Redis.from_url(server.url) as redis:
        announce(redis, advert())

        async def body() -> None:
            client = AsyncClient(server.url)
            await client.submit("echo", x())
            redis.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
            task = asyncio.create_task(client.infer("echo", x(), timeout=None))
            await turns(lambda: pushing(client._session))
            await asyncio.gather(client.close(), client.close())
            with pytest.raises(ClientClosed, match="is not known"):
                await task
            with pytest.raises(ClientClosed, match="nothing was sent"):
                await client.submit("echo", x())

        run(body)


def test_a_connection_task_that_somebody_else_cancels_leaves_nobody_waiting(
    echo: redis_py.Redis, redis_url: str
) -> None:
    async def body() -> None:
        async with AsyncClient(redis_url) as client:
            pending = await client.submit("echo", x())
            waiting = asyncio.create_task(pending.result(None))
            await asyncio.sleep(0)
            task = client._session._task
            assert task is not None
            task.cancel()
            with pytest.raises(ClientClosed, match="goes on"):
                async with asyncio.timeout(SOON_S):
                    await waiting
            with pytest.raises(ClientClosed, match="nothing was sent"):
                await client.submit("echo", x())

    run(body)


def test_tasks_that_use_a_client_while_it_is_closed_all_end(
    echo: redis_py.Redis, redis_url: str
) -> None:
    async def body() -> None:
        client = AsyncClient(redis_url)
        done = [0]

        async def infer() -> None:
            while True:
                await client.infer("echo", x(), timeout=None)
                done[0] += 1

        async def stream() -> None:
            async for _ in client.map("echo", iter(x, None), in_flight=8, timeout=None):
                done[0] += 1

        tasks = [asyncio.create_task(job()) for _ in range(10) for job in (infer, stream)]
        await turns(lambda: done[0] > 200)
        await client.close()
        async with asyncio.timeout(SOON_S):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(each) for each in outcomes} == {ClientClosed}, outcomes
        assert client._session.core.unresolved() == []

    with Responder(redis_url):
        run(body)
