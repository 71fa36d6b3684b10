"""Pushes what Celery publishes for a request, by the worker's own connections.

What follows on a request is collected first, and pushed once all of it is known: so nothing of what
is refused was sent, and what Redis has is not sent again when a try breaks off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import redis

from inferq.shared.errors import InvalidInput
from inferq.shared.lua import source
from inferq.shared.names import Names
from inferq.workers.canvas.celery_canvas import Published
from inferq.workers.canvas.following import MAX_FOLLOWING, check_bytes
from inferq.workers.canvas.link_queues import LinkQueues
from inferq.workers.canvas.pace import Pace

#: Most messages, and bytes, of one trip to Redis; one message at least.
_TRIP_MESSAGES: Final = 100
_TRIP_BYTES: Final = 1 << 20


class Patience(Protocol):
    """Calls what it is given until it succeeds, or no other try would change a thing."""

    def __call__(self, attempt: Callable[[], None], /) -> None: ...


class LinkSender:
    """Takes what Celery publishes, one request after another. For one thread."""

    def __init__(
        self,
        client: redis.Redis,
        names: Names,
        queues: LinkQueues,
        expires_s: int,
        patience: Patience,
        pace: Pace,
    ) -> None:
        self._client = client
        self._names = names
        self._queues = queues
        self._expires_s = expires_s
        self._patience = patience
        self._pace = pace
        self._collected: list[Published] | None = None
        self.begin()

    def begin(self) -> None:
        """What is taken from now on is another request's."""
        self._messages = self._bytes = self._largest = 0

    def take(self, published: Published) -> None:
        """One message, which is pushed at once unless it is collected.

        InvalidInput, PayloadTooLarge: it may not go there, or too much went before it.
        """
        self._queues.check(published.queue)
        self._pace.give_way()
        self._messages += 1
        if self._messages > MAX_FOLLOWING:
            raise InvalidInput(f"more than {MAX_FOLLOWING} messages follow on it")
        size = len(published.message)
        self._bytes += size
        self._largest = max(self._largest, size)
        check_bytes(self._bytes, self._largest)
        if self._collected is None:
            self._push([published])
        else:
            self._collected.append(published)

    def collecting(self, publish: Callable[[], None]) -> list[Published]:
        """Call `publish`; what it published, none of which was pushed."""
        found: list[Published] = []
        self._collected = found
        try:
            publish()
        finally:
            self._collected = None
        return found

    def push_at_once(self, publish: Callable[[], object]) -> None:
        """Call `publish`; what it publishes is in Redis when it returns."""
        before, self._collected = self._collected, None
        try:
            publish()
        finally:
            self._collected = before

    def push(self, messages: Sequence[Published]) -> None:
        """Have all `messages` in Redis, in their order."""
        trip: list[Published] = []
        size = 0
        for each in messages:
            if trip and (len(trip) >= _TRIP_MESSAGES or size + len(each.message) > _TRIP_BYTES):
                self._push(trip)
                trip, size = [], 0
            trip.append(each)
            size += len(each.message)
        if trip:
            self._push(trip)

    def _push(self, trip: Sequence[Published]) -> None:
        left = list(trip)

        def attempt() -> None:
            # kill point: links-unsent
            with self._client.pipeline(transaction=False) as pipe:
                for each in left:
                    pipe.lpush(self._names.list_of(each.queue, each.priority), each.message)
                replies = pipe.execute(raise_on_error=False)
            refused = [reply for reply in replies if isinstance(reply, Exception)]
            left[:] = [
                each
                for each, reply in zip(left, replies, strict=True)
                if isinstance(reply, Exception)
            ]
            if refused:
                raise refused[0]

        self._patience(attempt)
        # kill point: links-sent

    def store(self, key: str, value: bytes) -> None:
        """Store what became of a task that follows, unless it has a result; tell who waits."""
        with self._client.pipeline(transaction=True) as pipe:
            pipe.set(key, value, ex=self._expires_s, nx=True)
            pipe.eval(source("publish"), 1, key)
            pipe.execute()
