"""Odd members, odd fields and keys of another type stop only what they are for."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from helpers.repository import fake_model, message, numbered
from helpers.results import NAMES
from helpers.stock import let_go
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.shared.celery_app import make_app
from inferq.shared.settings import Settings
from inferq.workers.supervision.health import problem_of, read_beat

LEASE_S = 1.0
#: Within which what a dead worker held is served again, with that lease; on a loaded machine.
RECOVERED_S = 15.0


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    for name in ("a", "b"):
        fake_model(root, name, knobs="lanes = 1\nwarm_up = false")
    return root


@contextmanager
def serving(redis_url: str, models: Path, tmp_path: Path) -> Iterator[Worker]:
    """A worker of both models, which must live and be healthy at the end."""
    beat = tmp_path / "beat.json"
    env = {"INFERQ_LEASE_S": str(LEASE_S), "INFERQ_HEARTBEAT_FILE": str(beat)}
    with Worker(redis_url, models, env=env) as worker:
        yield worker
        assert worker.alive
        until(lambda: is_healthy(beat), what="it is healthy")
        assert "Traceback" not in worker.log
        worker.kill()  # a key still of the wrong type would hold it up as long as its grace lasts


def is_healthy(path: Path) -> bool:
    beat = read_beat(path)
    return beat is not None and problem_of(beat) is None


def push(redis: Redis, model: str, priority: int = 0) -> str:
    request_id, raw = message(model, numbered(1), priority=priority)
    redis.lpush(NAMES.queue(model, priority), raw)
    return request_id


def is_answered(redis: Redis, request_id: str) -> bool:
    return bool(redis.exists(NAMES.meta(request_id)))


def assert_serves(redis: Redis, *models: str) -> None:
    for model in models:
        request_id = push(redis, model)
        until(partial(is_answered, redis, request_id), what=f"{model} answers")


def later(redis: Redis, model: str, seconds: float = 1.0) -> str:
    """The id of a request that was pushed with an ETA so far ahead."""
    request_id, raw = message(model, numbered(1))
    due = datetime.fromtimestamp(time.time() + seconds, UTC).isoformat()
    redis.lpush(NAMES.queue(model), raw.replace(b'"eta": null', f'"eta": "{due}"'.encode()))
    return request_id


def dead_worker(redis: Redis, name: str, *models: str, field: bytes | None = None) -> list[str]:
    """An incarnation whose lease has run out, with a claimed request of each of `models`."""
    ids = []
    redis.set(NAMES.fence(name), 0)
    for n, model in enumerate(models, 1):
        request_id, raw = message(model, numbered(1))
        key = NAMES.claim(name, n, model, 0)
        redis.lpush(key, raw)
        redis.hset(NAMES.claims(name), key, "1")
        ids.append(request_id)
    if field is not None:
        redis.hset(NAMES.claims(name), field, "1")
    redis.zadd(NAMES.leases, {name: 1})
    return ids


def lines(worker: Worker, words: str) -> list[str]:
    return [line for line in worker.log.splitlines() if words in line]


# --- odd members and fields ------------------------------------------------------------------


def test_odd_members_among_the_scheduled_keep_none_of_the_others(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    odd = [b"garbage", b"a:x:1", b"a:0", b"a:0:1:2", b"\xff\xfe:0:1", b"../a:0:1", b"", b"::"]
    many = [b"%d of them" % n for n in range(300)]
    with serving(redis_url, models, tmp_path) as worker:
        redis.zadd(NAMES.scheduled, dict.fromkeys([*odd, *many], 0))
        request_id = later(redis, "a")
        until(lambda: is_answered(redis, request_id), what="the one with an ETA is answered")
        until(lambda: not redis.exists(NAMES.scheduled), what="nothing odd is left")
        assert lines(worker, r"b'garbage' in inferq:1:later is no scheduled request")


def test_odd_members_among_the_leases_end_no_recovery(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    odd = [b"\xff%d" % n for n in range(150)]
    with serving(redis_url, models, tmp_path) as worker:
        redis.zadd(NAMES.leases, dict.fromkeys([*odd, b"a:b", b" "], 0))
        (request_id,) = dead_worker(redis, "dead", "a")
        until(lambda: is_answered(redis, request_id), RECOVERED_S, "it is recovered")
        until(lambda: int(redis.zcard(NAMES.leases)) == 1, RECOVERED_S, "only one is left")
        assert lines(worker, r"b'\xff0' in inferq:1:leases is no worker's name")


@pytest.mark.parametrize(
    "field", [b"\xff", b"garbage", b"inferq:1:claim:dead:x:a:0", b"inferq:1:claim:other:1:a:0"]
)
def test_an_odd_field_among_a_dead_workers_claims_keeps_none_of_them(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path, field: bytes
) -> None:
    """A claim of another worker, named there, stays with that one."""
    other = NAMES.claim("other", 1, "a", 0)
    redis.lpush(other, "held by another")
    with serving(redis_url, models, tmp_path):
        sent = dead_worker(redis, "dead", "a", "b", field=field)
        until(lambda: all(is_answered(redis, one) for one in sent), RECOVERED_S, "recovered")
        until(lambda: not redis.exists(NAMES.claims("dead")), what="nothing is left of it")
        assert redis.llen(other) == 1


def test_odd_numbers_of_attempts_and_odd_names_of_what_ran_count_as_none(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    with serving(redis_url, models, tmp_path):
        request_id, raw = message("a", numbered(1))
        redis.hset(NAMES.attempts("a"), request_id, "many")
        redis.lpush(NAMES.queue("a"), raw)
        until(lambda: is_answered(redis, request_id), what="it is answered")
        redis.sadd(NAMES.running("dead"), "no model", b"\xff", f"a/{request_id}")
        (other,) = dead_worker(redis, "dead", "b")
        until(lambda: is_answered(redis, other), RECOVERED_S, "recovered")


# --- keys of another type --------------------------------------------------------------------


def test_a_queue_of_another_type_stops_no_other_model_and_heals(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    key = NAMES.queue("a", 9)
    with serving(redis_url, models, tmp_path) as worker:
        assert_serves(redis, "a", "b")
        redis.set(key, "x")
        until(lambda: lines(worker, "is a string; expected a list"), what="it is said")
        assert_serves(redis, "b", "a")
        for n in range(20):  # each change is told to the worker
            redis.set(key, n)
        assert_serves(redis, "b", "a")
        assert len(lines(worker, "is a string; expected a list")) == 1, "said once"
        assert "DEL it" in worker.log
        assert not lines(worker, "connection broke")
        redis.delete(key)
        request_id = push(redis, "a", 9)
        until(lambda: is_answered(redis, request_id), what="it is served again")
        assert len(lines(worker, "is right again")) == 1


def test_a_queue_of_another_type_at_the_start_stops_no_other_model(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    redis.hset(NAMES.queue("a"), "x", "y")
    with serving(redis_url, models, tmp_path) as worker:
        assert_serves(redis, "b")
        assert lines(worker, "key 'inferq.a' is a hash; expected a list")
        app = make_app(Settings.load(redis_url=redis_url))
        until(
            lambda: app.control.inspect(timeout=1.0, limit=1).ping(), what="remote control answers"
        )
        consumed = app.control.inspect(timeout=10.0, limit=1).active_queues()
        assert {each["name"] for each in next(iter(consumed.values()))} == {"inferq.a", "inferq.b"}
        let_go(app)
        assert not lines(worker, "Connection to broker lost")
        redis.delete(NAMES.queue("a"))
        assert_serves(redis, "a")


def shared_keys() -> dict[str, str]:
    return {
        "attempts": NAMES.attempts("a"),
        "dead": NAMES.dead("a"),
        "later": NAMES.scheduled,
        "leases": NAMES.leases,
        "serving": NAMES.serving("a"),
        "model": NAMES.model("a"),
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("attempts", "string"),
        ("dead", "string"),
        ("later", "string"),
        ("leases", "string"),
        ("leases", "list"),
        ("serving", "string"),
        ("model", "list"),
    ],
)
def test_a_shared_key_of_another_type_stops_no_model(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path, name: str, kind: str
) -> None:
    key = shared_keys()[name]
    with serving(redis_url, models, tmp_path) as worker:
        assert_serves(redis, "a", "b")
        redis.delete(key)
        if kind == "string":
            redis.set(key, "x")
        else:
            redis.lpush(key, "x")
        time.sleep(2 * LEASE_S)  # what is renewed is due once or twice meanwhile
        assert_serves(redis, "a", "b")
        if name in {"attempts", "later", "leases", "serving"}:
            until(lambda: len(lines(worker, f"key {key!r} is a")) == 1, what="it is said once")
        redis.delete(key)
        if name not in {"dead", "model"}:
            push(redis, "a")
            until(lambda: lines(worker, f"key {key!r} is right again"), what="it heals")
        assert_serves(redis, "a", "b")
        sent = dead_worker(redis, "dead", "a", "b")
        until(lambda: all(is_answered(redis, one) for one in sent), RECOVERED_S, "recovered")
        assert not lines(worker, "lease of"), "its own lease was never lost"


def test_a_worker_starts_where_shared_keys_are_of_another_type(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    for name, key in shared_keys().items():
        if name not in {"serving"}:  # by which the test sees that it serves
            redis.set(key, "x")
    with serving(redis_url, models, tmp_path):
        assert_serves(redis, "a", "b")


@pytest.mark.parametrize("name", ["fence", "claims", "running"])
def test_a_workers_own_key_of_another_type_ends_its_incarnation_and_loses_nothing(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path, name: str
) -> None:
    fake_model(
        models,
        "slow",
        knobs="lanes = 1\nmax_batch_size = 2\nwarm_up = false",
        fake="delay_ms = 1000",
    )
    with serving(redis_url, models, tmp_path) as worker:
        sent = [push(redis, "slow") for _ in range(8)]
        until(lambda: any(is_answered(redis, one) for one in sent), what="it computes")
        key = getattr(NAMES, name)(worker.incarnation)
        redis.delete(key)
        redis.zadd(key, {"x": 1})
        assert_serves(redis, "a", "b")
        until(lambda: all(is_answered(redis, one) for one in sent), 30.0, "all are answered")
        until(lambda: int(redis.zcard(NAMES.leases)) == 1, RECOVERED_S, "the first one is gone")
        assert not redis.keys(NAMES.claims("*")), "nothing is held"


def test_a_fence_that_is_no_number_ends_its_incarnation(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    with serving(redis_url, models, tmp_path) as worker:
        redis.set(NAMES.fence(worker.incarnation), "x")
        assert_serves(redis, "a", "b")
        until(lambda: not redis.exists(NAMES.fence(worker.incarnation)), RECOVERED_S, "it is gone")


@pytest.mark.parametrize("name", ["claims", "running", "stats"])
def test_a_dead_workers_key_of_another_type_keeps_nothing_from_coming_back(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path, name: str
) -> None:
    with serving(redis_url, models, tmp_path):
        sent = dead_worker(redis, "dead", "a", "b")
        key = getattr(NAMES, name)("dead")
        redis.delete(key)
        redis.lpush(key, "x")
        until(lambda: all(is_answered(redis, one) for one in sent), RECOVERED_S, "recovered")
        until(lambda: int(redis.zcard(NAMES.leases)) == 1, RECOVERED_S, "nothing is left")


def test_what_a_dead_worker_held_of_others_comes_back_where_one_queue_has_the_wrong_type(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    redis.set(NAMES.queue("a"), "x")
    with serving(redis_url, models, tmp_path) as worker:
        stays, comes = dead_worker(redis, "dead", "a", "b")
        until(lambda: is_answered(redis, comes), RECOVERED_S, "that of b is recovered")
        assert not is_answered(redis, stays)
        redis.delete(NAMES.queue("a"))
        until(lambda: is_answered(redis, stays), RECOVERED_S, "that of a, too, later")
        until(lambda: int(redis.zcard(NAMES.leases)) == 1, what="nothing is left")
        assert len(lines(worker, "cannot be recovered")) == 0


def test_a_worker_that_stops_where_a_queue_has_the_wrong_type_leaves_its_requests_to_others(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    fake_model(
        models,
        "slow",
        knobs="lanes = 1\nmax_batch_size = 1\nwarm_up = false",
        fake="delay_ms = 1000",
    )
    env = {"INFERQ_LEASE_S": str(LEASE_S), "INFERQ_GRACE_S": "0"}
    with Worker(redis_url, models, env=env) as worker:
        sent = [push(redis, "slow") for _ in range(5)]
        until(lambda: any(is_answered(redis, one) for one in sent), what="it computes")
        until(lambda: redis.keys(NAMES.claims("*")), what="it holds some")
        queue = NAMES.queue("slow")
        waiting = list(redis.lrange(queue, 0, -1))
        redis.delete(queue)
        redis.set(queue, "x")
        worker.stop()
    assert redis.keys(NAMES.claims("*")), "they are still held"
    redis.delete(queue)
    if waiting:
        redis.rpush(queue, *waiting)
    with serving(redis_url, models, tmp_path):
        until(lambda: all(is_answered(redis, one) for one in sent), 30.0, "all are answered")


def test_a_request_with_an_eta_outlives_a_list_of_the_scheduled_that_has_the_wrong_type(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    """It is kept while nothing can stand in the list, and is found once that is right again."""
    with serving(redis_url, models, tmp_path) as worker:
        before = later(redis, "a", 3.0)
        until(lambda: redis.zcard(NAMES.scheduled) == 1, what="it is scheduled")
        redis.delete(NAMES.scheduled)
        redis.set(NAMES.scheduled, "x")
        during = later(redis, "b", 3.0)
        until(lambda: len(redis.keys(f"{NAMES.scheduled}:*")) == 2, what="both are kept")
        until(lambda: lines(worker, "is a string; expected a zset"), what="it is said")
        assert_serves(redis, "a", "b")
        redis.delete(NAMES.scheduled)
        for one in (before, during):
            until(partial(is_answered, redis, one), what="it is answered")
        assert not redis.keys(f"{NAMES.scheduled}*")


def test_scheduled_requests_of_a_queue_of_the_wrong_type_keep_none_of_the_others(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    with serving(redis_url, models, tmp_path):
        stay = [later(redis, "a", 2.0) for _ in range(150)]
        until(lambda: int(redis.zcard(NAMES.scheduled)) == len(stay), what="they are scheduled")
        redis.set(NAMES.queue("a"), "x")
        comes = later(redis, "b", 3.0)
        until(lambda: is_answered(redis, comes), what="that of b is answered")
        redis.delete(NAMES.queue("a"))
        until(lambda: all(is_answered(redis, one) for one in stay), 30.0, "they follow")


def test_results_of_one_settle_are_stored_though_a_command_in_it_is_refused(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    """A dead letter that cannot be kept: the request still has its answer, and so have others."""
    redis.set(NAMES.dead("a"), "x")
    redis.set(NAMES.attempts("a"), "x")
    with serving(redis_url, models, tmp_path) as worker:
        bad, raw = message("a", numbered(1))
        raw = raw.replace(b'"lang": "py"', b'"lang": 1')
        sent = [message("a", numbered(n)) for n in range(5)]
        redis.lpush(NAMES.queue("a"), raw, b"no message", *[each for _, each in sent])
        until(lambda: all(is_answered(redis, one) for one, _ in sent), what="all are answered")
        until(lambda: lines(worker, f"refused LPUSH {NAMES.dead('a')}"), what="it is said")
        until(lambda: is_answered(redis, bad), what="the bad one is answered")


# --- operators see it ------------------------------------------------------------------------


def ask(redis_url: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inferq.workers.cli", *args, "--redis-url", redis_url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_doctor_and_queues_show_keys_of_another_type(
    redis_url: str, redis: Redis, models: Path, tmp_path: Path
) -> None:
    with serving(redis_url, models, tmp_path):
        found = json.loads(ask(redis_url, "doctor", "--json").stdout)
        assert [each["level"] for each in found if each["check"] == "keys"] == ["ok"]
        redis.set(NAMES.queue("a", 9), "x")
        redis.set(NAMES.attempts("b"), "x")
        asked = ask(redis_url, "doctor", "--json")
        told = [each["found"] for each in json.loads(asked.stdout) if each["check"] == "keys"]
        assert asked.returncode == 1
        for key, expected in ((NAMES.queue("a", 9), "list"), (NAMES.attempts("b"), "hash")):
            start = f"{key!r} is a string; expected a {expected}"
            assert [each for each in told if each.startswith(start)]
        asked = ask(redis_url, "queues")
        assert asked.returncode == 0
        assert "is a string; expected a list" in asked.stderr
        listed = json.loads(ask(redis_url, "queues", "--json").stdout)["wrong_type"]
        assert {each["key"] for each in listed} == {NAMES.queue("a", 9), NAMES.attempts("b")}
