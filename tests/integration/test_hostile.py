"""Whatever stands in a queue: it is answered or quarantined, and everybody else is served.

Each message of the table is pushed raw between two good ones, to one worker that must live through
all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis as redis_py
from helpers.envelopes import request, tensor
from helpers.hostile import (
    FOREIGN_KEYS,
    LONG,
    MAX_REQUEST_BYTES,
    QUARANTINED,
    SUCCESS,
    TABLE,
    Hostile,
    asked,
)
from helpers.repository import fake_model, message, numbered
from helpers.results import dead_letters, meta_of, nothing_is_held, outputs_of
from helpers.wait import until
from helpers.worker import Worker

from inferq.shared.names import Names
from inferq.workers.data_plane.results import MAX_QUARANTINED_BYTES
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
QUEUE = NAMES.queue("m")
SECRET = b"secret"


@pytest.fixture(scope="module")
def served(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One worker that serves the whole file."""
    models = tmp_path_factory.mktemp("models")
    fake_model(models, "m", knobs=f"warm_up = false\nmax_request_bytes = {MAX_REQUEST_BYTES}")
    with EmbeddedRedis(redis_kind) as server, Worker(server.url, models) as worker:
        yield worker


@pytest.fixture
def store(served: Worker) -> Iterator[redis_py.Redis]:
    """Its Redis, with secrets that are as they were afterwards, and nothing held."""
    with redis_py.Redis.from_url(served.redis_url, socket_timeout=30) as client:
        client.delete(NAMES.dead("m"), "nobody")
        client.mset(dict.fromkeys(FOREIGN_KEYS, SECRET))
        yield client
        assert served.alive
        assert client.mget(FOREIGN_KEYS) == [SECRET] * len(FOREIGN_KEYS)
        until(lambda: nothing_is_held(client), what="nothing is held any more")


def between_good_ones(store: redis_py.Redis, *raw: bytes) -> None:
    """Push `raw` between two good messages, and have these answered rightly."""
    (first_id, first), (last_id, last) = (message("m", numbered(n)) for n in (7, 8))
    store.lpush(QUEUE, first, *raw, last)
    np.testing.assert_array_equal(outputs_of(store, first_id)["x"], numbered(7))
    np.testing.assert_array_equal(outputs_of(store, last_id)["x"], numbered(8))


def named(raw: bytes) -> str:
    """The id of a message that Python may be unable to read."""
    start = raw.rindex(b'"id": ') + len(b'"id": ')
    return str(json.JSONDecoder().raw_decode(raw[start:].decode())[0])


@pytest.mark.parametrize("case", TABLE.values(), ids=[f"{name[:60]!a}" for name in TABLE])
def test_a_hostile_message_ends_as_it_should_and_harms_nobody(
    store: redis_py.Redis, case: Hostile
) -> None:
    between_good_ones(store, case.raw)
    if case.ends == QUARANTINED:
        (letter,) = until(lambda: dead_letters(store, "m"), what="it is quarantined")
        assert (letter["id"], letter["message"]) == (None, case.raw[:MAX_QUARANTINED_BYTES])
        assert letter["size"] == len(case.raw)
        return
    meta = meta_of(store, named(case.raw))
    if case.ends == SUCCESS:
        assert meta["status"] == SUCCESS, meta
        return
    assert meta["result"]["exc_type"] == case.ends, meta
    assert meta["result"]["exc_message"][0]
    letters = [letter["message"] for letter in dead_letters(store, "m")]
    kept = case.raw[:MAX_QUARANTINED_BYTES]
    assert letters == ([kept] if case.ends == "DeadLettered" else [])


# --- claim-checked payloads --------------------------------------------------------------------


def reference(key: object) -> dict[str, Any]:
    return tensor(numbered(1), data=..., key=key)


@pytest.mark.parametrize(
    ("request_id", "key"),
    [
        *(("mine", key) for key in FOREIGN_KEYS),
        ("user", NAMES.payload("user:42", "x")),
        ("mine", f"{NAMES.root}payload:"),
        ("mine", f"{NAMES.root}payload:mine"),
        ("mine", NAMES.leases),
        ("mine", QUEUE),
        ("mine", ""),
        ("mine", "\x00"),
        ("mine", f"{NAMES.payload('mine', 'x')}".upper()),
        ("mine", LONG),
    ],
    ids=lambda value: f"{value[:50]!a}",
)
def test_a_payload_that_is_not_its_own_is_neither_read_nor_deleted(
    store: redis_py.Redis, request_id: str, key: str
) -> None:
    store.delete(NAMES.meta(request_id))
    raw = asked({"x": reference(key)}, headers={"id": request_id})
    between_good_ones(store, raw)
    result = meta_of(store, request_id)["result"]
    assert result["exc_type"] == "InvalidInput"
    assert "is not its payload's" in result["exc_message"][0]
    assert store.zcard(NAMES.leases) == 1


@pytest.mark.parametrize("planted", [b"", bytes(15), bytes(17), bytes(MAX_REQUEST_BYTES + 1), []])
def test_a_payload_of_its_own_that_is_none_fails_it_and_is_deleted(
    store: redis_py.Redis, planted: object
) -> None:
    key = NAMES.payload("mine", "x")
    store.delete(NAMES.meta("mine"))
    if isinstance(planted, bytes):
        store.set(key, planted)
    else:
        store.lpush(key, "a list")
    between_good_ones(store, asked({"x": reference(key)}, headers={"id": "mine"}))
    result = meta_of(store, "mine")["result"]
    gone = not isinstance(planted, bytes) or len(planted) > MAX_REQUEST_BYTES
    assert result["exc_type"] == ("PayloadExpired" if gone else "InvalidInput")
    assert not store.exists(key)


def test_the_payload_of_an_id_with_colons_is_its_own(store: redis_py.Redis) -> None:
    key = NAMES.payload("a:b%3A", "x")
    store.set(key, numbered(3).tobytes())
    store.lpush(QUEUE, asked({"x": reference(key)}, headers={"id": "a:b%3A"}))
    np.testing.assert_array_equal(outputs_of(store, "a:b%3A")["x"], numbered(3))
    assert not store.exists(key)


def test_a_result_that_stands_already_is_not_replaced(store: redis_py.Redis) -> None:
    """Whoever names another's id, or that of a key that is no result at all."""
    between_good_ones(
        store,
        request(1, headers={"id": "other"}),
        asked({}, headers={"id": "other"}),
        request(1, headers={"id": "other", "group": 5}),
    )
    until(lambda: len(dead_letters(store, "m")) == 1)
