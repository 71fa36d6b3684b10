"""Intake refuses messages of any bytes, however large or deep, without raising."""

from __future__ import annotations

import base64
import json
import tracemalloc
from datetime import datetime
from typing import Any

import msgpack
import pytest
from helpers.intake import INPUTS, NAMES, OWN, SLOT, X, failure, intake, message, opened
from hypothesis import given
from hypothesis import strategies as st

from inferq.shared import codec
from inferq.shared.errors import (
    ModelNotFound,
    PayloadTooLarge,
)
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.verdicts import (
    Failed,
    Opened,
    Quarantined,
    Revoked,
    ScheduledRequest,
)
from inferq.workers.data_plane.intake import BODY_BYTES, MAX_REPR_CHARS

# --- anything ------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
    | st.binary() | st.sampled_from(["m", "x", "<f4", OWN]),
    lambda inner: st.lists(inner)
    | st.dictionaries(
        st.sampled_from(["x", "y", "dtype", "shape", "data", "key", "model", "inputs", "chain"]),
        inner,
    ),
    max_leaves=12,
)  # fmt: skip


@given(ANYTHING, ANYTHING, ANYTHING)
def test_no_body_makes_it_raise(args: Any, kwargs: Any, embed: Any) -> None:
    reader = intake()
    bodies: list[Any] = [[args, kwargs, embed], [[], {"inputs": {"x": args}}, None], args]
    for body in bodies:
        raw = json.dumps(
            {
                "body": base64.b64encode(msgpack.packb(body)).decode(),
                "headers": {"id": "one", "task": "inferq.infer"},
                "properties": {"body_encoding": "base64"},
                "content-type": codec.MSGPACK,
            }
        ).encode()
        found = reader.open(SLOT, raw)
        assert isinstance(found, Opened | Failed)
        if isinstance(found, Opened):
            assert isinstance(reader.admit(found, {OWN: b"1234"}), Waiting | Failed)


HEADER = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.text()
    | st.datetimes().map(datetime.isoformat)
    | st.sampled_from(["inferq.infer", NAMES.reply("a"), "9999-12-31T23:59:59-23:59"])
)


@given(
    st.dictionaries(st.sampled_from(codec.Headers.__struct_fields__), HEADER),
    st.sampled_from([codec.MSGPACK, codec.JSON, "application/x-yaml"]),
)
def test_no_headers_make_it_raise(headers: dict[str, Any], kind: str) -> None:
    given = {"inputs": {"x": X.tolist()}} if kind == codec.JSON else {"inputs": INPUTS}
    reader = intake()
    found = reader.open(SLOT, message(kwargs=given, kind=kind, **headers))
    if isinstance(found, Opened):
        assert isinstance(reader.admit(found, {}), Waiting)
    elif isinstance(found, Failed | Revoked):
        assert found.ticket.id == headers.get("id", "one")
        assert found.ticket.reply is None or NAMES.is_reply(found.ticket.reply)
    else:
        assert isinstance(found, Quarantined | ScheduledRequest)


# --- headers and properties ------------------------------------------------------------------


def changed(raw: bytes, part: str, **fields: object) -> bytes:
    """`raw` with fields added to its headers or properties."""
    tree = json.loads(raw)
    tree[part] |= fields
    return json.dumps(tree).encode()


@pytest.mark.parametrize("task", ["inferq.infer", "somebody.elses"])
@pytest.mark.parametrize(
    ("part", "field"),
    [("headers", "stamps"), ("headers", "kwargsrepr"), ("properties", "reply_to")],
)
def test_headers_that_are_too_large_are_refused_under_their_id(
    part: str, field: str, task: str
) -> None:
    """Whoever reads them next (links, Celery's handler) makes objects of them all."""
    reader = intake()
    raw = changed(message(task=task), part, **{field: "x" * codec.MAX_HEAD_BYTES})
    found = reader.open(SLOT, raw)
    problem = failure(found)
    assert type(problem) is PayloadTooLarge
    assert f"expected at most {codec.MAX_HEAD_BYTES}" in str(problem)
    assert isinstance(found, Failed)
    assert (found.ticket.id, found.ticket.priority) == ("one", 3)
    within = changed(message(), part, **{field: "x" * (codec.MAX_HEAD_BYTES - 1_000)})
    assert isinstance(reader.open(SLOT, within), Opened)


def test_headers_that_are_too_large_cost_no_memory_to_speak_of() -> None:
    reader = intake()
    stamps = {str(n): {str(n): [n]} for n in range(100_000)}
    raw = changed(message(), "headers", stamps=stamps)
    long = changed(message(), "headers", kwargsrepr="x" * 30_000_000)
    for each in (raw, long):
        assert len(each) > codec.MAX_HEAD_BYTES
        tracemalloc.start()
        assert type(failure(reader.open(SLOT, each))) is PayloadTooLarge
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_a_message_that_is_too_large_and_names_nobody_is_quarantined() -> None:
    found = intake().open(SLOT, b"x" * (2 * BODY_BYTES))
    assert isinstance(found, Quarantined)
    assert "expected at most" in found.reason


def test_the_description_that_is_kept_of_a_request_is_short() -> None:
    found = opened(intake(), message(kwargsrepr="\N{GRINNING FACE}" * 50_000))
    assert len(found.ticket.kwargsrepr) == MAX_REPR_CHARS


@pytest.mark.parametrize(
    "raw",
    [
        b'"id": "victim"',
        b'{"headers": {"id": "victim"',
        b'{"headers": {"id": "victim"}} and more',
        b'garbage {"headers": {"id": "victim", "task": "inferq.infer"}}',
        b'{"body": {"headers": {"id": "victim"}}, "properties": {}}',
        b'{"headers": {"id": "victim", "x": ' + b"[" * 9_000 + b"]" * 9_000 + b"}}",
        b'\xff{"headers": {"id": "victim"}}',
        b'{"headers": {"id": ["victim"]}}',
        b'{"headers": [{"id": "victim"}]}',
        b'[{"headers": {"id": "victim"}}]',
        message(id="victim")[:-3],
        message(id="victim")[1:],
        message(id="victim") * 2,
        message(id="victim").decode().encode("utf-16"),
    ],
    ids=lambda raw: f"{raw[:50]!r}",
)
def test_bytes_that_merely_hold_an_id_name_nobody(raw: bytes) -> None:
    assert isinstance(intake().open(SLOT, raw), Quarantined)
    assert codec.guess_ticket(raw, "m") is None


def test_an_envelope_with_a_header_of_the_wrong_type_names_who_asked() -> None:
    raw = message(retries="none")
    assert isinstance(intake().open(SLOT, raw), Quarantined)
    ticket = codec.guess_ticket(raw, "m")
    assert ticket is not None
    assert (ticket.id, ticket.content_type, ticket.reply, ticket.payload_keys) == (
        "one",
        codec.MSGPACK,
        None,
        (),
    )


@pytest.mark.parametrize(
    "model", [["deep"], json.loads("[" * 400 + "]" * 400), {"x" * 10_000: 1}], ids=range(3)
)
def test_a_model_of_any_kind_is_named_in_few_words(model: object) -> None:
    problem = failure(intake().open(SLOT, message(kwargs={"inputs": INPUTS, "model": model})))
    assert type(problem) is ModelNotFound
    assert len(str(problem)) < 300
