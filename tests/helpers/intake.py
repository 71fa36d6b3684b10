"""An intake without a worker, and the messages that tests give it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from inferq.shared import codec
from inferq.shared.names import Names
from inferq.shared.schema import ModelAdvert, Signature, TensorSpec
from inferq.workers.batching.padding import Padding, PadRule
from inferq.workers.canvas.link_queues import LinkQueues
from inferq.workers.claims.claim import Claim, Slot
from inferq.workers.claims.verdicts import (
    Failed,
    Opened,
)
from inferq.workers.data_plane.intake import Intake

NAMES = Names()
NOW = 1_800_000_000_000.0
SLOT = Slot(Claim("k", "m", 3, 1), 0)
X = np.arange(4, dtype=np.float32).reshape(1, 4)
INPUTS = {"x": codec.encode_tensor(X)}
PLAIN = (TensorSpec("x", "float32", ("batch", 4)),)


def intake(
    *inputs: TensorSpec, revoked: frozenset[str] = frozenset(), limit: int = 1000, **pad: PadRule
) -> Intake:
    signature = Signature(inputs or PLAIN, inputs or PLAIN)
    advert = ModelAdvert(
        name="m",
        version=1,
        engine="fake",
        signature=signature,
        max_batch_size=8,
        batchable=True,
        max_queue_depth=0,
        max_request_bytes=limit,
        default_priority=0,
        default_timeout_ms=0,
        seconds_per_row=0.0,
    )
    padding = Padding(signature, pad)
    links = LinkQueues(NAMES)
    return Intake(advert, NAMES, padding, revoked.__contains__, lambda: NOW, links)


def message(
    inputs: object = None,
    *,
    args: list[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    embed: object = None,
    kind: str = codec.MSGPACK,
    **headers: Any,
) -> bytes:
    if kwargs is None:
        kwargs = {} if args else {"model": "m", "inputs": INPUTS if inputs is None else inputs}
    body = [args or [], kwargs, embed]
    packed = json.dumps(body).encode() if kind == codec.JSON else msgpack.packb(body)
    return json.dumps(
        {
            "body": base64.b64encode(packed).decode(),
            "headers": {"id": "one", "task": "inferq.infer", **headers},
            "properties": {"body_encoding": "base64"},
            "content-type": kind,
        }
    ).encode()


def failure(found: object) -> Exception:
    assert isinstance(found, Failed), found
    return found.error


def opened(reader: Intake, raw: bytes) -> Opened:
    found = reader.open(SLOT, raw)
    assert isinstance(found, Opened), found
    return found


# --- claim check ---------------------------------------------------------------------------------

OWN = NAMES.payload("one", "x")
