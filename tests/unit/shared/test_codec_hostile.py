"""Whatever stands in a queue, the codec answers with one of its two errors, and soon."""

from __future__ import annotations

import base64
import json
import re
from contextlib import suppress
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.shared import codec
from inferq.shared.codec import JSON, MSGPACK, MalformedMessage
from inferq.shared.errors import BY_CODE, ConfigError, InferqError, InvalidInput, from_wire
from inferq.shared.schema import (
    DTYPES,
    MAX_DIMS,
    InputCheck,
    ModelAdvert,
    Signature,
    TensorSpec,
)

HEAD = b'"headers":{"id":"a","task":"inferq.infer"},'
DEEP = 100_000


def raw(
    body: bytes, properties: bytes = b'{"body_encoding":"base64"}', kind: str = MSGPACK
) -> bytes:
    """An envelope whose body is the JSON text `body`."""
    return (
        b'{"body":'
        + body
        + b","
        + HEAD
        + b'"properties":'
        + properties
        + b',"content-type":"'
        + kind.encode()
        + b'"}'
    )


def wrapped(body: bytes, kind: str = MSGPACK) -> bytes:
    return raw(b'"' + base64.b64encode(body) + b'"', kind=kind)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x00\xff",
        b"null",
        b"[]",
        b"{}",
        b'{"body":"","headers":{},"properties":{}}',
        b'{"body":"","headers":{"id":"a"},"properties":{}}',
        b'{"body":"","headers":{"id":7,"task":"t"},"properties":{}}',
        b'{"body":"","headers":null,"properties":{}}',
        b'{"headers":{"id":"a","task":"t"},"properties":{}}',
        b'{"body":"' + b"x" * 100,
        b'{"body":"\\q",' + HEAD + b'"properties":{}}',
        b'{"body":"",' + HEAD.replace(b'"a"', b'"\\ud800"') + b'"properties":{}}',
        b'{"body":"",' + HEAD.replace(b'"a"', b'"\xff"') + b'"properties":{}}',
        b'{"body":' + b"[" * DEEP,
        b'{"x":' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"headers":{"x":' + b'{"y":' * DEEP,
    ],
    ids=lambda message: repr(message[:60]),
)
def test_what_names_no_request_is_malformed(message: bytes) -> None:
    with pytest.raises(MalformedMessage):
        codec.decode_envelope(message)


def test_a_message_over_the_limit_is_malformed_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inferq.shared.codec.messages.MAX_MESSAGE_BYTES", 10)
    with pytest.raises(MalformedMessage, match="expected at most 10"):
        codec.decode_envelope(b"[" * 11)


@pytest.mark.parametrize(
    "message",
    [
        raw(b"7"),
        raw(b"null"),
        raw(b"{}"),
        raw(b'""'),
        raw(b'"not base64!"'),
        raw(b'"YWJ"'),
        raw(b'"\xff\xfe"'),
        raw(b'"\xc3\xbc"'),
        raw(b'"\xff\xfe"', b"{}", JSON),
        raw(b'"no json"', b"{}", JSON),
        raw(b'"[[],{},null]"', b'{"body_encoding":"rot13"}'),
        wrapped(b""),
        wrapped(b"\x93\x90\x80"),
        wrapped(b"\x81\x80\x01"),
        wrapped(b"\xdd\xff\xff\xff\xff"),
        wrapped(b"\xdf\xff\xff\xff\xff"),
        wrapped(b"\xc6\xff\xff\xff\xffab"),
        wrapped(b"\x93\x90\x81\xa1\xff\x01\xc0"),
        wrapped(b"\x91" * DEEP + b"\xc0"),
        wrapped(msgpack.packb([[], {}])),
        wrapped(msgpack.packb([{}, {}, None])),
        wrapped(msgpack.packb([[], [], None])),
        wrapped(msgpack.packb([[], {1: 2}, None])),
        wrapped(msgpack.packb([[], {}, []])),
        wrapped(msgpack.packb([[], {}, None]) + b"\x00"),
        wrapped(b"[[],{},null]" + b"x", JSON),
        wrapped(b"[" * DEEP, JSON),
        wrapped(b'[[],{"x":"\\ud800"},null]', JSON),
        wrapped(b'[[],{"x":"\\ud800","y":NaN},null]', JSON),
        wrapped(b'[[],{"x":' + b"9" * 5000 + b"},null]", JSON),
        wrapped(b"[[],{},null]", "application/x-python-serialize"),
        wrapped(b"[[],{},null]", "application/x-yaml"),
    ],
    ids=lambda message: repr(message[:60]),
)
def test_a_body_that_is_none_is_invalid_input(message: bytes) -> None:
    envelope = codec.decode_envelope(message)
    with pytest.raises(InvalidInput):
        codec.decode_body(envelope)


