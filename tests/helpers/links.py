"""A worker, its Redis and a client that may only push, for tests of hostile links."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis as redis_py

from helpers.acl import Users
from helpers.repository import fake_model
from helpers.results import nothing_is_held
from helpers.wait import until
from helpers.worker import Worker
from inferq.workers.process.embedded import EmbeddedRedis


@contextmanager
def serving(redis_kind: str, models: Path, *, wide: int) -> Iterator[Worker]:
    """A worker of the models m and other, and of `wide`, whose results have so many columns."""
    for name in ("m", "other"):
        fake_model(models, name, knobs="warm_up = false")
    fake_model(models, "wide", knobs="warm_up = false", width=wide)
    with EmbeddedRedis(redis_kind) as server, Worker(server.url, models) as worker:
        yield worker


@contextmanager
def store_of(worker: Worker, patterns: Sequence[str]) -> Iterator[redis_py.Redis]:
    """The worker's Redis. At the end nothing is held, and keys of `patterns` are deleted."""
    with redis_py.Redis.from_url(worker.redis_url, socket_timeout=30) as client:
        yield client
        assert worker.alive
        until(lambda: nothing_is_held(client), what="nothing is held any more")
        for pattern in patterns:
            for key in client.scan_iter(pattern):
                client.unlink(key)


@contextmanager
def push_only(worker: Worker) -> Iterator[redis_py.Redis]:
    """A client that may push to queues of models, and nothing else."""
    with Users(worker.redis_url) as users:
        yield users.push_only()


def link(queue: object = "links", **options: Any) -> dict[str, Any]:
    """A signature that is sent to `queue`."""
    return {
        "task": "app.note", "args": [], "kwargs": {}, "subtask_type": None, "immutable": False,
        "options": {"queue": queue, **options},
    }  # fmt: skip
