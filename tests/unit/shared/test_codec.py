"""The codec's own two ends agree: whatever is encoded comes back as it was, in either content."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from inferq.shared import codec
from inferq.shared.codec import JSON, MSGPACK
from inferq.shared.errors import (
    BY_CODE,
    Cancelled,
    DeadLettered,
    InferqError,
    InvalidInput,
    from_wire,
)
from inferq.shared.schema import NUMBERS, Array, ModelAdvert, Signature, TensorSpec

ANY_DTYPE = st.sampled_from(sorted(NUMBERS))
ANY_ARRAY = ANY_DTYPE.flatmap(
    lambda dtype: np_st.arrays(dtype, np_st.array_shapes(min_dims=0, max_dims=5, min_side=0))
)
DATE = "2026-01-01T00:00:00+00:00"


def through_msgpack(array: Array) -> Array:
    wire = msgpack.unpackb(msgpack.packb(codec.encode_tensor(codec.wire_array("x", array))))
    return codec.decode_tensor("x", wire)


def through_a_meta(array: Array, content_type: str, *, lists: bool = False) -> Array:
    data = codec.encode_success("id", {"x": array}, {}, DATE, content_type, lists=lists)
    return codec.decode_outputs(codec.decode_meta(data)["result"])["x"]


def assert_same(got: Array, sent: Array) -> None:
    assert got.shape == sent.shape
    assert got.dtype == sent.dtype.newbyteorder("=")
    np.testing.assert_array_equal(got, sent)


@given(ANY_ARRAY)
def test_a_tensor_of_any_dtype_and_shape_comes_back_as_it_was(array: Array) -> None:
    assert_same(through_msgpack(array), array)


@given(ANY_ARRAY, st.sampled_from([MSGPACK, JSON]))
def test_an_output_of_any_dtype_and_shape_comes_back_in_both_contents(
    array: Array, content_type: str
) -> None:
    assert_same(through_a_meta(array, content_type), array)


@given(ANY_ARRAY.filter(lambda array: array.size > 0))
def test_an_output_as_nested_lists_comes_back(array: Array) -> None:
    """NaN and infinities too: Python's JSON writes and reads them, and so does Celery's."""
    assert_same(through_a_meta(array, JSON, lists=True), array)


@pytest.mark.parametrize("dtype", [">f4", ">i8", ">c16", ">u2", "<f4"])
def test_arrays_of_either_byte_order_arrive_as_the_same_numbers(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    assert codec.wire_array("x", array).dtype.str[0] in "<|"
    assert_same(through_msgpack(array), array)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24.0).reshape(4, 6).T,
        np.arange(24.0).reshape(4, 6)[:, ::2],
        np.arange(24.0)[::-1],
        np.broadcast_to(np.float32(1), (3, 4)),
        np.asfortranarray(np.arange(20_000.0).reshape(100, 200)),
        np.float32(3.5),
    ],
    ids=["transposed", "strided", "reversed", "broadcast", "fortran", "scalar"],
)
def test_arrays_that_are_not_contiguous_arrive_as_the_same_numbers(array: Array) -> None:
    assert_same(through_msgpack(array), np.asarray(array))
    assert_same(through_a_meta(np.asarray(array), MSGPACK), np.asarray(array))


def test_a_large_tensor_is_neither_copied_out_nor_in() -> None:
    array = np.arange(10_000, dtype=np.float32)
    data = codec.encode_tensor(array)["data"]
    assert np.shares_memory(np.frombuffer(data, np.float32), array)
    raw = array.tobytes()
    got = codec.decode_tensor("x", {"dtype": "<f4", "shape": [10_000], "data": raw})
    assert np.shares_memory(got, np.frombuffer(raw, np.float32))
    assert not got.flags.writeable


# --- JSON inputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        [[1, 2], [3, 4]],
        {"data": [[1, 2], [3, 4]]},
        {"dtype": "int32", "data": [[1, 2], [3, 4]]},
        {"dtype": "<i4", "shape": [2, 2], "data": [[1, 2], [3, 4]]},
        {
            "dtype": "<i4",
            "shape": [2, 2],
            "data": base64.b64encode(np.array([1, 2, 3, 4], "<i4").tobytes()).decode(),
        },
    ],
    ids=["lists", "lists as data", "with dtype", "with shape", "base64"],
)
def test_every_form_of_a_json_tensor_is_read(tensor: Any) -> None:
    got = codec.decode_tensor("x", json.loads(json.dumps(tensor)), "int32")
    assert_same(got, np.array([[1, 2], [3, 4]], np.int32))


@pytest.mark.parametrize(
    ("lists", "dtype"),
    [
        ([1.5], "int32"),
        ([300], "uint8"),
        ([-1], "uint64"),
        ([2**40], "int32"),
        ([2], "bool"),
        ([1e39], "float32"),
        ([1e5], "float16"),
        ([float("nan")], "int64"),
        (["1"], "int32"),
        (["nan"], "float32"),
        ([None], "float32"),
        ([b"ab"], "int8"),
        ([{}], "float32"),
        ([[1], [1, 2]], "float32"),
        ([2**70], "int64"),
    ],
)
def test_numbers_that_the_dtype_does_not_hold_are_refused_not_changed(
    lists: list[Any], dtype: str
) -> None:
    with pytest.raises(InvalidInput, match="'x'"):
        codec.decode_tensor("x", lists, dtype)


@pytest.mark.parametrize(
    ("lists", "dtype", "expected"),
    [
        ([1.0, 2.0], "int64", [1, 2]),
        ([0, 1], "bool", [False, True]),
        ([True, False], "float32", [1.0, 0.0]),
        ([1, 2.5], "complex64", [1.0, 2.5]),
        ([0.1], "float16", [np.float16(0.1)]),
        ([math.inf, -math.inf], "float32", [math.inf, -math.inf]),
        ([2**64 - 1], "uint64", [2**64 - 1]),
        ([], "int32", []),
    ],
)
def test_numbers_that_the_dtype_holds_are_taken(
    lists: list[Any], dtype: str, expected: list[Any]
) -> None:
    assert_same(codec.decode_tensor("x", lists, dtype), np.array(expected, dtype))


def test_a_json_body_with_nan_is_read_as_pythons_json_reads_it() -> None:
    body = base64.b64encode(b'[[], {"inputs": {"x": [NaN, -Infinity]}}, null]').decode()
    envelope = codec.decode_envelope(envelope_bytes(body, {"content-type": JSON}))
    (got,) = codec.decode_body(envelope).kwargs["inputs"].values()
    np.testing.assert_array_equal(got, [math.nan, -math.inf])


# --- requests ------------------------------------------------------------------------------------


def envelope_bytes(body: object, fields: Mapping[str, Any] | None = None) -> bytes:
    raw = {
        "body": body,
        "headers": {"id": "a", "task": "inferq.infer"},
        "properties": {"body_encoding": "base64"},
        "content-type": MSGPACK,
    }
    return json.dumps({**raw, **(fields or {})}).encode()


def test_a_request_comes_back_with_all_that_it_says() -> None:
    x = np.arange(4, dtype=np.float32)
    encoder = codec.RequestEncoder("inferq.m", "me@host", "channel")
    raw = encoder.encode(
        "some-id",
        "m",
        {"x": codec.encode_tensor(x)},
        shown='x=<4 float32> "quoted" \n ü',
        priority=6,
        sent_ms=1.25,
        deadline_ms=99.5,
    )
    envelope = codec.decode_envelope(raw)
    headers = envelope.headers
    assert (headers.id, headers.task, headers.inferq_reply) == (
        "some-id",
        "inferq.infer",
        "channel",
    )
    assert (headers.inferq_sent_ms, headers.inferq_deadline_ms) == (1.25, 99.5)
    assert headers.kwargsrepr == 'x=<4 float32> "quoted" \n ü'
    assert envelope.properties.priority == 6
    body = codec.decode_body(envelope)
    assert (body.args, body.kwargs["model"], body.has_canvas) == ([], "m", False)
    assert_same(codec.decode_tensor("x", body.kwargs["inputs"]["x"]), x)


MS = st.floats(0, 1e15).map(lambda ms: round(ms, 3))


@given(
    st.uuids().map(str),
    st.text(max_size=20),
    st.integers(-9, 99),
    MS,
    st.none() | MS,
    st.dictionaries(st.text(max_size=5), ANY_ARRAY, max_size=3),
    st.none() | st.text(max_size=50),
)
def test_any_request_comes_back_exactly(
    request_id: str,
    shown: str,
    priority: int,
    sent_ms: float,
    deadline_ms: float | None,
    inputs: dict[str, Array],
    reply: str | None,
) -> None:
    raw = codec.RequestEncoder("inferq.m", "me", reply).encode(
        request_id,
        "m",
        {name: codec.encode_tensor(array) for name, array in inputs.items()},
        shown=shown,
        priority=priority,
        sent_ms=sent_ms,
        deadline_ms=deadline_ms,
    )
    envelope = codec.decode_envelope(raw)
    headers = envelope.headers
    assert (headers.id, headers.root_id, headers.kwargsrepr) == (request_id, request_id, shown)
    assert (headers.inferq_reply, envelope.properties.priority) == (reply, priority)
    assert (headers.inferq_sent_ms, headers.inferq_deadline_ms) == (sent_ms, deadline_ms)
    got = codec.decode_body(envelope).kwargs["inputs"]
    assert got.keys() == inputs.keys()
    for name, array in inputs.items():
        assert_same(codec.decode_tensor(name, got[name]), array)


def test_a_claim_checked_tensor_is_known_by_its_key() -> None:
    x = np.zeros((2, 3), np.float32)
    wire = codec.encode_reference(x, "some:key")
    assert codec.reference_of(wire) == "some:key"
    assert codec.reference_of(codec.encode_tensor(x)) is None
    assert codec.reference_of([1.0]) is None
    assert_same(codec.decode_tensor("x", {**wire, "data": x.tobytes()}), x)


@pytest.mark.parametrize("slot", ["callbacks", "errbacks", "chain", "chord"])
def test_what_follows_on_a_request_is_seen(slot: str) -> None:
    body = msgpack.packb([[], {}, {slot: [{"task": "x"}]}])
    envelope = codec.decode_envelope(envelope_bytes(base64.b64encode(body).decode()))
    assert codec.decode_body(envelope).has_canvas


# --- results and announcements -------------------------------------------------------------------


@pytest.mark.parametrize("content_type", [MSGPACK, JSON])
@pytest.mark.parametrize("cls", sorted(BY_CODE.values(), key=str))
def test_every_error_reaches_the_caller_as_the_class_that_was_raised(
    cls: type[InferqError], content_type: str
) -> None:
    meta = codec.decode_meta(
        codec.encode_failure("id", cls("why ü", limit=3), DATE, content_type, extra={"group_id": 1})
    )
    error = from_wire(meta["status"], meta["result"])
    assert type(error) is cls
    assert (error.message, error.detail) == ("why ü", {"limit": 3})
    assert meta["group_id"] == 1


@pytest.mark.parametrize("content_type", [MSGPACK, JSON])
def test_a_revoked_request_reaches_the_caller_as_cancelled(content_type: str) -> None:
    meta = codec.decode_meta(codec.encode_revoked("id", "expired", DATE, content_type))
    assert meta["status"] == "REVOKED"
    error = from_wire(meta["status"], meta["result"])
    assert type(error) is Cancelled
    assert error.message == "expired"


def test_an_announcement_comes_back_as_it_was() -> None:
    spec = TensorSpec("x", "float32", ("batch", 3, None))
    advert = ModelAdvert(
        name="m",
        version=2,
        engine="fake",
        signature=Signature((spec,), (spec,)),
        max_batch_size=8,
        batchable=True,
        max_queue_depth=5,
        max_request_bytes=10,
        default_priority=3,
        default_timeout_ms=7,
        seconds_per_row=0.5,
        padded=("n",),
    )
    assert codec.decode_advert(codec.encode_advert(advert)) == advert


def test_a_dead_letters_detail_survives_json() -> None:
    error = DeadLettered("gone", attempts=3, reason="it died")
    meta = codec.decode_meta(codec.encode_failure("id", error, DATE, JSON))
    assert meta["result"]["detail"] == {"attempts": 3, "reason": "it died"}


def test_lists_that_hold_nothing_take_the_shape_beside_them() -> None:
    tensor = {"dtype": "<f4", "shape": [1, 2, 0, 4], "data": [[[], []]]}
    assert codec.decode_tensor("past", tensor).shape == (1, 2, 0, 4)
    for shape in ([1, 2, 1, 4], [2, 2, 0, 4], [1, 2], [1, 2, 0, -1]):
        with pytest.raises(InvalidInput, match=r"expected .* the shape beside them"):
            codec.decode_tensor("past", {**tensor, "shape": shape})


def test_the_short_repr_of_hundreds_of_inputs_is_short() -> None:
    inputs = {f"past_key_values.{n}.decoder.key": np.zeros((1, 8), "f4") for n in range(512)}
    assert len(codec.shown("m", inputs)) < 1_024
    assert "… 496 more" in codec.shown("m", inputs)


@pytest.mark.parametrize(
    ("nan", "expected"),
    [
        ("null", [[1.5, None], [None, None]]),
        ("string", [[1.5, "NaN"], ["Infinity", "-Infinity"]]),
    ],
)
def test_nan_and_infinity_in_lists_are_strict_json_by_setting(
    nan: str, expected: list[list[object]]
) -> None:
    outputs = {"y": np.array([[1.5, np.nan], [np.inf, -np.inf]], "f4"), "n": np.array([1])}
    meta = codec.encode_success("id", outputs, {}, "now", JSON, lists=True, nan=nan)

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    result = json.loads(meta, parse_constant=refuse)["result"]
    assert (result["y"]["data"], result["n"]["data"]) == (expected, [1])
    bare = json.loads(codec.encode_success("id", outputs, {}, "now", JSON, lists=True))
    assert math.isnan(bare["result"]["y"]["data"][0][1])
