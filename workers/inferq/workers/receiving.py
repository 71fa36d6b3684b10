"""From claimed bytes to waiting requests, with what must be asked of Redis on the way.

A message that ended its worker while it was decoded, or while it was computed, is known by its
entry in ``attempts:<m>``: it is then decoded by itself, runs alone, and after max_attempts is put
among the dead letters. Where that hash is empty, which is the rule, none of this costs a thing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

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


class Receiver:
    """Admits claimed messages to their model's waiting requests.

    What ends at once is given to `settle`, with the message if it has links, a chain or a chord.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        clock: RedisClock,
        hooks: Hooks,
        settle: Callable[[Settlement, bytes | None], None],
    ) -> None:
        self._models = models
        self._clock = clock
        self._hooks = hooks
        self._settle = settle

    def receive(self, ledger: Ledger, claimed: Claimed, suspicious: bool) -> None:
        """Decode one claim. `suspicious`: its model has entries in attempts:<m>."""
        model = self._models[claimed.claim.model]
        messages = claimed.messages
        deaths: dict[str, int] = {}
        if suspicious:
            deaths = ledger.attempts(model.name, [suspect(m) for m in messages if m is not None])
        opened: list[Opened] = []
        for place, message in enumerate(messages):
            if message is None:
                continue
            slot = Slot(claimed.claim, place)
            if deaths:
                found = self._open_suspect(ledger, model, slot, message, deaths)
            else:
                found = model.intake.open(slot, message)
            if isinstance(found, Opened):
                opened.append(found)
            else:
                self._end(model, found)
        if suspicious and opened:
            opened = self._without_dead(ledger, model, opened, messages)
        self._admit(ledger, model, opened)

    def _open_suspect(
        self, ledger: Ledger, model: ServedModel, slot: Slot, message: bytes,
        deaths: Mapping[str, int],
    ) -> Found:  # fmt: skip
        field = suspect(message)
        count = deaths.get(field, 0)
        if not count:
            return model.intake.open(slot, message)
        if count >= model.spec.config.max_attempts:
            ledger.forgive(model.name, field)
            return Quarantined(slot, message, f"its worker died decoding it {count} times")
        ledger.mark_running([f"{model.name}/{field}"], [])
        found = model.intake.open(slot, message)
        ledger.forgive(model.name, field)
        return found

    def _without_dead(
        self, ledger: Ledger, model: ServedModel, opened: Sequence[Opened],
        messages: Sequence[bytes | None],
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
            logger.error(
                "dead letter: %s of %s ended %d workers", again.ticket.id, model.name, count
            )
            dead = model.results.dead(again.slot, again.ticket, message, self._clock.now())
            self._settle(dead, again.ticket.canvas)
        return alive

    def _admit(self, ledger: Ledger, model: ServedModel, opened: Sequence[Opened]) -> None:
        keys = [key for found in opened for key in found.references.values()]
        payloads = ledger.payloads(keys) if keys else {}
        for found in opened:
            item = model.intake.admit(found, payloads)
            if isinstance(item, Failed):
                self._end(model, item)
            else:
                model.add(item)

    def _end(self, model: ServedModel, found: Failed | Revoked | Foreign | Quarantined) -> None:
        results = model.results
        match found:
            case Failed(slot, ticket, error):
                self._settle(results.failed(slot, ticket, error), ticket.canvas)
            case Revoked(slot, ticket, reason):
                self._settle(results.revoked(slot, ticket, reason), ticket.canvas)
            case Foreign(slot, message):
                try:
                    self._settle(self._hooks.hand_over(slot, model.name, message), None)
                except ValueError as problem:
                    self._end(model, Quarantined(slot, message, str(problem)))
            case Quarantined(reason=reason):
                logger.error("quarantined a message of %s: %s", model.name, reason)
                self._settle(results.quarantined(found, model.name, self._clock.now()), None)
