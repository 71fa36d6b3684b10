"""Keeps requests whose ETA is ahead in Redis, held by no worker, and puts them back when due.

Celery's own handler would hold them in one process' memory. If that process is killed they are back
after an hour, and its event loop starts only ten of them a second.

Each request waits in a list of its own. The MULTI that settles its place in the claim moves it
there. Any worker moves requests that are due back to their queues, whichever models it serves.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import redis
from redis.exceptions import RedisError

from inferq.shared import codec
from inferq.shared.errors import InvalidInput
from inferq.shared.names import Names, glob_of, is_model_name
from inferq.shared.resp import Command
from inferq.workers.claims.claim import Slot
from inferq.workers.claims.clock import RedisClock
from inferq.workers.claims.message import unix_ms
from inferq.workers.claims.oom import attempted
from inferq.workers.claims.settlement import Settlement
from inferq.workers.claims.wrong_type import (
    LIST,
    NO_RETURN,
    NOTHING_CLAIMED,
    ZSET,
    WrongTypeReports,
    is_wrong_type,
    type_of,
)
from inferq.workers.process.periodic import Periodic

logger = logging.getLogger(__name__)

#: Seconds between two looks for requests that other workers have put there.
LOOK_EVERY_S = 1.0
#: Ms until a request whose queue, or own list, has the wrong type is tried again.
WRONG_TYPE_AGAIN_MS = 10_000
#: Ms until a postponed message comes back, and between two such messages.
POSTPONED_MS = 200
POSTPONED_APART_MS = 5
_MOVES_PER_TRIP = 100


class _Place(NamedTuple):
    """The parts of a member of `later`."""

    model: str
    step: int


def _parse(member: bytes) -> _Place | None:
    """The parts of a member; None: it is not inferq's."""
    try:
        model, step, _ = member.decode().split(":")
        return _Place(model, int(step)) if is_model_name(model) else None
    except ValueError:
        return None


