"""Publishes task events to whoever listens (Flower, ``celery events``), off the request path.

Events of `GATHER_S` go out in one message. If Redis is slow or away, or the queue of events is
full, events are dropped and counted: requests never wait for them.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import redis
from celery.utils.time import utcoffset

from inferq.shared.resp import BROKEN
from inferq.workers.control_plane import celery_private
from inferq.workers.process.periodic import Periodic

logger = logging.getLogger(__name__)

Event = dict[str, Any]

#: Seconds that events wait for more of them.
GATHER_S: Final = 0.1
#: Most events that wait to be published. From half as many on, no events of new requests are added.
MAX_QUEUED: Final = 20_000
#: Events in one message.
MAX_AT_ONCE: Final = 500
#: Seconds that one publication may take.
TIMEOUT_S: Final = 2.0
#: Seconds until Redis is tried again after it failed.
RETRY_S: Final = 1.0
#: Seconds to publish what is left at the end.
LAST_S: Final = 3.0
#: Seconds between log lines about events that were not sent.
SAY_EVERY_S: Final = 60.0


class EventPublisher:
    """`start` spawns the thread; `put` may be called from any, at any time.

    Only that thread uses `client`, whose timeouts bound every publication. `forward` advances
    Celery's logical clock; `left_out` returns how many requests were left out.
    """

    def __init__(
        self,
        client: redis.Redis,
        prefix: str,
        node: str,
        *,
        forward: Callable[[], int],
        left_out: Callable[[], int],
        per_s: int,
    ) -> None:
        self._client = client
        self._db = int(client.connection_pool.connection_kwargs.get("db") or 0)
        self._prefix = prefix
        self._node = node
        self._forward = forward
        self._left_out = left_out
        self._per_s = per_s
        self._queue: deque[Event] = deque()
        self.loop = Periodic(
            "events",
            self._turn,
            every_s=SAY_EVERY_S,
            first_s=SAY_EVERY_S,
            retry_s=RETRY_S,
            failing="task events are not published",
            logger=logger,
            ending=self._end,
        )
        self._sent = False
        self._said_at = -SAY_EVERY_S
        self._said = (0, 0)
        #: Events that were not sent, since the start.
        self.dropped = 0

    def start(self) -> None:
        self.loop.start()

    def put(self, events: Sequence[Event], *, begin: bool = False) -> bool:
        """Have `events` published, in this order; False if they were dropped.

        `begin`: they are the first events of their requests; they leave room for the other events.
        """
        if len(self._queue) + len(events) > (MAX_QUEUED // 2 if begin else MAX_QUEUED):
            self.dropped += len(events)
            return False
        self._queue.extend(events)
        self.loop.wake()
        return True

    def stop(self) -> None:
        """Publish what is left, and that the worker is offline, within LAST_S seconds."""
        self.loop.stop(LAST_S + TIMEOUT_S)

    def _turn(self) -> float | None:
        self.loop.pause(GATHER_S)
        flushed = self._flush()
        self._say()
        if flushed:
            return None
        self.loop.pause(RETRY_S)
        return 0.0

    def _end(self) -> None:
        deadline = time.monotonic() + LAST_S
        while self._queue and self._flush() and time.monotonic() < deadline:
            pass
        if self._sent:  # Celery has sent it already, but later events say that the worker lives
            self._publish("worker.offline", {"type": "worker-offline", "timestamp": time.time()})
        self._client.close()

    def _flush(self) -> bool:
        """Publish all that waits now; False once Redis fails."""
        for _ in range(0, len(self._queue), MAX_AT_ONCE):
            count = min(MAX_AT_ONCE, len(self._queue))
            if not self._publish("task.multi", [self._queue.popleft() for _ in range(count)]):
                return False
        return True

    def _publish(self, routing_key: str, body: Event | list[Event]) -> bool:
        offset, pid = utcoffset(), os.getpid()
        events = body if isinstance(body, list) else [body]
        for event in events:
            event.update(hostname=self._node, utcoffset=offset, pid=pid, clock=self._forward())
        topic = celery_private.event_topic(self._prefix, self._db, routing_key)
        try:
            message = celery_private.event_message(body, routing_key, self._node)
            self._client.publish(topic, message)
            self._sent = True
        except BROKEN as problem:
            self.dropped += len(events)
            logger.debug("%d events were not published: %s", len(events), problem)
            return False
        except Exception:
            self.dropped += len(events)
            logger.exception("%d events could not be written", len(events))
        return True

    def _say(self) -> None:
        """Log, once a minute, what was not sent."""
        now = time.monotonic()
        told, said = (self._left_out(), self.dropped), self._said
        if told == said or now < self._said_at + SAY_EVERY_S:
            return
        self._said_at, self._said = now, told
        if left_out := told[0] - said[0]:
            logger.info(
                "no task events of %d requests: more than INFERQ_EVENTS_PER_S=%d came in a second "
                "(what fails is always told of)",
                left_out,
                self._per_s,
            )
        if dropped := told[1] - said[1]:
            logger.warning("%d task events were dropped: Redis was slow or away", dropped)
