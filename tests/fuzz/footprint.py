"""What a Redis keeps for ever: its keys without a time to live, by pattern."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import redis as redis_py

#: Bytes by which keys of one pattern may grow that are no more than before.
SLACK_BYTES: Final = 256 * 1024
#: What is another from run to run or from request to request.
_VARYING = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{16,}|\b\d+\b")


class Lasting:
    """Such keys at one instant: how many of each pattern, and their bytes."""

    def __init__(self, counts: Mapping[str, int], sizes: Mapping[str, int]) -> None:
        self.counts = counts
        self.sizes = sizes

    def growth_since(self, before: Lasting) -> list[str]:
        """Each pattern of which there are more keys, or much more in them."""
        told = []
        for pattern in sorted(self.counts):
            more = self.counts[pattern] - before.counts.get(pattern, 0)
            grown = self.sizes[pattern] - before.sizes.get(pattern, 0)
            if more > 0 or grown > SLACK_BYTES:
                told.append(f"keys without TTL: {pattern} by {more} keys, {grown} bytes")
        return told


def lasting(redis: redis_py.Redis) -> Lasting:
    """What is there now."""
    keys: list[Any] = list(redis.scan_iter(count=5_000))
    with redis.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.ttl(key)
            pipe.memory_usage(key)
        told = pipe.execute()
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for key, ttl, size in zip(keys, told[::2], told[1::2], strict=True):
        if ttl == -1:
            pattern = pattern_of(key.decode("utf-8", "backslashreplace"))
            counts[pattern] += 1
            sizes[pattern] += size or 0
    return Lasting(counts, sizes)


def pattern_of(key: str) -> str:
    """`key` with * for what only tells it from others of its kind."""
    return _VARYING.sub("*", key)