def test_a_body_with_escaped_slashes_is_read() -> None:
    body = msgpack.packb([[], {"x": b"\xff\xff\xff"}, None])
    text = base64.b64encode(body).replace(b"/", b"\\/")
    assert b"\\/" in text
    got = codec.decode_body(codec.decode_envelope(raw(b'"' + text + b'"')))
    assert got.kwargs == {"x": b"\xff\xff\xff"}


@pytest.mark.parametrize(
    "properties", [b"{}", b'{"body_encoding":null}', b'{"body_encoding":"utf-8"}']
)
def test_a_json_body_without_base64_is_read_as_text(properties: bytes) -> None:
    text = json.dumps('[[], {"x": "ü/"}, null]').encode()
    got = codec.decode_body(codec.decode_envelope(raw(text, properties, JSON)))
    assert got.kwargs == {"x": "ü/"}


@pytest.mark.parametrize(
    "tensor",
    [
        None,
        "text",
        {},
        {"dtype": "<f4"},
        {"dtype": "<f4", "shape": [1]},
        {"dtype": "O", "shape": [1], "data": bytes(8)},
        {"dtype": ">f4", "shape": [1], "data": bytes(4)},
        {"dtype": "<U1", "shape": [1], "data": bytes(4)},
        {"dtype": "M8[ns]", "shape": [1], "data": bytes(8)},
        {"dtype": "f4,f4", "shape": [1], "data": bytes(8)},
        {"dtype": ["<f4"], "shape": [1], "data": bytes(4)},
        {"dtype": None, "shape": [1], "data": bytes(4)},
        {"dtype": "<f4", "shape": "1", "data": bytes(4)},
        {"dtype": "<f4", "shape": 1, "data": bytes(4)},
        {"dtype": "<f4", "shape": [-1], "data": bytes(4)},
        {"dtype": "<f4", "shape": [-1, -1], "data": bytes(4)},
        {"dtype": "<f4", "shape": [1.0], "data": bytes(4)},
        {"dtype": "<f4", "shape": [True], "data": bytes(4)},
        {"dtype": "<f4", "shape": [None], "data": bytes(4)},
        {"dtype": "<f4", "shape": [1] * 17, "data": bytes(4)},
        {"dtype": "<f4", "shape": [2**62, 4], "data": bytes(4)},
        {"dtype": "<f4", "shape": [2**64, 2**64], "data": b""},
        {"dtype": "<f4", "shape": [0, 2**62, 2**62], "data": b""},
        {"dtype": "<f4", "shape": [2**63, 0], "data": b""},
        {"dtype": "<f4", "shape": [2], "data": bytes(7)},
        {"dtype": "<f4", "shape": [2], "data": bytes(9)},
        {"dtype": "<f4", "shape": [1], "data": "not base64!"},
        {"dtype": "<f4", "shape": [1], "data": "AAAA"},
        {"dtype": "<f4", "shape": [1], "data": 1.0},
        {"dtype": "<f4", "shape": [1], "data": {}},
        {"dtype": "<f4", "shape": [3], "data": [1.0]},
        {"dtype": "O", "data": [1.0]},
        json.loads("[" * 60 + "]" * 60),
        json.loads("[" * 20 + "1" + "]" * 20),
    ],
    ids=lambda tensor: repr(tensor)[:50],
)
def test_a_tensor_that_is_none_is_invalid_input_and_named(tensor: Any) -> None:
    with pytest.raises(InvalidInput, match="'x'"):
        codec.decode_tensor("x", tensor, "float32")


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([None]), np.array([0], "M8[s]")])
def test_arrays_that_do_not_travel_are_refused_before_they_are_sent(array: Any) -> None:
    with pytest.raises(InvalidInput, match=re.escape(f"'x': dtype {array.dtype.name}")):
        codec.wire_array("x", array)
    with pytest.raises(InvalidInput, match="17 dims"):
        codec.wire_array("x", np.zeros((1,) * 17))


JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
WIRE_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary()
    | st.text()
    | st.sampled_from(["<f4", "|b1", "float16"]),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["dtype", "shape", "data", "key"]), inner)
    ),
    max_leaves=8,
)


@given(st.binary())
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for kind in (MSGPACK, JSON):
        with suppress(InvalidInput):
            codec.decode_body(codec.decode_envelope(wrapped(data, kind)))
    with suppress(MalformedMessage, InvalidInput, KeyError):
        codec.decode_outputs(codec.decode_meta(data)["result"])
    with suppress(ConfigError):
        codec.decode_advert(data)


@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(["body", "headers", "properties", "content-type"], JSON_VALUE)
    )
)
def test_any_json_is_read_or_malformed(value: Any) -> None:
    with suppress(MalformedMessage):
        codec.decode_envelope(json.dumps(value).encode())


@given(WIRE_VALUE)
def test_anything_in_a_tensors_place_is_read_or_invalid_input(value: Any) -> None:
    with suppress(InvalidInput):
        codec.decode_tensor("x", value, "float32")


@given(st.integers(1, 200))
def test_a_message_cut_anywhere_is_refused(cut: int) -> None:
    encoder = codec.RequestEncoder("inferq.m", "me", None)
    whole = encoder.encode(
        "id",
        "m",
        {"x": codec.encode_tensor(np.zeros(8, np.float32))},
        shown="x",
        priority=0,
        sent_ms=0.0,
        deadline_ms=None,
    )
    with pytest.raises((MalformedMessage, InvalidInput)):
        codec.decode_body(codec.decode_envelope(whole[: -(cut % len(whole)) or -1]))


# --- results and announcements that somebody else wrote ------------------------------------------

TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["<f4", "|b1", "O", ">f4", ""]) | WIRE_VALUE,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | WIRE_VALUE,
        "data": st.binary(max_size=64) | WIRE_VALUE,
    }
)
META = st.fixed_dictionaries(
    {"status": st.sampled_from(["SUCCESS", "FAILURE", "REVOKED", "PENDING"]) | WIRE_VALUE},
    optional={
        "result": st.dictionaries(st.text(max_size=3), TENSOR, max_size=3) | WIRE_VALUE,
        "receipt": WIRE_VALUE,
        "task_id": WIRE_VALUE,
    },
)


@given(META)
def test_a_meta_is_read_alike_both_ways_or_refused_by_both(meta: dict[str, Any]) -> None:
    """The quick way reads what the thorough one does, and leaves all else to it."""
    data = msgpack.packb(meta)
    quick = codec.decode_success(data)
    try:
        read = codec.decode_meta(data)
        outputs = codec.decode_outputs(read.get("result"))
    except (MalformedMessage, InvalidInput):
        assert quick is None
        return
    if quick is not None:
        assert read["status"] == "SUCCESS"
        assert quick[0].keys() == outputs.keys()
        for name, array in outputs.items():
            np.testing.assert_array_equal(quick[0][name], array)


@given(
    st.text(),
    WIRE_VALUE
    | st.dictionaries(
        st.sampled_from(["exc_type", "exc_message", "code", "detail"]),
        st.sampled_from(sorted(BY_CODE)) | WIRE_VALUE,
    ),
)
def test_whatever_stands_for_an_error_is_one(status: str, wire: Any) -> None:
    error = from_wire(status, wire)
    assert isinstance(error, InferqError)
    assert isinstance(str(error), str)
    assert all(isinstance(name, str) for name in error.detail)


