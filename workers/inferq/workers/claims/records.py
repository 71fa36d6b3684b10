"""What Redis holds of one incarnation: its claims, and what is known of their requests."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from inferq.shared.names import Names
from inferq.shared.resp import ReplyError
from inferq.workers.claims.claim import Claim, Claimed, Slot
from inferq.workers.claims.fenced import FencedLink
from inferq.workers.claims.wrong_type import LIST, NO_ATTEMPTS


class Records:
    """Reads on the data plane's own link, in its thread."""

    def __init__(self, link: FencedLink, names: Names, incarnation: str) -> None:
        self._link = link
        self._names = names
        self._incarnation = incarnation
        self._claims = names.claims(incarnation)

    def adopt(self, known: Mapping[str, Claim]) -> Iterator[Claimed]:
        """Claims of this incarnation that are in Redis and not among the `known` ones.

        Either the reply that brought them was lost, or they were settled whole and Redis went back.
        """
        for key in self._held():
            if key in known:
                continue
            items = self._messages(key)
            if items is None:
                self._link.report_wrong_type(
                    key, LIST, "The requests of this claim, if it is one, are not seen"
                )
                continue
            if not any(items):
                self._link.note_memory(("UNLINK", key))
                self._link.note_memory(("HDEL", self._claims, key))
                continue
            name = self._names.parse_claim(key)
            claim = Claim(key, name.model, name.step, len(items))
            claim.settled = {place for place, item in enumerate(items) if item is None}
            yield Claimed(claim, items, adopted=True)

    def unsettled(
        self, known: Mapping[str, Claim], settling: Collection[Slot]
    ) -> Iterator[Claimed]:
        """What Redis, which went back, still holds of `known` claims although it was settled.

        `settling`: requests of which it is not known yet whether they are settled.
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
        """The keys of this incarnation's claims, as Redis has them."""
        (held,) = self._link.call([("HKEYS", self._claims)])
        if isinstance(held, ReplyError):
            raise self._link.own_keys_changed()
        keys = [key.decode(errors="replace") for key in held or ()]
        return [key for key in keys if self._is_ours(key)]

    def _messages(self, key: str) -> list[bytes | None] | None:
        """The messages of a claim, oldest first, None for a settled one. None: `key` is no list."""
        (items,) = self._link.call([("LRANGE", key, 0, -1)])
        return None if isinstance(items, ReplyError) else [item or None for item in reversed(items)]

    def _is_ours(self, key: str) -> bool:
        """Whether `key`, from claims:<i>, is this incarnation's claim of a queue served here."""
        try:
            name = self._names.parse_claim(key)
        except ValueError:
            return False
        return (
            name.incarnation == self._incarnation and (name.model, name.step) in self._link.queues
        )

    def attempts(self, model: str, fields: Sequence[str]) -> dict[str, int]:
        """The counts in attempts:<m> of those `fields` that have one."""
        key = self._names.attempts(model)
        (counts,) = self._link.call([("HMGET", key, *fields)])
        if isinstance(counts, ReplyError):
            self._link.check_hash(key, NO_ATTEMPTS, counts)
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


def _count(number: bytes) -> int:
    """A number of attempts; 0: it is no number, somebody else wrote there."""
    try:
        return int(number)
    except ValueError:
        return 0
