"""What a producer that may only push costs a worker in memory, and whom it answers: nobody else.

One worker lives through the file; the peak of its memory is reset before each message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np
import pytest
import redis as redis_py
from helpers.acl import Users
from helpers.envelopes import JSON, body, envelope, request
from helpers.process import memory_mb
from helpers.repository import claim_checked, fake_model, message, numbered
from helpers.results import dead_letters, meta_of, nothing_is_held, outputs_of
from helpers.wait import until
from helpers.worker import Worker

from inferq.shared import codec
from inferq.shared.names import Names
from inferq.workers.claims.settlement import QUARANTINED_KEPT
from inferq.workers.data_plane.results import MAX_QUARANTINED_BYTES
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
QUEUE = NAMES.queue("m")
#: What one message may take at its peak, in MB, its own bytes a few times over included.
MAX_MB: Final = 160.0
MB: Final = 1 << 20


@pytest.fixture(scope="module")
def served(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    models = tmp_path_factory.mktemp("models")
    fake_model(models, "m", knobs="warm_up = false")
    fake_model(models, "slow", knobs="warm_up = false\nlanes = 1", fake="delay_ms = 1500")
    with EmbeddedRedis(redis_kind) as server, Worker(server.url, models) as worker:
        yield worker


@pytest.fixture
def store(served: Worker) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(served.redis_url, socket_timeout=30) as client:
        client.delete(NAMES.dead("m"), NAMES.quarantined("m"))
        yield client
        assert served.alive
        until(lambda: nothing_is_held(client), what="nothing is held any more")


@pytest.fixture
def pusher(served: Worker) -> Iterator[redis_py.Redis]:
    """May LPUSH to the queues, and nothing else."""
    with Users(served.redis_url) as users:
        yield users.push_only()


def lists(value: object, kind: str = JSON) -> bytes:
    content: list[Any] = [[], {"inputs": {"x": value}}, None]
    packed = json.dumps(content).encode() if kind == JSON else msgpack.packb(content)
    return envelope(packed, kind=kind, request_id="bomb")


def inside(raw: bytes) -> bytes:
    return envelope(b"\x93\x90\x81\xa6inputs\x81\xa1x" + raw + b"\xc0", request_id="bomb")


def headed(part: str, value: object, **given: Any) -> bytes:
    tree = json.loads(request(1, request_id="bomb", **given))
    tree[part]["stamps"] = value
    return json.dumps(tree, separators=(",", ":")).encode()


LINK: Final = {
    "task": "nobody.knows", "args": [], "kwargs": {}, "immutable": True, "subtask_type": None,
    "options": {"queue": "nobody", "task_id": "link"},
}  # fmt: skip
MAPS: Final[list[Any]] = [{"": {}}] * 1_500_000
BOMBS: Final = {
    "67 KB of strings": lists(["a"] * 12_000 + ["b" * 20_000]),
    "strings in msgpack": lists(["a"] * 16_000 + ["b" * 30_000], codec.MSGPACK),
    "strings in rows": lists([["a"] * 200, ["b" * 30_000] * 200]),
    "empty lists": inside(b"\xdd\x00\x2d\xc6\xc0" + b"\x90" * 3_000_000),
    "maps in maps": inside(b"\xdd\x00\x00\x0b\xb8" + (b"\x81\x00" * 450 + b"\x00") * 3_000),
    "15 MB of headers": headed("headers", MAPS),
    "15 MB of properties": headed("properties", MAPS),
    "15 MB of headers and a link": headed("headers", MAPS, embed={"callbacks": [LINK]}),
    "15 MB of headers of another task": headed("headers", MAPS, headers={"task": "another.task"}),
    "a long description": request(1, request_id="bomb", headers={"kwargsrepr": "😀" * MB}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_message_takes_much_more_memory_than_its_bytes(
    store: redis_py.Redis, served: Worker, pusher: redis_py.Redis, name: str
) -> None:
    store.delete(NAMES.meta("bomb"))
    before_id, before = message("m", numbered(1))
    pusher.lpush(QUEUE, before)
    outputs_of(store, before_id)
    Path(f"/proc/{served.pid}/clear_refs").write_text("5")  # the peak is that of now
    rss = memory_mb(served.pid, "VmRSS")
    after_id, after = message("m", numbered(2))
    pusher.lpush(QUEUE, BOMBS[name], after)
    np.testing.assert_array_equal(outputs_of(store, after_id)["x"], numbered(2))
    meta = meta_of(store, "bomb", 60.0)
    assert meta["status"] == "FAILURE", meta
    assert meta["result"]["exc_type"] in {"InvalidInput", "PayloadTooLarge"}
    assert memory_mb(served.pid, "VmHWM") - rss < MAX_MB


@pytest.mark.parametrize(
    "shape", [[2**62, 2**62], [2**63] * 200_000, [1 << 30]], ids=["beyond all", "many", "4 GB"]
)
def test_what_a_message_says_of_its_payload_keeps_nobody_waiting(
    store: redis_py.Redis, pusher: redis_py.Redis, shape: list[int]
) -> None:
    store.delete(NAMES.meta("large"))
    x = {"dtype": "<f4", "shape": shape, "key": NAMES.payload("large", "x")}
    large = envelope(body({"inputs": {"x": x}}), request_id="large")
    sent = [claim_checked(store, "m", numbered(n)) for n in range(20)]
    pusher.lpush(QUEUE, large, *(raw for _, raw, _ in sent))
    for n, (request_id, _, _) in enumerate(sent):
        np.testing.assert_array_equal(outputs_of(store, request_id)["x"], numbered(n))
    assert meta_of(store, "large")["result"]["exc_type"] in {"InvalidInput", "PayloadExpired"}


def test_garbage_that_guesses_an_id_answers_nobody_and_deletes_nothing(
    store: redis_py.Redis, pusher: redis_py.Redis
) -> None:
    """Whatever stands beside the id: it is no envelope."""
    victim, raw, key = claim_checked(store, "slow", numbered(7))
    whole = json.loads(raw)
    store.lpush(NAMES.queue("slow"), message("slow", numbered(0))[1])  # computes meanwhile
    garbage = [
        raw[:-2],
        raw[1:],
        raw + b"]",
        b"garbage" + raw,
        b'{"headers": {"id": "%s", "task": "inferq.infer"' % victim.encode(),
        raw.replace(b'"headers":{', b'"headers":{"x":' + b"[" * 9_000 + b"]" * 9_000 + b","),
        json.dumps({"body": whole["headers"], "properties": whole}).encode(),
    ]
    pusher.lpush(NAMES.queue("slow"), *garbage)
    until(lambda: store.llen(NAMES.dead("slow")) == len(garbage), what="all are quarantined")
    assert not store.exists(NAMES.meta(victim))
    assert store.get(key) == numbered(7).tobytes()
    pusher.lpush(NAMES.queue("slow"), raw)
    np.testing.assert_array_equal(outputs_of(store, victim)["x"], numbered(7))
    assert {letter["id"] for letter in dead_letters(store, "slow")} == {None}


def test_garbage_costs_no_letter_of_an_accepted_request_and_is_bounded(
    store: redis_py.Redis, pusher: redis_py.Redis
) -> None:
    letter = msgpack.packb(
        {
            "id": "accepted", "reason": "its worker died computing it 3 times", "attempts": 3,
            "at_ms": 1.0, "worker": "w", "size": 1, "message": b"x",
        }
    )  # fmt: skip
    store.lpush(NAMES.dead("m"), letter)
    large = b"\xff" * (3 * MAX_QUARANTINED_BYTES)
    for start in range(0, 2 * QUARANTINED_KEPT + 200, 200):
        pusher.lpush(QUEUE, *(b"\xff %d" % n for n in range(start, start + 200)))
    pusher.lpush(QUEUE, large)
    last_id, last = message("m", numbered(1))
    pusher.lpush(QUEUE, last)
    outputs_of(store, last_id, 60.0)
    until(lambda: nothing_is_held(store), what="nothing is held any more")
    assert store.lindex(NAMES.dead("m"), -1) == letter
    found = dead_letters(store, "m")
    assert len(found) <= QUARANTINED_KEPT + 1
    (cut,) = (each for each in found if each["size"] == len(large))
    assert cut["message"] == large[:MAX_QUARANTINED_BYTES]
    assert store.ttl(NAMES.dead("m")) > 0
