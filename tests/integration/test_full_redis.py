"""A Redis at its maxmemory (noeviction) loses nothing and crashes nobody: what waits is served."""

from __future__ import annotations

import uuid
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import redis as redis_py
from helpers.envelopes import body, envelope, request, tensor
from helpers.hostile import links
from helpers.repository import fake_model, message, numbered
from helpers.results import held_by, meta_of, nothing_is_held, outputs_of
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.producer import Client
from inferq.shared.errors import RedisUnavailable
from inferq.shared.names import Names
from inferq.shared.schema import MAX_TENSORS
from inferq.workers.data_plane.plane import MAX_AWAY_IN_CANVAS
from inferq.workers.engines.fake import FAULT_EXIT
from inferq.workers.process.embedded import EmbeddedRedis
from inferq.workers.supervision.health import read_beat

NAMES = Names()
MAXMEMORY = 64 << 20
SERVER = {"maxmemory": MAXMEMORY}
SHORT_LEASE = {"INFERQ_LEASE_S": "1"}
#: Columns that make a result larger than what is sent once and published by a script.
WIDE = 8_192
#: Of a model with as many inputs as one may have, and how many of its requests make a batch.
INPUTS = [f"x{n}" for n in range(MAX_TENSORS)]
MANY = 20
#: Words that a command in a script may have at most.
LUA_STACK = 8_000
#: Most requests that a worker with one lane of 8 has claimed and not computed, with some to spare.
CLAIMED_AHEAD = 64


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    fake_model(
        root,
        "m",
        knobs="lanes = 1\nmax_batch_size = 4\nwarm_up = false",
        fake="faults = true\ndelay_ms = 20",
    )
    fake_model(root, "wide", knobs="lanes = 1\nmax_batch_size = 4\nwarm_up = false", width=WIDE)
    fake_model(
        root, "linked", knobs="lanes = 1\nmax_batch_size = 8\nwarm_up = false", fake="delay_ms = 10"
    )
    (root / "many").mkdir()
    tensors = [f'{{ name = "{name}", dtype = "float32", shape = ["batch", 4] }}' for name in INPUTS]
    (root / "many" / "model.toml").write_text(
        'engine = "fake"\nlanes = 1\nwarm_up = false\n'
        # All that the test sends is one batch: it waits until that is complete.
        f"max_batch_size = {MANY}\nmax_queue_delay_ms = 60_000\n"
        f"[fake]\ninputs = [{', '.join(tensors)}]\n"
    )
    return root