class ScheduledKeeper:
    """Keeps requests until they are due. `start` spawns the thread that puts them back."""

    def __init__(self, client: redis.Redis, names: Names, clock: RedisClock) -> None:
        self._client = client
        self._names = names
        self._clock = clock
        #: Redis ms at which the thread looks for due requests next.
        self._next_ms = 0.0
        #: Redis ms at which the last one that was postponed comes back.
        self._postponed_ms = 0.0
        self._wrong_types = WrongTypeReports()
        self.loop = Periodic(
            "later",
            self._turn,
            every_s=LOOK_EVERY_S,
            retry_s=LOOK_EVERY_S,
            failing="requests that are due now wait for Redis",
            logger=logger,
        )

    def start(self) -> None:
        self.loop.start()

    def stop(self) -> None:
        self.loop.stop()

    def keep(self, slot: Slot, message: bytes, due_ms: float) -> Settlement:
        """The settlement that makes `message` wait until `due_ms`, by Redis' clock."""
        names, claim = self._names, slot.claim
        place = f"{claim.model}:{claim.step}:{secrets.token_hex(8)}"
        key = names.scheduled_message(place)
        return Settlement(
            slot,
            claim.model,
            None,
            b"",
            before=(
                ("ZADD", names.scheduled, due_ms, place),
                ("DEL", key),  # The answer may be lost: then this MULTI is sent again.
                ("RPUSH", key, message),
            ),
            after=partial(self._expect, due_ms),
        )

    def postpone(self, slot: Slot, message: bytes) -> Settlement:
        """The settlement that makes `message` come back after a while, after those before it.

        So even many messages come back no faster than they can be handled.
        """
        self._postponed_ms = max(
            self._postponed_ms + POSTPONED_APART_MS, self._clock.now() + POSTPONED_MS
        )
        return self.keep(slot, message, self._postponed_ms)

    def _expect(self, due_ms: float) -> None:
        if due_ms < self._next_ms:
            self.loop.wake()

    def _turn(self) -> float:
        now = self._clock.now()
        self._next_ms = now + LOOK_EVERY_S * 1000
        for names in self._names.all_protocols():
            self._next_ms = min(self._next_ms, self._put_back(names, now))
        return (self._next_ms - self._clock.now()) / 1000

    def _put_back(self, names: Names, now_ms: float) -> float:
        """Put back what is due; return the Redis ms at which there may be more to do."""
        try:
            found: list[tuple[bytes, float]] = self._client.zrange(
                names.scheduled, 0, _MOVES_PER_TRIP, withscores=True
            )  # type: ignore[assignment]
        except RedisError as problem:
            if not is_wrong_type(problem):
                raise
            self._wrong_types.report(
                names.scheduled, type_of(self._client, names.scheduled), ZSET, NO_RETURN
            )
            return float("inf")
        if self._wrong_types and self._wrong_types.resolve(names.scheduled):
            self._list_again(names)
            return now_ms
        due = [member for member, due_ms in found if due_ms <= now_ms]
        if due:
            self._move(names, due, now_ms)
        if len(due) < len(found):
            return found[len(due)][1]
        return now_ms if len(due) > _MOVES_PER_TRIP else float("inf")

    def _move(self, names: Names, due: Sequence[bytes], now_ms: float) -> None:
        """Move each request that is `due` to its queue. One that cannot be moved stays."""
        places = {member: place for member in due if (place := _parse(member)) is not None}
        commands: list[Command] = []
        # To the end that is claimed first, since they have waited long enough; the first due last.
        for member, (model, step) in reversed(places.items()):
            waiting, queue = names.scheduled_message(member.decode()), names.queue(model, step)
            commands.append(("LMOVE", waiting, queue, "LEFT", "RIGHT"))
        replies = attempted(self._client, names, commands)
        stays = {
            member
            for member, reply in zip(reversed(places), replies, strict=True)
            if isinstance(reply, Exception)
        }
        for member in stays:
            self._tell(names, member, places[member])
        if stays:  # else the first of them would hide later ones
            again = dict.fromkeys(stays, now_ms + WRONG_TYPE_AGAIN_MS)
            self._client.zadd(names.scheduled, again, xx=True)
        if self._wrong_types:
            for queue in {names.queue(*places[member]) for member in places.keys() - stays}:
                self._wrong_types.resolve(queue)
        for member in due:
            if member not in places:
                logger.error(
                    "%r in %s is no scheduled request and is removed; expected "
                    "<model>:<priority>:<random>. What is at %r stays there",
                    member,
                    names.scheduled,
                    names.scheduled.encode() + b":" + member,
                )
        if gone := [member for member in due if member not in stays]:
            self._client.zrem(names.scheduled, *gone)

    def _tell(self, names: Names, member: bytes, place: _Place) -> None:
        for key, until in (
            (names.scheduled_message(member.decode()), "The request that it held is gone"),
            (names.queue(*place), NOTHING_CLAIMED),
        ):
            if (kind := type_of(self._client, key)) not in (LIST, "none"):
                self._wrong_types.report(key, kind, LIST, until)

    def _list_again(self, names: Names) -> None:
        """`later` had the wrong type: add the scheduled requests that are missing from it."""
        head = names.scheduled_message("").encode()
        for key in self._client.scan_iter(
            match=f"{glob_of(names.scheduled_message(''))}*", count=1000, _type=LIST
        ):
            member = bytes(key).removeprefix(head)
            message = self._client.lindex(key, 0)
            if _parse(member) is not None and isinstance(message, bytes):
                due_ms = _due_ms(message, self._clock.now())
                self._client.zadd(names.scheduled, {member: due_ms}, nx=True)


def _due_ms(message: bytes, now_ms: float) -> float:
    try:
        eta = codec.decode_envelope(message).headers.eta
        return now_ms if eta is None else unix_ms("eta", eta)
    except (codec.MalformedMessage, InvalidInput, OverflowError):
        return now_ms
