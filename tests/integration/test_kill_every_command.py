"""Killed after any one of its Redis commands, a worker loses nothing and doubles nothing.

A proxy forwards the first k commands of claim → run → settle and the worker is SIGKILLed, for
every k. A second worker, which was not claiming, then serves what is left. The lease is the
default.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from celery import Celery
from helpers.proxy import CommandProxy
from helpers.repository import fake_model, message, numbered
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.shared import codec
from inferq.shared.names import Names, queue_of
from inferq.shared.schema import Array
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
REQUESTS = 3
#: Default lease (10 s), looked at every second, and time to serve: the promise.
RECOVERED_WITHIN_S = 15.0
#: Workers killed at a time, so that their leases run out together.
WAVE = 8


@dataclass
class Victim:
    """One worker that dies after `k` commands, and the requests that it was given."""

    k: int
    model: str
    proxy: CommandProxy
    worker: Worker
    sent: dict[str, float]
    killed_at: float = 0.0

    def dead(self) -> bool:
        return not self.worker.alive

    def die(self) -> None:
        self.killed_at = time.monotonic()
        self.worker.process.kill()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    for k in range(WAVE):
        fake_model(root, f"m{k}", knobs="lanes = 1")
    return root


def _result(redis: Redis, request_id: str) -> Array | None:
    data = redis.get(NAMES.meta(request_id))
    if not isinstance(data, bytes):
        return None
    meta = codec.decode_meta(data)
    assert meta["status"] == "SUCCESS", meta
    return codec.decode_outputs(meta["result"])["x"]


def _all_stored(redis: Redis, sent: dict[str, float]) -> bool:
    return all(_result(redis, request_id) is not None for request_id in sent)


def _one_serves(redis: Redis, model: str) -> bool:
    return redis.zcard(NAMES.serving(model)) == 1


def _executed(proxy: CommandProxy, trip: int) -> bool:
    return proxy.seen.count("EXEC") > trip


def _push(redis: Redis, model: str, first: int) -> dict[str, float]:
    sent: dict[str, float] = {}
    messages = []
    for n in range(first, first + REQUESTS):
        request_id, raw = message(model, numbered(n))
        sent[request_id] = n
        messages.append(raw)
    redis.lpush(NAMES.queue(model), *messages)
    return sent


def _control(redis_url: str, command: str, models: list[str]) -> None:

    app = Celery(broker=redis_url, set_as_current=False)
    for model in models:
        replies = app.control.broadcast(
            command, arguments={"queue": queue_of(model)}, reply=True, timeout=10, limit=1
        )
        assert replies, f"no reply to {command} {model}"
    app.close()


def _path_length(redis_url: str, redis: Redis, models: Path, target: tuple[str, int]) -> list[str]:
    """The commands of one whole claim → run → settle."""
    proxy = CommandProxy(target)
    try:
        with Worker(proxy.url, models, ["m0"], name="first"):
            proxy.arm(10_000)
            sent = _push(redis, "m0", 0)
            until(partial(_all_stored, redis, sent))
            until(lambda: not redis.keys(NAMES.claims("*")), what="the claim is settled")
            return list(proxy.seen)
    finally:
        proxy.close()


@pytest.mark.timeout(900)
def test_a_worker_killed_after_any_command_loses_nothing_and_doubles_nothing(
    redis_url: str, redis: Redis, redis_server: EmbeddedRedis, models: Path
) -> None:
    target = ("127.0.0.1", redis_server.port)
    path = _path_length(redis_url, redis, models, target)
    assert {"LMOVE", "EXEC", "SADD", "SET", "EVAL", "UNLINK"} <= set(path)
    with Worker(redis_url, models, name="second") as second:
        names = [f"m{n}" for n in range(WAVE)]
        slowest = 0.0
        for start in range(0, len(path) + 1, WAVE):
            _control(redis_url, "cancel_consumer", names)
            victims = []
            for k in range(start, min(start + WAVE, len(path) + 1)):
                model, proxy = names[k - start], CommandProxy(target)
                worker = Worker(proxy.url, models, [model], name=f"victim{k}")
                worker.start()
                victims.append(Victim(k, model, proxy, worker, {}))
            try:
                for victim in victims:
                    victim.worker.wait_ready()
                for victim in victims:
                    victim.proxy.arm(victim.k, victim.die)
                    victim.sent = _push(redis, victim.model, victim.k * REQUESTS)
                for victim in victims:
                    if victim.k < len(path):
                        until(victim.dead, what=f"killed at {victim.k}")
                    else:
                        until(partial(_all_stored, redis, victim.sent))
                        victim.die()
                _control(redis_url, "add_consumer", names)
                for victim in victims:
                    until(
                        partial(_all_stored, redis, victim.sent),
                        timeout=RECOVERED_WITHIN_S + 15,
                        what=f"all results after command {victim.k} ({path[victim.k - 1 :][:1]})",
                    )
                    took = time.monotonic() - victim.killed_at
                    slowest = max(slowest, took)
                    assert took <= RECOVERED_WITHIN_S, f"command {victim.k}: {took:.1f} s"
                    _expect(redis, victim.sent, f"command {victim.k}")
            finally:
                for victim in victims:
                    victim.worker.close()
                    victim.proxy.close()
        assert second.alive
        print(f"{len(path) + 1} kills, slowest recovery {slowest:.1f} s")
        until(lambda: redis.zcard(NAMES.leases) == 1, what="no dead worker's lease is left")
        for name in names:
            until(partial(_one_serves, redis, name), what=f"one serves {name}")
    left = {str(key, "utf-8") for key in redis.keys("inferq:1:*") if isinstance(key, bytes)}
    assert left == {NAMES.model(name) for name in names}


def test_a_connection_cut_after_any_command_loses_nothing_and_needs_no_recovery(
    redis_url: str, redis: Redis, redis_server: EmbeddedRedis, models: Path
) -> None:
    """The worker lives on: it adopts the claim whose reply was lost and settles again."""
    target = ("127.0.0.1", redis_server.port)
    path = _path_length(redis_url, redis, models, target)
    proxy = CommandProxy(target)
    try:
        with Worker(proxy.url, models, ["m1"], name="survivor") as worker:
            for k, command in enumerate(path):
                proxy.arm(k, partial(_cut, proxy))
                _serve(redis, k, f"a cut before command {k} ({command})")
            for trip in range(path.count("MULTI")):
                proxy.arm(10_000, lost_trip=trip)
                sent = _push(redis, "m1", trip * REQUESTS)
                until(partial(_executed, proxy, trip), what=f"round trip {trip}")
                _cut(proxy)
                _expect(redis, sent, f"the reply of round trip {trip} was lost")
            until(lambda: not redis.keys("inferq:1:claim*"), what="nothing is held any more")
            assert "recovered" not in worker.log
    finally:
        proxy.close()


def _cut(proxy: CommandProxy) -> None:
    proxy.disarm()
    proxy.cut()


def _serve(redis: Redis, k: int, what: str) -> None:
    _expect(redis, _push(redis, "m1", k * REQUESTS), what)


def _expect(redis: Redis, sent: dict[str, float], what: str) -> None:
    until(partial(_all_stored, redis, sent), what=f"results after {what}")
    for request_id, n in sent.items():
        result = _result(redis, request_id)
        assert result is not None
        np.testing.assert_array_equal(result, numbered(n))
