"""The two serialisers of message bodies and results: msgpack and JSON, never pickle or yaml."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

MSGPACK: Final = "application/x-msgpack"
JSON: Final = "application/json"

_json_decoder = msgspec.json.Decoder()
# msgspec's msgpack: the same bytes as the msgpack package, in half the time.
pack = msgspec.msgpack.Encoder().encode
unpack = msgspec.msgpack.Decoder().decode


class MalformedMessage(ValueError):
    """The bytes are no request that could be answered: not JSON, no id, an unknown content type."""


def from_json(data: bytes) -> Any:
    """Whatever Python's own JSON writes. ValueError or msgspec.DecodeError if it is none."""
    try:
        return _json_decoder.decode(data)
    except msgspec.DecodeError:
        # NaN and Infinity are no JSON, but Python's, and so Celery's, writes and reads them. It
        # also lets half a surrogate pass, which no other serialiser takes: encode raises.
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()
        return value
