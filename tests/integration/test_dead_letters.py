"""A request that ends its worker is dead-lettered after three; all the others get their answer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.repository import fake_model, message, numbered
from helpers.results import dead_letters, meta_of, nothing_is_held, outputs_of
from helpers.wait import until
from helpers.worker import Worker
from redis import Redis

from inferq.producer import Client, Pending
from inferq.shared import codec
from inferq.shared.errors import DeadLettered, EngineError
from inferq.shared.names import Names
from inferq.shared.schema import Receipt
from inferq.workers.claims.recovery import decoding_field
from inferq.workers.claims.settlement import DEAD_PAYLOAD_S
from inferq.workers.engines.fake import (
    FAULT_EXIT,
    FAULT_FATAL,
    FAULT_RAISE,
    FAULT_SEGFAULT,
    FAULT_TOO_FEW_ROWS,
)
from inferq.workers.supervision.health import EX_FATAL_ENGINE

NAMES = Names()
#: A short lease, so that the dead are recovered soon.
SHORT_LEASE = {"INFERQ_LEASE_S": "0.5"}
#: Enough columns for a request to be claim-checked.
WIDE = 16_384
MAX_ATTEMPTS = 3


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    fake_model(
        root,
        "m",
        knobs="lanes = 1\nmax_batch_size = 16\nwarm_up = false",
        fake="faults = true\ndelay_ms = 30",
    )
    for lanes in (1, 3):
        fake_model(
            root,
            f"wide{lanes}",
            knobs=f"lanes = {lanes}\nmax_batch_size = 16\nwarm_up = false",
            fake="faults = true\ndelay_ms = 30",
            width=WIDE,
        )
    return root


def receipt(pending: Pending) -> Receipt:
    found = pending.result(30).receipt
    assert found is not None
    return found


@pytest.mark.parametrize("fault", [FAULT_RAISE, FAULT_TOO_FEW_ROWS], ids=["raises", "too few rows"])
def test_a_request_that_fails_in_the_engine_fails_alone_in_a_mixed_batch(
    redis_url: str, redis: Redis, models: Path, fault: int
) -> None:
    with Worker(redis_url, models, ["m"]) as worker, Client(redis_url) as client:
        first = client.submit("m", {"x": numbered(100)})  # the lane is busy: the others wait
        values = [float(fault) if n == 5 else float(n) for n in range(16)]
        pending = [client.submit("m", {"x": numbered(value)}) for value in values]
        first.result(30)
        for value, each in zip(values, pending, strict=True):
            if value < 0:
                with pytest.raises(EngineError, match=r"raise|rows"):
                    each.result(30)
            else:
                np.testing.assert_array_equal(each.result(30).outputs["x"], numbered(value))
                assert receipt(each).attempt == 1
        assert max(receipt(each).requests for each in pending if each is not pending[5]) > 1
        assert worker.alive
        assert dead_letters(redis, "m") == []


@pytest.mark.parametrize(
    ("fault", "lanes"), [(FAULT_EXIT, 1), (FAULT_SEGFAULT, 3)], ids=["exit", "segfault, 3 lanes"]
)
def test_one_poison_among_fifty_ends_three_workers_and_nothing_else(
    redis_url: str, redis: Redis, models: Path, fault: int, lanes: int
) -> None:
    name = f"wide{lanes}"
    items = [np.full((1, WIDE), fault if n == 20 else n, np.float32) for n in range(50)]
    deaths = 0
    with Client(redis_url) as client:
        worker = Worker(redis_url, models, [name], env=SHORT_LEASE)
        try:
            worker.start()
            worker.wait_ready()
            pending = [client.submit(name, {"x": item}) for item in items]
            (poison_key,) = redis.keys(NAMES.payload(pending[20].request_id, "*"))
            until(partial(_all_done_or_dead, pending, worker), 30)
            while not all(each.done() for each in pending):
                deaths += 1
                assert deaths <= MAX_ATTEMPTS
                worker.close()
                worker = Worker(redis_url, models, [name], env=SHORT_LEASE)
                worker.start()
                worker.wait_ready()
                until(partial(_all_done_or_dead, pending, worker), 30)
            assert deaths == MAX_ATTEMPTS
            assert worker.alive
            again = _expect_one_dead_letter(redis, pending, items)
            assert lanes > 1 or again < 2 * 16, "one batch ran and one was formed"
            until(lambda: nothing_is_held(redis), what="nothing is held any more")
            assert redis.keys("inferq:1:attempts:*") == []
            assert redis.keys("inferq:1:payload:*") == [poison_key]
            assert 0 < redis.ttl(poison_key) <= DEAD_PAYLOAD_S
        finally:
            worker.close()


def _all_done_or_dead(pending: list[Pending], worker: Worker) -> bool:
    return not worker.alive or all(each.done() for each in pending)


def _expect_one_dead_letter(redis: Redis, pending: list[Pending], items: list[Any]) -> int:
    """How many others were tried twice."""
    poison = pending[20]
    with pytest.raises(DeadLettered, match="died computing it 3 times") as caught:
        poison.result(1)
    assert caught.value.detail["attempts"] == MAX_ATTEMPTS
    (letter,) = dead_letters(redis, poison.model)
    assert (letter["id"], letter["attempts"]) == (poison.request_id, MAX_ATTEMPTS)
    assert letter["reason"] == caught.value.detail["reason"]
    assert codec.decode_envelope(letter["message"]).headers.id == poison.request_id
    again = 0
    for item, each in zip(items, pending, strict=True):
        if each is poison:
            continue
        np.testing.assert_array_equal(each.result(1).outputs["x"], item)
        if receipt(each).attempt > 1:
            again += 1
            assert receipt(each).requests == 1, "a suspect runs alone"
            assert receipt(each).attempt == 2, "only its first neighbours shared its fate"
    return again


def test_an_engine_beyond_use_ends_its_worker_and_what_it_held_goes_back_at_once(
    redis_url: str, redis: Redis, models: Path
) -> None:
    """Also where no other worker is there to recover it; the supervisor knows by the status."""
    sent = dict(message("m", numbered(FAULT_FATAL if n == 2 else n)) for n in range(20))
    redis.lpush(NAMES.queue("m"), *sent.values())
    with Worker(redis_url, models, ["m"]) as worker:
        assert worker.process.wait(30) == EX_FATAL_ENGINE
    assert nothing_is_held(redis)
    assert redis.zcard(NAMES.leases) == 0
    waiting = redis.lrange(NAMES.queue("m"), 0, -1)
    served = {each for each in sent if redis.exists(NAMES.meta(each))}
    assert waiting == [raw for each, raw in sent.items() if each not in served][::-1]
    fatal = list(sent)[2]
    assert redis.hget(NAMES.attempts("m"), fatal) == b"1"
    computing = [each for each in sent if redis.hexists(NAMES.attempts("m"), each)]
    assert len(computing) <= 16, "only its batch is counted"
    redis.hset(NAMES.attempts("m"), fatal, str(MAX_ATTEMPTS))
    with Worker(redis_url, models, ["m"]):
        for n, request_id in enumerate(sent):
            if request_id != fatal:
                np.testing.assert_array_equal(outputs_of(redis, request_id)["x"], numbered(n))
        assert meta_of(redis, fatal)["result"]["exc_type"] == "DeadLettered"


def test_bytes_that_name_no_request_are_quarantined_and_the_worker_goes_on(
    redis_url: str, redis: Redis, models: Path
) -> None:
    junk = [b"junk", b"\x00\xff" * 50, b"{}", b"null", b"", b"[" * 10_000]
    good = [message("m", numbered(n)) for n in range(len(junk))]
    with Worker(redis_url, models, ["m"]) as worker:
        for (_, raw), bad in zip(good, junk, strict=True):
            redis.lpush(NAMES.queue("m"), bad, raw)
        for n, (request_id, _) in enumerate(good):
            outputs = outputs_of(redis, request_id)
            np.testing.assert_array_equal(outputs["x"], numbered(n))
        until(lambda: len(dead_letters(redis, "m")) == len(junk), what="all are quarantined")
        found = dead_letters(redis, "m")
        assert {letter["message"] for letter in found} == set(junk)
        assert all(letter["id"] is None and letter["reason"] for letter in found)
        until(lambda: nothing_is_held(redis), what="nothing is held any more")
        assert worker.alive


def test_a_message_that_cannot_be_read_but_names_its_request_is_answered(
    redis_url: str, redis: Redis, models: Path
) -> None:
    request_id, raw = message("m", numbered(1))
    bad = raw.replace(b'"retries": 0', b'"retries": "none"')
    assert bad != raw
    redis.lpush(NAMES.queue("m"), bad)
    with Worker(redis_url, models, ["m"]):
        result = meta_of(redis, request_id)["result"]
        assert result["exc_type"] == "DeadLettered"
        assert "retries" in result["exc_message"][0]
        (letter,) = dead_letters(redis, "m")
        assert (letter["id"], letter["message"]) == (request_id, bad)


@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_a_message_that_ended_workers_while_it_was_decoded_is_given_up_the_third_time(
    redis_url: str, redis: Redis, models: Path, deaths: int
) -> None:
    request_id, raw = message("m", numbered(7))
    neighbour_id, neighbour = message("m", numbered(8))
    redis.hset(NAMES.attempts("m"), decoding_field(raw), str(deaths))
    redis.lpush(NAMES.queue("m"), raw, neighbour)
    with Worker(redis_url, models, ["m"]):
        metas = {each: meta_of(redis, each) for each in (request_id, neighbour_id)}
        assert metas[neighbour_id]["status"] == "SUCCESS"
        if deaths < MAX_ATTEMPTS:
            assert metas[request_id]["status"] == "SUCCESS"
            assert dead_letters(redis, "m") == []
        else:
            assert metas[request_id]["result"]["exc_type"] == "DeadLettered"
            (letter,) = dead_letters(redis, "m")
            assert (letter["id"], letter["message"]) == (request_id, raw)
            assert "died decoding it 3 times" in letter["reason"]
        until(lambda: not redis.exists(NAMES.attempts("m")), what="nothing is suspected any more")
        until(lambda: nothing_is_held(redis), what="nothing is held any more")
