"""Foreign tasks on their way to Celery's own handler: those it holds, and those that wait.

Each is in kombu's unacked by then. Celery's main thread takes one at a time and runs its event loop
in between, so remote control is answered between two tasks. When the worker ends, tasks that Celery
has not taken go back to their queue; kombu itself puts back those that Celery holds.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from typing import Final

import redis
from celery.worker.consumer import Consumer
from redis.exceptions import RedisError

from inferq.workers.control_plane import celery_private

logger = logging.getLogger(__name__)

#: Most tasks that Celery holds, and most bytes of their messages; others wait in Redis.
MAX_HELD: Final = 64
MAX_HELD_BYTES: Final = 4 << 20


class Handed:
    """A message as Celery is given it, and the Redis key of its queue."""

    def __init__(self, message: bytes, queue: str) -> None:
        self.message = message
        self.queue = queue


class CeleryInbox:
    """The data plane's thread calls `expect` and `put`; Celery's thread calls all other methods."""

    def __init__(self, key_prefix: str) -> None:
        self._key_prefix = key_prefix
        self._lock = threading.Lock()
        #: They are put here once they are settled. Those that never are (the lease is lost) vanish.
        self._expected: weakref.WeakSet[Handed] = weakref.WeakSet()
        self._waiting: deque[Handed] = deque()
        #: Taken by Celery and not acknowledged yet.
        self._held: set[Handed] = set()
        self._consumer: Consumer | None = None

    def expect(self, handed: Handed) -> bool:
        """Whether there is room for it; if so, it counts from now on."""
        with self._lock:
            all_of_them = [*self._expected, *self._waiting, *self._held]
            size = sum(len(each.message) for each in all_of_them)
            if len(all_of_them) >= MAX_HELD or size + len(handed.message) > MAX_HELD_BYTES:
                return False
            self._expected.add(handed)
        return True

    def put(self, handed: Handed) -> None:
        """Add a message that is settled and in kombu's unacked."""
        with self._lock:
            self._expected.discard(handed)
            self._waiting.append(handed)
            consumer = self._consumer
        if consumer is not None:
            consumer.call_soon(self._take)

    def open(self, consumer: Consumer) -> None:
        """Celery has connected, perhaps again: kombu has put back what it held before."""
        with self._lock:
            self._consumer = consumer
            self._held.clear()
        consumer.call_soon(self._take)

    def close(self) -> None:
        """Celery takes nothing any more."""
        with self._lock:
            self._consumer = None

    def _take(self) -> None:
        with self._lock:
            consumer = self._consumer
            if consumer is None or not self._waiting:
                return
            handed = self._waiting.popleft()
            self._held.add(handed)
        consumer.call_soon(self._take)
        celery_private.deliver(consumer, handed.message, lambda: self._release(handed))

    def _release(self, handed: Handed) -> None:
        with self._lock:
            self._held.discard(handed)

    def put_back(self, client: redis.Redis) -> None:
        """At the worker's end: put what Celery has not taken back into its queues."""
        self.close()
        with self._lock:
            left = list(self._waiting)
            self._waiting.clear()
        if not left:
            return
        try:
            with client.pipeline(transaction=True) as pipe:
                for handed in reversed(left):  # so that the first is claimed first again
                    for command in celery_private.acked_commands(handed.message, self._key_prefix):
                        pipe.execute_command(*command)  # type: ignore[no-untyped-call]
                    pipe.rpush(handed.queue, handed.message)
                pipe.execute()
        except RedisError as problem:
            logger.error(
                "%d tasks for Celery stay in kombu's unacked until its visibility timeout: %s",
                len(left),
                problem,
            )
