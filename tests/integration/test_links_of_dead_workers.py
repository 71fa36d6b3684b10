"""What follows on a request is published though its worker dies, or ends, while it publishes it.

A worker is killed at each place marked ``# kill point`` in the room `canvas`; another one publishes
then what the dead one had in hand: at least once, as Celery does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from helpers.envelopes import JSON, envelope
from helpers.killpoints import sitecustomize
from helpers.repository import fake_model, numbered
from helpers.results import meta_of, nothing_is_held
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

import inferq.workers.canvas
from inferq.shared.names import Names
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
QUEUE = NAMES.queue("m")
MAXMEMORY = 64 << 20
SERVER = {"maxmemory": MAXMEMORY}
SHORT_LEASE = {"INFERQ_LEASE_S": "1"}
KILL_POINTS = sorted(
    name.decode()
    for path in Path(inferq.workers.canvas.__path__[0]).glob("*.py")
    for _, name in sitecustomize.MARK.findall(path.read_bytes())
)
RECOVERED_WITHIN_S = 30.0


@pytest.fixture
def models(tmp_path: Path) -> Path:
    fake_model(tmp_path / "models", "m", knobs="lanes = 1\nwarm_up = false")
    return tmp_path / "models"


def note(queue: str) -> dict[str, Any]:
    """A signature of a task of somebody else's."""
    return {
        "task": "app.note",
        "args": [],
        "kwargs": {},
        "subtask_type": None,
        "immutable": False,
        "options": {"queue": queue},
    }


def request(n: float, embed: object, **headers: Any) -> tuple[str, bytes]:
    request_id = str(uuid.uuid4())
    packed = json.dumps([[], {"inputs": {"x": numbered(n).tolist()}}, embed]).encode()
    return request_id, envelope(packed, kind=JSON, request_id=request_id, headers=headers)


def chord_parts(redis: Redis, count: int, queue: str) -> list[tuple[str, bytes]]:
    """The requests of a chord's header, whose body goes to `queue`; its size is known."""
    group_id = str(uuid.uuid4())
    redis.set(f"celery-taskset-meta-{group_id}.s", count)
    body = {**note(queue), "options": {"queue": queue, "task_id": str(uuid.uuid4())}}
    body["chord_size"] = count
    return [request(n, {"chord": body}, group=group_id, group_index=n) for n in range(count)]


def dying(url: str, models: Path, place: str) -> Worker:
    folders = [str(Path(sitecustomize.__file__).parent), *(each for each in sys.path if each)]
    env = {"PYTHONPATH": os.pathsep.join(folders), "INFERQ_TEST_KILL_AT": place}
    return Worker(url, models, ["m"], name="dying", env={**SHORT_LEASE, **env})


def test_there_are_kill_points() -> None:
    assert {"links-noted", "links-unsent", "links-sent"} <= set(KILL_POINTS)


@pytest.mark.parametrize("place", KILL_POINTS)
def test_links_and_a_chords_body_are_published_though_their_worker_is_killed(
    server: EmbeddedRedis, redis: Redis, models: Path, place: str
) -> None:
    ids = []
    with dying(server.url, models, place) as worker:
        worker.pause()
        for request_id, raw in chord_parts(redis, 2, "bodies"):
            ids.append(request_id)
            redis.lpush(QUEUE, raw)
        worker.resume()
        assert until(worker.process.poll, RECOVERED_WITHIN_S, "it dies") == -signal.SIGKILL
        request_id, raw = request(7, {"callbacks": [note("links")]})
        ids.append(request_id)
        redis.lpush(QUEUE, raw)
    with Worker(server.url, models, ["m"], env=SHORT_LEASE) as rescuer:
        for request_id in ids:
            assert meta_of(redis, request_id, RECOVERED_WITHIN_S)["status"] == "SUCCESS"
        until(lambda: redis.llen("links"), what="the link is published")
        until(lambda: redis.llen("bodies"), RECOVERED_WITHIN_S, "the chord's body is published")
        until(lambda: nothing_is_held(redis), RECOVERED_WITHIN_S)
        assert rescuer.alive


def test_a_chords_body_that_a_full_redis_refuses_is_published_though_its_worker_is_told_to_end(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    parts = chord_parts(redis, 2, "bodies")
    with Worker(server.url, models, ["m"], env={**SHORT_LEASE, "INFERQ_GRACE_S": "1"}) as worker:
        worker.pause()
        redis.lpush(QUEUE, *(raw for _, raw in parts))
        redis.set("filler", b"x" * (MAXMEMORY // 8))
        redis.config_set("maxmemory", MAXMEMORY // 16)
        with pytest.raises(redis_py.OutOfMemoryError):
            redis.set("another", b"x")
        worker.resume()
        until(lambda: "wait: " in worker.log, what="its links wait for memory")
        worker.stop()
    assert not redis.llen("bodies")
    redis.config_set("maxmemory", 0)
    with Worker(server.url, models, ["m"], env=SHORT_LEASE) as other:
        for request_id, _ in parts:
            assert meta_of(redis, request_id)["status"] == "SUCCESS"
        until(lambda: redis.llen("bodies"), RECOVERED_WITHIN_S, "the chord's body is published")
        until(lambda: nothing_is_held(redis), RECOVERED_WITHIN_S)
        assert other.alive
