"""From claimed bytes to waiting requests, with what must be asked of Redis on the way.

A message that ended its worker while it was decoded, or while it was computed, is known by its
entry in ``attempts:<m>``: it is then decoded by itself, runs alone, and after max_attempts is put
among the dead letters. Where that hash is empty, which is the rule, none of this costs a thing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import msgspec

from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims import Claimed, Slot
from inferq.workers.clock import RedisClock
from inferq.workers.hooks import Hooks
from inferq.workers.intake import Failed, Foreign, Opened, Quarantined, Revoked
from inferq.workers.ledger import Ledger
from inferq.workers.recovery import suspect
from inferq.workers.serving import ServedModel
from inferq.workers.settle import Settlement

logger = logging.getLogger(__name__)

Found = Opened | Failed | Revoked | Foreign | Quarantined


class Received(msgspec.Struct, frozen=True):
    """What became of one claim's messages: they wait for a lane, or have ended already.

    `ended` pairs a settlement with the whole message if it has links, a chain or a chord.
    """

    waiting: list[Waiting]
    ended: list[tuple[Settlement, bytes | None]]


class Receiver:
    """Reads claims. What it asks of Redis may break off: then nothing was admitted or ended."""

    def __init__(self, models: Mapping[str, ServedModel], clock: RedisClock, hooks: Hooks) -> None:
        self._models = models
        self._clock = clock
        self._hooks = hooks

    def receive(self, ledger: Ledger, claimed: Claimed, suspicious: bool) -> Received:
        """Decode one claim. `suspicious`: its model has entries in attempts:<m>."""
        model = self._models[claimed.claim.model]
        messages = claimed.messages
        deaths: dict[str, int] = {}
        if suspicious:
            deaths = ledger.attempts(model.name, [suspect(m) for m in messages if m is not None])
        received = Received([], [])
        opened: list[Opened] = []
        for place, message in enumerate(messages):
            if message is None:
                continue
            slot = Slot(claimed.claim, place)
            if deaths:
                found = self._open_suspect(ledger, model, slot, message, deaths)
            else:
                found = self._open(model, slot, message)
            if isinstance(found, Opened):
                opened.append(found)
            else:
                received.ended.append(self._end(model, found))
        if suspicious and opened:
            opened = self._without_dead(ledger, model, opened, messages, received)
        keys = [key for found in opened for key in found.references.values()]
        payloads = ledger.payloads(keys) if keys else {}
        for found in opened:
            item = model.intake.admit(found, payloads)
            if isinstance(item, Failed):
                received.ended.append(self._end(model, item))
            else:
                received.waiting.append(item)
        return received

    def _open(self, model: ServedModel, slot: Slot, message: bytes) -> Found:
        try:
            return model.intake.open(slot, message)
        except Exception as problem:
            logger.exception("a message of %s cannot be read", model.name)
            return Quarantined(slot, message, f"reading it raised {problem!r}")

    def _open_suspect(
        self, ledger: Ledger, model: ServedModel, slot: Slot, message: bytes,
        deaths: Mapping[str, int],
    ) -> Found:  # fmt: skip
        field = suspect(message)
        count = deaths.get(field, 0)
        if not count:
            return self._open(model, slot, message)
        if count >= model.spec.config.max_attempts:
            ledger.forgive(model.name, field)
            return Quarantined(slot, message, f"its worker died decoding it {count} times")
        ledger.mark_running([f"{model.name}/{field}"], [])
        found = self._open(model, slot, message)
        ledger.forgive(model.name, field)
        return found

    def _without_dead(
        self, ledger: Ledger, model: ServedModel, opened: Sequence[Opened],
        messages: Sequence[bytes | None], received: Received,
    ) -> list[Opened]:  # fmt: skip
        counts = ledger.attempts(model.name, [found.ticket.id for found in opened])
        alive: list[Opened] = []
        for found in opened:
            count = counts.get(found.ticket.id, 0)
            message = messages[found.slot.index]
            again = found.retried(count) if count else found
            if count < model.spec.config.max_attempts or message is None:
                alive.append(again)
                continue
            ticket = again.ticket
            logger.error("dead letter: %s of %s ended %d workers", ticket.id, model.name, count)
            dead = model.results.dead(again.slot, ticket, message, self._clock.now())
            received.ended.append((dead, ticket.canvas))
        return alive

    def _end(
        self, model: ServedModel, found: Failed | Revoked | Foreign | Quarantined
    ) -> tuple[Settlement, bytes | None]:
        results = model.results
        match found:
            case Failed(slot=slot, ticket=ticket, error=error):
                return results.failed(slot, ticket, error), ticket.canvas
            case Revoked(slot=slot, ticket=ticket, reason=reason):
                return results.revoked(slot, ticket, reason), ticket.canvas
            case Foreign(slot=slot, message=message):
                try:
                    return self._hooks.hand_over(slot, model.name, message), None
                except ValueError as problem:
                    return self._end(model, Quarantined(slot, message, str(problem)))
            case Quarantined(reason=reason):
                logger.error("quarantined a message of %s: %s", model.name, reason)
                return results.quarantined(found, model.name, self._clock.now()), None
