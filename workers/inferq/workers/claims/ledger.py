"""The claim protocol on one link: exactly one fenced MULTI per round trip, settles before claims.

    MULTI
      <settles>, SET fence:i <their number>                  see settlement.py
      per non-empty queue: HSET claims:i k 0, LMOVE q k RIGHT LEFT × n, HLEN attempts:m
    EXEC
    WATCH fence:i   GET fence:i   LLEN q × queues to hear of  arms the next round trip

EXEC answers nil exactly if the fence was touched since it was watched: the lease is lost, and so is
everything in that MULTI. The LLENs are tracked reads (CLIENT TRACKING), so Redis itself tells
when a queue changed: an idle worker waits on this same connection and takes nothing by looking.
One that has no room for more does not look, and is not told.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from redis.exceptions import RedisError

from inferq.shared.names import Names
from inferq.shared.resp import Command, Packed, Reply, ReplyError, pack, unpack
from inferq.workers.claims.claim import Claim, Claimed, Slot, Want
from inferq.workers.claims.link import Link
from inferq.workers.claims.oom import forced
from inferq.workers.claims.settlement import Settle, Settlement, without_scripts
from inferq.workers.claims.wrong_type import (
    HASH,
    LIST,
    NO_ATTEMPTS,
    NOTHING_CLAIMED,
    WrongTypeReports,
    is_wrong_type,
)

logger = logging.getLogger(__name__)

#: What to assume of a queue that Redis reports as changed while nothing was in it: enough to be
#: useful, little enough that LMOVEs of nothing cost nothing.
HINT: Final = 4
#: Seconds for which a Redis that was full is taken to be full.
FULL_S: Final = 1.0
#: Most members that one SADD or SREM names.
_MEMBERS: Final = 1_000
_YEAR_S: Final = 365 * 24 * 3600
_MULTI: Final = pack([("MULTI",)])
#: A model's name and a priority step.
QueueId = tuple[str, int]


class LeaseLost(Exception):
    """The fence is gone: another worker has taken over what this incarnation held."""


class RedisFull(RedisError):
    """Redis refused the MULTI for want of memory, forced or not; nothing of it was applied."""


@dataclass(frozen=True)
class Exchange:
    """What one round trip brought."""

    claimed: list[Claimed]
    #: Models that have entries in attempts:<m>: ask before running their claimed requests.
    suspicious: frozenset[str]
    #: A queue held less than was wanted, and was not looked at.
    missed: bool
    #: What stored results and dead letters, and told who waits.
    storing: Packed
    #: Places of the settlements whose request had a result already.
    overtaken: frozenset[int]


class Ledger:
    """One incarnation's claims on one link. Owned by the data plane's thread.

    `numbers` outlives the link: a claim's number is never used twice by one incarnation, or a claim
    whose reply was lost would pass for one that is known. So does `settles`, which numbers the
    MULTIs that settle: the last one's number stands in the fence, which tells if Redis went back;
    and `wrong_types`, which remembers the keys of the wrong type that were reported.
    """

    def __init__(
        self,
        link: Link,
        names: Names,
        incarnation: str,
        models: Sequence[str],
        *,
        numbers: Iterator[int],
        settles: Iterator[int],
        result_ttl_s: int,
        wrong_types: WrongTypeReports,
    ) -> None:
        self._link = link
        self._names = names
        self._incarnation = incarnation
        self._result_ttl_s = result_ttl_s
        self._queues: dict[QueueId, str] = {
            (model, step): names.queue(model, step)
            for model in models
            for step in names.priority_steps
        }
        self._by_key = {queue.encode(): place for place, queue in self._queues.items()}
        self._fence = names.fence(incarnation)
        self._claims = names.claims(incarnation)
        self._numbers = numbers
        self._settles = settles
        #: The number of the last MULTI that settled, as sent, and as Redis knew it when last armed.
        self.settles_sent = 0
        self.settles_known = 0
        #: Until then (monotonic s) everything is forced upon Redis, which is full.
        self._full_until = 0.0
        #: Requests waiting in each queue; None: unknown, as it was not looked at.
        self.depths: dict[QueueId, int | None] = {}
        self._wrong_types = wrong_types
        #: Queues whose key holds something else than a list: nothing is claimed from them.
        self._wrong_queues: set[QueueId] = set()

    def take_over(self) -> None:
        """Have done with earlier links of this incarnation; the first thing on a new one.

        A network may deliver what one of them sent long after it was given up. It was watching the
        fence, so touching that makes its EXEC fail; else it would claim what nobody then knows of.
        """
        touch: list[Command] = [("EXPIRE", self._fence, _YEAR_S), ("PERSIST", self._fence)]
        self._link.call(touch)  # these take no memory: they work on a full Redis too

    def arm(self) -> None:
        """Watch the fence and look at all queues: first of all, and when idle."""
        listen = list(self._queues)
        _, arming = self._round_trip([], [], listen)
        self._read_arming(listen, arming)

    def exchange(
        self,
        settlements: Sequence[Settlement],
        wants: Sequence[Want],
        listen: Sequence[QueueId],
        sent: Callable[[], None],
    ) -> Exchange:
        """Settle and claim in one MULTI, and arm the next. At least one of both is not empty.

        `listen`: the queues to look at, and to hear of, from then on.
        `sent` is called between writing and waiting for the reply. Raises LeaseLost, RedisFull, or
        one of resp.BROKEN: then whether it was applied is unknown and the same settlements are sent
        again on the next link.
        """
        claims = [self._new_claim(want) for want in wants]
        claiming: list[Command] = []
        for want, claim in zip(wants, claims, strict=True):
            queue = self._names.queue(want.model, want.step)
            claiming.append(("HSET", self._claims, claim.key, 0))
            claiming += [("LMOVE", queue, claim.key, "RIGHT", "LEFT")] * want.count
        models = sorted({want.model for want in wants})
        claiming += [("HLEN", self._names.attempts(model)) for model in models]
        # kill point: exchange-unwritten
        settle = Settle.of(settlements, self._names, self._incarnation, self._result_ttl_s)
        storing, releasing = pack(settle.storing), pack(settle.releasing)
        number = next(self._settles) if settlements else 0
        done = self._transact([storing, releasing], number, claiming, listen, sent)
        self._tell_refused(settle, done)
        offset = len(done) - len(claiming)  # what settles comes first
        self.depths.update((place, None) for place in self._queues if place not in listen)
        self.depths.update(dict.fromkeys(self._wrong_queues, 0))
        claimed: list[Claimed] = []
        empty: list[str] = []
        missed = False
        for want, claim in zip(wants, claims, strict=True):
            got = [
                reply
                for reply in done[offset + 1 : offset + 1 + want.count]
                if type(reply) is bytes
            ]
            if done[offset].__class__ is ReplyError:  # HSET: nobody would find this claim
                raise self._own_keys_changed()
            if len(got) < want.count and is_wrong_type(done[offset + 1 + len(got)]):
                self._set_aside((want.model, want.step))
            offset += 1 + want.count
            claim.size = len(got)
            if len(got) < want.count and (want.model, want.step) not in listen:
                missed = True
                self.depths[want.model, want.step] = 0
            if got:
                claimed.append(Claimed(claim, got))
            else:
                empty.append(claim.key)
        suspicious = frozenset(
            model
            for model, count in zip(models, done[offset:], strict=True)
            if not self._lacks_attempts(model, count) and count != 0
        )
        if empty:
            self._link.note(("HDEL", self._claims, *empty))
        # kill point: exchange-read
        overtaken = settle.overtaken(done[: storing.count])
        return Exchange(claimed, suspicious, missed, storing, overtaken)

    def settle_again(self, storing: Packed, number: int) -> None:
        """Store once more what was stored before, on a Redis that has forgotten it.

        `number` is that of then. So wherever this breaks off, the fence tells what is still to be
        settled again.
        """
        again = self._transact([storing], number, [], list(self._queues), lambda: None)
        _log_errors(again)

    def _transact(
        self,
        settling: Sequence[Packed],
        number: int,
        claiming: list[Command],
        listen: Sequence[QueueId],
        sent: Callable[[], None],
    ) -> list[Reply]:
        """The replies to `settling` and to `claiming`, from one fenced MULTI.

        `number` is that of the MULTI; 0: it settles nothing.
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

    def _note(self, command: Command) -> None:
        self._link.note(forced([command], self._names) if self._is_full() else command)

    def forgot(self) -> bool:
        """Whether Redis was too full to take what was noted: `mark` it all again, then.

        Raises LeaseLost if it cannot be marked since one of this incarnation's own keys has the
        wrong type.
        """
        if self._link.wrong_type is not None:
            self._link.wrong_type = None
            own = {self._claims: b"hash", self._names.running(self._incarnation): b"set"}
            kinds = self._link.call([("TYPE", key) for key in own])
            if any(kind not in (b"none", own[key]) for key, kind in zip(own, kinds, strict=True)):
                raise self._own_keys_changed()
        if self._link.refused is None:
            return False
        self._now_full(str(self._link.refused))
        self._link.refused = None
        return True

    def mark(self, starting: Sequence[str], decoded: Sequence[Claim]) -> None:
        """Note what starts computing ("<m>/<id>") and which claims were decoded.

        Redis is told with what is written next; at the latest by `flush`, and before any of it
        starts: what kills this process is then known by name.
        """
        if decoded:
            fields = [part for claim in decoded for part in (claim.key, 1)]
            self._note(("HSET", self._claims, *fields))
        for at in range(0, len(starting), _MEMBERS):
            some = starting[at : at + _MEMBERS]
            self._note(("SADD", self._names.running(self._incarnation), *some))

    def unmark(self, recalled: Sequence[str]) -> None:
        """Note what was to start computing ("<m>/<id>") and shall wait again."""
        self._link.note(("SREM", self._names.running(self._incarnation), *recalled))

    def unmark_all(self) -> None:
        """Note that nothing computes: what does is to be marked anew."""
        self._link.note(("DEL", self._names.running(self._incarnation)))

    def flush(self) -> None:
        """Write what was noted, if nothing else is to be written."""
        self._link.flush()

    def adopt(self, known: Mapping[str, Claim]) -> Iterator[Claimed]:
        """Claims of ours in Redis that we do not know: the reply that brought them was lost.

        Or it was settled whole, and Redis went back.
        """
        for key in self._held():
            if key in known:
                continue
            items = self._messages(key)
            if items is None:
                self._report_wrong_type(
                    key, LIST, "The requests of this claim, if it is one, are not seen"
                )
                continue
            if not any(items):
                self._note(("UNLINK", key))
                self._note(("HDEL", self._claims, key))
                continue
            name = self._names.parse_claim(key)
            claim = Claim(key, name.model, name.step, len(items))
            claim.settled = {place for place, item in enumerate(items) if item is None}
            yield Claimed(claim, items, adopted=True)

    def unsettled(
        self, known: Mapping[str, Claim], settling: Collection[Slot]
    ) -> Iterator[Claimed]:
        """What Redis, which went back, holds of `known` claims though it was settled.

        `settling`: places of which it is not known yet whether they are.
        """
        for key in self._held():
            claim = known.get(key)
            if claim is None or not claim.settled:
                continue
            messages = [
                item if place in claim.settled and Slot(claim, place) not in settling else None
                for place, item in enumerate(self._messages(key) or ())
            ]
            if any(messages):
                yield Claimed(claim, messages, adopted=True)

    def _held(self) -> list[str]:
        """The keys of our claims, as Redis has them."""
        (held,) = self._link.call([("HKEYS", self._claims)])
        if isinstance(held, ReplyError):
            raise self._own_keys_changed()
        keys = [key.decode(errors="replace") for key in held or ()]
        return [key for key in keys if self._is_ours(key)]

    def _messages(self, key: str) -> list[bytes | None] | None:
        """The messages of a claim, oldest first; None: settled, or in place of all: no list."""
        (items,) = self._link.call([("LRANGE", key, 0, -1)])
        return None if isinstance(items, ReplyError) else [item or None for item in reversed(items)]

    def attempts(self, model: str, fields: Sequence[str]) -> dict[str, int]:
        """The counts in attempts:<m> of those `fields` that have one."""
        (counts,) = self._link.call([("HMGET", self._names.attempts(model), *fields)])
        if isinstance(counts, ReplyError):
            self._lacks_attempts(model, counts)
            return {}
        return {name: _count(n) for name, n in zip(fields, counts, strict=True) if n is not None}

    def result(self, request_id: str) -> bytes:
        """The stored result of a request; empty if there is none."""
        (found,) = self._link.call([("GET", self._names.meta(request_id))])
        return found if isinstance(found, bytes) else b""

    def stored(self, ids: Sequence[str]) -> set[str]:
        """Those of `ids` that have a result."""
        replies = self._link.call([("EXISTS", self._names.meta(one)) for one in ids])
        return {one for one, reply in zip(ids, replies, strict=True) if reply == 1}

    def absolve(self, model: str, field: str) -> None:
        """Strike `field` from running and from attempts:<m>: it did no harm this time."""
        self._link.note(("SREM", self._names.running(self._incarnation), f"{model}/{field}"))
        self._link.note(("HDEL", self._names.attempts(model), field))

    def note_changes(self) -> None:
        """Take over what Redis pushed: queues that changed since they were last looked at."""
        keys = self._by_key.keys() if self._link.all_changed else self._link.changed
        for key in keys:
            place = self._by_key.get(key)
            if place is not None and place not in self._wrong_queues:
                self.depths[place] = max(self.depths.get(place) or 0, HINT)
        self._link.forget_changes()

    def _new_claim(self, want: Want) -> Claim:
        key = self._names.claim(self._incarnation, next(self._numbers), want.model, want.step)
        return Claim(key, want.model, want.step, want.count)

    def _round_trip(
        self,
        ahead: list[Packed],
        commands: list[Command],
        listen: Sequence[QueueId],
        sent: Callable[[], None] = lambda: None,
    ) -> tuple[list[Reply], list[Reply]]:
        """The replies to what is `ahead` and to `commands`, and to what arms the next."""
        arming: list[Command] = [("WATCH", self._fence), ("GET", self._fence)]
        arming += [("LLEN", self._queues[place]) for place in listen]
        self._link.post(*ahead, pack([*commands, *arming]))
        # kill point: exchange-written
        sent()
        replies = self._link.read(sum(part.count for part in ahead) + len(commands))
        # kill point: exchange-answered
        # From here on the replies tell the depths; a change that is pushed after them is newer.
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
                    raise self._own_keys_changed()
                raise RedisError(f"while arming: {reply}")
        if replies[1] is None:
            raise LeaseLost
        try:
            self.settles_known = int(replies[1])
        except ValueError:
            raise self._own_keys_changed() from None
        for place, depth in zip(listen, replies[2:], strict=True):
            if depth.__class__ is int:
                self.depths[place] = depth
                if self._wrong_types:
                    self._wrong_queues.discard(place)
                    self._wrong_types.resolve(self._queues[place])
            elif is_wrong_type(depth):
                self._set_aside(place)
            else:
                raise RedisError(f"while arming: {depth}")

    # --- keys that hold something else than ours do ------------------------------------------

    def _set_aside(self, place: QueueId) -> None:
        """Claim nothing from this queue, until its length can be told again."""
        self.depths[place] = 0
        if place not in self._wrong_queues and self._report_wrong_type(
            self._queues[place], LIST, NOTHING_CLAIMED
        ):
            self._wrong_queues.add(place)

    def _report_wrong_type(self, key: str, expected: str, effect: str) -> bool:
        """Whether `key` is of another type now; that is told, once."""
        (kind,) = self._link.call([("TYPE", key)])
        found = kind.decode()
        if found in (expected, "none"):
            return False
        self._wrong_types.report(key, found, expected, effect)
        return True

    def _own_keys_changed(self) -> LeaseLost:
        """Why this incarnation must end: what it holds cannot be told from its keys any more.

        Whoever recovers it finds its claims all the same.
        """
        logger.error(
            "a key of this worker's own (%r, %r or %r) is not as it wrote it; expected nobody else "
            "to write there: its requests are computed again",
            self._fence,
            self._claims,
            self._names.running(self._incarnation),
        )
        return LeaseLost()

    def _lacks_attempts(self, model: str, reply: Reply) -> bool:
        """Whether attempts:<m> is no hash, by what it answered: nobody is suspect then."""
        key = self._names.attempts(model)
        if isinstance(reply, ReplyError):
            if key not in self._wrong_types:
                self._report_wrong_type(key, HASH, NO_ATTEMPTS)
            return True
        if self._wrong_types:
            self._wrong_types.resolve(key)
        return False

    def _is_ours(self, key: str) -> bool:
        """Whether `key`, from claims:<i>, is the claim of a queue that is served here."""
        try:
            name = self._names.parse_claim(key)
        except ValueError:
            return False
        return name.incarnation == self._incarnation and (name.model, name.step) in self._queues

    def _tell_refused(self, settle: Settle, done: Sequence[Reply]) -> None:
        """What settles was applied but for these; results of others are not touched by it."""
        if not any(reply.__class__ is ReplyError for reply in done):
            return
        for command, reply in zip(settle.commands, done, strict=False):
            if isinstance(reply, ReplyError) and not _is_repeated(reply):
                key = command[3 if command[0] == "EVAL" else 1]
                logger.error("Redis refused %s %s of a settle: %s", command[0], key, reply)


def _count(number: bytes) -> int:
    """A number of attempts; 0: somebody else wrote there."""
    try:
        return int(number)
    except ValueError:
        return 0


def _is_repeated(reply: ReplyError) -> bool:
    """ "no such key": a MULTI sent again, its first answer lost."""
    return str(reply).startswith("ERR no such key")


def _log_errors(replies: Sequence[Reply]) -> None:
    """All the rest was applied."""
    for reply in replies:
        if isinstance(reply, ReplyError) and not _is_repeated(reply):
            logger.error("Redis refused one command of a settle: %s", reply)
