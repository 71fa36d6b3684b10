"""The claim protocol: one fenced MULTI settles requests and claims more; settles come first.

    MULTI
      <settles>, SET fence:i <their number>                  see settlement.py
      per non-empty queue: HSET claims:i k 0, LMOVE q k RIGHT LEFT × n, HLEN attempts:m
    EXEC

How it is sent, and how the fence makes it fail, is in fenced.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from inferq.shared.names import Names
from inferq.shared.resp import Command, Packed, Reply, ReplyError, pack
from inferq.workers.claims.claim import Claim, Claimed, Want
from inferq.workers.claims.fenced import FencedLink, QueueId
from inferq.workers.claims.records import Records
from inferq.workers.claims.settlement import Settle, Settlement
from inferq.workers.claims.wrong_type import NO_ATTEMPTS, is_wrong_type

logger = logging.getLogger(__name__)

#: Most members that one SADD or SREM names.
_MEMBERS: Final = 1_000


@dataclass(frozen=True)
class Exchange:
    """What one round trip brought."""

    claimed: list[Claimed]
    #: Models with entries in attempts:<m>: read them before their claimed requests run.
    suspicious: frozenset[str]
    #: A queue held fewer requests than were wanted, and its length was not read.
    missed: bool
    #: The commands that stored results and dead letters and told who waits.
    storing: Packed
    #: Places of the settlements whose request had a result already.
    overtaken: frozenset[int]


class Ledger:
    """One incarnation's claims on one link. Owned by the data plane's thread.

    `numbers` outlives the link: one incarnation uses the number of a claim only once. Otherwise a
    claim whose reply was lost would pass for one that is known. `settles` outlives it as well; it
    numbers the MULTIs that settle. The number of the last one stands in the fence, which shows
    whether Redis went back.
    """

    def __init__(
        self,
        link: FencedLink,
        names: Names,
        incarnation: str,
        *,
        numbers: Iterator[int],
        settles: Iterator[int],
        result_ttl_s: int,
    ) -> None:
        #: Its round trips, and the depths that they bring.
        self.link = link
        #: What Redis holds of this incarnation.
        self.records = Records(link, names, incarnation)
        self._names = names
        self._incarnation = incarnation
        self._result_ttl_s = result_ttl_s
        self._claims = names.claims(incarnation)
        self._running = names.running(incarnation)
        self._numbers = numbers
        self._settles = settles

    def exchange(
        self,
        settlements: Sequence[Settlement],
        wants: Sequence[Want],
        listen: Sequence[QueueId],
        sent: Callable[[], None],
    ) -> Exchange:
        """Settle and claim in one MULTI, and arm the next. `settlements` or `wants` is not empty.

        `listen`: the queues whose length is read, and whose changes Redis reports from then on.
        `sent` is called between writing and waiting for the reply. Raises LeaseLost, RedisFull, or
        one of resp.BROKEN. In the last case it is unknown whether the MULTI was applied, and the
        same settlements are sent again on the next link.
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
        done = self.link.transact([storing, releasing], number, claiming, listen, sent)
        self._tell_refused(settle, done)
        offset = len(done) - len(claiming)  # what settles comes first
        depths = self.link.depths
        depths.update((place, None) for place in self.link.queues if place not in listen)
        depths.update(dict.fromkeys(self.link.wrong_queues, 0))
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
                raise self.link.own_keys_changed()
            if len(got) < want.count and is_wrong_type(done[offset + 1 + len(got)]):
                self.link.set_aside((want.model, want.step))
            offset += 1 + want.count
            claim.size = len(got)
            if len(got) < want.count and (want.model, want.step) not in listen:
                missed = True
                depths[want.model, want.step] = 0
            if got:
                claimed.append(Claimed(claim, got))
            else:
                empty.append(claim.key)
        suspicious = frozenset(
            model
            for model, count in zip(models, done[offset:], strict=True)
            if self.link.check_hash(self._names.attempts(model), NO_ATTEMPTS, count) and count != 0
        )
        if empty:
            self.link.note(("HDEL", self._claims, *empty))
        # kill point: exchange-read
        overtaken = settle.overtaken(done[: storing.count])
        return Exchange(claimed, suspicious, missed, storing, overtaken)

    def settle_again(self, storing: Packed, number: int) -> None:
        """Store once more what was stored before, on a Redis that has forgotten it.

        `number` is the one it was settled under. So wherever this breaks off, the fence tells what
        is still to be settled again.
        """
        again = self.link.transact([storing], number, [], list(self.link.queues), lambda: None)
        _log_errors(again)

    def mark(self, starting: Sequence[str], decoded: Sequence[Claim]) -> None:
        """Note what starts computing ("<m>/<id>") and which claims were decoded.

        Redis is told with what is written next, by `FencedLink.flush` at the latest, and before any
        of it starts: then Redis knows the name of what kills this process.
        """
        if decoded:
            fields = [part for claim in decoded for part in (claim.key, 1)]
            self.link.note_memory(("HSET", self._claims, *fields))
        for at in range(0, len(starting), _MEMBERS):
            some = starting[at : at + _MEMBERS]
            self.link.note_memory(("SADD", self._running, *some))

    def unmark(self, recalled: Sequence[str]) -> None:
        """Note what was to start computing ("<m>/<id>") and waits again."""
        self.link.note(("SREM", self._running, *recalled))

    def unmark_all(self) -> None:
        """Note that nothing computes. What does compute is then marked anew."""
        self.link.note(("DEL", self._running))

    def absolve(self, model: str, field: str) -> None:
        """Remove `field` from running:<i> and attempts:<m>: this time it ended no worker."""
        self.link.note(("SREM", self._running, f"{model}/{field}"))
        self.link.note(("HDEL", self._names.attempts(model), field))

    def _new_claim(self, want: Want) -> Claim:
        key = self._names.claim(self._incarnation, next(self._numbers), want.model, want.step)
        return Claim(key, want.model, want.step, want.count)

    def _tell_refused(self, settle: Settle, done: Sequence[Reply]) -> None:
        """Log the commands of a settle that Redis refused. All others were applied."""
        if not any(reply.__class__ is ReplyError for reply in done):
            return
        for command, reply in zip(settle.commands, done, strict=False):
            if isinstance(reply, ReplyError) and not _is_repeated(reply):
                key = command[3 if command[0] == "EVAL" else 1]
                logger.error("Redis refused %s %s of a settle: %s", command[0], key, reply)


def _is_repeated(reply: ReplyError) -> bool:
    """ "no such key": a MULTI sent again, its first answer lost."""
    return str(reply).startswith("ERR no such key")


def _log_errors(replies: Sequence[Reply]) -> None:
    """Log the commands that Redis refused. All others were applied."""
    for reply in replies:
        if isinstance(reply, ReplyError) and not _is_repeated(reply):
            logger.error("Redis refused one command of a settle: %s", reply)
