"""A served model is changed between two batches, while requests come and go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event, Thread

import pytest
import redis as redis_py
from helpers.plane import RunningPlane
from helpers.repository import fake_model, message, numbered
from helpers.results import nothing_is_held
from helpers.wait import until

from inferq.producer import Client, Result
from inferq.shared.names import Names
from inferq.workers.process.embedded import EmbeddedRedis


@pytest.fixture
def models(tmp_path: Path) -> Path:
    fake_model(tmp_path, "m", knobs="max_batch_size = 8\nwarm_up = false", fake="delay_ms = 2.0")
    return tmp_path


def version(result: Result) -> int:
    assert result.receipt is not None
    return result.receipt.version


def test_a_model_that_is_changed_under_load_fails_no_request_and_serves_what_comes_as_changed(
    redis_url: str, redis: redis_py.Redis, models: Path
) -> None:
    with RunningPlane(redis_url, models, ["m"]) as running, Client(redis_url) as client:
        model, plane = running.models["m"], running.plane
        enough, seen = Event(), list[tuple[float, Result]]()

        def load() -> None:
            with Client(redis_url) as other:
                n = 0
                while not enough.is_set():
                    inputs = [{"x": numbered(n + each)} for each in range(40)]
                    for x, result in enumerate(other.map("m", inputs, in_flight=40), n):
                        seen.append((x, result))
                    n += 40

        def promote(to: int) -> int:
            model.results = replace(model.results, version=to)
            return to

        thread = Thread(target=load)
        thread.start()
        try:
            for to in range(2, 12):
                assert plane.call(partial(promote, to)).result(20) == to
                assert version(client.infer("m", {"x": numbered(to)}, timeout=20)) == to
        finally:
            enough.set()
            thread.join(60)
        until(lambda: nothing_is_held(redis), what="nothing is held any more")
        assert not running.control.ended
    assert len(seen) > 40
    assert all(result.outputs["x"][0, 0] == x for x, result in seen), "each has its own answer"
    versions = [version(result) for _, result in seen]
    assert versions == sorted(versions), "one after the other"


def test_a_queue_that_is_closed_by_a_call_is_claimed_from_no_more_until_another_opens_it(
    redis_url: str, redis: redis_py.Redis, models: Path
) -> None:
    queue = Names().queue("m")
    with RunningPlane(redis_url, models, ["m"]) as running:
        model, plane = running.models["m"], running.plane

        def consume(on: bool) -> None:
            model.consuming = on

        plane.call(partial(consume, False)).result(20)
        redis.lpush(queue, *(message("m", numbered(n))[1] for n in range(10)))
        for _ in range(10):  # it has turned so often since
            plane.call(lambda: None).result(20)
        assert redis.llen(queue) == 10
        plane.call(partial(consume, True)).result(20)
        until(lambda: plane.settled == 10, what="all are served")


def test_calls_are_run_while_redis_is_away(
    new_redis: Callable[..., EmbeddedRedis], models: Path
) -> None:
    server = new_redis()
    with RunningPlane(server.url, models, ["m"]) as running:
        until(lambda: running.plane.answered_at, what="it serves")
        server.kill()
        for _ in range(3):
            assert running.plane.call(lambda: 1).result(20) == 1
        server.start()
        with redis_py.Redis.from_url(server.url) as client:
            client.lpush(Names().queue("m"), message("m", numbered(3))[1])
            until(lambda: running.plane.settled == 1, what="it serves again")


def test_no_attribute_of_a_data_plane_appears_after_its_constructor(
    redis_url: str, models: Path
) -> None:
    running = RunningPlane(redis_url, models, ["m"])
    plane = running.plane
    parts = [plane, plane._held, plane._settling, plane._incarnation, plane._calls]
    before = [set(vars(part)) for part in parts]
    with running, Client(redis_url) as client:
        client.infer("m", {"x": numbered(3)}, timeout=20)
    assert [set(vars(part)) for part in parts] == before
    assert len(before[0]) <= 22
