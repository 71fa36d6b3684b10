"""Tensors of strings and bytes: what was given comes back, and what is no text is refused."""

from __future__ import annotations

import base64
import json
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.producer.outgoing import INLINE_LIMIT, Encoder, arrays_of
from inferq.shared import codec
from inferq.shared.codec import JSON, MSGPACK, pack_text, packed_text, unpack_text
from inferq.shared.errors import ConfigError, InferqError, InvalidInput, PayloadTooLarge
from inferq.shared.names import Names
from inferq.shared.schema import (
    DTYPES,
    Array,
    InputCheck,
    ModelAdvert,
    Signature,
    TensorSpec,
    describe,
    nbytes,
)
from inferq.shared.text import OBJECT, NoText, packed_bytes

#: Characters of one to four bytes, NUL, and none.
STRINGS = ["a", "", "b\0", "ü", "猫", "😀é", "long " * 50]
BYTES = [b"a", b"", b"b\0", b"\xff\xfe", b"\x00\x00"]
SHAPES = st.lists(st.integers(0, 4), max_size=4)


def of(*flat: Any, shape: tuple[int, ...] | None = None) -> Array:
    array = np.empty(len(flat), object)
    for place, each in enumerate(flat):
        array[place] = each
    return array if shape is None else array.reshape(shape)


def advert(
    dtype: str = "string", *, limit: int = 1 << 20, tail: tuple[int, ...] = ()
) -> ModelAdvert:
    spec = (TensorSpec("x", dtype, ("batch", *tail)),)
    return ModelAdvert(
        name="m",
        version=1,
        engine="fake",
        signature=Signature(spec, spec),
        max_batch_size=1 << 20,
        batchable=True,
        max_queue_depth=0,
        max_request_bytes=limit,
        default_priority=0,
        default_timeout_ms=0,
        seconds_per_row=0.0,
    )


def same(got: Array, expected: Array) -> bool:
    """Elements and their very types, and shapes; NumPy's own comparison is lax about both."""
    return (
        got.dtype == OBJECT
        and got.shape == expected.shape
        and got.ravel().tolist() == expected.ravel().tolist()
        and list(map(type, got.flat)) == list(map(type, expected.flat))
    )


def elements(kind: str, shape: list[int], data: st.DataObject) -> Array:
    one = st.text() if kind == "string" else st.binary()
    count = int(np.prod(shape))
    return of(*data.draw(st.lists(one, min_size=count, max_size=count))).reshape(shape)


@given(st.sampled_from(["string", "bytes"]), SHAPES, st.data())
def test_any_text_comes_back_from_its_layout(
    kind: str, shape: list[int], data: st.DataObject
) -> None:
    array = elements(kind, shape, data)
    packed = pack_text(array)
    assert len(packed) == packed_bytes(array)
    assert same(unpack_text(kind, packed, shape), array)
    assert same(unpack_text(kind, memoryview(bytearray(packed)), shape), array)


@given(st.sampled_from(["string", "bytes"]), SHAPES, st.data())
def test_any_text_comes_back_from_a_request_and_from_a_result_in_both_contents(
    kind: str, shape: list[int], data: st.DataObject
) -> None:
    array = elements(kind, shape, data)
    wire = msgpack.unpackb(msgpack.packb(codec.encode_tensor(array)))
    assert same(codec.decode_tensor("x", wire, kind), array)
    for content in (MSGPACK, JSON):
        raw = codec.encode_success("one", {"y": array}, {}, "now", content)
        got = codec.decode_outputs(codec.decode_meta(raw)["result"])["y"]
        assert same(got, array)
    fast = codec.decode_success(codec.encode_success("one", {"y": array}, {}, "now"))
    assert fast is not None
    assert same(fast[0]["y"], array)
    assert not fast[0]["y"].flags.writeable


