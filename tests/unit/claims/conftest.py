"""A claim as a worker has it in Redis, for the tests of how its requests are settled."""

from __future__ import annotations

import pytest
from helpers.settlements import NAMES, I
from redis import Redis

from inferq.workers.claims.claim import Claim


@pytest.fixture
def claim(redis: Redis) -> Claim:
    """A claim of three requests in Redis, as the data plane holds it."""
    claim = Claim(NAMES.claim(I, 1, "m", 0), "m", 0, 3)
    redis.lpush(claim.key, b"first", b"second", b"third")
    redis.hset(NAMES.claims(I), claim.key, 1)
    return claim