def fill(redis: Redis) -> None:
    """Full, and far beyond: what is freed while serving makes no room."""
    redis.set("filler", b"x" * (MAXMEMORY // 8))
    redis.config_set("maxmemory", MAXMEMORY // 16)
    with pytest.raises(redis_py.OutOfMemoryError):
        redis.set("another", b"x")


def push_though_full(redis: Redis, queue: str, message: bytes) -> None:
    """As no producer could: a script that has written goes on."""
    script = "redis.call('DEL', KEYS[2]) return redis.call('LPUSH', KEYS[1], ARGV[1])"
    redis.eval(script, 2, queue, "nowhere", message)


@pytest.mark.parametrize("model", ["m", "wide"])
def test_what_is_queued_is_served_while_redis_is_full(
    server: EmbeddedRedis, redis: Redis, models: Path, model: str
) -> None:
    width = WIDE if model == "wide" else 4
    sent = dict(message(model, numbered(n, width)) for n in range(40))
    with Worker(server.url, models, [model]) as worker:
        worker.pause()
        redis.lpush(NAMES.queue(model), *sent.values())
        fill(redis)
        worker.resume()
        for n, request_id in enumerate(sent):
            outputs = outputs_of(redis, request_id)
            np.testing.assert_array_equal(outputs["x"], numbered(n, width))
        until(lambda: nothing_is_held(redis), what="nothing is held any more")
        assert worker.alive
        assert "Redis is full" in worker.log


def test_a_worker_that_starts_while_redis_is_full_serves_and_keeps_its_lease(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    sent = dict(message("m", numbered(n)) for n in range(10))
    redis.lpush(NAMES.queue("m"), *sent.values())
    fill(redis)
    with Worker(server.url, models, ["m"], env=SHORT_LEASE) as worker:
        for n, request_id in enumerate(sent):
            np.testing.assert_array_equal(outputs_of(redis, request_id)["x"], numbered(n))
        before = redis.zscore(NAMES.leases, worker.incarnation)
        assert before is not None
        until(partial(_renewed, redis, worker.incarnation, before), what="the lease is renewed")
        with redis_py.Redis.from_url(server.url) as other:
            assert other.exists(NAMES.fence(worker.incarnation))
        assert worker.stop() == 0
    assert redis.zcard(NAMES.leases) == 0


def _renewed(redis: Redis, incarnation: str, before: float) -> bool:
    score = redis.zscore(NAMES.leases, incarnation)
    assert score is not None, "its lease is gone"
    return score > before + 1_500


def test_a_dead_workers_claims_are_recovered_while_redis_is_full(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    with Worker(server.url, models, ["m"], name="first", env=SHORT_LEASE) as first:
        # The poison is counted although what is noted of it needs memory that is not there.
        sent = dict(message("m", numbered(FAULT_EXIT if n == 1 else n)) for n in range(12))
        first.pause()
        redis.lpush(NAMES.queue("m"), *sent.values())
        fill(redis)
        first.resume()
        first.process.wait(20)
    for survivors in range(3):
        with Worker(server.url, models, ["m"], name=f"next{survivors}", env=SHORT_LEASE) as worker:
            until(lambda w=worker: not w.alive or _all_done(redis, sent))  # type: ignore[misc]
            if worker.alive:
                break
    for n, request_id in enumerate(sent):
        if n == 1:
            assert meta_of(redis, request_id)["result"]["exc_type"] == "DeadLettered"
        else:
            np.testing.assert_array_equal(outputs_of(redis, request_id)["x"], numbered(n))


def _all_done(redis: Redis, sent: dict[str, bytes]) -> bool:
    return all(redis.exists(NAMES.meta(request_id)) for request_id in sent)


def test_a_push_that_a_full_redis_refuses_is_an_error_and_what_was_accepted_comes(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    with Worker(server.url, models, ["m"]) as worker, Client(server.url) as client:
        accepted = [client.submit("m", {"x": numbered(n)}) for n in range(20)]
        fill(redis)
        with pytest.raises(RedisUnavailable, match="maxmemory"):
            client.submit("m", {"x": numbered(1)})
        for n, pending in enumerate(accepted):
            np.testing.assert_array_equal(pending.result(15).outputs["x"], numbered(n))
        redis.config_set("maxmemory", 0)
        assert client.infer("m", {"x": numbered(5)}, timeout=10).outputs["x"][0, 0] == 5
        until(lambda: held_by(redis, worker.incarnation) == 0)


def test_thousands_of_payloads_are_deleted_by_one_settle_while_redis_is_full(
    server: EmbeddedRedis, redis: Redis, models: Path
) -> None:
    """More of them than a script could name in one command."""
    sent = dict(_claim_checked(redis, n) for n in range(MANY))
    assert len(redis.keys(NAMES.payload("*", "*"))) == MANY * len(INPUTS) > LUA_STACK
    with Worker(server.url, models, ["many"]) as worker:
        worker.pause()
        redis.lpush(NAMES.queue("many"), *sent.values())
        fill(redis)
        worker.resume()
        for n, request_id in enumerate(sent):
            outputs = outputs_of(redis, request_id, 30)
            for place, name in enumerate(INPUTS):
                np.testing.assert_array_equal(outputs[name], numbered(n + place / 100))
        until(lambda: nothing_is_held(redis), what="nothing is held any more")
        assert redis.get(NAMES.fence(worker.incarnation)) == b"1", "one MULTI has settled all"
        assert redis.keys(NAMES.payload("*", "*")) == []
        assert "Redis is full" in worker.log
        assert "refused one command" not in worker.log
        assert worker.alive


def _claim_checked(redis: Redis, n: int) -> tuple[str, bytes]:
    """A request of the model many, all inputs of which are claim-checked: its id and message."""
    request_id = str(uuid.uuid4())
    inputs, payloads = {}, {}
    for place, name in enumerate(INPUTS):
        x, key = numbered(n + place / 100), NAMES.payload(request_id, name)
        payloads[key] = x.tobytes()
        inputs[name] = tensor(x, data=..., key=key)
    redis.mset(payloads)
    return request_id, envelope(body({"inputs": inputs}), request_id=request_id)


def test_claims_stop_while_many_requests_wait_for_their_links(
    server: EmbeddedRedis, redis: Redis, models: Path, tmp_path: Path
) -> None:
    """A full Redis takes results, which make room again, but no links. None of both is lost.

    Requests of another model are served meanwhile.
    """
    path = tmp_path / "beat.json"
    count = 3 * MAX_AWAY_IN_CANVAS
    ids = [str(uuid.uuid4()) for _ in range(count)]
    link = {"callbacks": links(1)}
    queue, answered = NAMES.queue("linked"), "nobody"
    env = {"INFERQ_HEARTBEAT_FILE": str(path)}
    with Worker(server.url, models, ["linked", "m"], env=env) as worker:
        plain_id, plain = message("m", numbered(7))
        worker.pause()
        messages = [request(n, embed=link, request_id=each) for n, each in enumerate(ids)]
        redis.lpush(queue, *messages)
        fill(redis)
        worker.resume()
        until(lambda: held_by(redis, worker.incarnation) >= MAX_AWAY_IN_CANVAS, what="many wait")
        left: dict[float, int] = {}

        def nothing_moves() -> bool:
            """Whether three heartbeats in a row found the queue as long as it is."""
            if (beat := read_beat(path)) is not None:
                left.setdefault(beat.written, int(redis.llen(queue)))
            last = list(left.values())[-3:]
            return len(last) == 3 and len(set(last)) == 1

        until(nothing_moves, what="no more are claimed")
        push_though_full(redis, NAMES.queue("m"), plain)
        np.testing.assert_array_equal(outputs_of(redis, plain_id)["x"], numbered(7))
        held = held_by(redis, worker.incarnation)
        assert MAX_AWAY_IN_CANVAS <= held <= MAX_AWAY_IN_CANVAS + CLAIMED_AHEAD
        assert redis.llen(queue) == count - held
        assert redis.llen(answered) == 0
        beat = read_beat(path)
        assert beat is not None
        assert beat.stuck_s == 0, "a supervisor would kill it"
        redis.config_set("maxmemory", 0)
        for n, request_id in enumerate(ids):
            np.testing.assert_array_equal(outputs_of(redis, request_id, 30)["x"], numbered(n))
        until(lambda: nothing_is_held(redis), what="nothing is held any more")
        assert redis.llen(answered) == count
        assert worker.alive
