"""``inferq queues``: how much waits where is right with workers and without, and cheap to ask."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from helpers.repository import fake_model, message, numbered, push
from helpers.stock import stock_app
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.producer import Client
from inferq.shared.names import TASK, Names
from inferq.workers.cli import inferq
from inferq.workers.queues import depths as depths_module
from inferq.workers.queues.depths import DepthReader

NAMES = Names()

Queues = Callable[..., Result]


@pytest.fixture
def queues(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Queues:
    """``queues("m", "--json")`` runs the command."""
    monkeypatch.setenv("INFERQ_REDIS_URL", redis_url)
    return lambda *args: CliRunner().invoke(inferq, ["queues", *args])


def _of(queues: Queues, *models: str) -> dict[str, dict[str, Any]]:
    run = queues(*models, "--json")
    assert run.exit_code == 0, run.output
    return {each["model"]: each for each in json.loads(run.stdout)["models"]}


def test_depths_are_right_without_a_worker_for_all_priorities(redis: Redis, queues: Queues) -> None:
    seconds, _ = redis.time()
    for n, (priority, age_s) in enumerate([(0, 5), (4, 60), (4, 30), (9, 1)]):
        sent = (seconds - age_s) * 1000.0
        _, raw = message("m", numbered(n), priority=priority, sent_ms=sent)
        redis.lpush(NAMES.queue("m", priority), raw)
    redis.lpush(NAMES.dead("given.up"), b"a letter", b"another")
    redis.set("inferq.no-list", 1)
    redis.lpush("other", "x")
    found = _of(queues)
    assert sorted(found) == ["given.up", "m"]
    assert found["m"]["depth"] == 4
    assert found["m"]["by_priority"] == {"0": 1, "3": 2, "6": 0, "9": 1}
    assert 59 <= found["m"]["oldest_age_s"] <= 70
    assert (found["m"]["consumers"], found["m"]["claimed"], found["m"]["later"]) == (0, 0, 0)
    assert found["m"]["max_queue_depth"] is None
    assert (found["given.up"]["depth"], found["given.up"]["dead"]) == (0, 2)
    assert list(_of(queues, "nobody", "m")) == ["nobody", "m"]


def test_one_message_that_lies_of_its_time_hides_no_queue(redis: Redis, queues: Queues) -> None:
    redis.lpush("inferq.m", '{"inferq_sent_ms": 1.2.3}')
    redis.lpush("inferq.n", '{"inferq_sent_ms": .}', "x")
    found = _of(queues)
    assert {name: each["depth"] for name, each in found.items()} == {"m": 1, "n": 2}
    assert [each["oldest_age_s"] for each in found.values()] == [None, None]


@pytest.mark.parametrize(
    "break_key",
    [
        lambda redis: redis.set(NAMES.queue("wrong", 3), 1),
        lambda redis: redis.set(NAMES.dead("wrong"), 1),
        lambda redis: redis.set(NAMES.serving("wrong"), 1),
        lambda redis: redis.lpush(NAMES.model("wrong"), 1),
        lambda redis: redis.lpush(NAMES.stats("w"), 1),
        lambda redis: redis.set(NAMES.stats("w"), b"\xdc\x00\x10" * 9, ex=15),
        lambda redis: redis.set(NAMES.claims("w"), 1),
        lambda redis: redis.hset(NAMES.claims("w"), "no claim", 1),
        lambda redis: redis.zadd(NAMES.leases, {b"\xff\xfe": 9e15}),
        lambda redis: redis.set(NAMES.scheduled, 1),
        lambda redis: (redis.delete(NAMES.leases), redis.set(NAMES.leases, 1)),
    ],
)
def test_a_key_of_the_wrong_type_hides_no_queue(
    redis: Redis, queues: Queues, break_key: Callable[[Redis], object]
) -> None:
    redis.lpush("inferq.m", "x")
    redis.lpush("inferq.wrong", "x")
    redis.zadd(NAMES.leases, {"w": 9e15})
    break_key(redis)
    found = _of(queues)
    assert {name: each["depth"] for name, each in found.items()} == {"wrong": 1, "m": 1}


def test_a_stock_message_has_no_age_and_its_content_does_not_pass_for_one(
    redis_url: str, redis: Redis, queues: Queues
) -> None:
    lie = '"inferq_sent_ms": 1.0'
    with stock_app(redis_url) as app:
        app.send_task(TASK, queue="inferq.m", kwargs={"model": lie}, headers={"note": lie})
    assert lie.replace('"', r"\"") in redis.lindex("inferq.m", -1).decode()  # type: ignore[union-attr]
    found = _of(queues)["m"]
    assert (found["depth"], found["oldest_age_s"]) == (1, None)
    redis.lpush("inferq.junk", b"\xff\x00")
    assert _of(queues)["junk"]["oldest_age_s"] is None


def test_with_a_worker_what_it_claimed_and_who_waits_for_an_eta_is_counted(
    redis_url: str, redis: Redis, queues: Queues, tmp_path: Path
) -> None:
    knobs = "lanes = 1\nmax_batch_size = 1\nwarm_up = false\nmax_queue_depth = 10"
    fake_model(tmp_path, "slow", knobs=knobs, fake="delay_ms = 3000")
    fake_model(tmp_path, "idle", knobs="warm_up = false")
    with Worker(redis_url, tmp_path), stock_app(redis_url) as app, Client(redis_url) as client:
        inputs = {"x": [[1.0, 2.0, 3.0, 4.0]]}
        for _ in range(2):
            app.send_task(
                TASK, queue="inferq.idle", kwargs={"model": "idle", "inputs": inputs}, countdown=600
            )
        until(lambda: _of(queues)["idle"]["later"] == 2, what="requests wait for their ETA")
        for n in range(10):
            client.submit("slow", {"x": numbered(n)})
        until(lambda: _of(queues)["slow"]["claimed"], what="some are claimed")
        slow = _of(queues)["slow"]
        assert slow["depth"] + slow["claimed"] in range(8, 11)
        assert slow["oldest_age_s"] < 30
        assert (slow["consumers"], slow["max_queue_depth"]) == (1, 10)
        assert _of(queues)["idle"]["claimed"] == 0, "a settled place is no claimed request"
        push(redis, "slow", range(10))
        shown = queues()
        assert "slow: full: at its limit of 10 (max_queue_depth)\n" in shown.stderr
        assert _of(queues)["slow"]["near_limit"] is True
    until(lambda: _of(queues)["slow"]["consumers"] == 0, what="it serves no longer")
    assert "slow: requests wait and no worker serves it\n" in queues("slow").stderr


def test_the_rate_is_what_all_workers_have_answered(
    redis_url: str, redis: Redis, queues: Queues, tmp_path: Path
) -> None:
    fake_model(tmp_path, "m", knobs="lanes = 1\nmax_batch_size = 1", fake="delay_ms = 20")
    fake_model(tmp_path, "idle")
    workers = [Worker(redis_url, tmp_path, name=name) for name in ("one", "two")]
    with workers[0], workers[1], Client(redis_url) as client:
        until(lambda: _of(queues)["m"]["rate"] == _of(queues)["idle"]["rate"] == 0.0)
        done = threading.Event()

        def load() -> None:
            items = ({"x": numbered(n)} for n in takewhile(lambda _: not done.is_set(), count()))
            for _ in client.map("m", items, in_flight=32):
                pass

        thread = threading.Thread(target=load)
        thread.start()
        try:
            # Two lanes at 20 ms a request: 100/s at most, more than 50 only by both of them.
            until(lambda: 55 < _of(queues)["m"]["rate"] <= 110, 30, "both rates are told")
            assert _of(queues)["idle"]["rate"] == 0.0
            assert re.search(r" \d+\.\d/s ", queues("m").stdout)
        finally:
            done.set()
            thread.join()
        for worker in workers:
            worker.kill()
    until(lambda: _of(queues)["m"]["rate"] is None, what="nobody tells any more")


def test_a_worker_whose_lease_ran_out_is_no_consumer_and_what_it_held_still_counts(
    redis_url: str, redis: Redis, queues: Queues, tmp_path: Path
) -> None:
    knobs = "lanes = 1\nmax_batch_size = 1\nwarm_up = false"
    fake_model(tmp_path, "slow", knobs=knobs, fake="delay_ms = 60000")
    with Worker(redis_url, tmp_path, env={"INFERQ_LEASE_S": "1"}) as worker:
        push(redis, "slow", range(3))
        until(lambda: _of(queues)["slow"]["claimed"], what="some are claimed")
        worker.kill()
    until(lambda: _of(queues)["slow"]["consumers"] == 0, what="its lease ran out")
    found = _of(queues)["slow"]
    assert found["depth"] + found["claimed"] == 3
    assert found["claimed"] > 0


def test_a_reading_costs_few_trips_and_no_message_leaves_redis(redis: Redis) -> None:
    big = message("m", numbered(1), sent_ms=time.time() * 1000)[1] + b" " * 20_000_000
    redis.lpush(NAMES.queue("m"), big)
    for n in range(30):
        redis.lpush(NAMES.queue(f"m{n}"), b"x")
    reader = DepthReader(redis, NAMES)
    known = reader.models()
    assert len(known) == 31
    reader.read(known)
    before = redis.info("stats")
    found = reader.read(known)
    after = redis.info("stats")
    sent = after["total_net_output_bytes"] - before["total_net_output_bytes"]
    assert sent < 30_000
    assert [each.model for each in found.models if each.oldest_age_s is not None] == ["m"]


def test_of_very_many_queues_that_no_worker_announced_some_are_listed(
    redis: Redis, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depths_module, "STRAYS", 3)
    for n in range(7):
        redis.lpush(NAMES.queue(f"stray{n}"), b"x")
    redis.lpush(NAMES.queue("known"), b"x")
    redis.set(NAMES.model("known"), "x")
    found = DepthReader(redis, NAMES).read()
    assert "known" in {each.model for each in found.models}
    assert (len(found.models), found.unlisted) == (4, 4)
    assert "4 more queues, of models that no worker announced\n" in queues().stderr


def test_only_the_first_of_very_many_etas_are_looked_at(
    redis: Redis, queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depths_module, "LATER_PLACES", 3)
    redis.zadd(NAMES.scheduled, {f"m:0:{n}": n for n in range(5)})
    found = DepthReader(redis, NAMES).read()
    assert [(each.model, each.later) for each in found.models] == [("m", 3)]
    assert found.later_unread == 2
    assert "later: 2 more, of models not looked at\n" in queues().stderr


def test_only_keys_of_the_prefix_and_all_separators_are_understood(redis: Redis) -> None:
    ours = Names(prefix="a[b]*:", sep=":", priority_steps=(0, 5))
    redis.lpush(ours.queue("m", 5), b"x")
    redis.lpush(Names(prefix="ab:").queue("n"), b"x")
    found = DepthReader(redis, ours).read()
    assert [(each.model, dict(each.by_priority)) for each in found.models] == [("m", {0: 0, 5: 1})]


def test_a_table_is_columns_and_nothing_there_is_said(redis: Redis, queues: Queues) -> None:
    empty = queues()
    assert (empty.exit_code, empty.stdout) == (0, "")
    assert empty.stderr == "no models: Redis knows no queue, dead letter or worker of any\n"
    redis.lpush(NAMES.queue("m", 6), b"x", b"y")
    heading, row = queues().stdout.splitlines()
    assert heading.split() == [
        "model", "depth", "by", "priority", "oldest", "rate", "later", "claimed", "dead",
        "consumers",
    ]  # fmt: skip
    assert row.split() == ["m", "2", "6:", "2", "-", "-", "0", "0", "0", "0"]


@pytest.mark.parametrize(
    ("args", "status", "error"),
    [
        (["bad:name"], 2, "'bad:name'; expected a model's name"),
        (["--redis-url", "redis://127.0.0.1:1/0"], 1, "Redis does not answer"),
        (["--redis-url", "http://x"], 1, "expected one of redis://"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    queues: Queues, args: list[str], status: int, error: str
) -> None:
    run = queues(*args)
    assert run.exit_code == status
    assert error in run.stderr
