"""Nested lists cost memory in proportion to their bytes, and honest ones are exact.

At a worker they come in messages, in msgpack or JSON; at a client they are what the caller passes.
"""

from __future__ import annotations

import base64
import json
import math
import struct
import tracemalloc
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgpack
import numpy as np
import pytest
from helpers.envelopes import JSON, MSGPACK, envelope
from hypothesis import given
from hypothesis import strategies as st

from inferq.producer.outgoing import arrays_of
from inferq.shared import codec
from inferq.shared.codec import weight
from inferq.shared.errors import InferqError, InvalidInput
from inferq.shared.schema import NUMBERS, Array

#: Most bytes that decoding takes for each byte of a message, and besides: of the lists and maps
#: that any message may hold.
FACTOR: Final = 40
BESIDES: Final = 16 << 20
#: Of what is counted, and of all else.
HEAVY: Final = 1_500_000
SIZE: Final = 300_000


def peak(work: Callable[[], object]) -> int:
    """The most memory that `work` has at a time, in bytes."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def array_of(item: bytes, size: int = SIZE) -> bytes:
    """A msgpack array of so many equal items that it has about `size` bytes."""
    count = size // len(item)
    return b"\xdd" + struct.pack(">I", count) + item * count


def in_place_of_x(raw: bytes) -> bytes:
    """A message whose input x is the msgpack `raw`."""
    return envelope(b"\x93\x90\x81\xa6inputs\x81\xa1x" + raw + b"\xc0")


def written(value: str) -> bytes:
    """A message whose input x is the JSON `value`."""
    return envelope(f'[[],{{"inputs":{{"x":{value}}}}},null]'.encode(), kind=JSON)


def many(item: str, size: int = SIZE) -> str:
    return "[" + ",".join([item] * (size // (len(item) + 1))) + "]"


LONG_BESIDE_MANY: Final = ["a"] * 16_000 + ["b" * 20_000]
BOMBS: Final = {
    "one long string beside many": in_place_of_x(msgpack.packb(LONG_BESIDE_MANY)),
    "one long string beside many, in JSON": written(json.dumps(LONG_BESIDE_MANY)),
    "long strings in rows": in_place_of_x(
        msgpack.packb([[*"ab", "c" * n] for n in (1, 1, 30_000)] * 300)
    ),
    "bytes": in_place_of_x(msgpack.packb([b"a"] * 16_000 + [b"b" * 20_000])),
    "empty lists": in_place_of_x(array_of(b"\x90", HEAVY)),
    "empty lists, in JSON": written(many("[]")),
    "lists of one": in_place_of_x(array_of(b"\x91\x01", HEAVY)),
    "lists of one, in JSON": written(many("[1]")),
    "lists of empty lists": in_place_of_x(array_of(b"\x94\x90\x90\x90\x90", HEAVY)),
    "empty maps": in_place_of_x(array_of(b"\x80", HEAVY)),
    "empty maps, in JSON": written(many("{}")),
    "small maps": in_place_of_x(array_of(b"\x81\xa0\x00", HEAVY)),
    "small maps, in JSON": written(many('{"":0}')),
    "maps in maps": in_place_of_x(array_of(b"\x81\x00" * 400 + b"\x00", HEAVY)),
    "maps in maps, just few enough": in_place_of_x(array_of(b"\x81\x00" * 400 + b"\x00", 170_000)),
    "maps in maps, in JSON": written(many('{"":' * 400 + "0" + "}" * 400)),
    "lists in lists": in_place_of_x(array_of(b"\x91" * 400 + b"\x00", HEAVY)),
    "as many maps as are allowed": in_place_of_x(array_of(b"\x81\x00\xa3abc", HEAVY)),
    "nothing, very often": in_place_of_x(array_of(b"\xc0")),
    "nothing, in JSON": written(many("null")),
    "short strings": in_place_of_x(array_of(b"\xa2ab")),
    "short strings, in JSON": written(many('"ab"')),
    "extensions": in_place_of_x(array_of(b"\xd4\x05\x00")),
    "integers of two bytes": in_place_of_x(array_of(b"\xcd\x10\x00")),
    "bits": in_place_of_x(array_of(b"\xc3")),
    "integers of 400 digits": written(many("9" * 400)),
    "not finite": written("[" + many("1.5")[1:-1] + ",NaN,Infinity]"),
    "one more number": in_place_of_x(msgpack.packb([[0.5] * 999] * 100 + [[0.5] * 1000])),
    "a string at the end": in_place_of_x(msgpack.packb([[0.5] * 1000] * 100 + [["x"] * 1000])),
    "a shape of lists": in_place_of_x(
        b"\x83\xa5dtype\xa3<f4\xa5shape" + array_of(b"\x90") + b"\xa4data\x91\x01"
    ),
    "a dtype of lists": in_place_of_x(
        b"\x83\xa5dtype" + array_of(b"\x91\xa2ab") + b"\xa5shape\x91\x01\xa4data\xc4\x01a"
    ),
    "data in base64": written(
        json.dumps({"dtype": "<f4", "shape": [1], "data": base64.b64encode(bytes(SIZE)).decode()})
    ),
    "a shape beyond the bytes": written(
        json.dumps({"dtype": "<f8", "shape": [2**31, 2**31], "data": "AAAA"})
    ),
}


def decode(message: bytes, dtype: str) -> Array:
    """A worker's way from a message to its tensor."""
    given = codec.decode_body(codec.decode_envelope(message)).kwargs["inputs"]
    return codec.decode_tensor("x", given["x"], dtype)


