"""A producer that may only push gains nothing by chords: no worker waits for what never comes.

One worker, which must live through all of it.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import redis as redis_py
from helpers.envelopes import JSON, body, envelope, request, tensor
from helpers.links import link, push_only, serving, store_of
from helpers.repository import numbered
from helpers.results import meta_of, outputs_of
from helpers.stock import PlainWorker
from helpers.wait import until
from helpers.worker import Worker

from inferq.shared.names import Names
from inferq.workers.canvas.chord_results import MAX_CHORD_BYTES

NAMES = Names()
QUEUE = NAMES.queue("m")
#: Columns of a result of 4 MB.
WIDE = 1 << 20
Signature = dict[str, Any]


@pytest.fixture(scope="module")
def served(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One worker that serves the whole file."""
    with serving(redis_kind, tmp_path_factory.mktemp("models"), wide=WIDE) as worker:
        yield worker


@pytest.fixture
def store(served: Worker) -> Iterator[redis_py.Redis]:
    """Its Redis, empty of what the test before left; afterwards nothing is held."""
    with store_of(served, ("celery-task*", "links*")) as client:
        yield client


@pytest.fixture
def producer(served: Worker) -> Iterator[redis_py.Redis]:
    """May push to queues of models, and nothing else."""
    with push_only(served) as client:
        yield client


def infer(n: float, **options: Any) -> Signature:
    """A request for m that takes nothing over from the step before it."""
    kwargs = {"inputs": {"x": numbered(n).tolist()}}
    signature = {**link(QUEUE, **options), "task": "inferq.infer", "kwargs": kwargs}
    return {**signature, "immutable": True}


def canvas(kind: str, **kwargs: Any) -> Signature:
    return {
        **link(),
        "task": f"celery.{kind}",
        "subtask_type": kind,
        "kwargs": kwargs,
        "options": {},
    }


def group(*tasks: Signature) -> Signature:
    return canvas("group", tasks=list(tasks))


def chain(*tasks: Signature) -> Signature:
    return canvas("chain", tasks=list(tasks))


def chord(*header: Signature, after: Signature, **options: Any) -> Signature:
    made = canvas("chord", header=group(*header), body=after, kwargs={})
    return {**made, "options": options}


def asked(producer: redis_py.Redis, embed: object, **given: Any) -> str:
    """Push a request for m with `embed`, as JSON; its id."""
    request_id = str(uuid.uuid4())
    packed = json.dumps([[], {"inputs": {"x": numbered(1).tolist()}}, embed]).encode()
    producer.lpush(QUEUE, envelope(packed, kind=JSON, request_id=request_id, **given))
    return request_id


def linked(store: redis_py.Redis, producer: redis_py.Redis) -> None:
    """A request for another model, with an honest link, is answered and has it published."""
    request_id = str(uuid.uuid4())
    raw = request(7, request_id=request_id, embed={"callbacks": [link("links.other")]})
    before = store.llen("links.other")
    producer.lpush(NAMES.queue("other"), raw)
    np.testing.assert_array_equal(outputs_of(store, request_id)["x"], numbered(7))
    assert store.llen("links.other") == before + 1


def given(store: redis_py.Redis, queue: str = "links") -> Any:
    """What the only task in `queue` is given, waited for."""
    until(lambda: store.llen(queue), what=f"a task is in {queue}")
    (message,) = store.lrange(queue, 0, -1)
    read = json.loads(message)
    packed = base64.b64decode(read["body"])
    known = json.loads if read["content-type"] == JSON else msgpack.unpackb
    return known(packed)[0]


def numbers(results: Any) -> Any:
    """The first number of each echo, in the lists in which they stand."""
    if isinstance(results, list):
        return [numbers(each) for each in results]
    return results["x"]["data"][0][0]


# --- parts that nobody waits for ----------------------------------------------------------------


def test_a_chord_of_groups_whose_parts_store_no_result_is_over_and_holds_up_nobody(
    store: redis_py.Redis, producer: redis_py.Redis
) -> None:
    """Celery waits for the result of each, without an end."""
    inner = group(infer(2, ignore_result=True), infer(3, ignore_result=True))
    asked(producer, {"callbacks": [chord(chain(infer(1), inner), after=link())]})
    (results,) = given(store)
    assert numbers(results) == [[2.0, 3.0]]
    linked(store, producer)


def armed(producer: redis_py.Redis, store: redis_py.Redis, *header: Signature) -> Signature:
    """Have a worker begin a chord with `header`; what its parts are to say that they belong to it.

    Its body is the task "body", and has an errback.
    """
    group_id = str(uuid.uuid4())
    after = link("links.body", link_error=[link("links.errback")])
    made = chord(*header, after=after, task_id=group_id)
    meta_of(store, asked(producer, {"callbacks": [made]}))
    return {"headers": {"group": group_id}, "embed": {"chord": after}}


