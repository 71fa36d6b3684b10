"""The two serialisers of message bodies and results: msgpack and JSON, never pickle or yaml."""

from __future__ import annotations

import binascii
import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeGuard

import msgspec
import pybase64

from inferq.shared.codec.weight import BYTES_EACH, FREE, too_heavy
from inferq.shared.schema import MAX_DIMS

MSGPACK: Final = "application/x-msgpack"
JSON: Final = "application/json"

_json_decoder = msgspec.json.Decoder()
# msgspec's msgpack: the same bytes as the msgpack package, in half the time.
pack = msgspec.msgpack.Encoder().encode
_msgpack_decoder = msgspec.msgpack.Decoder()


class MalformedMessage(ValueError):
    """The bytes are no request to answer: not JSON, without an id, of an unknown content type."""


#: Longest `brief`, in characters.
_BRIEF_CHARS: Final = 80
_brief = reprlib.Repr()
_brief.maxlevel = 3
_brief.maxstring = _brief.maxother = 60


def unpack(data: bytes) -> Any:
    """Decode msgpack. ValueError or msgspec.DecodeError if it is none, or too heavy."""
    if len(data) > FREE and too_heavy(data):
        raise ValueError(
            f"its {len(data)} bytes hold too many lists and maps; "
            f"expected at most {FREE}, and one more for every {BYTES_EACH} bytes"
        )
    return _msgpack_decoder.decode(data)


def brief(value: object) -> str:
    """The beginning of `value`, whatever that is, for a message; its length is bounded."""
    return _brief.repr(value)[:_BRIEF_CHARS]


def from_json(data: bytes) -> Any:
    """Decode JSON as Python writes it. ValueError or msgspec.DecodeError if it is none."""
    try:
        return _json_decoder.decode(data)
    except msgspec.DecodeError:
        # NaN and Infinity are no JSON, but Python's json, and so Celery, writes and reads them. It
        # also accepts half a surrogate, which no other serialiser takes: encode raises.
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()
        return value


def kombu_bytes(data: Mapping[str, Any]) -> object:
    """Bytes as kombu's JSON writes them: it does so wherever a program puts bytes into a task.

    `data` itself, if it is no such thing.
    """
    match data:
        case {"__type__": "base64", "__value__": str(text)}:
            try:
                return pybase64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                return text
        case {"__type__": "bytes", "__value__": str(text)}:
            return text.encode()
    return data


def is_shape(shape: object) -> TypeGuard[Sequence[int]]:
    """Whether `shape`, of a message, is one that an array can have."""
    return (
        isinstance(shape, list | tuple)
        and len(shape) <= MAX_DIMS
        and all(type(size) is int and size >= 0 for size in shape)
    )
