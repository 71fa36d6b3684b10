"""A network that swallows what a worker says, and delivers it when nobody expects it any more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import redis as redis_py
from chaos.proxy import Proxy
from helpers.repository import fake_model, message, numbered
from helpers.results import NAMES, nothing_is_held
from helpers.wait import until
from helpers.worker import Worker

from inferq.workers.process.embedded import EmbeddedRedis

REQUESTS = 60


def test_a_claim_that_arrives_after_its_connection_was_given_up_takes_nothing_away(
    new_redis: Callable[..., EmbeddedRedis], tmp_path: Path
) -> None:
    server = new_redis()
    models = tmp_path / "models"
    knobs = "lanes = 1\nmax_batch_size = 1\nwarm_up = false"
    fake_model(models, "m", knobs=knobs, fake="delay_ms = 150")
    with (
        redis_py.Redis.from_url(server.url) as redis,
        Proxy(server.port, ["worker"]) as proxy,
        Worker(proxy.url("worker"), models) as worker,
    ):
        sent = [message("m", numbered(n)) for n in range(REQUESTS)]
        redis.lpush(NAMES.queue("m"), *[raw for _, raw in sent])

        def settled() -> int:
            return sum(redis.exists(NAMES.meta(each)) for each, _ in sent)

        until(lambda: settled() >= 3, what="it works")
        deliver = proxy.swallow(["worker"])
        before = settled()
        until(lambda: settled() >= before + 3, 20.0, "it goes on, on other connections")
        assert worker.alive
        deliver()
        until(lambda: settled() == REQUESTS, 30.0, "everything is settled")
        until(lambda: nothing_is_held(redis), 10.0, "nothing is held")
