"""Holds what has ended and is not settled yet, and decides when and how much to settle.

Batches end on the lanes' threads; links and chords are published on another. What was settled
lately is kept, in case Redis goes back in time (see claims/rollback.py).
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Final

from msgspec.structs import replace

from inferq.shared.errors import FatalEngineError
from inferq.shared.resp import Packed
from inferq.workers.claims.ledger import Ledger
from inferq.workers.claims.rollback import SettledMultis
from inferq.workers.claims.runs import Finished
from inferq.workers.claims.settlement import Settlement
from inferq.workers.data_plane.control import Control
from inferq.workers.data_plane.held import Held
from inferq.workers.data_plane.observers import Observers, Settled
from inferq.workers.data_plane.served_model import ServedModel
from inferq.workers.logs.fields import about

logger = logging.getLogger(__name__)

#: Longest time that results wait for those of the lanes' next batches, in s.
SETTLE_WITHIN_S: Final = 0.02
#: Most results in one MULTI, and most bytes of them; the rest goes into the next.
MAX_SETTLEMENTS: Final = 1_000
MAX_SETTLE_BYTES: Final = 32 * 1024 * 1024


def portion(settlements: list[Settlement]) -> list[Settlement]:
    """The first of `settlements`: as many as one MULTI may carry."""
    size = 0
    for place, done in enumerate(settlements):
        size += len(done.outcome)
        if done.dead_letter is not None or done.before:
            size += _other_bytes(done)
        if place and (size > MAX_SETTLE_BYTES or place == MAX_SETTLEMENTS):
            return settlements[:place]
    return list(settlements)


def _other_bytes(done: Settlement) -> int:
    """Bytes that settling it sends besides its result; a dead letter is sent twice."""
    words = [word for command in done.before for word in command]
    sizes = [len(word) for word in words if isinstance(word, bytes | str)]
    return sum(sizes) + 2 * len(done.dead_letter or b"")


class Settling:
    """Owned by the data plane's thread; `on_finished` and `on_ready` may be called from any."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        held: Held,
        control: Control,
        observers: Observers,
    ) -> None:
        self._models = models
        self._held = held
        self._control = control
        self._observers = observers
        self._finished: deque[Finished] = deque()
        self._ready: deque[tuple[str, Settlement]] = deque()
        #: Batches whose results wait for those of others.
        self._ended: list[Finished] = []
        #: Model → requests that have ended, but whose links, chain or chord are not published yet.
        self.away_in_canvas: Counter[str] = Counter()
        #: Those of them that are still marked in Redis as computing ("<m>/<id>").
        self._stopped: list[str] = []
        #: The incarnation whose requests these are.
        self.incarnation = ""
        #: What goes into the next MULTIs, in order.
        self.due: list[Settlement] = []
        self.settled_multis = SettledMultis()
        #: How many of those due were sent without an answer.
        self._doubtful = 0
        #: Since the start.
        self.batches_ended = 0
        self.requests_settled = 0

    def on_finished(self, finished: Finished) -> None:
        """A lane has ended a batch."""
        self._finished.append(finished)

    def on_ready(self, incarnation: str, settlement: Settlement) -> None:
        """The links, chain or chord of a request were published."""
        self._ready.append((incarnation, settlement))

    def collect(self) -> FatalEngineError | None:
        """Note the batches that have ended. Returns the error if an engine cannot be used again."""
        fatal: FatalEngineError | None = None
        while self._finished:
            finished = self._finished.popleft()
            model = self._model(finished)
            if not finished.audited:
                self.batches_ended += 1
                model.learn(finished)
                model.ended(finished.job, finished.ended - finished.began)
                if finished.outcomes and (one := finished.outcomes[0]).outputs is not None:
                    model.sizes.computed(one.item.inputs, one.outputs)
                self._observers.finished(finished)
            if finished.fatal is not None:
                ids = (item.ticket.id for item in finished.job.items)
                told = about(*ids, model=model.name)
                logger.critical("engine of %s: %s", model.name, finished.fatal, extra=told)
                fatal = finished.fatal
            else:
                self._ended.append(finished)
        return fatal

    def is_due(self) -> bool:
        """False while results may wait for more of them: each trip to Redis takes the same time."""
        if not self._ended or self.due or self._ready:
            return True
        if time.monotonic() >= self._ended[0].ended + SETTLE_WITHIN_S:
            return True
        return not all(self._model(finished).has_enough_ahead() for finished in self._ended)

    def due_at(self) -> float | None:
        """When (monotonic s) the results that wait will be due; None if none wait."""
        return self._ended[0].ended + SETTLE_WITHIN_S if self._ended else None

    def take(self, ledger: Ledger) -> None:
        """Make what has ended due now, if it belongs to a claim that is held."""
        claims = self._held.claims
        ended, self._ended = self._ended, []
        for finished in ended:
            results = self._model(finished).results
            for outcome in finished.outcomes:
                if outcome.item.slot.claim.key in claims:
                    self.add(results.computed(outcome), outcome.item.ticket.canvas)
            for late in finished.late:
                if late.slot.claim.key in claims:
                    self.add(results.late(late), late.ticket.canvas)
        self._take_ready()
        if self._stopped:
            ledger.unmark(self._stopped)
            self._stopped = []

    def _take_ready(self) -> None:
        while self._ready:
            incarnation, settlement = self._ready.popleft()
            if incarnation == self.incarnation:
                self.away_in_canvas[settlement.model] -= 1
                self.due.append(settlement)

    def add(self, settlement: Settlement, canvas: bytes | None) -> None:
        """Add a settlement. It is due at once or, with a `canvas`, once that is published."""
        if canvas is None:
            self.due.append(settlement)
        else:
            if settlement.running:
                self._stopped.append(f"{settlement.model}/{settlement.request_id}")
            self._publish(replace(settlement, canvas=canvas), canvas)

    def _publish(self, settlement: Settlement, canvas: bytes) -> None:
        self.away_in_canvas[settlement.model] += 1
        self._control.publish_canvas(self.incarnation, settlement, canvas)

    def publish_again(self) -> None:
        """Publish again what was published for those due: a restarted Redis may have lost it."""
        self._take_ready()
        again = [done for done in self.due if done.canvas is not None]
        self._doubtful = sum(done.canvas is None for done in self.due[: self._doubtful])
        self.due = [done for done in self.due if done.canvas is None]
        for done in again:
            done.slot.claim.settled.discard(done.slot.index)
            self._publish(done, done.canvas or b"")

    def unanswered(self, sent: list[Settlement]) -> None:
        """Redis may or may not have settled `sent`, the first ones due: they are sent again."""
        self._doubtful = max(self._doubtful, len(sent))

    def settled(
        self,
        sent: list[Settlement],
        storing: Packed,
        number: int,
        overtaken: frozenset[int],
        redis_ms: float,
    ) -> None:
        """Redis has confirmed that the MULTI `number` settled `sent`, the first ones due.

        `overtaken`: places of those that had a result already. `redis_ms`: Redis' time now.
        """
        self.requests_settled += len(sent)
        self._held.settled({done.slot.claim for done in sent})
        del self.due[: len(sent)]
        self.settled_multis.add(storing, len(sent), number)
        if overtaken and self._doubtful:  # the stored result may be their own
            overtaken = frozenset(place for place in overtaken if place >= self._doubtful)
        self._doubtful = max(0, self._doubtful - len(sent))
        self._observers.settled(Settled(sent, overtaken, time.monotonic() * 1000, redis_ms))
        for done in sent:
            if done.after is not None:
                try:
                    done.after()
                except Exception:
                    logger.exception(
                        "Celery did not take a message; it stays in kombu's unacked",
                        extra=about(done.request_id, model=done.model),
                    )

    def is_ahead_of(self, ledger: Ledger) -> bool:
        """Whether Redis went back in time: it knows less than it has confirmed."""
        return ledger.link.settles_known < self.settled_multis.last

    def store_again(self, ledger: Ledger) -> None:
        """Store again results that were settled lately and that Redis has lost."""
        for multi in self.settled_multis.after(ledger.link.settles_known):
            ledger.settle_again(multi.storing, multi.number)
            self.settled_multis.again(multi)

    def ending(self) -> int:
        """How many requests the next MULTIs will settle."""
        return len(self.due) + sum(len(ended.job.items) for ended in self._ended)

    def is_over(self) -> bool:
        """Whether everything that has ended so far is settled."""
        waiting = self._finished or self._ended or self._ready or self.due
        return not waiting and not self.away_in_canvas.total()

    def drop(self, *, forgotten: bool) -> None:
        """Forget everything: it belongs to another worker now.

        `forgotten`: because Redis went back to before this incarnation existed. Then the results
        that it had stored are lost, and the kept ones stay, to be stored again.
        """
        self.due.clear()
        if not forgotten:
            self.settled_multis.clear()
        self.settled_multis.last = 0
        self._stopped.clear()
        self.away_in_canvas.clear()
        self._doubtful = 0

    def _model(self, finished: Finished) -> ServedModel:
        return self._models[finished.job.model]
