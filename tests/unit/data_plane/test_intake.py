"""Hop 3 reads every message to one of its ends, and never raises."""

from __future__ import annotations

import base64
import json
import tracemalloc
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from helpers.intake import INPUTS, NAMES, NOW, OWN, PLAIN, SLOT, X, failure, intake, message, opened

from inferq.shared import codec
from inferq.shared.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    NotRegistered,
    PayloadExpired,
    PayloadTooLarge,
)
from inferq.shared.schema import TensorSpec
from inferq.workers.batching.padding import PadRule
from inferq.workers.batching.waiting import Waiting
from inferq.workers.canvas.following import MAX_FOLLOWING
from inferq.workers.canvas.link_queues import LinkQueues
from inferq.workers.claims.verdicts import (
    Failed,
    Foreign,
    Opened,
    Quarantined,
    Revoked,
    ScheduledRequest,
    retried,
)
from inferq.workers.data_plane.foreign_tasks import MAX_BYTES, ForeignTasks
from inferq.workers.data_plane.intake import BODY_BYTES, WRITTEN_OUT, Intake


def admitted(
    reader: Intake, raw: bytes, payloads: Mapping[str, bytes | None] | None = None
) -> Waiting:
    item = reader.admit(opened(reader, raw), payloads or {})
    assert isinstance(item, Waiting), item
    return item


@pytest.mark.parametrize(
    "raw",
    [
        message(),
        message(args=[INPUTS]),
        message(args=[INPUTS, "m"]),
        message(args=[INPUTS], kwargs={"model": "m"}),
        message({"x": X.tolist()}, kind=codec.JSON),
        message({"x": {"data": X.tolist()}}, kind=codec.JSON),
    ],
)
def test_every_way_to_pass_the_arguments_is_read(raw: bytes) -> None:
    item = admitted(intake(), raw)
    np.testing.assert_array_equal(item.inputs["x"], X)
    assert (item.rows, item.ticket.id, item.ticket.model, item.ticket.priority) == (
        1,
        "one",
        "m",
        3,
    )


def test_json_lists_are_answered_with_lists_and_bytes_with_bytes() -> None:
    b64 = {"dtype": "<f4", "shape": [1, 4], "data": base64.b64encode(X.tobytes()).decode()}
    assert admitted(intake(), message({"x": X.tolist()}, kind=codec.JSON)).ticket.lists
    assert not admitted(intake(), message({"x": b64}, kind=codec.JSON)).ticket.lists


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        (message(kwargs={"inputs": INPUTS, "model": "other"}), ModelNotFound, "'other'"),
        (message(kwargs={"inputs": INPUTS, "model": 7}), ModelNotFound, "'7'"),
        (message(kwargs={"inputs": INPUTS, "extra": 1}), InvalidInput, "'extra'"),
        (message(args=[INPUTS, "m", 1]), InvalidInput, "3 arguments"),
        (message(kwargs={"model": "m"}), InvalidInput, "NoneType"),
        (message([1]), InvalidInput, "list"),
        (message({}), InvalidInput, "missing 'x'"),
        (message({**INPUTS, "y": 1}), InvalidInput, "unknown 'y'"),
        (message({1: 2}, kind=codec.MSGPACK), InvalidInput, "names"),
        (message(compression="application/x-gzip"), InvalidInput, "gzip"),
        (message(expires="tomorrow"), InvalidInput, "ISO 8601"),
        (message(kind="application/x-yaml"), InvalidInput, "yaml"),
    ],
)
def test_a_bad_message_fails_with_what_was_expected(
    raw: bytes, error: type[Exception], words: str
) -> None:
    problem = failure(intake().open(SLOT, raw))
    assert type(problem) is error
    assert words in str(problem)


@pytest.mark.parametrize(
    ("tensor", "error", "words"),
    [
        (codec.encode_tensor(X.astype("f8")), InvalidInput, "float64; expected float32"),
        (codec.encode_tensor(X[:, :3].copy()), InvalidInput, "expected 4"),
        (codec.encode_tensor(X[0]), InvalidInput, "1 dims"),
        (codec.encode_tensor(np.zeros((0, 4), "f4")), InvalidInput, "expected at least 1"),
        (codec.encode_tensor(np.zeros((9, 4), "f4")), InvalidInput, "9 rows; expected 1 to 8"),
        (codec.encode_tensor(np.zeros((7, 4), "f4")), PayloadTooLarge, "112 bytes"),
        ({"dtype": "<f4", "shape": [0, 2**62, 2**62], "data": b""}, InvalidInput, "shape"),
        (None, InvalidInput, "NoneType"),
        ("text", InvalidInput, "str"),
        ({1: 2}, InvalidInput, "None"),
    ],
)
def test_a_bad_tensor_fails_with_what_was_expected(
    tensor: Any, error: type[Exception], words: str
) -> None:
    reader = intake(limit=100 if error is PayloadTooLarge else 1000)
    problem = failure(reader.admit(opened(reader, message({"x": tensor})), {}))
    assert type(problem) is error
    assert words in str(problem)