#: Of these the numbers are converted.
OF_NUMBERS: Final = (
    "lists of one, in JSON",
    "integers of two bytes",
    "bits",
    "not finite",
    "one more number",
    "one long string beside many",
)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in BOMBS]
    + [(name, dtype) for name in OF_NUMBERS for dtype in NUMBERS if dtype != "float32"],
)
def test_decoding_takes_memory_in_proportion_to_the_message(name: str, dtype: str) -> None:
    message = BOMBS[name]

    def work() -> None:
        try:
            array = decode(message, dtype)
        except InferqError as problem:
            assert len(str(problem)) < 1_000  # noqa: PT017 - either way is right
        else:
            assert array.dtype == NUMBERS[dtype]

    taken = peak(work)
    assert taken <= FACTOR * len(message) + BESIDES, f"{taken / len(message):.1f} for each byte"


ITSELF: Final[list[Any]] = []
ITSELF.append(ITSELF)
CALLERS: Final[dict[str, Any]] = {
    "strings": ["a", "b"],
    "a long string beside many": LONG_BESIDE_MANY,
    "rows of strings": [LONG_BESIDE_MANY],
    "bytes": [b"a" * 10_000, *[b"b"] * 10_000],
    "NumPy's strings": [np.str_("a"), np.str_("b" * 10_000)],
    "nothing": [None],
    "a number and nothing": [1.0, None],
    "objects": [object()],
    "a map": [{"a": 1}],
    "a set": [{1, 2}],
    "ragged": [[1], [1, 2]],
    "ragged further in": [[[1]], [[1, 2]]],
    "a number beside a list": [1, [2]],
    "1000 deep": json.loads("[" * 900 + "1" + "]" * 900),
    "17 deep": json.loads("[" * 17 + "1" + "]" * 17),
    "itself": ITSELF,
    "an integer of 65 bits": [2**64],
    "an integer of 20,000 bits": [[1.0, 2**20_000]],
    "times": [np.datetime64(0, "s")],
    "arrays of strings": [np.array(["a"])],
    "arrays that differ": [np.zeros(2), np.zeros(3)],
    "arrays of objects": [np.array([None])],
    "complex numbers": [1 + 2j],
    "NumPy's complex numbers": [np.complex64(1j), 2.0],
    "a deque of strings": deque(LONG_BESIDE_MANY),
}


@pytest.mark.parametrize("known", [True, False], ids=["an input", "no input of the model"])
@pytest.mark.parametrize("value", CALLERS.values(), ids=CALLERS)
def test_what_a_caller_puts_into_lists_is_refused_by_name_at_once(value: Any, known: bool) -> None:
    dtypes = {"x": NUMBERS["float32"]} if known else {}
    if not known and any(isinstance(each, complex | np.complexfloating) for each in value):
        pytest.skip("complex numbers travel, where the model's dtype is not known to be another")

    def work() -> None:
        with pytest.raises(InvalidInput, match="'x'"):
            arrays_of(dtypes, {"x": value})

    assert peak(work) < 4 << 20


@pytest.mark.parametrize("rows", [0, 1, 5, 100_000])
def test_empty_lists_are_the_shape_that_they_are(rows: int) -> None:
    array = codec.decode_tensor("x", [[] for _ in range(rows)], "float32")
    assert array.shape == ((rows, 0) if rows else (0,))


LEAVES = (
    0, 1, -1, True, 0.5, 2.0, -0.0, math.nan, math.inf, 127, 128, 255, 256, -129, 65_504, 65_520,
    2**24 + 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1,
    2.0**63, 2.0**64, 1e308, 3.5e38, 1e-320, np.float32(1.1), np.uint64(2**64 - 1), np.int8(3),
)  # fmt: skip


