"""A producer that may only push gains nothing by what follows on its requests.

What it may not write to, the worker does not write to for it; what it sends changes nothing for
others, and is bounded. One worker, which must live through all of it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis as redis_py
from helpers.acl import Users
from helpers.envelopes import JSON, body, envelope, request, tensor
from helpers.links import link, push_only, serving, store_of
from helpers.repository import fake_model, message, numbered
from helpers.results import meta_of, outputs_of
from helpers.stock import stock_app
from helpers.wait import until
from helpers.worker import Worker

from inferq.shared.names import Names
from inferq.workers.canvas.following import MAX_PUBLISHED_BYTES
from inferq.workers.process.embedded import EmbeddedRedis

NAMES = Names()
QUEUE = NAMES.queue("m")
WIDE = 65_536


@pytest.fixture(scope="module")
def served(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One worker that serves the whole file."""
    with serving(redis_kind, tmp_path_factory.mktemp("models"), wide=WIDE) as worker:
        yield worker


@pytest.fixture
def store(served: Worker) -> Iterator[redis_py.Redis]:
    """Its Redis, empty of what the test before left; afterwards nothing is held."""
    with store_of(served, ("celery-task*", "links*", "stolen*")) as client:
        yield client


@pytest.fixture
def producer(served: Worker) -> Iterator[redis_py.Redis]:
    """May push to queues of models, and nothing else."""
    with push_only(served) as client:
        yield client


def asked(producer: redis_py.Redis, *, model: str = "m", n: float = 1, **given: Any) -> str:
    """Push a request with `embed`; its id."""
    request_id = str(uuid.uuid4())
    producer.lpush(NAMES.queue(model), request(n, request_id=request_id, **given))
    return request_id


def refusal(store: redis_py.Redis, request_id: str) -> str:
    """With what it was refused as invalid."""
    result = meta_of(store, request_id)["result"]
    assert result["exc_type"] == "InvalidInput", result
    return str(result["exc_message"][0])


def failing(embed: object, **given: Any) -> bytes:
    return envelope(body({"inputs": {}}, embed=embed), **given)


def linked(store: redis_py.Redis, producer: redis_py.Redis, queue: str = "links") -> None:
    """A request with an honest link has it published, where it says."""
    before = store.llen(queue)
    request_id = asked(producer, model="other", n=7, embed={"callbacks": [link(queue)]})
    np.testing.assert_array_equal(outputs_of(store, request_id)["x"], numbered(7))
    assert store.llen(queue) == before + 1


def answers_a_ping(url: str) -> bool:
    with stock_app(url) as app:
        return bool(until(lambda: app.control.ping(timeout=2, limit=1), what="it answers a ping"))


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"retry_policy": {"global_keyprefix": "stolen:"}},
        {"retry_policy": {"priority_steps": []}},
        {"retry_policy": {"sep": "links", "fanout_prefix": False}},
        {"priority_steps": []},
        {"connection": "redis://127.0.0.1:1"},
        {"producer": {}},
        {"exchange": "stolen", "routing_key": "stolen", "exchange_type": "fanout"},
        {"serializer": "pickle", "compression": "bzip2"},
        {"declare": [1], "transport_options": {}, "delivery_info": {"is_eager": True}},
    ],
    ids=lambda options: f"{next(iter(options.items()))!r:.50}",
)
def test_options_of_a_link_change_nothing_for_the_links_of_others(
    served: Worker, store: redis_py.Redis, producer: redis_py.Redis, options: dict[str, Any]
) -> None:
    embed = {"callbacks": [link("links.theirs", retry=True, **options)]}
    request_id = asked(producer, embed=embed)
    np.testing.assert_array_equal(outputs_of(store, request_id)["x"], numbered(1))
    (published,) = store.lrange("links.theirs", 0, -1)
    told = json.loads(published)
    assert told["properties"]["delivery_info"] == {"exchange": "", "routing_key": "links.theirs"}
    assert told["content-type"] == "application/x-msgpack"
    linked(store, producer)
    assert not store.keys("stolen*")
    assert answers_a_ping(served.redis_url)


