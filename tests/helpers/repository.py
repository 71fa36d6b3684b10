"""Model repositories for tests, and requests for the models in them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import redis as redis_py

from inferq.shared import codec
from inferq.shared.names import Names, queue_of
from inferq.shared.schema import Array, Signature
from inferq.workers.models.config import ModelConfig
from inferq.workers.models.spec import ModelSpec

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


TEXT = """\
engine = "fake"
{knobs}
[fake]
inputs = [{{ name = "x", dtype = "{dtype}", shape = [{shape}] }}]
"""


def text_model(
    root: Path, name: str, dtype: str = "string", shape: str = '"batch"', knobs: str = ""
) -> None:
    """The same of strings, or bytes."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(TEXT.format(dtype=dtype, shape=shape, knobs=knobs))


def spec_of(
    path: Path | None,
    table: Mapping[str, Any],
    *,
    lanes: int = 1,
    most: int = 8,
    buckets: tuple[int, ...] = (),
) -> ModelSpec:
    """What an engine needs to know of the model in `path`, without a repository."""
    return ModelSpec(
        name="model",
        version=1,
        versions=(1,),
        path=path,
        config=ModelConfig(lanes=lanes, buckets=buckets),
        engine_table=table,
        signature=Signature((), ()),
        max_batch_size=most,
        labels=(),
    )


def numbered(n: float, width: int = 4) -> Array:
    """An input that can be told from all others."""
    return np.full((1, width), n, np.float32)


def message(model: str, x: Array, request_id: str | None = None, **given: Any) -> tuple[str, bytes]:
    """A request's id and its message, as the producer builds it."""
    request_id = request_id or str(uuid.uuid4())
    return request_id, _encode(request_id, model, codec.encode_tensor(x), given)


def push(redis: redis_py.Redis, model: str, values: Iterable[float]) -> dict[str, float]:
    """Queue a request for each of `values`; their ids and what they hold."""
    sent: dict[str, float] = {}
    for value in values:
        request_id, raw = message(model, numbered(value))
        sent[request_id] = value
        redis.lpush(Names().queue(model), raw)
    return sent


def claim_checked(
    redis: redis_py.Redis, model: str, x: Array, **given: Any
) -> tuple[str, bytes, str]:
    """A request's id, its message and the key of its payload, which is stored."""
    request_id = str(uuid.uuid4())
    key = Names().payload(request_id, "x")
    redis.set(key, x.tobytes(), ex=3600)
    return request_id, _encode(request_id, model, codec.encode_reference(x, key), given), key


def _encode(request_id: str, model: str, x: dict[str, Any], given: dict[str, Any]) -> bytes:
    options = {"priority": 0, "sent_ms": 0.0, "deadline_ms": None, "shown": "x", **given}
    encoder = codec.RequestEncoder(queue_of(model), "test@loopback", None)
    return encoder.encode(request_id, model, {"x": x}, **options)