@given(
    st.lists(st.sampled_from(LEAVES), min_size=1, max_size=6),
    st.sampled_from(sorted(NUMBERS)),
    st.integers(1, 3),
)
def test_numbers_in_lists_are_kept_or_refused_and_never_become_others(
    numbers: list[Any], dtype: str, rows: int
) -> None:
    try:
        (got,) = {tuple(row) for row in codec.decode_tensor("x", [numbers] * rows, dtype).tolist()}
    except InvalidInput:
        holds = all(_holds(dtype, number) for number in numbers)
        whole = [int(number) for number in numbers if math.isfinite(number)]
        assert not holds or min(whole) < -(2**63) or max(whole) >= 2**64
        return
    except ValueError:  # several rows: some number is no number
        return
    for number, kept in zip(numbers, got, strict=True):
        if NUMBERS[dtype].kind in "biu":
            assert kept == number
        elif math.isnan(number):
            assert np.isnan(kept)
        else:
            with np.errstate(all="ignore"):
                assert kept == np.float64(float(number)).astype(NUMBERS[dtype])
            assert np.isinf(kept) == math.isinf(number)


def _holds(dtype: str, number: Any) -> bool:
    kind = NUMBERS[dtype]
    if kind.kind in "iu":
        info = np.iinfo(kind)
        whole = math.isfinite(number) and number == int(number)
        return whole and info.min <= int(number) <= info.max
    if kind.kind == "b":
        return bool(number in (0, 1))
    with np.errstate(all="ignore"):
        rounded = np.float64(float(number)).astype(kind)
    return not np.isinf(rounded) or math.isinf(number)


@pytest.mark.parametrize(
    ("lists", "dtype", "expected"),
    [
        ([2**53 + 1, 1.0], "int64", np.array([2**53 + 1, 1])),
        ([2**53 + 1, 2**64 - 1], "uint64", np.array([2**53 + 1, 2**64 - 1], np.uint64)),
        ([True, 2**53 + 1], "int64", np.array([1, 2**53 + 1])),
        ([np.float64(1.0), 2**53 + 1], "int64", np.array([1, 2**53 + 1])),
        ([np.array([1.0]), [2**53 + 1]], "int64", np.array([[1], [2**53 + 1]])),
        ([(1, 2), [3, 4]], "uint8", np.array([[1, 2], [3, 4]], np.uint8)),
        ([range(3), np.arange(3)], "float32", np.array([[0, 1, 2]] * 2, np.float32)),
        ([np.float16(1.5)], None, np.array([1.5], np.float16)),
        ([[1, 2.5]], None, np.array([[1, 2.5]])),
        ([True], None, np.array([True])),
    ],
)
def test_lists_of_several_kinds_of_numbers_are_exact(
    lists: Any, dtype: str | None, expected: Array
) -> None:
    got = codec.decode_tensor("x", lists, dtype)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", [MSGPACK, JSON])
def test_honest_lists_of_many_rows_are_read(kind: str) -> None:
    rows = np.arange(120_000, dtype=np.float64).reshape(-1, 1) / 7
    content: list[Any] = [[], {"inputs": {"x": rows.tolist()}}, None]
    packed = msgpack.packb(content) if kind == MSGPACK else json.dumps(content).encode()
    np.testing.assert_array_equal(decode(envelope(packed, kind=kind), "float64"), rows)


# --- what msgpack would weigh -------------------------------------------------------------------

PACKED = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary()
    | st.text()
    | st.binary(max_size=20).map(lambda data: msgpack.ExtType(5, data)),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20),
    max_leaves=40,
)


def containers(value: object) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(containers, value.values()))
    return 1 + sum(map(containers, value)) if isinstance(value, list) else 0


@given(PACKED, st.booleans())
def test_lists_and_maps_are_counted_without_decoding_them(value: Any, single: bool) -> None:
    try:
        data = msgpack.packb(value, use_single_float=single)
    except OverflowError:
        return
    for numbers in (weight._SOME, weight._MANY):
        assert weight._count(data, 1 << 30, len(data) + 1, numbers) == containers(value)


@given(st.binary(max_size=300))
def test_any_bytes_are_counted_to_an_end(data: bytes) -> None:
    assert weight._count(data, 1 << 30, len(data) + 1, weight._MANY) is not None


def test_as_many_lists_as_are_allowed_are_read_and_one_more_is_not() -> None:
    most = weight.FREE + (weight.FREE // (weight.BYTES_EACH - 1)) - 10
    assert codec.unpack(msgpack.packb([[]] * most)) == [[]] * most
    with pytest.raises(ValueError, match="too many lists and maps"):
        codec.unpack(msgpack.packb([[]] * (most + 100)))
