"""Any Celery application can ask and read the answer: it never imports inferq.

Each claim is tried with Celery untouched (JSON) and with one that is set up for msgpack.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis as redis_py
from helpers.repository import fake_model
from helpers.stock import CONTENTS, Side
from helpers.stock_side import WAIT_S, app, ending, forge, inputs, send, time, values
from helpers.wait import until
from helpers.worker import Worker

from inferq.shared.names import Names
from inferq.workers.process.embedded import EmbeddedRedis

#: What one batch of the model "slow" takes: long enough to queue behind, in ms.
SLOW_MS = 100


@pytest.fixture(scope="module")
def url(redis_kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis with one worker that serves all models of this file."""
    models = tmp_path_factory.mktemp("models")
    fake_model(models, "echo")
    fake_model(models, "small", knobs="max_request_bytes = 8")
    fake_model(models, "slow", knobs="max_batch_size = 1", fake=f"delay_ms = {SLOW_MS}.0")
    with EmbeddedRedis(redis_kind) as server, Worker(server.url, models):
        yield server.url


@pytest.fixture(scope="module", params=CONTENTS)
def side(request: pytest.FixtureRequest, url: str) -> Iterator[Side]:
    with Side(url, request.param) as side:
        yield side


@pytest.fixture
def store(url: str) -> Iterator[redis_py.Redis]:
    with redis_py.Redis.from_url(url) as client:
        yield client


def test_a_request_is_answered(side: Side) -> None:
    def ask() -> object:
        return values(send("echo", 3).get(timeout=WAIT_S))

    assert side(ask) == [3.0] * 4


def test_the_result_carries_a_receipt(side: Side) -> None:
    def ask() -> object:
        result = send("echo", 3)
        result.get(timeout=WAIT_S)
        meta = app.backend.get_task_meta(result.id)
        return [meta["status"], meta["task_id"] == result.id, meta["receipt"]]

    status, same, receipt = side(ask)
    assert (status, same) == ("SUCCESS", True)
    assert receipt["model"] == "echo"
    assert receipt["batch_size"] == 1
    assert receipt["queue_ms"] is None, "a stock message has no Redis time"


@pytest.mark.parametrize(
    "x",
    [
        pytest.param([[1, 2, 3, 4]], id="bare nested lists"),
        pytest.param({"data": [[1, 2, 3, 4]]}, id="nested lists"),
        pytest.param(
            {"dtype": "float32", "shape": [1, 4], "data": [[1, 2, 3, 4]]}, id="lists with dtype"
        ),
    ],
)
def test_nested_lists_are_taken(side: Side, x: object) -> None:
    """Where the message is JSON, the answer is nested lists as well."""

    def ask(x: object) -> object:
        asked = {"model": "echo", "inputs": {"x": x}}
        result = app.send_task("inferq.infer", kwargs=asked, queue="inferq.echo")
        outputs = result.get(timeout=WAIT_S)
        return [values(outputs), type(outputs["x"]["data"]).__name__]

    data = "list" if side.content == "json" else "bytes"
    assert side(ask, x) == [[1, 2, 3, 4], data]


def test_bytes_as_celery_writes_them_in_json_are_taken(side: Side) -> None:
    def ask() -> object:
        x = {"dtype": "<f4", "shape": [1, 4], "data": bytes(range(16))}
        asked = {"model": "echo", "inputs": {"x": x}}
        result = app.send_task("inferq.infer", kwargs=asked, queue="inferq.echo")
        return [result.get(timeout=WAIT_S)["x"]["dtype"], result.state]

    assert side(ask) == ["<f4", "SUCCESS"]