SPEC = st.builds(
    TensorSpec,
    st.sampled_from(["x", "y", ""]),
    st.sampled_from([*DTYPES, "O", "", "<f4", "str", "M8[s]"]),
    st.lists(st.integers(-2, 4) | st.sampled_from(["n", "m", ""]) | st.none(), max_size=3).map(
        tuple
    ),
)
SPECS = st.lists(SPEC, max_size=2).map(tuple)
ADVERT = st.builds(
    ModelAdvert,
    name=st.text(max_size=3),
    version=st.integers(-1, 2),
    engine=st.text(max_size=3),
    signature=st.builds(Signature, SPECS, SPECS),
    max_batch_size=st.integers(-(2**63), 2**63 - 1),
    batchable=st.booleans(),
    max_queue_depth=st.integers(-1, 9),
    max_request_bytes=st.integers(-1, 99),
    default_priority=st.integers(-1, 99),
    default_timeout_ms=st.integers(-1, 99),
    seconds_per_row=st.floats(),
)
SMALL_ARRAY = st.builds(
    np.zeros, st.lists(st.integers(0, 4), max_size=3), st.sampled_from(["float32", "int64", ">f4"])
)


@given(ADVERT, st.dictionaries(st.sampled_from(["x", "y", ""]), SMALL_ARRAY))
def test_an_announcement_is_refused_or_every_request_can_be_checked_by_it(
    advert: ModelAdvert, inputs: dict[str, Any]
) -> None:
    try:
        read = codec.decode_advert(codec.encode_advert(advert))
    except ConfigError:
        return
    assert read.signature == advert.signature
    with suppress(InferqError):
        assert InputCheck(read)(inputs) >= 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"inputs": ()}, "no inputs"),
        ({"inputs": (TensorSpec("x", "O", ("n",)),)}, "dtype 'O'"),
        ({"inputs": (TensorSpec("x", "int8", ("n",) + (1,) * MAX_DIMS),)}, "17 dims"),
        ({"inputs": (TensorSpec("x", "int8", ()),)}, "batchable"),
        ({"outputs": (TensorSpec("x", "int8", ("m",)),)}, "batchable"),
    ],
)
def test_an_announcement_that_contradicts_itself_says_how(
    changed: dict[str, Any], words: str
) -> None:
    good = (TensorSpec("x", "float32", ("n", 2)),)
    advert = ModelAdvert(
        name="m",
        version=1,
        engine="fake",
        max_batch_size=1,
        batchable=True,
        max_queue_depth=0,
        signature=Signature(**{"inputs": good, "outputs": good, **changed}),
        max_request_bytes=1,
        default_priority=0,
        default_timeout_ms=0,
        seconds_per_row=0.0,
    )
    with pytest.raises(ConfigError, match=words):
        codec.decode_advert(codec.encode_advert(advert))


# --- headers -------------------------------------------------------------------------------------

HEADER = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text())


@given(
    st.dictionaries(st.sampled_from([*codec.Headers.__struct_fields__, "stamps"]), HEADER),
    st.booleans(),
)
def test_any_headers_are_read_with_their_own_values_or_malformed(
    headers: dict[str, Any], ascii_only: bool
) -> None:
    message = {"body": "", "headers": {"id": "a", "task": "t", **headers}, "properties": {}}
    raw = json.dumps(message, ensure_ascii=ascii_only).encode()
    try:
        read = codec.decode_envelope(raw).headers
    except MalformedMessage:
        return
    for name in codec.Headers.__struct_fields__:
        if name in headers:
            assert getattr(read, name) == headers[name]


@given(st.binary(max_size=300))
def test_who_asked_is_looked_up_in_any_bytes(raw: bytes) -> None:
    for data in (raw, b'{"headers": {"id": "' + raw, b'"id":"a' + raw + b'"'):
        ticket = codec.guess_ticket(data, "m")
        assert ticket is None or ticket.id.encode() in data