def test_the_delivery_info_of_a_sender_has_no_say(
    store: redis_py.Redis, producer: redis_py.Redis
) -> None:
    """Celery runs errbacks in its own process where that says so."""
    request_id = str(uuid.uuid4())
    properties = {"delivery_info": {"is_eager": True, "exchange": "x", "routing_key": "x"}}
    raw = failing({"errbacks": [link("links.e")]}, request_id=request_id, properties=properties)
    producer.lpush(QUEUE, raw)
    assert meta_of(store, request_id)["result"]["exc_type"] == "InvalidInput"
    until(lambda: store.llen("links.e") == 1, what="its errback is published")


def test_queues_that_a_sender_makes_up_leave_nothing_else_behind(
    store: redis_py.Redis, producer: redis_py.Redis
) -> None:
    """kombu keeps a key for each, for good."""
    before = set(store.keys("_kombu*"))
    ids = [asked(producer, embed={"callbacks": [link(f"links.{n}")]}) for n in range(20)]
    for request_id in ids:
        outputs_of(store, request_id)
    assert len(store.keys("links.*")) == 20
    assert set(store.keys("_kombu*")) == before


# --- queues ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "queue",
    [
        NAMES.attempts("m"),
        NAMES.scheduled,
        NAMES.scheduled_message("m:0:ab"),
        NAMES.meta("victim"),
        "celery-taskset-meta-victim.s",
        "test@host.celery.pidbox",
        "_kombu.binding.celery",
        "unacked",
        "inferq.m\x06\x163",
    ],
    ids=lambda queue: f"{queue!a}",
)
@pytest.mark.parametrize("place", ["link", "errback", "chain", "chord"])
def test_a_link_into_what_is_no_applications_queue_fails_its_request_and_writes_nothing(
    store: redis_py.Redis, producer: redis_py.Redis, queue: str, place: str
) -> None:
    bad = link(queue)
    chord = {
        **link(),
        "task": "celery.chord",
        "subtask_type": "chord",
        "kwargs": {"header": [bad], "body": link(), "kwargs": {}},
    }
    embed = {
        "link": {"callbacks": [link(link=[bad])]},
        "errback": {"errbacks": [bad]},
        "chain": {"chain": [bad, link()]},
        "chord": {"callbacks": [chord]},
    }[place]
    before = store.type(queue)
    request_id = asked(producer, embed=embed)
    assert "options.queue" in refusal(store, request_id)
    assert store.type(queue) == before
    assert not store.exists("links")
    linked(store, producer)


def test_a_link_to_another_model_is_served(store: redis_py.Redis, producer: redis_py.Redis) -> None:
    following = {**link("inferq.other", task_id=str(uuid.uuid4())), "task": "inferq.infer"}
    asked(producer, n=5, embed={"callbacks": [following]})
    np.testing.assert_array_equal(
        outputs_of(store, following["options"]["task_id"])["x"], numbered(5)
    )