def test_a_chord_whose_parts_have_no_result_fails_at_once_and_holds_up_nobody(
    store: redis_py.Redis, producer: redis_py.Redis
) -> None:
    """Its parts never ran: others said that they were these. Celery waits 3 s for each chord."""
    inner = chain(link("links.x"), group(link("links.x"), link("links.x")))
    chords = [armed(producer, store, inner, link("links.x")) for _ in range(20)]
    for place in range(3):
        for each in chords:
            headers = {**each["headers"], "group_index": place}
            asked(producer, each["embed"], headers=headers)
    until(lambda: store.llen("links.errback") == 20, 10.0, "all fail")
    assert not store.llen("links.body")
    linked(store, producer)


def test_a_chord_that_fails_tells_its_body_that_a_result_is_missing(
    store: redis_py.Redis, producer: redis_py.Redis
) -> None:
    inner = chain(link("links.x"), group(link("links.x", task_id="one"), link("links.x")))
    each = armed(producer, store, inner, link("links.x"))
    each["embed"]["chord"]["options"]["task_id"] = "body"
    for place in range(3):
        asked(producer, each["embed"], headers={**each["headers"], "group_index": place})
    result = meta_of(store, "body")["result"]
    assert result["exc_type"] == "ChordError"
    assert "there is no result of " in result["exc_message"][0]


# --- how much a chord's body is given ---------------------------------------------------------


def with_parts(producer: redis_py.Redis, store: redis_py.Redis, count: int) -> list[str]:
    """A chord of so many parts with results of 4 MB; their ids."""
    each = armed(producer, store, *(link("links.x") for _ in range(count)))
    each["embed"]["chord"]["options"]["task_id"] = "body"
    wide = np.full((1, WIDE), 2, np.float32)
    packed = body({"inputs": {"x": tensor(wide)}}, embed=each["embed"])
    ids = [str(uuid.uuid4()) for _ in range(count)]
    for place, request_id in enumerate(ids):
        headers = {**each["headers"], "group_index": place}
        raw = envelope(packed, headers=headers, request_id=request_id)
        producer.lpush(NAMES.queue("wide"), raw)
        until(lambda: store.llen(NAMES.queue("wide")) < 4, 60.0, "they are served")
    return ids


def peak_mb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def test_a_chord_whose_results_are_too_many_bytes_for_one_message_fails(
    served: Worker, store: redis_py.Redis, producer: redis_py.Redis
) -> None:
    ids = with_parts(producer, store, 5 * MAX_CHORD_BYTES // (4 * WIDE))
    result = meta_of(store, "body", 60.0)["result"]
    assert result["exc_type"] == "ChordError"
    assert "PayloadTooLarge" in result["exc_message"][0]
    assert str(MAX_CHORD_BYTES) in result["exc_message"][0]
    assert store.llen("links.errback") == 1
    assert not store.llen("links.body")
    assert {meta_of(store, each)["status"] for each in ids} == {"SUCCESS"}
    assert peak_mb(served.pid) < 600
    linked(store, producer)


def test_a_chord_of_many_results_that_one_message_may_hold_calls_its_body(
    store: redis_py.Redis, producer: redis_py.Redis
) -> None:
    with_parts(producer, store, 7)
    (results,) = given(store, "links.body")
    assert [len(each["x"]["data"]) for each in results] == [4 * WIDE] * 7


# --- groups in what msgpack writes ----------------------------------------------------------------


def test_a_group_inside_of_what_is_published_is_run_also_where_that_is_msgpack(
    served: Worker, store: redis_py.Redis, producer: redis_py.Redis
) -> None:
    """Celery's groups say that they are as long as they have tasks, and not keys."""

    def plus(n: int, **options: Any) -> Signature:
        signature = link("plain.msgpack", **options)
        return {**signature, "task": "stock.plus", "args": [n]}

    deep = group(plus(3, task_id="a"), plus(4, task_id="b"), plus(5, task_id="c"))
    first = {**plus(1), "args": [1, 2], "immutable": True}
    after = {**plus(0, task_id="body"), "task": "stock.totals", "args": []}
    held = chord(chain(first, group(plus(3), plus(4))), after=after)
    with PlainWorker(served.redis_url, "msgpack"):
        producer.lpush(QUEUE, request(1, embed={"callbacks": [chain(first, deep), held]}))
        found = [meta_of(store, task_id, 30.0)["result"] for task_id in ("a", "b", "c", "body")]
    assert found == [6, 7, 8, [[6, 7]]]
