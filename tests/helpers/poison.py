"""Results, and news of them, that mean harm: whoever has the password may store or send them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Final

import msgpack

DEEP: Final = 200_000


def packed(**changed: Any) -> bytes:
    """A SUCCESS meta in msgpack, with fields `changed`, which may be `Raw`."""
    fields = {
        "status": "SUCCESS", "result": {}, "traceback": None, "children": [], "task_id": "x",
        "date_done": "2026-01-01T00:00:00+00:00", **changed,
    }  # fmt: skip
    body = b"".join(
        msgpack.packb(name) + (value.raw if isinstance(value, Raw) else msgpack.packb(value))
        for name, value in fields.items()
    )
    return bytes([0x80 | len(fields)]) + body


class Raw:
    """Msgpack that is written by hand."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw


LISTS: Final = Raw(b"\x91" * DEEP + b"\xc0")
MAPS: Final = Raw(b"\x81\xa1a" * DEEP + b"\xc0")
WIDE: Final = Raw(b"\xdd" + struct.pack(">I", 1 << 20) + b"\x90" * (1 << 20))
#: As deep as msgpack is read, and deeper than Python tells it.
ALMOST: Final = json.loads("[" * 900 + "]" * 900)
TENSOR: Final = {"dtype": "<f4", "shape": [1], "data": bytes(4)}

RESULTS: Final[Mapping[str, bytes]] = {
    "nothing": b"",
    "one byte that is none": b"\xc1",
    "a number": b"\x05",
    "deep lists": LISTS.raw,
    "deep maps": MAPS.raw,
    "deep JSON": b"[" * DEEP,
    "deep JSON in a meta": b'{"status":"SUCCESS","result":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "a deep result": packed(result=LISTS),
    "a result of deep maps": packed(result=MAPS),
    "a deep receipt": packed(result={"x": TENSOR}, receipt=LISTS),
    "deep children": packed(result={"x": TENSOR}, children=MAPS),
    "a deep status": packed(status=LISTS),
    "a status of lists": packed(status=[["SUCCESS"]]),
    "a failure that is deep": packed(status="FAILURE", result=LISTS),
    "a message that is deep": packed(status="FAILURE", result={"exc_message": ALMOST}),
    "a class that is deep": packed(
        status="FAILURE", result={"exc_type": ALMOST, "exc_message": ["x"]}
    ),
    "details that are deep": packed(
        status="FAILURE", result={"code": "invalid_input", "detail": {"x": ALMOST}}
    ),
    "a code that is deep": packed(status="FAILURE", result={"code": ALMOST}),
    "a million lists": packed(result=WIDE),
    "a message of a million lists": packed(status="FAILURE", result=WIDE),
    "a tensor of lists": packed(result={"x": ALMOST}),
    "a deep shape": packed(result={"x": {**TENSOR, "shape": ALMOST}}),
    "a negative shape": packed(result={"x": {**TENSOR, "shape": [-1]}}),
    "a shape beyond all": packed(result={"x": {**TENSOR, "shape": [2**64 - 1, 2**64 - 1]}}),
    "a shape of nothing": packed(result={"x": {**TENSOR, "shape": [0, 2**63], "data": b""}}),
    "a dtype that is none": packed(result={"x": {**TENSOR, "dtype": "O"}}),
    "strings for numbers": packed(result={"x": ["a"] * 9_999 + ["b" * 9_999]}),
    "4 billion tensors": packed(result=Raw(b"\xdf\xff\xff\xff\xff")),
    "text that is none": packed(result=Raw(b"\xa2\xff\xfe")),
    "an extension": packed(result=msgpack.ExtType(5, b"x")),
    "a time that is none": packed(result=Raw(b"\xd7\xff" + b"\xff" * 8)),
    "16 MB that are none": packed(status="FAILURE", result="x" * (16 << 20)),
}

#: What is sent on a client's reply channel.
NEWS: Final[tuple[bytes, ...]] = (
    b"", b"\xc1", LISTS.raw, MAPS.raw, WIDE.raw, b"\xdd\xff\xff\xff\xff", b"\x92\xa1a",
    msgpack.packb(["someone-elses", 5, None, b"x", [["x"]], {"a": 1}, 2.5]),
    msgpack.packb({"a": 1}), msgpack.packb("text"), b"\x91\xa2\xff\xfe",
    msgpack.packb(["x"] * 100_000),
)  # fmt: skip