def test_the_layout_is_offsets_of_four_bytes_and_then_the_data() -> None:
    offsets, data = packed_text(of("ab", "", "ü"))
    assert offsets == bytes([0, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0])
    assert data == b"ab\xc3\xbc"
    assert same(unpack_text("string", offsets + data, [3]), of("ab", "", "ü"))


def test_strings_across_what_is_read_at_once_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferq.shared.codec.strings._AT_ONCE", 2)
    for array in (of(*STRINGS), of(*"abcdefg"), of(*BYTES)):
        kind = "bytes" if isinstance(array[0], bytes) else "string"
        assert same(unpack_text(kind, pack_text(array), array.shape), array)


# --- what callers give -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a", "ü"], of("a", "ü")),
        (("a", "ü"), of("a", "ü")),
        ([["a"], ["b"]], of("a", "b", shape=(2, 1))),
        (np.array(["a", "bcd"]), of("a", "bcd")),
        (np.array(["a", "bcd"], np.dtypes.StringDType()), of("a", "bcd")),
        (of("a", "b", shape=(2, 1)), of("a", "b", shape=(2, 1))),
        (np.array([["a", "b"], ["c", "d"]], object).T, of("a", "c", "b", "d", shape=(2, 2))),
        ("alone", of("alone").reshape(())),
        ([np.array(["a"]), np.array(["b"])], of("a", "b", shape=(2, 1))),
        ([], of()),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_caller_gives_strings_as_lists_and_as_any_array_of_numpys(
    given: Any, expected: Array
) -> None:
    got = arrays_of({"x": OBJECT}, {"x": given}, {"x": "string"})["x"]
    assert same(unpack_text("string", pack_text(got), got.shape), expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([b"a", b"\xff\x00"], of(b"a", b"\xff\x00")),
        (np.array([b"a", b"bc"]), of(b"a", b"bc")),
        (of(b"a"), of(b"a")),
        (b"alone", of(b"alone").reshape(())),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_caller_gives_bytes_likewise(given: Any, expected: Array) -> None:
    assert same(arrays_of({"x": OBJECT}, {"x": given}, {"x": "bytes"})["x"], expected)


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        ("string", [b"a"], "element 0 is bytes; expected str"),
        ("string", np.array([b"a"]), r"dtype \|S1; expected string"),
        ("string", of("a", None), "element 1 is NoneType; expected str"),
        ("string", of("a", 7), "element 1 is int; expected str"),
        ("string", of(float("nan")), "element 0 is float; expected str"),
        ("string", [["a"], "b"], "ragged"),
        ("string", [["a"], ["b", "c"]], "ragged"),
        ("string", np.zeros(2), "dtype float64; expected string"),
        ("string", 7, "dtype int64; expected string"),
        ("string", ["a", "\ud800"], r"holds '\\ud800'; expected text that UTF-8"),
        ("bytes", ["YQ=="], "element 0 is str; expected bytes"),
        ("bytes", np.array(["a"]), "dtype <U1; expected bytes"),
        ("bytes", of(b"a", bytearray(b"b")), "element 1 is bytearray; expected bytes"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_text_is_refused_with_its_place_and_what_was_expected(
    kind: str, given: Any, told: str
) -> None:
    with pytest.raises(InvalidInput, match=told) as raised:
        InputCheck(advert(kind))(arrays_of({"x": OBJECT}, {"x": given}, {"x": kind}))
    assert "'x'" in str(raised.value)


@pytest.mark.parametrize("given", [of("a"), np.array(["a"]), np.array([b""]), ["a"]])
def test_text_is_refused_where_the_model_takes_numbers(given: Any) -> None:
    with pytest.raises(InvalidInput, match="'x'"):
        arrays_of({"x": np.dtype("float32")}, {"x": given})


# --- what JSON callers send ----------------------------------------------------------------------


def _json(value: object) -> object:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(
    ("kind", "sent", "expected"),
    [
        ("string", ["a", "ü"], of("a", "ü")),
        ("string", {"data": ["a", "ü"]}, of("a", "ü")),
        ("string", {"dtype": "string", "data": ["a", "ü"]}, of("a", "ü")),
        ("string", {"dtype": "string", "shape": [2, 1], "data": [["a"], ["b"]]},
         of("a", "b", shape=(2, 1))),
        ("string", {"dtype": "string", "shape": [], "data": "alone"}, of("alone").reshape(())),
        ("string", "alone", of("alone").reshape(())),
        ("string", ["YWJj"], of("YWJj")),
        ("bytes", ["YWJj", ""], of(b"abc", b"")),
        ("bytes", {"dtype": "bytes", "shape": [1], "data": ["/w=="]}, of(b"\xff")),
        ("bytes", [{"__type__": "base64", "__value__": "/w=="}], of(b"\xff")),
        ("bytes", [{"__type__": "bytes", "__value__": "abc"}], of(b"abc")),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_json_callers_send_plain_strings_and_base64_of_bytes(
    kind: str, sent: object, expected: Array
) -> None:
    assert same(codec.decode_tensor("x", _json(sent), kind), expected)


def test_msgpack_callers_may_send_lists_of_bytes_as_they_are() -> None:
    assert same(codec.decode_tensor("x", [b"YWJj", b"\xff"], "bytes"), of(b"YWJj", b"\xff"))


def test_the_layout_in_the_bytes_of_kombus_json_is_read() -> None:
    packed = base64.b64encode(pack_text(of("a", "ü"))).decode()
    data = {"__type__": "base64", "__value__": packed}
    tensor = {"dtype": "string", "shape": [2], "data": data}
    assert same(codec.decode_tensor("x", tensor, "string"), of("a", "ü"))


@pytest.mark.parametrize(
    ("kind", "sent", "told"),
    [
        ("string", [1, 2], "element 0 is int; expected str"),
        ("string", [None], "element 0 is NoneType"),
        ("string", [["a"], "b"], "ragged"),
        ("string", {"dtype": "<f4", "shape": [1], "data": "AAAAAA=="}, "'<f4'; expected string"),
        ("string", {"dtype": "bytes", "shape": [1], "data": ["YQ=="]}, "'bytes'; expected string"),
        ("string", {"dtype": ["string"], "shape": [1], "data": ["a"]}, "expected string"),
        ("string", {"shape": [3], "data": ["a"]}, "expected .3., the shape beside them"),
        ("string", {"dtype": "string", "shape": [1], "data": None}, "NoneType; expected str"),
        ("string", None, "element 0 is NoneType; expected str"),
        ("string", {}, "element 0 is dict; expected str"),
        ("bytes", ["no base64!"], "not base64"),
        ("bytes", [{"__type__": "base64", "__value__": "!"}], "not base64"),
        ("bytes", [7], "element 0 is int; expected bytes"),
        ("float32", {"dtype": "string", "shape": [1], "data": ["a"]}, "dtype 'string'"),
        ("float32", {"dtype": "string", "shape": [1], "data": b"\0" * 8}, "dtype 'string'"),
        ("float32", ["a"], "nested lists hold str; expected numbers"),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_what_a_message_holds_in_place_of_text_is_refused(
    kind: str, sent: object, told: str
) -> None:
    with pytest.raises(InvalidInput, match=told):
        codec.decode_tensor("x", sent, kind)


def test_json_answers_have_plain_strings_and_base64_whether_or_not_lists_were_sent() -> None:
    outputs = {"s": of("a", "ü", shape=(2, 1)), "b": of(b"\xff")}
    for lists in (True, False):
        raw = codec.encode_success("one", outputs, {}, "now", JSON, lists=lists)
        result = json.loads(raw)["result"]
        assert result["s"] == {"dtype": "string", "shape": [2, 1], "data": [["a"], ["ü"]]}
        assert result["b"] == {"dtype": "bytes", "shape": [1], "data": ["/w=="]}


# --- what is hostile -----------------------------------------------------------------------------


def _layout(offsets: list[int], data: bytes) -> bytes:
    return np.array(offsets, "<u4").tobytes() + data


@pytest.mark.parametrize(
    ("kind", "shape", "data", "told"),
    [
        ("string", [2], b"", "0 bytes of data; expected at least 12"),
        ("string", [2], b"\0" * 11, "11 bytes of data; expected at least 12"),
        ("string", [1], _layout([0, 2], b"a"), "offsets that do not ascend from 0 to 1"),
        ("string", [1], _layout([0, 1], b"ab"), "offsets that do not ascend from 0 to 2"),
        ("string", [1], _layout([1, 2], b"ab"), "offsets that do not ascend"),
        ("string", [2], _layout([0, 2, 1], b"a"), "offsets that do not ascend"),
        ("string", [3], _layout([0, 4_294_967_295, 1, 2], b"ab"), "offsets that do not ascend"),
        ("string", [0], _layout([0], b"a"), "offsets that do not ascend"),
        ("string", [1], _layout([0, 1], b"\xff"), "no UTF-8 at byte 0"),
        ("string", [1], _layout([0, 3], b"\xed\xa0\x80"), "no UTF-8 at byte 0"),
        ("string", [2], _layout([0, 1, 2], b"\xc3\xbc"), "element 0 begins or ends within"),
        ("string", [2], _layout([0, 0, 2], b"\xc3\xbc")[:-1], "offsets that do not ascend"),
        ("bytes", [2], _layout([0, 2, 1], b"a"), "offsets that do not ascend"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_layout_that_is_none_is_refused(
    kind: str, shape: list[int], data: bytes, told: str
) -> None:
    with pytest.raises(NoText, match=told):
        unpack_text(kind, data, shape)
    with pytest.raises(InvalidInput, match=told):
        codec.decode_tensor("x", {"dtype": kind, "shape": shape, "data": data}, kind)


@pytest.mark.parametrize(
    "shape",
    [
        None, "1", [1.0], [-1], [True], [2**62, 2**62], [2**62, 0], [1] * 17, [[1]],
        [0, 2**63], [2**40],
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_no_shape_of_a_message_takes_memory_or_raises_anything_else(shape: object) -> None:
    tracemalloc.start()
    try:
        tensor = {"dtype": "string", "shape": shape, "data": _layout([0], b"")}
        with pytest.raises(InvalidInput):
            codec.decode_tensor("x", tensor, "string")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@given(
    st.sampled_from(["string", "bytes"]),
    st.lists(st.integers(0, 3), max_size=3),
    st.binary(max_size=40),
)
def test_whatever_bytes_are_said_to_be_a_layout_are_read_or_refused(
    kind: str, shape: list[int], data: bytes
) -> None:
    try:
        array = codec.decode_tensor("x", {"dtype": kind, "shape": shape, "data": data}, kind)
    except InvalidInput:
        return
    assert pack_text(array) == data


@given(st.recursive(
    st.none() | st.text(max_size=3) | st.binary(max_size=3) | st.integers() | st.floats(),
    lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(max_size=3), of, max_size=3),
    max_leaves=10,
), st.sampled_from(["string", "bytes"]))  # fmt: skip
def test_whatever_a_message_holds_in_place_of_text_is_text_or_refused(
    sent: object, kind: str
) -> None:
    try:
        array = codec.decode_tensor("x", sent, kind)
        InputCheck(advert(kind))({"x": array})
    except InferqError:
        return
    assert {*map(type, array.flat)} <= {str if kind == "string" else bytes}


@pytest.mark.parametrize("element", ["", "ab", "é", "\u0100"])
def test_a_million_short_strings_take_no_more_memory_than_promised(element: str) -> None:
    """40 bytes for each of a message's, and 16 MB; of empty ones less than 40 MB in all."""
    count = 1_000_000
    data = _layout([n * len(element.encode()) for n in range(count + 1)], element.encode() * count)
    tracemalloc.start()
    try:
        codec.decode_tensor("x", {"dtype": "string", "shape": [count], "data": data}, "string")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (40 << 20 if not element else 20 * len(data) + (16 << 20))


@pytest.mark.parametrize("element", ["", "a", "ab", "\u0100"])
@pytest.mark.parametrize("content", [MSGPACK, JSON])
def test_lists_of_short_strings_take_no_more_memory_than_promised(
    element: str, content: str
) -> None:
    """40 bytes for each of a message's, and 16 MB."""
    body: list[Any] = [[], {"inputs": {"x": [[element] * 500_000, [element] * 500_000]}}, None]
    packed = (
        msgpack.packb(body)
        if content == MSGPACK
        else json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    )
    raw = json.dumps(
        {
            "body": base64.b64encode(packed).decode(),
            "headers": {"id": "one", "task": "inferq.infer"},
            "properties": {"body_encoding": "base64"},
            "content-type": content,
        }
    ).encode()
    tracemalloc.start()
    try:
        inputs = codec.decode_body(codec.decode_envelope(raw)).kwargs["inputs"]
        assert codec.decode_tensor("x", inputs["x"], "string").shape == (2, 500_000)
        assert tracemalloc.get_traced_memory()[1] < 40 * len(raw) + (16 << 20)
    finally:
        tracemalloc.stop()


def test_one_long_string_among_many_short_ones_takes_its_own_memory_only() -> None:
    array = of(*["a"] * 10_000, "b" * 1_000_000)
    data = pack_text(array)
    tracemalloc.start()
    try:
        got = unpack_text("string", data, array.shape)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert same(got, array)


# --- limits and what is shown --------------------------------------------------------------------


@pytest.mark.parametrize("element", ["a", "ü", "猫", b"\xff"])
def test_limits_count_the_bytes_of_text_and_four_for_each_offset(element: Any) -> None:
    kind = "bytes" if isinstance(element, bytes) else "string"
    array = of(*[element] * 10)
    size = 4 * 11 + 10 * len(element if isinstance(element, bytes) else element.encode())
    assert nbytes({"x": array}) == size
    assert InputCheck(advert(kind, limit=size))({"x": array}) == 10
    with pytest.raises(PayloadTooLarge, match=f"are {size} bytes; expected at most {size - 1}"):
        InputCheck(advert(kind, limit=size - 1))({"x": array})


def test_a_long_string_is_claim_checked_by_its_bytes() -> None:
    encoder = Encoder("m", Names(), "c", "1@host")
    for count, checked in ((INLINE_LIMIT - 8, True), (INLINE_LIMIT - 9, False)):
        array = of("a" * count)
        outgoing = encoder.encode({"x": array}, 0, 0.0, None)
        assert [data for _, data in outgoing.payloads] == ([pack_text(array)] if checked else [])
        body = codec.decode_body(codec.decode_envelope(outgoing.message))
        tensor = body.kwargs["inputs"]["x"]
        if checked:
            assert tensor["size"] == count + 8
            assert codec.reference_of(tensor) == outgoing.payloads[0][0]
        else:
            assert same(codec.decode_tensor("x", tensor, "string"), array)


def test_what_is_shown_of_text_is_its_shape_and_never_what_it_says() -> None:
    assert describe(of("secret", "b")) == "<2 string>"
    assert describe(of(b"secret", shape=(1, 1))) == "<1x1 bytes>"
    outgoing = Encoder("m", Names(), "c", "1@host").encode({"x": of("secret")}, 0, 0.0, None)
    shown = json.loads(outgoing.message)["headers"]["kwargsrepr"]
    assert shown == "{'model': 'm', x=<1 string>}"


def test_an_announcement_with_text_is_read_and_one_of_a_dtype_unknown_is_refused() -> None:
    for dtype in ("string", "bytes"):
        assert codec.decode_advert(codec.encode_advert(advert(dtype))) == advert(dtype)
        assert DTYPES[dtype] == OBJECT
    with pytest.raises(ConfigError, match="input 'x' of dtype 'text'"):
        codec.decode_advert(codec.encode_advert(advert("text")))
