"""One link under one fence: exactly one fenced MULTI per round trip, and what arms the next.

    MULTI …settles and claims, see ledger.py… EXEC
    WATCH fence:i   GET fence:i   LLEN q × queues to hear of

EXEC answers nil exactly if the fence was touched since it was watched: then the lease is lost, and
nothing of that MULTI was applied. The LLENs are tracked reads (CLIENT TRACKING), so Redis reports
on this same connection when a queue changes. An idle worker waits for that and claims nothing just
to look. A worker that has no room for more requests reads no LLEN, and is told of no change.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from redis.exceptions import RedisError

from inferq.shared.names import Names
from inferq.shared.resp import Command, Packed, Reply, ReplyError, pack, unpack
from inferq.workers.claims.link import Link
from inferq.workers.claims.oom import forced
from inferq.workers.claims.settlement import without_scripts
from inferq.workers.claims.wrong_type import (
    HASH,
    LIST,
    NOTHING_CLAIMED,
    WrongTypeReports,
    is_wrong_type,
)

logger = logging.getLogger(__name__)

#: The depth assumed of a queue that Redis reports as changed while it was known as empty: enough
#: to be useful, few enough that LMOVEs that find nothing cost little.
HINT: Final = 4
#: Seconds for which a Redis that was full is taken to be full.
FULL_S: Final = 1.0
_YEAR_S: Final = 365 * 24 * 3600
_MULTI: Final = pack([("MULTI",)])
#: A model's name and a priority step.
QueueId = tuple[str, int]


class LeaseLost(Exception):
    """The fence is gone: another worker has taken over what this incarnation held."""


class RedisFull(RedisError):
    """Redis refused the MULTI for want of memory, forced or not; nothing of it was applied."""


class FencedLink:
    """The round trips of one incarnation on one link. Owned by the data plane's thread.

    `wrong_types` outlives the link: it remembers which keys of the wrong type were reported.
    """

    def __init__(
        self,
        link: Link,
        names: Names,
        incarnation: str,
        models: Sequence[str],
        wrong_types: WrongTypeReports,
    ) -> None:
        self._link = link
        self._names = names
        #: The queues that are served, by key too.
        self.queues: dict[QueueId, str] = {
            (model, step): names.queue(model, step)
            for model in models
            for step in names.priority_steps
        }
        self._by_key = {queue.encode(): place for place, queue in self.queues.items()}
        self._fence = names.fence(incarnation)
        self._claims = names.claims(incarnation)
        self._running = names.running(incarnation)
        #: The number of the last MULTI that settled, as sent, and as Redis knew it when last armed.
        self.settles_sent = 0
        self.settles_known = 0
        #: When (monotonic s) Redis is no longer taken to be full; until then commands are forced
        #: upon it.
        self._full_until = 0.0
        #: Requests waiting in each queue; None: unknown, since it was not looked at.
        self.depths: dict[QueueId, int | None] = {}
        self._wrong_types = wrong_types
        #: Queues whose key has the wrong type: nothing is claimed from them.
        self.wrong_queues: set[QueueId] = set()

    def take_over(self) -> None:
        """Put an end to earlier links of this incarnation; the first thing on a new one.

        A network may deliver what an earlier link sent long after it was given up. That link
        watches the fence, so touching the fence makes its EXEC fail. Else it would claim requests
        that nobody knows of.
        """
        touch: list[Command] = [("EXPIRE", self._fence, _YEAR_S), ("PERSIST", self._fence)]
        self._link.call(touch)  # these take no memory: they work on a full Redis too

    def arm(self) -> None:
        """Watch the fence and look at all queues: first of all, and when idle."""
        listen = list(self.queues)
        _, arming = self._round_trip([], [], listen)
        self._read_arming(listen, arming)

    def transact(
        self,
        settling: Sequence[Packed],
        number: int,
        claiming: list[Command],
        listen: Sequence[QueueId],
        sent: Callable[[], None],
    ) -> list[Reply]:
        """The replies to `settling` and to `claiming`, from one fenced MULTI; then arm the next.

        `number` is that of the MULTI; 0: it settles nothing. `listen` and `sent`: see
        `Ledger.exchange`.
        """
        if number:
            self.settles_sent = number
            claiming = [("SET", self._fence, number), *claiming]
        if not self._is_full():
            try:
                return self._multi(settling, claiming, listen, sent)
            except RedisFull as problem:
                self._now_full(str(problem))
        body = [each for packed in settling for each in without_scripts(unpack(packed))]
        (done,) = self._multi([], [forced(body + claiming, self._names)], listen, sent)
        if isinstance(done, ReplyError):
            raise RedisFull(f"and takes no script: {done}")
        replies: list[Reply] = done
        return replies

    def _multi(
        self,
        settling: Sequence[Packed],
        claiming: list[Command],
        listen: Sequence[QueueId],
        sent: Callable[[], None],
    ) -> list[Reply]:
        replies, arming = self._round_trip(
            [_MULTI, *settling], [*claiming, ("EXEC",)], listen, sent
        )
        self._read_arming(listen, arming)
        return self._executed(replies)

    def _is_full(self) -> bool:
        return time.monotonic() < self._full_until

    def _now_full(self, problem: str) -> None:
        if time.monotonic() > self._full_until + FULL_S:
            logger.error("Redis is full: %s; what makes room again is forced upon it", problem)
        self._full_until = time.monotonic() + FULL_S

    # --- commands whose replies are passed over -----------------------------------------------

    def note(self, command: Command) -> None:
        """Have `command`, which takes no memory, written with what is written next."""
        self._link.note(command)

    def note_memory(self, command: Command) -> None:
        """As `note`, of a command that takes memory: it is forced upon a Redis that is full."""
        self._link.note(forced([command], self._names) if self._is_full() else command)

    def flush(self) -> None:
        """Write what was noted, if nothing else is to be written."""
        self._link.flush()

    def forgot(self) -> bool:
        """Whether Redis was too full to take what was noted: then `Ledger.mark` it all again.

        Raises LeaseLost if it cannot be marked since one of this incarnation's own keys has the
        wrong type.
        """
        if self._link.wrong_type is not None:
            self._link.wrong_type = None
            own = {self._claims: b"hash", self._running: b"set"}
            kinds = self._link.call([("TYPE", key) for key in own])
            if any(kind not in (b"none", own[key]) for key, kind in zip(own, kinds, strict=True)):
                raise self.own_keys_changed()
        if self._link.refused is None:
            return False
        self._now_full(str(self._link.refused))
        self._link.refused = None
        return True

    def call(self, commands: Sequence[Command]) -> list[Reply]:
        """The replies to `commands`, outside of any MULTI."""
        return self._link.call(commands)

    def note_changes(self) -> None:
        """Note which queues Redis has reported as changed since they were last looked at."""
        keys = self._by_key.keys() if self._link.all_changed else self._link.changed
        for key in keys:
            place = self._by_key.get(key)
            if place is not None and place not in self.wrong_queues:
                self.depths[place] = max(self.depths.get(place) or 0, HINT)
        self._link.forget_changes()

    def _round_trip(
        self,
        ahead: list[Packed],
        commands: list[Command],
        listen: Sequence[QueueId],
        sent: Callable[[], None] = lambda: None,
    ) -> tuple[list[Reply], list[Reply]]:
        """The replies to `ahead` and `commands`, and those to the commands that arm the next."""
        arming: list[Command] = [("WATCH", self._fence), ("GET", self._fence)]
        arming += [("LLEN", self.queues[place]) for place in listen]
        self._link.post(*ahead, pack([*commands, *arming]))
        # kill point: exchange-written
        sent()
        replies = self._link.read(sum(part.count for part in ahead) + len(commands))
        # kill point: exchange-answered
        # The replies that follow give the depths. A change that is pushed after them is newer.
        self._link.forget_changes()
        return replies, self._link.read(len(arming))

    def _executed(self, replies: list[Reply]) -> list[Reply]:
        result = replies[-1]
        if result is None:
            raise LeaseLost
        if isinstance(result, ReplyError):
            causes = [
                str(reply) for reply in (*replies[:-1], result) if isinstance(reply, ReplyError)
            ]
            if any("OOM " in cause for cause in causes):
                raise RedisFull(causes[0])
            raise RedisError("; ".join(causes[:3]))
        executed: list[Reply] = result
        return executed

    def _read_arming(self, listen: Sequence[QueueId], replies: list[Reply]) -> None:
        for reply in replies[:2]:
            if isinstance(reply, ReplyError):
                if is_wrong_type(reply):
                    raise self.own_keys_changed()
                raise RedisError(f"while arming: {reply}")
        if replies[1] is None:
            raise LeaseLost
        try:
            self.settles_known = int(replies[1])
        except ValueError:
            raise self.own_keys_changed() from None
        for place, depth in zip(listen, replies[2:], strict=True):
            if depth.__class__ is int:
                self.depths[place] = depth
                if self._wrong_types:
                    self.wrong_queues.discard(place)
                    self._wrong_types.resolve(self.queues[place])
            elif is_wrong_type(depth):
                self.set_aside(place)
            else:
                raise RedisError(f"while arming: {depth}")

    # --- keys of the wrong type ---------------------------------------------------------------

    def set_aside(self, place: QueueId) -> None:
        """Claim nothing from this queue until its length can be read again."""
        self.depths[place] = 0
        if place not in self.wrong_queues and self.report_wrong_type(
            self.queues[place], LIST, NOTHING_CLAIMED
        ):
            self.wrong_queues.add(place)

    def report_wrong_type(self, key: str, expected: str, effect: str) -> bool:
        """Whether `key` has another type now; that is logged, once."""
        (kind,) = self._link.call([("TYPE", key)])
        found = kind.decode()
        if found in (expected, "none"):
            return False
        self._wrong_types.report(key, found, expected, effect)
        return True

    def own_keys_changed(self) -> LeaseLost:
        """Why this incarnation must end: its keys no longer say what it holds.

        The worker that recovers it finds its claims all the same.
        """
        logger.error(
            "a key of this worker's own (%r, %r or %r) is not as it wrote it; expected nobody else "
            "to write there. Its requests are computed again",
            self._fence,
            self._claims,
            self._running,
        )
        return LeaseLost()

    def check_hash(self, key: str, effect: str, reply: Reply) -> bool:
        """Whether `key` is a hash, by what a command on it answered; if not, that is logged once.

        `effect`: what stops until it is one.
        """
        if isinstance(reply, ReplyError):
            if key not in self._wrong_types:
                self.report_wrong_type(key, HASH, effect)
            return False
        if self._wrong_types:
            self._wrong_types.resolve(key)
        return True
