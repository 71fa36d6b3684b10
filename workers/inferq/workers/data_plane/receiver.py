"""Turns claimed bytes into waiting requests, and asks Redis what must be known for that.

A message that ended its worker while it was decoded, or while it was computed, has an entry in
``attempts:<m>``. It is then decoded by itself, runs alone, and after max_attempts becomes a dead
letter. If that hash is empty, as it mostly is, none of this takes any time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import msgspec

from inferq.shared.errors import InvalidInput, NotRegistered
from inferq.shared.schema import Ticket
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.claim import Claimed, Slot
from inferq.workers.claims.clock import RedisClock
from inferq.workers.claims.ledger import Ledger
from inferq.workers.claims.payloads import PayloadReader
from inferq.workers.claims.recovery import decoding_field, linking_field
from inferq.workers.claims.scheduled import ScheduledKeeper
from inferq.workers.claims.settlement import Settlement
from inferq.workers.claims.verdicts import (
    Failed,
    Foreign,
    Opened,
    Quarantined,
    Revoked,
    ScheduledRequest,
    retried,
)
from inferq.workers.data_plane.budget import beside_bytes
from inferq.workers.data_plane.control import Control
from inferq.workers.data_plane.served_model import ServedModel
from inferq.workers.data_plane.unfetched import Unfetched, beside_payloads, payload_sizes
from inferq.workers.logs.fields import about

logger = logging.getLogger(__name__)


class Dead(msgspec.Struct, frozen=True):
    """Computing it, or publishing its links (`linking_field`), ended too many workers."""

    slot: Slot
    ticket: Ticket
    message: bytes
    linking: bool = False


class Answered(msgspec.Struct, frozen=True):
    """It has a result already: a client pushed it again when Redis was restarted.

    Or it was settled, and Redis went back in time. `result`: as stored, if it is needed.
    """

    slot: Slot
    ticket: Ticket
    result: bytes


Verdict = Opened | Failed | Revoked | Foreign | ScheduledRequest | Quarantined | Dead | Answered


class Received(msgspec.Struct, frozen=True):
    """What became of one claim's messages: they wait for a lane, or have ended already.

    `ended` pairs a settlement with the whole message if it has links, a chain or a chord.
    """

    waiting: list[Waiting]
    ended: list[tuple[Settlement, bytes | None]]
    #: Requests whose payloads are not fetched yet, since there is no room for them.
    unfetched: list[Unfetched]
    #: Place in the claim → all bytes of a request with payloads, fetched or not.
    whole: dict[int, int]
    #: Bytes of all payloads by their sizes, and what elements of text take besides their bytes.
    beside: list[int]


class Receiver:
    """Reads claims. If a question to Redis breaks off, nothing was admitted or ended."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        clock: RedisClock,
        control: Control,
        scheduled: ScheduledKeeper,
        payloads: PayloadReader,
    ) -> None:
        self._models = models
        self._clock = clock
        self._control = control
        self._scheduled = scheduled
        self._payloads = payloads

    def receive(self, ledger: Ledger, claimed: Claimed, suspicious: bool, room: int) -> Received:
        """Decode one claim. `suspicious`: its model has entries in attempts:<m>, or may have.

        `room`: bytes that requests with payloads may take; those beyond it are left `unfetched`.
        """
        model = self._models[claimed.claim.model]
        places = [
            (Slot(claimed.claim, place), message)
            for place, message in enumerate(claimed.messages)
            if message is not None
        ]
        received = Received([], [], [], {}, [])
        if not suspicious:
            found = [self._open(model, slot, message) for slot, message in places]
            # kill point: claim-opened
            self._admit(model, found, received, room)
            return received
        fields = [decoding_field(message) for _, message in places]
        deaths = ledger.records.attempts(model.name, fields)
        clear = [place for place, field in zip(places, fields, strict=True) if field not in deaths]
        adopted = claimed.adopted
        found = self._open_counted(ledger, model, clear, adopted)
        self._admit(model, found, received, room)
        for (slot, message), field in zip(places, fields, strict=True):
            count = deaths.get(field, 0)
            if count >= model.spec.config.max_attempts:
                dead = model.results.undecodable(slot, message, field, count, self._clock.now())
                told = about(dead.request_id, model=model.name)
                logger.error(
                    "dead letter: %s of %s ended %d workers",
                    dead.request_id or "a message",
                    model.name,
                    count,
                    extra=told,
                )
                received.ended.append((dead, None))
            elif count:
                # Alone: if decoding ends the worker again, an attempt is counted only for this
                # message.
                ledger.mark([f"{model.name}/{field}"], [])
                ledger.link.flush()
                found = self._open_counted(ledger, model, [(slot, message)], adopted)
                self._admit(model, found, received, math.inf)
                # kill point: suspect-decoded
                ledger.absolve(model.name, field)
        return received

    def _open(self, model: ServedModel, slot: Slot, message: bytes) -> Verdict:
        try:
            return model.intake.open(slot, message)
        except Exception as problem:
            told = about(model=model.name)  # the line about its quarantine has its id, if known
            logger.exception("a message of %s cannot be read", model.name, extra=told)
            return Quarantined(slot, message, f"reading it raised {problem!r}")

    def _open_counted(
        self,
        ledger: Ledger,
        model: ServedModel,
        places: Sequence[tuple[Slot, bytes]],
        adopted: bool,
    ) -> list[Verdict]:
        """As `_open`, with Dead for requests that ended too many workers.

        A copy of a request that ended a worker is Answered if there is a result: when the first
        copy was settled, its attempts were forgotten. In an `adopted` claim every request with a
        result is Answered.
        """
        opened = [self._open(model, slot, message) for slot, message in places]
        tickets = [found.ticket for found in opened if isinstance(found, Opened | Failed | Revoked)]
        ids = [ticket.id for ticket in tickets]
        links = [linking_field(ticket.id) for ticket in tickets if ticket.canvas is not None]
        counts = ledger.records.attempts(model.name, ids + links) if ids else {}
        if not counts and not adopted:
            return opened
        stored = ledger.records.stored(ids if adopted else [each for each in ids if each in counts])
        counted: list[Verdict] = []
        for found, (slot, message) in zip(opened, places, strict=True):
            if isinstance(found, Opened | Failed | Revoked):
                ended = counts.get(linking_field(found.ticket.id), 0)
                if found.ticket.canvas is not None and ended >= model.spec.config.max_attempts:
                    ticket = retried(found, ended).ticket
                    counted.append(Dead(slot, ticket, message, linking=True))
                    continue
                if found.ticket.id in stored:
                    counted.append(self._answered(ledger, slot, found.ticket))
                    continue
                again = retried(found, counts.get(found.ticket.id, 0))
                if (
                    isinstance(again, Opened)
                    and again.ticket.attempts >= model.spec.config.max_attempts
                ):
                    stored.add(again.ticket.id)  # further copies in this claim are answered
                    counted.append(Dead(slot, again.ticket, message))
                else:
                    counted.append(again)
            else:
                counted.append(found)
        return counted

    def _answered(self, ledger: Ledger, slot: Slot, ticket: Ticket) -> Answered:
        of_use = ticket.canvas is not None or ticket.payload_keys
        return Answered(slot, ticket, ledger.records.result(ticket.id) if of_use else b"")

    def fetch(self, model: ServedModel, some: Sequence[Unfetched]) -> Received:
        """Fetch the payloads of requests that were left `unfetched`."""
        received = Received([], [], [], {}, [])
        self._admit(model, [each.opened for each in some], received, math.inf)
        return received

    def _admit(
        self, model: ServedModel, found: Sequence[Verdict], received: Received, room: float
    ) -> None:
        sizes: dict[str, int] = {}
        for each in found:
            if isinstance(each, Opened) and each.references:
                mine = payload_sizes(each, model.advert.max_request_bytes)
                size = sum(mine.values())
                if size and model.sizes.of_text:
                    size += beside_payloads(each)
                whole = model.sizes.whole(size)
                received.beside.append(size)
                received.whole[each.slot.index] = whole
                if whole > room:
                    room = 0  # those behind it wait, too
                    received.unfetched.append(Unfetched(each, whole))
                else:
                    room -= whole
                    sizes.update(mine)
        left = {each.opened.slot.index for each in received.unfetched}
        payloads = self._payloads.fetch(sizes, model.advert.max_request_bytes) if sizes else {}
        for each in found:
            if left and each.slot.index in left:
                continue
            item = self._read(model, each, payloads) if isinstance(each, Opened) else each
            if isinstance(item, Waiting):
                received.waiting.append(item)
                if model.sizes.of_text and item.slot.index not in received.whole:
                    received.beside.append(beside_bytes(item.inputs))
            else:
                received.ended.append(self._end(model, item))

    def _read(
        self,
        model: ServedModel,
        opened: Opened,
        payloads: Mapping[str, bytes | memoryview | None],
    ) -> Waiting | Failed:
        try:
            return model.intake.admit(opened, payloads)
        except Exception as problem:
            told = about(opened.ticket.id, model=model.name)
            logger.exception("the inputs of %s cannot be read", opened.ticket.id, extra=told)
            error = InvalidInput(f"reading its inputs raised {problem!r}")
            return Failed(opened.slot, opened.ticket, error)

    def _end(
        self,
        model: ServedModel,
        found: Failed | Revoked | Foreign | ScheduledRequest | Quarantined | Dead | Answered,
    ) -> tuple[Settlement, bytes | None]:
        results = model.results
        match found:
            case Failed(slot=slot, ticket=ticket, error=error):
                if isinstance(error, NotRegistered):
                    logger.warning(
                        "task %r on the queue of %s is not run: it is not registered here",
                        error.message,
                        model.name,
                        extra=about(ticket.id, model=model.name, error=error.code),
                    )
                return results.failed(slot, ticket, error), ticket.canvas
            case Revoked(slot=slot, ticket=ticket, reason=reason):
                return results.revoked(slot, ticket, reason), ticket.canvas
            case Dead(slot=slot, ticket=ticket, message=message):
                logger.error(
                    "dead letter: %s of %s ended %d workers%s",
                    ticket.id,
                    model.name,
                    ticket.attempts,
                    " that published what follows on it" if found.linking else "",
                    extra=about(ticket.id, model=model.name),
                )
                if found.linking:
                    return results.unlinkable(slot, ticket, message, self._clock.now()), None
                return results.dead(slot, ticket, message, self._clock.now()), ticket.canvas
            case Answered(slot=slot, ticket=ticket, result=result):
                # The tasks that follow it may have been lost or never published; so they may be
                # published twice.
                return results.answered(slot, ticket, result), ticket.canvas if result else None
            case Foreign(slot=slot, message=message, handed=handed):
                return self._control.hand_over(slot, model.name, message, handed), None
            case ScheduledRequest(slot=slot, message=message, due_ms=due_ms):
                return self._scheduled.keep(slot, message, due_ms), None
            case Quarantined(reason=reason):
                settlement = results.quarantined(found, self._clock.now())
                told = about(settlement.request_id, model=model.name)
                logger.error(
                    "quarantined %s of %s: %s",
                    settlement.request_id or "a message",
                    model.name,
                    reason,
                    extra=told,
                )
                return settlement, None
