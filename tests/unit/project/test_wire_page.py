"""The message that docs/wire.md shows is one, and has what our client writes."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from inferq.producer.outgoing import Encoder
from inferq.shared import codec
from inferq.shared.names import Names
from inferq.shared.schema import WIRE_DTYPES

PAGE = Path(__file__).parents[3] / "docs" / "wire.md"
ID = "0b4f7d5e-6a51-4c39-9d5c-0a8f0a1b2c3d"
TENSOR = {"dtype": "<f4", "shape": [1, 3], "data": b"0" * 12}
BODY = [[], {"model": "colours", "inputs": {"rgb": TENSOR}}, {}]


@pytest.fixture
def shown() -> dict[str, Any]:
    """The message of the page, with what stands in angle brackets filled in."""
    (block,) = re.findall(r"^```json\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    body = base64.b64encode(msgpack.packb(BODY)).decode()
    block = re.sub(r"<base64[^>]*>", body, block)
    block = re.sub(r"<(a UUID|the same|the id)>", ID, block)
    block = block.replace("<model>", "colours").replace("<client>", "c")
    message: dict[str, Any] = json.loads(block)
    return message


def test_the_message_that_is_shown_is_read_as_a_request(shown: dict[str, Any]) -> None:
    envelope = codec.decode_envelope(json.dumps(shown).encode())
    assert envelope.headers.id == ID
    assert Names().is_reply(envelope.headers.inferq_reply or "")
    body = codec.decode_body(envelope)
    tensor = body.kwargs["inputs"]["rgb"]
    assert codec.decode_tensor("rgb", tensor).shape == (1, 3)


def test_the_client_writes_all_that_is_shown(shown: dict[str, Any]) -> None:
    encoder = Encoder("colours", Names(), "c", "1@host")
    sent = json.loads(encoder.encode({"rgb": np.zeros((1, 3), np.float32)}, 0, 0.0, None).message)
    assert shown.keys() <= sent.keys()
    for part in ("headers", "properties"):
        assert shown[part].keys() <= sent[part].keys()
    assert shown["properties"]["delivery_info"] == sent["properties"]["delivery_info"]
    assert shown["content-type"] == sent["content-type"]


def test_every_dtype_that_travels_is_named() -> None:
    _, _, after = PAGE.read_text().partition("dtypes are ")
    named = set(re.findall(r"`([<|]\w\d+)`", after.partition("inferq's own")[0]))
    assert named == set(WIRE_DTYPES)
