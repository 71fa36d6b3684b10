"""Messages for a queue, right or wrong in every part, built by hand rather than by our encoder."""

from __future__ import annotations

import base64
import json
import uuid
from typing import Any

import msgpack
import numpy as np

from inferq.shared.schema import Array

MSGPACK = "application/x-msgpack"
JSON = "application/json"


def tensor(x: Array, **changed: Any) -> dict[str, Any]:
    """`x` as msgpack carries it, with fields `changed`; a field that is `...` is left out."""
    wire = {"dtype": x.dtype.str, "shape": list(x.shape), "data": x.tobytes(), **changed}
    return {name: value for name, value in wire.items() if value is not ...}


def body(kwargs: object, *, args: object = (), embed: object = None) -> bytes:
    """A msgpack body."""
    packed: bytes = msgpack.packb([args, kwargs, embed])
    return packed


def envelope(
    packed: bytes,
    *,
    kind: str = MSGPACK,
    properties: dict[str, Any] | None = None,
    headers: dict[str, Any] | None = None,
    request_id: str | None = None,
    **fields: Any,
) -> bytes:
    """A message around a body; `headers`, `properties` and `fields` add to or replace its own."""
    request_id = request_id or str(uuid.uuid4())
    return json.dumps(
        {
            "body": base64.b64encode(packed).decode(),
            "content-encoding": "binary",
            "content-type": kind,
            "headers": {"id": request_id, "task": "inferq.infer", **(headers or {})},
            "properties": {
                "body_encoding": "base64",
                "delivery_tag": request_id,
                "delivery_info": {"exchange": "", "routing_key": "inferq.m"},
                **(properties or {}),
            },
            **fields,
        }
    ).encode()


def request(n: float, *, embed: object = None, **given: Any) -> bytes:
    """A good request of a fake model of helpers.repository, numbered `n`, unless `given` says."""
    x = np.full((1, 4), n, np.float32)
    return envelope(body({"inputs": {"x": tensor(x)}}, embed=embed), **given)
