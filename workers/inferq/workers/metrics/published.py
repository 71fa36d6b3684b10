"""Publishes each worker's `WorkerStats` in Redis, and reads those of all workers at once.

They are stored under ``stats:<i>``, in msgpack, every `EVERY_S` seconds, and expire after
`EXPIRES_S`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec
import redis
from redis.exceptions import RedisError

from inferq.shared.names import Names
from inferq.workers.claims import replies
from inferq.workers.data_plane.counts import WorkerStats
from inferq.workers.process.periodic import Periodic

logger = logging.getLogger(__name__)

EVERY_S: Final = 2.0
EXPIRES_S: Final = 15
#: Longer values are not read; this is enough for several thousand models.
MAX_BYTES: Final = 8 * 1024 * 1024


class StatsPublisher:
    """Publishes what `take` returns, from a thread of its own; nothing without an incarnation."""

    def __init__(self, client: redis.Redis, names: Names, take: Callable[[], WorkerStats]) -> None:
        self._client = client
        self._names = names
        self._take = take
        #: The incarnation whose stats were written last.
        self._written = ""
        #: Model → requests answered until `_answered_at` (monotonic s); None: not taken yet.
        self._answered: dict[str, int] = {}
        self._answered_at: float | None = None
        self.loop = Periodic(
            "stats",
            self._publish,
            every_s=EVERY_S,
            failing="stats are not published",
            logger=logger,
        )

    def start(self) -> None:
        self.loop.start()

    def stop(self) -> None:
        """Stop, and remove the worker's stats from Redis."""
        self.loop.stop()
        self._forget("")

    def _publish(self) -> None:
        stats = self._take()
        if not stats.incarnation:
            return
        self._forget(stats.incarnation)
        stats.rates = self._rates(stats)
        try:
            key = self._names.stats(stats.incarnation)
            self._client.set(key, msgspec.msgpack.encode(stats), ex=EXPIRES_S)
        except RedisError as problem:  # Redis is away or full; others log it
            logger.debug("stats are not published: %s", problem)
        else:
            self._written = stats.incarnation

    def _rates(self, stats: WorkerStats) -> dict[str, float]:
        before, since = self._answered, self._answered_at
        self._answered = {model.model: model.answered for model in stats.models}
        self._answered_at = now = time.monotonic()  # the wall clock may be set meanwhile
        if since is None or now <= since:
            return {}
        took = now - since
        return {name: (count - before[name]) / took for name, count in self._answered.items()}

    def _forget(self, incarnation: str) -> None:
        """Remove the stats of an incarnation other than `incarnation`."""
        if self._written and self._written != incarnation:
            with suppress(RedisError):  # it expires
                self._client.delete(self._names.stats(self._written))
            self._written = ""


def read_stats(
    client: redis.Redis, names: Names, *, within_s: float = EXPIRES_S
) -> list[WorkerStats]:
    """What the live workers published in the last `within_s` seconds, by node.

    Stats that cannot be decoded are left out. Raises redis' errors. It takes two round trips;
    workers of the protocol version before are included.
    """
    with client.pipeline(transaction=False) as pipe:
        for each in names.all_protocols():
            pipe.zrange(each.leases, 0, -1)
        leases = replies.of_each(pipe)
    with client.pipeline(transaction=False) as pipe:
        for each, incarnations in zip(names.all_protocols(), leases, strict=True):
            for incarnation in incarnations or ():
                key = each.stats(incarnation.decode(errors="replace"))
                pipe.pttl(key)
                pipe.getrange(key, 0, MAX_BYTES - 1)
        told = replies.of_each(pipe)
    oldest_ms = (EXPIRES_S - within_s) * 1000
    fresh = [raw for ttl, raw in zip(told[::2], told[1::2], strict=True) if ttl >= oldest_ms]
    stats = (_decode(raw) for raw in fresh if raw)
    return sorted((each for each in stats if each is not None), key=lambda each: each.node)


def read_rates(client: redis.Redis, names: Names) -> dict[str, float]:
    """Model → requests per second that all its workers together have answered.

    Each worker publishes it for the `EVERY_S` before. Models without a figure are absent. Raises
    redis' errors.
    """
    rates: dict[str, float] = {}
    for stats in read_stats(client, names, within_s=2 * EVERY_S):
        for model, rate in stats.rates.items():
            rates[model] = rates.get(model, 0.0) + rate
    return rates


def _decode(raw: bytes) -> WorkerStats | None:
    try:
        stats = msgspec.msgpack.decode(raw, type=WorkerStats)
    except (
        msgspec.DecodeError,
        UnicodeDecodeError,
        RecursionError,
    ):  # not the stats of a worker of inferq
        return None
    return stats if math.isfinite(stats.at) and math.isfinite(stats.started_at) else None
