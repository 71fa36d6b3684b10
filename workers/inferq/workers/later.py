"""Requests whose ETA is ahead wait in Redis, in no worker's care, and return to their queues.

Celery's own handler would hold them: in one process' memory, for as long as an hour if that one is
killed; and its event loop starts ten of them a second.

Each waits in a list of its own, moved there in the MULTI that settles its place in the claim, and
moved on as it is. Any worker moves what is due, whichever model it serves.
"""

from __future__ import annotations

import logging
import secrets
import threading
from functools import partial

import redis
from redis.exceptions import RedisError

from inferq.shared.names import Names
from inferq.shared.resp import Command
from inferq.workers.claims import Slot
from inferq.workers.clock import RedisClock
from inferq.workers.full import pipelined
from inferq.workers.settle import Settlement

logger = logging.getLogger(__name__)

#: Seconds between looks at what other workers have put there.
LOOK_EVERY_S = 1.0
_MOVES_PER_TRIP = 100


class Later:
    """Keeps requests until they are due. `start` spawns the thread that puts them back."""

    def __init__(self, client: redis.Redis, names: Names, clock: RedisClock) -> None:
        self._client = client
        self._names = names
        self._clock = clock
        #: Redis ms at which the thread looks next.
        self._next_ms = 0.0
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="inferq-later", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def keep(self, slot: Slot, message: bytes, due_ms: float) -> Settlement:
        """The settlement that has `message` wait until `due_ms`, by Redis' clock."""
        names, claim = self._names, slot.claim
        place = f"{claim.model}:{claim.step}:{secrets.token_hex(8)}"
        key = names.kept(place)
        return Settlement(
            slot, claim.model, None, b"",
            before=(
                ("ZADD", names.later, due_ms, place),
                ("DEL", key),  # This MULTI may be sent again, its first answer lost.
                ("RPUSH", key, message),
            ),
            after=partial(self._expect, due_ms),
        )  # fmt: skip

    def _expect(self, due_ms: float) -> None:
        if due_ms < self._next_ms:
            self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            now = self._clock.now()
            self._next_ms = now + LOOK_EVERY_S * 1000
            try:
                for names in self._names.spoken():
                    self._next_ms = min(self._next_ms, self._put_back(names, now))
            except RedisError as problem:
                logger.warning("requests that are due now wait for Redis: %s", problem)
            self._wake.wait(max(0.0, self._next_ms - self._clock.now()) / 1000)

    def _put_back(self, names: Names, now_ms: float) -> float:
        """Put back what is due; return the Redis ms at which there may be more to do."""
        found: list[tuple[bytes, float]] = self._client.zrange(
            names.later, 0, _MOVES_PER_TRIP, withscores=True
        )  # type: ignore[assignment]
        due = [place.decode() for place, due_ms in found if due_ms <= now_ms]
        commands: list[Command] = []
        # To the end that is claimed first: they have waited long enough. The first due last.
        for place in reversed(due):
            model, step, _ = place.split(":")
            queue = names.queue(model, int(step))
            commands.append(("LMOVE", names.kept(place), queue, "LEFT", "RIGHT"))
        if due:
            pipelined(self._client, names, commands)
            self._client.zrem(names.later, *due)
        if len(due) < len(found):
            return found[len(due)][1]
        return now_ms if len(due) > _MOVES_PER_TRIP else float("inf")