def test_a_body_that_no_inputs_could_fill_is_refused_unread() -> None:
    """What is made of it may take 40 times its bytes."""
    reader = intake(limit=1 << 30)
    bomb = message([{}] * (BODY_BYTES + 2_000))
    problem = failure(reader.open(SLOT, bomb))
    assert type(problem) is PayloadTooLarge
    rows = np.zeros((8, 4), np.float32)
    assert f"expected at most {BODY_BYTES + WRITTEN_OUT * rows.nbytes}" in str(problem)
    longest = ["-1.2345678901234567e-38"] * rows.size
    written = message({"x": [longest]}, kind=codec.JSON)
    assert isinstance(intake(limit=1 << 30).open(SLOT, written), Opened)


@pytest.mark.parametrize("slot", ["callbacks", "errbacks", "chain"])
def test_what_follows_and_may_not_is_refused_and_not_followed(slot: str) -> None:
    link = {"task": "x"}
    found = intake().open(SLOT, message(embed={slot: [link]}))
    assert isinstance(found, Opened)
    assert found.ticket.canvas is not None
    found = intake().open(SLOT, message(embed={slot: [link, {"task": "celery.chunks"}]}))
    assert "celery.chunks" in str(failure(found))
    assert isinstance(found, Failed)
    assert found.ticket.canvas is None


def test_what_follows_is_only_read_when_it_is_published_if_it_is_much() -> None:
    raw = message(embed={"callbacks": [{"task": "x"}] * (MAX_FOLLOWING + 1)})
    found = intake().open(SLOT, raw)
    assert isinstance(found, Opened)
    assert found.ticket.canvas == raw


def test_a_reply_channel_that_is_no_clients_is_refused_and_not_told() -> None:
    good = intake().open(SLOT, message(inferq_reply=NAMES.reply("me")))
    assert isinstance(good, Opened)
    assert good.ticket.reply == NAMES.reply("me")
    bad = intake().open(SLOT, message(inferq_reply="unrelated"))
    assert "inferq_reply 'unrelated'; expected a channel inferq:1:reply:" in str(failure(bad))
    assert isinstance(bad, Failed)
    assert bad.ticket.reply is None


def test_what_names_no_request_is_quarantined_with_its_bytes() -> None:
    for raw in (b"\xff", message(id=""), message(id=None)):
        found = intake().open(SLOT, raw)
        assert isinstance(found, Quarantined)
        assert (found.message, bool(found.reason)) == (raw, True)


def test_another_task_is_not_registered() -> None:
    error = failure(intake().open(SLOT, message(task="other", eta="some day")))
    assert (type(error), str(error)) == (NotRegistered, "other")


def handed(**headers: Any) -> Any:
    """What becomes of a task where two are registered."""
    foreign = ForeignTasks({"mine", "celery.mine"}, lambda raw: raw)
    reader = Intake(
        intake()._advert, NAMES, intake()._padding, bool, lambda: NOW, LinkQueues(NAMES), foreign
    )
    return reader.open(SLOT, message(**headers))


def test_another_task_is_celerys_where_it_is_registered_and_may_be() -> None:
    found = handed(task="mine", compression="", expires="2040-01-01T00:00:00")
    assert isinstance(found, Foreign)
    made = json.loads(found.handed)
    assert made["properties"]["delivery_info"] == {"exchange": "", "routing_key": "inferq.m"}
    assert made["properties"]["priority"] == 3
    assert len(made["properties"]["delivery_tag"]) == 36
    assert isinstance(handed(task="mine", eta="2040-01-01T00:00:00"), ScheduledRequest)
    for task in ("other", "celery.mine"):
        assert isinstance(failure(handed(task=task)), NotRegistered)
    for odd in ({"eta": "x"}, {"expires": "x"}, {"compression": "x-bz2"}):
        assert isinstance(failure(handed(task="mine", **odd)), InvalidInput)
    assert isinstance(failure(handed(task="mine", x="y" * MAX_BYTES)), PayloadTooLarge)


def test_a_request_waits_for_its_eta_only_if_it_is_good_and_early() -> None:
    ahead = "2030-01-01T00:00:00"
    early = intake().open(SLOT, message(eta=ahead))
    assert isinstance(early, ScheduledRequest)
    assert early.due_ms == datetime(2030, 1, 1, tzinfo=UTC).timestamp() * 1000
    assert isinstance(intake().open(SLOT, message(eta="2020-01-01T00:00:00+02:00")), Opened)
    bad = [message(eta="some day"), message(eta=ahead, kwargs={}), message(eta=ahead, kind="yaml")]
    for raw in bad:
        assert isinstance(failure(intake().open(SLOT, raw)), InvalidInput)
    revoked = intake(revoked=frozenset({"one"})).open(SLOT, message(eta=ahead))
    assert isinstance(revoked, Revoked)


