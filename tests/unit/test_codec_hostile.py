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
from inferq.shared.errors import ConfigError, InvalidInput

HEAD = b'"headers":{"id":"a","task":"inferq.infer"},'
DEEP = 100_000


def raw(
    body: bytes, properties: bytes = b'{"body_encoding":"base64"}', kind: str = MSGPACK
) -> bytes:
    """An envelope whose body is the JSON text `body`."""
    return (
        b'{"body":' + body + b"," + HEAD + b'"properties":' + properties
        + b',"content-type":"' + kind.encode() + b'"}'
    )  # fmt: skip


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
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary()
    | st.text() | st.sampled_from(["<f4", "|b1", "float16"]),
    lambda inner: st.lists(inner)
    | st.dictionaries(st.sampled_from(["dtype", "shape", "data", "key"]), inner),
    max_leaves=8,
)  # fmt: skip


@given(st.binary())
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for kind in (MSGPACK, JSON):
        with suppress(InvalidInput):
            codec.decode_body(codec.decode_envelope(wrapped(data, kind)))
    with suppress(MalformedMessage, InvalidInput, KeyError):
        codec.decode_outputs(codec.decode_meta(data)["result"])
    with suppress(ConfigError):
        codec.decode_advert(data)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(
    ["body", "headers", "properties", "content-type"], JSON_VALUE
)))  # fmt: skip
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
        "id", "m", {"x": codec.encode_tensor(np.zeros(8, np.float32))},
        shown="x", priority=0, sent_ms=0.0, deadline_ms=None,
    )  # fmt: skip
    with pytest.raises((MalformedMessage, InvalidInput)):
        codec.decode_body(codec.decode_envelope(whole[: -(cut % len(whole)) or -1]))
