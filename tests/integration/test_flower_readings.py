"""Redis is asked once for all who look, and looking for models holds up no reading."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
import redis as redis_py

from inferq.shared.names import Names
from inferq.workers.flower.readings import FRESH_S, LOOK_EVERY_S, LOOK_SHARE, Readings
from inferq.workers.queues.depths import DepthReader, Depths

NAMES = Names()


class Clock:
    """Stands until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the reader, in order."""
    asked: list[str] = []
    models, read = DepthReader.models, DepthReader.read

    def noted_models(self: DepthReader) -> list[str]:
        asked.append("models")
        return models(self)

    def noted_read(self: DepthReader, wanted: Sequence[str] | None = None) -> Depths:
        asked.append("read")
        return read(self, wanted)

    monkeypatch.setattr(DepthReader, "models", noted_models)
    monkeypatch.setattr(DepthReader, "read", noted_read)
    return asked


def test_all_who_ask_within_a_second_share_one_reading(
    redis: redis_py.Redis, asked: list[str]
) -> None:
    redis.lpush("inferq.m", "x", "y")
    redis.lpush("other", "x")
    redis.set("no-list", "x")
    clock = Clock()

    async def ask() -> None:
        readings = Readings(redis, NAMES, clock=clock)
        several = await asyncio.gather(
            *(readings.latest({"other", "no-list", "inferq.m"}) for _ in range(20))
        )
        assert asked == ["models", "read"]
        reading = several[0].reading
        assert reading is not None
        assert all(told.reading is reading for told in several)
        assert [(each.model, each.depth) for each in reading.depths.models] == [("m", 2)]
        assert reading.foreign == {"no-list": 0, "other": 1}
        clock.now += FRESH_S / 2
        assert (await readings.latest()).reading is reading
        clock.now += FRESH_S
        redis.lpush("inferq.m", "z")
        later = (await readings.latest()).reading
        assert later is not None
        assert later.depths.models[0].depth == 3
        assert asked == ["models", "read", "read"]

    asyncio.run(ask())


def test_queues_that_anybody_may_make_hide_no_model_that_a_worker_knows(
    redis: redis_py.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferq.workers.flower.readings.MODELS", 10)
    for n in range(30):
        redis.lpush(f"inferq.0{n:03}", "x")
    redis.set(NAMES.model("m"), "x")

    async def ask() -> None:
        reading = (await Readings(redis, NAMES, clock=Clock()).latest()).reading
        assert reading is not None
        assert len(reading.depths.models) == 10
        assert "m" in {each.model for each in reading.depths.models}
        assert reading.left_out == 21

    asyncio.run(ask())


def test_a_long_look_for_models_holds_up_no_reading_and_is_taken_seldom(
    redis: redis_py.Redis, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    redis.lpush("inferq.m", "x")
    clock = Clock()
    may_end = threading.Event()
    quick = DepthReader.models

    def slow(self: DepthReader) -> list[str]:
        assert may_end.wait(20)
        clock.now += 3.0
        return quick(self)

    async def ask() -> None:
        readings = Readings(redis, NAMES, clock=clock)
        await readings.latest()
        monkeypatch.setattr(DepthReader, "models", slow)
        redis.lpush("inferq.new", "x")
        clock.now += LOOK_EVERY_S
        told = await readings.latest()
        assert told.problem is None
        assert told.reading is not None
        assert [each.model for each in told.reading.depths.models] == ["m"]
        looking = readings._looking
        assert looking is not None
        may_end.set()
        await asyncio.wait_for(looking, 20)
        clock.now += FRESH_S
        told = await readings.latest()
        assert told.reading is not None
        assert [each.model for each in told.reading.depths.models] == ["m", "new"]
        clock.now += 3.0 * (LOOK_SHARE - 1)
        await readings.latest()
        assert asked.count("models") == 2
        clock.now += 3.0
        await readings.latest()
        if readings._looking is not None:
            await asyncio.wait_for(readings._looking, 20)
        assert asked.count("models") == 3

    asyncio.run(ask())