# --- too late ------------------------------------------------------------------------------------


@pytest.mark.parametrize("expires", ["2028-01-01T00:00:00+00:00", "2020-01-01T00:00:00"])
def test_expiry_ends_a_request_as_revoked_only_once_it_has_passed(expires: str) -> None:
    found = intake().open(SLOT, message(expires=expires))
    passed = expires.startswith("2020")
    assert isinstance(found, Revoked if passed else Opened)
    assert not isinstance(found, Revoked) or found.reason == "expired"


def test_a_deadline_ends_a_request_only_once_it_has_passed() -> None:
    assert isinstance(intake().open(SLOT, message(inferq_deadline_ms=NOW)), Opened)
    problem = failure(intake().open(SLOT, message(inferq_deadline_ms=NOW - 5)))
    assert type(problem) is DeadlineExceeded
    assert "5 ms ago" in str(problem)


def test_a_revoked_request_ends_as_revoked() -> None:
    found = intake(revoked=frozenset({"one"})).open(SLOT, message())
    assert isinstance(found, Revoked)
    assert found.reason == "revoked"


def test_a_request_that_is_too_late_still_has_its_links() -> None:
    raw = message(embed={"errbacks": [{"task": "x"}]}, inferq_deadline_ms=1.0)
    found = intake().open(SLOT, raw)
    assert isinstance(found, Failed)
    assert found.ticket.canvas == raw


CHECKED = {"x": codec.encode_reference(X, OWN)}


def test_a_claim_checked_tensor_is_read_from_its_payload() -> None:
    item = admitted(intake(), message(CHECKED), {OWN: X.tobytes()})
    np.testing.assert_array_equal(item.inputs["x"], X)
    assert item.ticket.payload_keys == (OWN,)


def test_a_payload_that_is_gone_is_payload_expired() -> None:
    reader = intake()
    found = reader.admit(opened(reader, message(CHECKED)), {OWN: None})
    assert type(failure(found)) is PayloadExpired


@pytest.mark.parametrize("data", [b"", X.tobytes()[:-1], X.tobytes() + b"\x00"])
def test_a_payload_of_the_wrong_size_is_invalid_input(data: bytes) -> None:
    reader = intake()
    assert (
        type(failure(reader.admit(opened(reader, message(CHECKED)), {OWN: data}))) is InvalidInput
    )


@pytest.mark.parametrize(
    "key",
    [
        NAMES.payload("two", "x"),
        NAMES.payload("one1", "x"),
        "inferq:1:payload:",
        "celery-task-meta-one",
        NAMES.queue("m"),
        NAMES.leases,
        " " + OWN,
        "",
    ],
)
def test_a_key_that_is_not_the_requests_own_is_neither_read_nor_deleted(key: str) -> None:
    two = (*PLAIN, TensorSpec("y", "float32", ("batch", 4)))
    raw = message({**CHECKED, "y": codec.encode_reference(X, key)})
    found = intake(*two).open(SLOT, raw)
    problem = failure(found)
    assert type(problem) is InvalidInput
    assert "'y'" in str(problem)
    assert isinstance(found, Failed)
    assert found.ticket.payload_keys == (OWN,)


@pytest.mark.parametrize(
    "raw",
    [
        message(CHECKED, inferq_deadline_ms=1.0),
        message(CHECKED, expires="2020-01-01T00:00:00"),
        message(kwargs={"model": "other", "inputs": CHECKED}),
        message({**CHECKED, "y": [1]}),
        message(args=[CHECKED, "other"]),
    ],
    ids=["late", "expired", "other model", "unknown input", "positional"],
)
def test_a_request_that_ends_unread_still_names_its_payload_so_that_it_is_deleted(
    raw: bytes,
) -> None:
    found = intake().open(SLOT, raw)
    assert isinstance(found, Failed | Revoked)
    assert found.ticket.payload_keys == (OWN,)


# --- who may share a batch -----------------------------------------------------------------------

PAIR = (TensorSpec("a", "float32", ("batch", "n")), TensorSpec("b", "float32", ("batch", "m")))


def pair(n: int, m: int, order: str = "ab") -> bytes:
    arrays = {"a": np.zeros((1, n), np.float32), "b": np.zeros((1, m), np.float32)}
    return message({name: codec.encode_tensor(arrays[name]) for name in order})


def test_only_equal_inner_shapes_are_compatible() -> None:
    reader = intake(*PAIR)
    groups = {(n, m): admitted(reader, pair(n, m)).compatible for n in (1, 2) for m in (1, 2)}
    assert len(set(groups.values())) == 4