def test_arguments_may_be_positional_and_the_model_left_to_the_queue(side: Side) -> None:
    def ask() -> object:
        ways: list[dict[str, Any]] = [
            {"args": [inputs(1), "echo"]},
            {"args": [inputs(2)]},
            {"args": [inputs(3)], "kwargs": {"model": "echo"}},
            {"kwargs": {"inputs": inputs(4)}},
        ]
        asked = [app.send_task("inferq.infer", queue="inferq.echo", **way) for way in ways]
        return [values(result.get(timeout=WAIT_S))[0] for result in asked]

    assert side(ask) == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("queue", "kwargs", "error", "said"),
    [
        ("echo", {"model": "nope", "inputs": {}}, "ModelNotFound", "'nope'"),
        ("echo", {"inputs": {"y": [[1, 2, 3, 4]]}}, "InvalidInput", "unknown 'y'"),
        ("echo", {"inputs": {"x": [[1, 2, 3]]}}, "InvalidInput", "shape [1, 3]"),
        ("echo", {"inputs": {"x": [1, 2, 3, 4]}}, "InvalidInput", "shape [4]"),
        ("echo", {"inputs": {"x": [[0] * 4] * 33}}, "InvalidInput", "33 rows"),
        ("echo", {"inputs": {"x": "not base64!"}}, "InvalidInput", "str"),
        (
            "echo",
            {"inputs": {"x": {"dtype": "<f8", "shape": [1, 4], "data": [[0] * 4]}}},
            "InvalidInput",
            "float64",
        ),
        (
            "echo",
            {"inputs": {"x": {"dtype": "O", "shape": [1], "data": [0]}}},
            "InvalidInput",
            "dtype 'O'",
        ),
        ("echo", {"inputs": [[1, 2, 3, 4]]}, "InvalidInput", "list"),
        ("echo", {"inputs": {}, "shape": 1}, "InvalidInput", "'shape'"),
        ("echo", {}, "InvalidInput", "NoneType"),
        ("small", {"inputs": {"x": [[1, 2, 3, 4]]}}, "PayloadTooLarge", "max_request_bytes"),
    ],
)
def test_a_bad_request_fails_with_the_named_error(
    side: Side, queue: str, kwargs: dict[str, object], error: str, said: str
) -> None:
    def ask(queue: str, kwargs: dict[str, object]) -> object:
        return ending(app.send_task("inferq.infer", kwargs=kwargs, queue=f"inferq.{queue}"))

    state, name, message = side(ask, queue, kwargs)
    assert (state, name) == ("FAILURE", error)
    assert said in message


@pytest.mark.parametrize("side", ["json"], indirect=True)
@pytest.mark.parametrize("eta", [None, "2099-01-01T00:00:00+00:00"])
@pytest.mark.parametrize("kind", ["application/x-python-serialize", "application/x-yaml"])
def test_pickle_and_yaml_are_refused_unread(side: Side, kind: str, eta: str | None) -> None:
    """Nothing is read of them, so the answer is written as JSON."""

    def ask(kind: str, eta: str | None) -> object:
        return ending(forge("echo", kind, b"cbuiltins\nexit\n(tR.", eta=eta))

    state, name, message = side(ask, kind, eta)
    assert (state, name) == ("FAILURE", "InvalidInput")
    assert f"content type {kind!r}" in message


def test_compressed_messages_are_refused_by_name(side: Side) -> None:
    def ask() -> object:
        return ending(send("echo", 1, compression="gzip"))

    state, name, message = side(ask)
    assert (state, name) == ("FAILURE", "InvalidInput")
    assert "compression 'application/x-gzip'" in message


def test_an_ignored_result_is_stored_nowhere(side: Side, store: redis_py.Redis) -> None:
    def ask() -> object:
        ignored = send("echo", 1, ignore_result=True)
        # One lane, in order: when the second is answered, the first was.
        send("echo", 2).get(timeout=WAIT_S)
        return ignored.id

    assert not store.exists(Names().meta(side(ask)))


def test_an_expired_request_is_revoked(side: Side) -> None:
    def ask(past: str) -> object:
        return ending(send("echo", 1, expires=past))

    past = (datetime.now(UTC) - timedelta(seconds=5)).isoformat()
    state, name, message = side(ask, past)
    assert (state, name, message) == ("REVOKED", "TaskRevokedError", "expired")


def test_a_request_that_expires_while_it_waits_is_revoked(side: Side) -> None:
    def ask(slow_s: float) -> object:
        before = [send("slow", n) for n in range(5)]
        late = send("slow", 99, expires=2 * slow_s)
        return [ending(late), [values(r.get(timeout=WAIT_S))[0] for r in before]]

    assert side(ask, SLOW_MS / 1000) == [
        ["REVOKED", "TaskRevokedError", "expired"],
        [0.0, 1.0, 2.0, 3.0, 4.0],
    ]