def test_links_go_to_no_queue_but_those_of_the_settings(
    redis_kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    models = tmp_path_factory.mktemp("few")
    fake_model(models, "m", knobs="warm_up = false")
    with (
        EmbeddedRedis(redis_kind) as server,
        Worker(server.url, models, env={"INFERQ_LINK_QUEUES": "links, inferq.*"}),
        Users(server.url) as users,
        redis_py.Redis.from_url(server.url, socket_timeout=30) as store,
    ):
        producer = users.push_only()
        good, bad, none = (
            asked(producer, embed={"callbacks": [each]})
            for each in (link(), link("billing"), {**link(), "options": {}})
        )
        outputs_of(store, good)
        assert store.llen("links") == 1
        assert "INFERQ_LINK_QUEUES" in refusal(store, bad)
        assert "names no queue" in refusal(store, none)
        assert not store.exists("billing", "celery")


# --- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["FAILURE", "REVOKED"])
def test_a_chain_that_fails_writes_over_no_result(
    store: redis_py.Redis, producer: redis_py.Redis, status: str
) -> None:
    """Celery itself spares but a SUCCESS."""
    victim = NAMES.meta("victim")
    stands = json.dumps({"status": status, "result": None, "task_id": "victim"}).encode()
    store.set(victim, stands, ex=60)
    request_id = str(uuid.uuid4())
    steps = [link(task_id="victim"), link(task_id="fresh")]
    raw = envelope(
        json.dumps([[], {"inputs": {}}, {"chain": steps}]).encode(),
        kind=JSON,
        request_id=request_id,
    )
    producer.lpush(QUEUE, raw)
    assert meta_of(store, request_id)["status"] == "FAILURE"
    assert meta_of(store, "fresh")["status"] == "FAILURE"
    assert store.ttl(NAMES.meta("fresh")) > 0
    assert store.get(victim) == stands
    assert store.ttl(victim) <= 60


# --- how much ----------------------------------------------------------------------------------


def group(count: int) -> dict[str, Any]:
    return {
        **link(),
        "task": "celery.group",
        "subtask_type": "group",
        "kwargs": {"tasks": [link() for _ in range(count)]},
        "options": {},
    }


@pytest.mark.parametrize(
    "signature",
    [
        group(20_000),
        link(link=[group(20_000)]),
        {
            **link(),
            "subtask_type": "chunks",
            "task": "celery.chunks",
            "kwargs": {"task": link(), "it": [[n] for n in range(1000)], "n": 1},
        },
        {**link(), "task": "celery.starmap", "kwargs": {"task": link(), "it": [[1]]}},
        {**link(), "task": "celery.chord_unlock"},
    ],
    ids=["group", "group in a link", "chunks", "starmap", "chord_unlock"],
)
def test_what_multiplies_is_refused_before_it_is_published(
    store: redis_py.Redis, producer: redis_py.Redis, signature: dict[str, Any]
) -> None:
    assert refusal(store, asked(producer, embed={"callbacks": [signature]}))
    assert not store.exists("links")


def test_large_results_are_not_multiplied_by_many_links(
    store: redis_py.Redis, producer: redis_py.Redis
) -> None:
    """The bytes of a result are known only once it was computed."""
    wide = np.full((1, WIDE), 2, np.float32)
    many, few = str(uuid.uuid4()), str(uuid.uuid4())
    for request_id, count in ((many, MAX_PUBLISHED_BYTES // wide.nbytes), (few, 4)):
        packed = body({"inputs": {"x": tensor(wide)}}, embed={"callbacks": [group(count)]})
        producer.lpush(NAMES.queue("wide"), envelope(packed, request_id=request_id))
    result = meta_of(store, many)["result"]
    assert result["exc_type"] == "PayloadTooLarge"
    assert "bytes of messages" in result["exc_message"][0]
    assert meta_of(store, few)["status"] == "SUCCESS"
    assert store.llen("links") == 4, "what is too much is not published in part"


def test_a_plain_request_does_not_wait_for_the_links_of_another_model(
    store: redis_py.Redis, producer: redis_py.Redis
) -> None:
    """More of those requests are sent than wait before no more of their model are claimed."""
    ids = [asked(producer, embed={"callbacks": [group(100)]}) for _ in range(300)]
    until(lambda: store.llen("links") > 0, 30.0, "links are published")
    request_id, raw = message("other", numbered(3))
    producer.lpush(NAMES.queue("other"), raw)
    np.testing.assert_array_equal(outputs_of(store, request_id)["x"], numbered(3))
    linked(store, producer, "links.other")
    assert store.llen("links") < 300 * 100, "the others still wait"
    for each in ids:
        meta_of(store, each, 120.0)
    assert store.llen("links") == 300 * 100