def test_compatibility_does_not_depend_on_the_order_of_the_inputs() -> None:
    reader = intake(*PAIR)
    assert admitted(reader, pair(1, 2)).compatible == admitted(reader, pair(1, 2, "ba")).compatible
    assert admitted(reader, pair(1, 2)).compatible != admitted(reader, pair(2, 1, "ba")).compatible


def test_padded_sizes_are_compatible_up_to_their_bucket() -> None:
    reader = intake(*PAIR, n=PadRule((4, 8), 0.0))
    groups = [admitted(reader, pair(n, 1)).compatible for n in (1, 3, 4, 5, 8)]
    assert groups[0] == groups[1] == groups[2] != groups[3] == groups[4]
    problem = failure(reader.admit(opened(reader, pair(9, 1)), {}))
    assert "expected at most 8" in str(problem)


def test_one_that_killed_a_worker_runs_alone() -> None:
    reader = intake()
    found = opened(reader, message())
    again = reader.admit(retried(found, 2), {})
    assert isinstance(again, Waiting)
    assert (again.alone, again.ticket.attempts) == (True, 2)
    assert not admitted(reader, message()).alone


# --- text ----------------------------------------------------------------------------------------

TEXT = (TensorSpec("x", "string", ("batch",)),)
WORDS = np.array(["a", "bc"], object)
WORDS_CHECKED = {"x": codec.encode_reference(WORDS, OWN, len(codec.pack_text(WORDS)))}


@pytest.mark.parametrize(
    ("raw", "payloads"),
    [
        (message({"x": codec.encode_tensor(WORDS)}), {}),
        (message({"x": ["a", "bc"]}, kind=codec.JSON), {}),
        (message({"x": {"data": ["a", "bc"]}}, kind=codec.JSON), {}),
        (message(WORDS_CHECKED), {OWN: codec.pack_text(WORDS)}),
    ],
)
def test_text_is_admitted_however_it_is_written(
    raw: bytes, payloads: Mapping[str, bytes | None]
) -> None:
    item = admitted(intake(*TEXT), raw, payloads)
    assert item.inputs["x"].tolist() == ["a", "bc"]
    assert item.rows == 2


@pytest.mark.parametrize("kind", ["inline", "payload", "kombu"])
def test_text_that_is_too_large_is_refused_before_its_elements_are_made(kind: str) -> None:
    data = np.zeros(250_001, "<u4").tobytes()
    tensor: dict[str, Any] = {"dtype": "string", "shape": [250_000], "data": data}
    payloads: dict[str, bytes | None] = {}
    content = codec.MSGPACK
    if kind == "payload":
        tensor = {"dtype": "string", "shape": [250_000], "key": OWN, "size": len(data)}
        payloads[OWN] = data
    if kind == "kombu":
        content = codec.JSON
        encoded = {"__type__": "base64", "__value__": base64.b64encode(data).decode()}
        tensor["data"] = encoded
    reader = intake(*TEXT, limit=100_000)
    found = opened(reader, message({"x": tensor}, kind=content))
    tracemalloc.start()
    try:
        problem = failure(reader.admit(found, payloads))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert type(problem) is PayloadTooLarge
    assert "expected at most 100000 (max_request_bytes)" in str(problem)


@pytest.mark.parametrize(
    "tensor",
    [
        codec.encode_tensor(X),
        codec.encode_tensor(np.array([b"a"], object)),
        {"dtype": "string", "shape": [1], "data": b""},
        {"dtype": "string", "shape": [1], "data": np.array([0, 1], "<u4").tobytes() + b"\xff"},
        {"dtype": "string", "shape": [1]},
        [1.5],
        [["a"], "b"],
        b"a",
        None,
    ],
    ids=repr,
)
def test_what_is_no_text_fails_alone(tensor: object) -> None:
    reader = intake(*TEXT)
    found = reader.admit(opened(reader, message({"x": tensor})), {})
    assert type(failure(found)) is InvalidInput
    assert "'x'" in str(failure(found))


@pytest.mark.parametrize("size", [None, -1, True, "8", 10**9])
def test_a_payload_of_text_that_lies_about_its_size_fails_alone(size: object) -> None:
    tensor = {"dtype": "string", "shape": [2], "key": OWN, "size": size}
    reader = intake(*TEXT)
    found = reader.admit(opened(reader, message({"x": tensor})), {OWN: None})
    assert type(failure(found)) in (PayloadExpired, PayloadTooLarge)


def test_strings_are_padded_with_empty_ones() -> None:
    spec = TensorSpec("x", "string", ("batch", "words"))
    item = admitted(
        intake(spec, words=PadRule((4,), 7.0)), message({"x": [["a", "b"]]}, kind=codec.JSON)
    )
    assert item.inputs["x"].tolist() == [["a", "b", "", ""]]
