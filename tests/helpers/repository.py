"""Model repositories for tests, and requests for the models in them."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numpy as np

from inferq.shared import codec
from inferq.shared.names import queue_of
from inferq.shared.schema import Array

FAKE = """\
engine = "fake"
{knobs}
[fake]
inputs = [{{ name = "x", dtype = "float32", shape = ["batch", {width}] }}]
{fake}
"""


def fake_model(root: Path, name: str, *, knobs: str = "", fake: str = "", width: int = 4) -> None:
    """An echoing model in the repository `root`; `knobs` and `fake` are lines of its model.toml."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(FAKE.format(knobs=knobs, fake=fake, width=width))


def numbered(n: float, width: int = 4) -> Array:
    """An input that can be told from all others."""
    return np.full((1, width), n, np.float32)


def message(model: str, x: Array, request_id: str | None = None, **given: Any) -> tuple[str, bytes]:
    """A request's id and its message, as the producer builds it."""
    request_id = request_id or str(uuid.uuid4())
    options = {"priority": 0, "sent_ms": 0.0, "deadline_ms": None, "shown": "x", **given}
    encoder = codec.RequestEncoder(queue_of(model), "test@loopback", None)
    return request_id, encoder.encode(request_id, model, {"x": codec.encode_tensor(x)}, **options)
