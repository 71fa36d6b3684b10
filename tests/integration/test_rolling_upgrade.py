"""Workers of the next protocol version replace those of this one under load: no request fails.

The next version does not exist yet. What stands for it is this one with another number, and with
that all keys but the queues', the payloads' and the results'.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import helpers.next_protocol
import numpy as np
import pytest
from helpers.repository import fake_model, message, numbered
from helpers.results import outputs_of
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.producer import Client, Pending
from inferq.shared import names
from inferq.shared.names import Names

OLD = Names()
NEW = Names(protocol=names.PROTOCOL + 1)
#: Columns of a request that is claim-checked.
WIDE = 16_384
HOOK = str(Path(helpers.next_protocol.__path__[0]))


def upgraded(redis_url: str, models: Path, name: str, **env: str) -> Worker:
    path = os.pathsep.join([HOOK, *(entry for entry in sys.path if entry)])
    return Worker(redis_url, models, name=name, names=NEW, env={**env, "PYTHONPATH": path})


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    knobs = "lanes = 1\nmax_batch_size = 8\nwarm_up = false"
    fake_model(root, "m", knobs=knobs, fake="delay_ms = 5")
    fake_model(root, "wide", knobs=knobs, fake="delay_ms = 5", width=WIDE)
    return root


def test_a_rolling_upgrade_under_load_fails_no_request(
    redis_url: str, redis: Redis, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One old worker stops, the other is killed; old clients go on, new ones join."""
    short = {"INFERQ_LEASE_S": "1"}
    pending: list[tuple[Pending, float, int]] = []

    def load(client: Client, count: int) -> None:
        for _ in range(count):
            n = len(pending)
            model, width = ("wide", WIDE) if n % 10 == 0 else ("m", 4)
            each = client.submit(model, {"x": numbered(n, width)}, priority=n % 4 * 3)
            pending.append((each, n, width))
            if n % 40 == 39:
                pending[-20][0].result(30)

    old = [Worker(redis_url, models, name=f"old{n}", env=short) for n in range(2)]
    new = [upgraded(redis_url, models, f"new{n}", **short) for n in range(2)]
    with Client(redis_url) as old_client:
        try:
            for worker in old:
                worker.start()
                worker.wait_ready()
            load(old_client, 200)
            new[0].start()
            new[0].wait_ready()
            load(old_client, 200)
            assert old[0].stop() == 0
            load(old_client, 200)
            with monkeypatch.context() as patch:
                patch.setattr(names, "PROTOCOL", NEW.protocol)
                new_client = Client(redis_url)
            with new_client:
                load(new_client, 200)
                old[1].kill()
                new[1].start()
                new[1].wait_ready()
                load(new_client, 200)
                load(old_client, 200)
                for each, n, width in pending:
                    outputs = each.result(30).outputs
                    np.testing.assert_array_equal(outputs["x"], numbered(n, width))
        finally:
            for worker in (*old, *new):
                worker.close()
    until(lambda: not redis.keys(f"{OLD.root}claim*"), what="nothing is held in the old version")
    assert redis.keys("*payload*") == []


def test_what_an_old_worker_held_when_it_died_is_recovered_by_a_new_one(
    redis_url: str, redis: Redis, models: Path
) -> None:
    short = {"INFERQ_LEASE_S": "1"}
    with Worker(redis_url, models, ["m"], name="old", env=short) as old:
        old.pause()
        sent = dict(message("m", numbered(n)) for n in range(4))
        redis.lpush(OLD.queue("m"), *sent.values())
        key = OLD.claim(old.incarnation, 999, "m", 0)
        for _ in range(2):
            redis.lmove(OLD.queue("m"), key, "RIGHT", "LEFT")
        redis.hset(OLD.claims(old.incarnation), key, 1)
        redis.zadd(OLD.scheduled, {"m:0:someplace": 0})
        later = message("m", numbered(9))
        redis.rpush(OLD.scheduled_message("m:0:someplace"), later[1])
        old.kill()
        with upgraded(redis_url, models, "new", **short):
            for n, request_id in enumerate([*sent]):
                outputs = outputs_of(redis, request_id)
                np.testing.assert_array_equal(outputs["x"], numbered(n))
            np.testing.assert_array_equal(outputs_of(redis, later[0])["x"], numbered(9))
            until(
                partial(_forgotten, redis, old.incarnation), what="nothing is left of the old one"
            )


def _forgotten(redis: Redis, incarnation: str) -> bool:
    return not redis.exists(OLD.fence(incarnation), OLD.leases, OLD.claims(incarnation))
