"""Takes on claimed requests: reads them, counts their bytes, and adds them to their model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from inferq.workers.claims.claim import Claimed
from inferq.workers.claims.clock import RedisClock
from inferq.workers.claims.ledger import Ledger
from inferq.workers.data_plane.held import Held
from inferq.workers.data_plane.observers import Observers
from inferq.workers.data_plane.receiver import Received, Receiver
from inferq.workers.data_plane.served_model import ServedModel
from inferq.workers.data_plane.settling import Settling
from inferq.workers.data_plane.unfetched import Unfetched


class Admission:
    """Admits what is claimed on one link, that of `ledger`. Owned by the data plane's thread."""

    def __init__(
        self,
        ledger: Ledger,
        receiver: Receiver,
        clock: RedisClock,
        models: Mapping[str, ServedModel],
        held: Held,
        settling: Settling,
        observers: Observers,
    ) -> None:
        self._ledger = ledger
        self._receiver = receiver
        self._clock = clock
        self._models = models
        self._held = held
        self._settling = settling
        self._observers = observers

    def take_on(self, claimed: Sequence[Claimed], suspicious: frozenset[str]) -> None:
        """Take on each of `claimed`. `suspicious`: models with entries in attempts:<m>."""
        held = self._held
        for batch in claimed:
            claim = batch.claim
            claim.claimed_redis_ms = self._clock.now()
            room = held.budget.fetchable(claim.model)
            began = time.thread_time()
            # If this breaks off, the claim stays unknown here and is adopted on the next link.
            suspected = claim.model in suspicious
            received = self._receiver.receive(self._ledger, batch, suspected, room)
            if batch.places:
                took = time.thread_time() - began
                self._models[claim.model].sizes.read(took / len(batch.places))
            held.claims[claim.key] = claim
            if batch.adopted:
                claim.settled.difference_update(batch.places)
            inputs = sum(map(len, filter(None, batch.messages))) + sum(received.beside)
            held.budget.claimed(claim, batch.places, inputs, received.whole)
            # kill point: claim-decoded
            held.decoded.append(claim)
            if received.unfetched:
                self._postpone(claim.model, received.unfetched)
            self._admit(self._models[claim.model], received)

    def fetch(self) -> None:
        """Fetch payloads for which there is room by now."""
        held = self._held
        for name in held.unfetched.models:
            model, room = self._models[name], held.budget.fetchable(name)
            some = held.unfetched.first(name, room, alone=not (model.waiting or model.jobs))
            if some:
                received = self._receiver.fetch(
                    model, some
                )  # if this breaks off, they stay in the backlog
                held.unfetched.drop(name, len(some))
                held.budget.postponed(name, -sum(each.size for each in some))
                self._admit(model, received)

    def _postpone(self, model: str, some: Sequence[Unfetched]) -> None:
        self._held.unfetched.add(model, some)
        self._held.budget.postponed(model, sum(each.size for each in some))

    def _admit(self, model: ServedModel, received: Received) -> None:
        self._held.requests_claimed += len(received.waiting) + len(received.ended)
        for item in received.waiting:
            model.add(item)
        if received.waiting:
            self._observers.claimed(received.waiting)
        refused = [done.ended for done, _ in received.ended if done.ended is not None]
        if refused:
            self._observers.refused(refused)
        for settlement, canvas in received.ended:
            self._settling.add(settlement, canvas)
