"""What stands in Redis of a request, read as any client could."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import redis as redis_py

from helpers.repository import numbered
from helpers.wait import until
from inferq.shared import codec
from inferq.shared.names import Names
from inferq.shared.schema import Array

NAMES = Names()

#: Nonblank messages of all claims of one incarnation, counted at one instant.
_HELD = """
local held = 0
for _, key in ipairs(redis.call('HKEYS', KEYS[1])) do
  for _, message in ipairs(redis.call('LRANGE', key, 0, -1)) do
    if message ~= '' then held = held + 1 end
  end
end
return held
"""


def meta_of(redis: redis_py.Redis, request_id: str, timeout: float = 15.0) -> dict[str, Any]:
    """The stored result meta of a request, waited for."""

    def stored() -> bytes | None:
        data = redis.get(NAMES.meta(request_id))
        return data if isinstance(data, bytes) else None

    return codec.decode_meta(until(stored, timeout, f"a result of {request_id}") or b"")


def outputs_of(redis: redis_py.Redis, request_id: str, timeout: float = 15.0) -> dict[str, Array]:
    """The outputs of a request that succeeds, waited for."""
    meta = meta_of(redis, request_id, timeout)
    assert meta["status"] == "SUCCESS", meta
    return codec.decode_outputs(meta["result"])


def expect(redis: redis_py.Redis, sent: dict[str, float], timeout: float = 15.0) -> None:
    """Each of the requests `sent` (see repository.push) is answered with what it holds."""
    for request_id, value in sent.items():
        np.testing.assert_array_equal(outputs_of(redis, request_id, timeout)["x"], numbered(value))


def dead_letters(redis: redis_py.Redis, model: str) -> list[dict[str, Any]]:
    """A model's dead letters, newest first."""
    found = redis.lrange(NAMES.dead(model), 0, -1)
    return [msgpack.unpackb(letter) for letter in found if isinstance(letter, bytes)]


def held_by(redis: redis_py.Redis, incarnation: str) -> int:
    """How many unsettled requests a worker's incarnation holds at this instant."""
    return int(str(redis.eval(_HELD, 1, NAMES.claims(incarnation))))


def nothing_is_held(redis: redis_py.Redis) -> bool:
    """Whether no worker holds a claim or computes."""
    return not redis.keys("inferq:1:claim*") and not redis.keys("inferq:1:running:*")