def test_a_request_revoked_before_its_start_is_revoked(side: Side) -> None:
    """Wherever it is by then: still queued, or claimed by the worker."""

    def ask() -> object:
        before = [send("slow", n) for n in range(4)]
        revoked = [send("slow", 99), send("slow", 99)]
        app.control.revoke([result.id for result in revoked])
        endings = [ending(result) for result in revoked]
        return [endings, [values(r.get(timeout=WAIT_S))[0] for r in before]]

    revoked = ["REVOKED", "TaskRevokedError", "revoked"]
    assert side(ask) == [[revoked, revoked], [0.0, 1.0, 2.0, 3.0]]


def test_requests_are_served_when_they_are_due(side: Side, store: redis_py.Redis) -> None:
    """At once then, and in the order of their ETAs, however many they are."""

    def ask() -> object:
        began = time.time()
        later = [send("echo", 200 - n, countdown=5 - n / 200) for n in range(200)]
        send("echo", 8).get(timeout=WAIT_S)
        early = sum(result.ready() for result in later)
        answers = [values(result.get(timeout=WAIT_S))[0] for result in later]
        return [early, answers == [200.0 - n for n in range(200)], time.time() - began]

    early, right, took = side(ask)
    assert (early, right) == (0, True)
    assert 5 <= took < 10
    assert not store.keys(f"{Names().scheduled}*")


def test_a_request_may_be_revoked_or_expire_before_its_eta(side: Side) -> None:
    def ask() -> object:
        revoked, expired = send("echo", 1, countdown=4), send("echo", 2, countdown=1, expires=0.5)
        app.control.revoke(revoked.id)
        return [ending(revoked), ending(expired)]

    assert side(ask) == [
        ["REVOKED", "TaskRevokedError", "revoked"],
        ["REVOKED", "TaskRevokedError", "expired"],
    ]


@pytest.mark.parametrize("header", ["eta", "expires"])
def test_a_time_that_is_none_fails_with_the_named_error(side: Side, header: str) -> None:
    def ask(header: str) -> object:
        headers: dict[str, Any] = {header: "some day"}
        return ending(forge("echo", **headers))

    state, name, message = side(ask, header)
    assert (state, name) == ("FAILURE", "InvalidInput")
    assert f"{header} 'some day'" in message


def test_an_urgent_request_overtakes_a_backlog(side: Side) -> None:
    """Priority 0 is the most urgent on Redis."""

    def ask() -> object:
        backlog = [send("slow", n, priority=9) for n in range(8)]
        backlog[0].get(timeout=WAIT_S)
        values(send("slow", 99, priority=0).get(timeout=WAIT_S))
        left = sum(not result.ready() for result in backlog)
        for result in backlog:
            result.get(timeout=WAIT_S)
        return left

    assert side(ask) >= 4


def test_another_task_is_not_registered(side: Side, store: redis_py.Redis) -> None:
    """Also one of Celery's own; a request behind them is served as ever."""

    def ask() -> object:
        own = app.send_task("celery.accumulate", args=[1, 2], queue="inferq.echo")
        unknown = app.send_task("someone.elses", queue="inferq.echo")
        served = values(send("echo", 5).get(timeout=WAIT_S))[0]
        return [ending(own)[1], ending(unknown)[1], served]

    assert side(ask) == ["NotRegistered", "NotRegistered", 5.0]
    assert not store.exists("unacked", "unacked_index")


def test_what_is_no_message_harms_nobody(side: Side, store: redis_py.Redis) -> None:
    """It names nobody to answer: it is kept as a dead letter."""

    def ask() -> object:
        return values(send("echo", 6).get(timeout=WAIT_S))[0]

    store.delete(Names().dead("echo"))
    store.lpush(Names().queue("echo"), b"\x00 no JSON", b"{}", b'{"body": 1}')
    assert side(ask) == 6.0
    assert until(lambda: store.llen(Names().dead("echo")) == 3)
