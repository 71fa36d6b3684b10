"""Each worker's `WorkerStats` in Redis, for whoever wants to look at all of them at once.

Under ``stats:<i>``, in msgpack, written every `EVERY_S` seconds and gone `EXPIRES_S` seconds after
the last time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec
import redis
from redis.exceptions import RedisError

from inferq.shared.names import Names
from inferq.workers.metrics.counts import WorkerStats

logger = logging.getLogger(__name__)

EVERY_S: Final = 2.0
EXPIRES_S: Final = 15
#: What is longer is not read: several thousand models' worth.
MAX_BYTES: Final = 8 * 1024 * 1024


class StatsPublisher:
    """Writes what `take` returns, from a thread of its own. No incarnation: nothing is written."""

    def __init__(self, client: redis.Redis, names: Names, take: Callable[[], WorkerStats]) -> None:
        self._client = client
        self._names = names
        self._take = take
        #: The incarnation under which something was written.
        self._written = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inferq-stats", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The end of the worker: nothing of it is left there."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
            self._forget("")

    def _run(self) -> None:
        while True:
            self._publish()
            if self._ended.wait(EVERY_S):
                return

    def _publish(self) -> None:
        stats = self._take()
        if not stats.incarnation:
            return
        self._forget(stats.incarnation)
        try:
            key = self._names.stats(stats.incarnation)
            self._client.set(key, msgspec.msgpack.encode(stats), ex=EXPIRES_S)
        except RedisError as problem:  # away or full; others say so
            logger.debug("stats are not published: %s", problem)
        else:
            self._written = stats.incarnation

    def _forget(self, incarnation: str) -> None:
        """Remove what was written, unless it is still `incarnation`'s."""
        if self._written and self._written != incarnation:
            with suppress(RedisError):  # it expires
                self._client.delete(self._names.stats(self._written))
            self._written = ""


def read_stats(client: redis.Redis, names: Names) -> list[WorkerStats]:
    """What the live workers published last, by node; without what cannot be decoded.

    Raises redis' errors. Two round trips; workers of the protocol before are looked for, too.
    """
    with client.pipeline(transaction=False) as pipe:
        for each in names.spoken():
            pipe.zrange(each.leases, 0, -1)
        leases = pipe.execute()
    with client.pipeline(transaction=False) as pipe:
        for each, incarnations in zip(names.spoken(), leases, strict=True):
            for incarnation in incarnations:
                pipe.getrange(each.stats(incarnation.decode()), 0, MAX_BYTES - 1)
        published = pipe.execute()
    stats = (_decode(raw) for raw in published)
    return sorted((each for each in stats if each is not None), key=lambda each: each.node)


def _decode(raw: bytes) -> WorkerStats | None:
    try:
        return msgspec.msgpack.decode(raw, type=WorkerStats)
    except msgspec.DecodeError:  # nothing there yet, or of another version
        return None
