"""A result that means harm fails its own request; all others of that client get theirs.

Whoever has the password stores it, and tells the client of it, while a worker stands still.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
from helpers import poison
from helpers.repository import fake_model, numbered
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.producer import AsyncClient, Client, InferqError, Result
from inferq.shared import codec
from inferq.shared.names import Names

NAMES = Names()
QUEUE = NAMES.queue("m")
COUNT = 6
#: Which of them is given the result that means harm.
POISONED = 2
TIMEOUT_S = 60.0

Outcomes = list[Result | InferqError]
Asker = Callable[[str, Outcomes], None]


def by_submit(url: str, outcomes: Outcomes) -> None:
    with Client(url) as client:
        pending = [client.submit("m", {"x": numbered(n)}) for n in range(COUNT)]
        for each in pending:
            try:
                outcomes.append(each.result(TIMEOUT_S))
            except InferqError as error:
                outcomes.append(error)


def by_map(url: str, outcomes: Outcomes) -> None:
    with Client(url) as client:
        items = ({"x": numbered(n)} for n in range(COUNT))
        outcomes += client.map("m", items, timeout=TIMEOUT_S, return_errors=True)


def by_asyncio(url: str, outcomes: Outcomes) -> None:
    async def ask() -> None:
        async with AsyncClient(url) as client:
            pending = [await client.submit("m", {"x": numbered(n)}) for n in range(COUNT)]
            for each in pending:
                try:
                    outcomes.append(await each.result(TIMEOUT_S))
                except InferqError as error:
                    outcomes.append(error)

    asyncio.run(ask())


def by_asyncio_map(url: str, outcomes: Outcomes) -> None:
    async def ask() -> None:
        async with AsyncClient(url) as client:
            items = ({"x": numbered(n)} for n in range(COUNT))
            found = client.map("m", items, timeout=TIMEOUT_S, return_errors=True)
            outcomes.extend([each async for each in found])

    asyncio.run(ask())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    fake_model(root, "m", knobs="warm_up = false")
    return root


@pytest.fixture
def worker(redis_url: str, models: Path) -> Iterator[Worker]:
    with Worker(redis_url, models) as worker:
        yield worker


def store(redis: Redis, raw: bytes) -> None:
    """`raw` as the result of one of the requests that wait, told on its client's reply channel."""
    until(lambda: redis.llen(QUEUE) == COUNT, what="all are queued")
    waiting = redis.lrange(QUEUE, 0, -1)[::-1]
    headers = codec.decode_envelope(bytes(waiting[POISONED])).headers  # type: ignore[arg-type]
    redis.set(NAMES.meta(headers.id), raw)
    channel = headers.inferq_reply or ""
    for news in poison.NEWS:
        redis.publish(channel, news)
    redis.publish(channel, msgpack.packb([headers.id]))


@pytest.mark.parametrize(
    "ask", [by_submit, by_map, by_asyncio, by_asyncio_map], ids=lambda ask: ask.__name__
)
def test_a_result_that_means_harm_harms_no_other_request_of_its_client(
    redis_url: str, redis: Redis, worker: Worker, ask: Asker
) -> None:
    for name in (
        "a deep result",
        "deep children",
        "a failure that is deep",
        "a message that is deep",
        "a million lists",
        "strings for numbers",
        "16 MB that are none",
        "nothing",
    ):
        worker.pause()
        outcomes: Outcomes = []
        asking = threading.Thread(target=ask, args=(redis_url, outcomes), daemon=True)
        asking.start()
        store(redis, poison.RESULTS[name])
        worker.resume()
        asking.join(TIMEOUT_S)
        assert not asking.is_alive(), name
        assert len(outcomes) == COUNT, name
        for n, outcome in enumerate(outcomes):
            if n == POISONED:
                assert isinstance(outcome, InferqError), name
            else:
                assert isinstance(outcome, Result), (name, outcome)
                np.testing.assert_array_equal(outcome.outputs["x"], numbered(n))
