"""The data plane: claim → form → run → settle, in one thread on one connection.

    collect   what the lanes have finished becomes settlements
    form      waiting requests leave in batches: for free lanes, and one more for each lane
    exchange  one fenced MULTI settles and claims
    admit     what was claimed is decoded and waits

While lanes compute (GIL released), this thread settles the batch before and claims, decodes and
forms the batch after, which a lane takes by itself. It never waits for a lane: it sleeps until
Redis reports a changed queue on this very connection, or a lane sets the waker (which lanes with
short batches and more of them ahead do not: then it looks after SETTLE_WITHIN_S at the latest).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from itertools import count

import redis
from redis.exceptions import RedisError

from inferq.shared.names import Names
from inferq.shared.resp import BROKEN
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.amiss import Told
from inferq.workers.claims.claim import Claim, Claimed, Want
from inferq.workers.claims.clock import RedisClock
from inferq.workers.claims.lease import Lease
from inferq.workers.claims.ledger import LeaseLost, Ledger, QueueId, RedisFull
from inferq.workers.claims.link import Link, Waker
from inferq.workers.claims.payloads import PayloadReader
from inferq.workers.claims.recovery import Recoverer
from inferq.workers.claims.runs import Finished, Job
from inferq.workers.claims.scheduled import Later
from inferq.workers.claims.settlement import Settlement
from inferq.workers.data_plane import scheduling as supply
from inferq.workers.data_plane.budget import Budget, budget_bytes
from inferq.workers.data_plane.control import Control
from inferq.workers.data_plane.observers import Observers
from inferq.workers.data_plane.receiver import Received, Receiver
from inferq.workers.data_plane.served_model import ServedModel
from inferq.workers.data_plane.settling import SETTLE_WITHIN_S, Settling, portion
from inferq.workers.data_plane.unfetched import Backlog, Unfetched
from inferq.workers.logs.fields import about

logger = logging.getLogger(__name__)

#: Longest sleep of an idle data plane, in s: then it looks at the queues, and at its connection.
IDLE_S = 1.0
#: Seconds before a broken connection is replaced, and again if that fails.
RECONNECT_S = 0.2
#: Requests that wait for their links to be published, at which no more of their model are claimed.
MAX_AWAY_IN_CANVAS = 256
#: Seconds after which it is said again that it is broken.
REMIND_S = 5.0
#: Seconds before a MULTI that a full Redis refused is sent again.
FULL_RETRY_S = 0.25


def _ids(items: Iterable[Waiting]) -> list[str]:
    """The members of running:<i> for `items`."""
    return [f"{item.ticket.model}/{item.ticket.id}" for item in items]


class DataPlane:
    """Runs the request path of one worker process. `start` spawns its thread.

    `control` does what Celery's half alone can do, `observers` are told what becomes of requests.
    """

    def __init__(
        self,
        client: redis.Redis,
        names: Names,
        clock: RedisClock,
        models: Sequence[ServedModel],
        *,
        lease: Lease,
        recoverer: Recoverer,
        later: Later,
        control: Control,
        observers: Observers,
        result_expires_s: int,
        reply_timeout_s: float,
    ) -> None:
        self._client = client
        self._names = names
        self._models = {model.name: model for model in models}
        self._lease = lease
        self._recoverer = recoverer
        self._later = later
        self._control = control
        self._observers = observers
        self._result_expires_s = result_expires_s
        self._reply_timeout_s = reply_timeout_s
        self._waker = Waker()
        self._settling = Settling(self._models, control, observers)
        self._budget = Budget(models, budget_bytes())
        self._unfetched = Backlog()
        self._ledger: Ledger | None = None
        self._told = Told()
        #: The Redis that last knew this incarnation, and all that it had settled.
        self._run_id = ""
        #: Whether Redis went back in time, and it was not looked yet for what it took back.
        self._went_back = False
        #: Batches that were formed and not given to the lanes yet.
        self._leaving: list[tuple[ServedModel, Job]] = []
        self._claims: dict[str, Claim] = {}
        self._claim_numbers = count(1)
        self._settle_numbers = count(1)
        self._clock = clock
        #: Claims decoded since Redis was last told.
        self._decoded: list[Claim] = []
        self._claiming = True
        self._drain_by: float | None = None
        self._fenced_out = False
        self._fatal = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inferq-data-plane", daemon=True)
        #: Requests since the start.
        self.claimed = 0
        self.settled = 0
        #: When Redis last answered (monotonic s); 0: never yet.
        self.answered_at = 0.0
        #: When the present connection was made (monotonic s): Redis has answered since.
        self.answering_since = 0.0

    # --- called from other threads ----------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def on_finished(self, finished: Finished) -> None:
        """A lane is done: called from its thread."""
        self._settling.on_finished(finished)
        if finished.hurry:
            self._waker.set()

    def on_ready(self, incarnation: str, settlement: Settlement) -> None:
        """A request's links, chain or chord are published: it may be settled now."""
        self._settling.on_ready(incarnation, settlement)
        self._waker.set()

    def on_lease_lost(self) -> None:
        """The lease's thread found the fence gone."""
        self._fenced_out = True
        self._waker.set()

    def look(self) -> None:
        """Look at the queues again: what may be claimed from has changed."""
        self._waker.set()

    @property
    def incarnation(self) -> str:
        """Under which it holds what it holds; empty: it was not born yet."""
        return self._lease.incarnation

    @property
    def run_id(self) -> str:
        """Of the Redis that last knew it; empty: none yet."""
        return self._run_id

    @property
    def steps(self) -> int:
        """Grows with whatever gets done: see heartbeat."""
        return self.claimed + self.settled + self._settling.batches_ended

    def backlog(self) -> bool:
        """Whether requests wait in a queue that this worker consumes, as far as it knows.

        Not while links wait for a Redis that is full or away: a restart would be of no use.
        """
        ledger = self._ledger
        if ledger is None or not self._claiming:
            return False
        claimable = {model.name for model in self._claimable() if model.consuming}
        return any(
            depth and model in claimable for (model, _), depth in list(ledger.depths.items())
        )

    def overdue(self) -> bool:
        """Whether some batch exceeds its model's max_run_seconds."""
        return any(model.overdue() for model in self._models.values())

    def stop_claiming(self) -> None:
        """Claim no more and form no more batches; what computes is finished and settled."""
        self._claiming = False
        self._end_audits()
        self._waker.set()

    def drain(self, grace_s: float) -> None:
        """End within `grace_s` seconds: settle what computes, hand back the rest.

        With 0 everything is handed back at once, computing or not.
        """
        self._claiming = False
        self._drain_by = time.monotonic() + grace_s
        self._end_audits()
        self._waker.set()

    def _end_audits(self) -> None:
        for model in self._models.values():
            model.audit.stop()

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the end; True once everything is handed back."""
        return self._ended.wait(timeout)

    @property
    def models(self) -> Iterable[ServedModel]:
        return self._models.values()

    # --- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        broke_at = -math.inf
        try:
            while not self._over():
                self._settling.incarnation = self._lease.incarnation
                link = Link(self._client, self._waker, self._reply_timeout_s)
                payloads = PayloadReader(self._client, self._reply_timeout_s)
                self._receiver = Receiver(
                    self._models, self._clock, self._control, self._later, payloads
                )
                try:
                    link.open()
                    ledger = Ledger(
                        link,
                        self._names,
                        self._settling.incarnation,
                        list(self._models),
                        numbers=self._claim_numbers,
                        settles=self._settle_numbers,
                        result_ttl_s=self._result_expires_s,
                        told=self._told,
                    )
                    self._ledger = ledger
                    ledger.take_over()
                    ledger.arm()
                    if link.run_id != self._run_id:
                        self._settling.publish_again()
                    self._catch_up(ledger)
                    self._run_id = link.run_id
                    self._serve(link, ledger)
                except LeaseLost:
                    self._be_reborn(forgotten=link.run_id != self._run_id)
                except BROKEN as problem:
                    if time.monotonic() > broke_at + REMIND_S:
                        broke_at = time.monotonic()
                        logger.warning("the data plane's connection broke: %s", problem)
                    time.sleep(RECONNECT_S)
                finally:
                    payloads.close()
                    link.close()
            self._hand_back()
        except Exception:
            logger.critical("the data plane failed", exc_info=True)
            self._fatal = True
            try:
                self._hand_back()
            finally:  # whatever else fails: a process that serves nothing must end
                self._control.end_process()
        finally:
            self._ended.set()

    def _over(self) -> bool:
        if self._drain_by is None:
            return self._fatal
        if time.monotonic() >= self._drain_by or self._fatal:
            return True
        computing = any(model.jobs for model in self._models.values())
        return not computing and self._settling.is_over()

    def _catch_up(self, ledger: Ledger) -> None:
        """Learn what became, before this link, of what was sent on the one before it.

        Where Redis went back, results that are kept are stored again first. Then each request that
        Redis holds for us is taken on, unless it still waits, computes or is being settled here: it
        is acknowledged if it has a result, and computed once more if not.
        """
        kept = self._settling.kept
        if ledger.settles_known < kept.last:
            self._went_back = True
        if self._went_back:
            ledger.unmark_all()
        self._mark_all(ledger)
        for multi in kept.after(ledger.settles_known):
            ledger.settle_again(multi.results(), multi.number)
            kept.again(multi)
        models = frozenset(self._models)
        if self._went_back:
            settling = {done.slot for done in self._settling.due}
            for claimed in ledger.unsettled(self._claims, settling):
                self._receive(ledger, [claimed], models)
            self._went_back = False
        for claimed in ledger.adopt(self._claims):
            self._receive(ledger, [claimed], models)
        kept.last = ledger.settles_known

    def _serve(self, link: Link, ledger: Ledger) -> None:
        settling = self._settling
        self.answered_at = self.answering_since = time.monotonic()
        while not self._over():
            if self._fenced_out:
                raise LeaseLost
            if ledger.forgot():
                self._mark_all(ledger)
            fatal = settling.collect()
            if fatal is not None:
                self._fatal = True
                self._control.end_process()
            if self._unfetched and self._claiming:
                self._fetch()
            self._form(ledger)
            wants, listen = self._wants(ledger)
            if wants or settling.is_due():
                settling.take(self._claims)
                if settling.stopped:
                    ledger.unmark(settling.stopped)
                    settling.stopped = []
            if settling.due or wants:
                try:
                    self._exchange(ledger, wants, listen)
                except RedisFull as problem:
                    logger.error("Redis is full, will try again: %s", problem)
                    link.wait(FULL_RETRY_S)
                self.answered_at = time.monotonic()
                continue
            if self._leaving:
                ledger.flush()
                # kill point: batch-flushed
                self._dispatch()
            link.wait(self._sleep_s())
            ledger.note_changes()
            if time.monotonic() - self.answered_at > IDLE_S:
                ledger.arm()
                settling.kept.trim()
                self.answered_at = time.monotonic()

    def _mark_all(self, ledger: Ledger) -> None:
        # What a lost incarnation had begun is discarded: it is nothing of this one's.
        jobs = [job for model in self._models.values() for job in model.jobs]
        items = [item for job in jobs for item in job.items if item.slot.claim.key in self._claims]
        ledger.mark(_ids(items), list(self._claims.values()))

    def _sleep_s(self) -> float:
        until = [IDLE_S]
        now = time.monotonic()
        until += [m.due_ms / 1000 - now for m in self._models.values() if m.due_ms is not None]
        if self._drain_by is not None:
            until.append(self._drain_by - now)
        if (due_at := self._settling.due_at()) is not None:
            until.append(due_at - now)
        elif any(model.brisk() for model in self._models.values()):
            until.append(SETTLE_WITHIN_S)
        return max(0.0, min(until))

    def _form(self, ledger: Ledger) -> None:
        """Decide what leaves. It is dispatched once Redis was told what starts."""
        leaving: list[tuple[ServedModel, Job]] = []
        for model in self._models.values():
            model.due_ms = None
        if self._claiming and not self._fatal:
            for model in self._models.values():
                if model.overtaken():
                    self._recall(ledger, model)
            leaving = supply.next_batches(self._models.values(), time.monotonic() * 1000)
        else:
            for model in self._models.values():
                self._recall(ledger, model)
        if leaving or self._decoded:
            ledger.mark(_ids(item for _, job in leaving for item in job.items), self._decoded)
            # kill point: batch-noted
            self._decoded = []
            self._leaving += leaving

    def _recall(self, ledger: Ledger, model: ServedModel) -> None:
        """Let what waits for `model`'s lanes in formed batches be formed anew, or handed back."""
        recalled = model.recall()
        if recalled:
            ledger.unmark(_ids(recalled))

    def _dispatch(self) -> None:
        for model, job in self._leaving:
            model.put(job)
        self._leaving.clear()

    def _wants(self, ledger: Ledger) -> tuple[list[Want], list[QueueId]]:
        if not self._claiming:
            return [], []
        models, ending = self._claimable(), self._settling.ending()
        return supply.wants(models, ledger.depths, ending, self._budget)

    def _claimable(self) -> Collection[ServedModel]:
        """The models of which more may be claimed: few of their requests wait for links."""
        away = self._settling.away_in_canvas
        models = self._models.values()
        if not away:
            return models
        return [model for model in models if away[model.name] < MAX_AWAY_IN_CANVAS]

    def _exchange(self, ledger: Ledger, wants: list[Want], listen: list[QueueId]) -> None:
        sending = portion(self._settling.due)
        try:
            exchange = ledger.exchange(sending, wants, listen, self._dispatch)
        except BROKEN:
            self._settling.unanswered(sending)
            raise
        if sending:
            # kill point: settle-answered
            self.settled += len(sending)
            for claim in {done.slot.claim for done in sending}:
                self._budget.settled(claim)
                if claim.complete:
                    self._claims.pop(claim.key, None)
            self._settling.settled(
                sending, exchange.settling, ledger.settles_sent,
                exchange.overtaken, self._clock.now(),
            )  # fmt: skip
        self._receive(ledger, exchange.claimed, exchange.suspicious)
        if exchange.missed:
            ledger.arm()

    def _receive(
        self, ledger: Ledger, claimed: Sequence[Claimed], suspicious: frozenset[str]
    ) -> None:
        for batch in claimed:
            claim = batch.claim
            claim.claimed_ms = self._clock.now()
            room = self._budget.fetchable(claim.model)
            began = time.thread_time()
            # If this breaks off, the claim stays unknown here and is adopted on the next link.
            received = self._receiver.receive(ledger, batch, claim.model in suspicious, room)
            if batch.places:
                took = time.thread_time() - began
                self._models[claim.model].sizes.read(took / len(batch.places))
            self._claims[claim.key] = claim
            if batch.adopted:
                claim.settled.difference_update(batch.places)
            inputs = sum(map(len, filter(None, batch.messages))) + sum(received.payloads)
            self._budget.claimed(claim, batch.places, inputs, received.whole)
            # kill point: claim-decoded
            self._decoded.append(claim)
            if received.unfetched:
                self._postpone(claim.model, received.unfetched)
            self._admit(self._models[claim.model], received)

    def _admit(self, model: ServedModel, received: Received) -> None:
        self.claimed += len(received.waiting) + len(received.ended)
        for item in received.waiting:
            model.add(item)
        if received.waiting:
            self._observers.claimed(received.waiting)
        refused = [done.ended for done, _ in received.ended if done.ended is not None]
        if refused:
            self._observers.refused(refused)
        for settlement, canvas in received.ended:
            self._settling.add(settlement, canvas)

    def _postpone(self, model: str, some: Sequence[Unfetched]) -> None:
        self._unfetched.add(model, some)
        self._budget.postponed(model, sum(each.size for each in some))

    def _fetch(self) -> None:
        """Fetch payloads that there is room for by now."""
        for name in self._unfetched.models:
            model, room = self._models[name], self._budget.fetchable(name)
            some = self._unfetched.first(name, room, alone=not (model.waiting or model.jobs))
            if some:
                received = self._receiver.fetch(model, some)  # breaks off: they are still there
                self._unfetched.drop(name, len(some))
                self._budget.postponed(name, -sum(each.size for each in some))
                self._admit(model, received)

    # --- the end of an incarnation ----------------------------------------------------------

    def _be_reborn(self, *, forgotten: bool) -> None:
        """Another worker took over what this incarnation held: drop it all, begin anew.

        `forgotten`: it is another Redis now, which may have gone back behind this one's birth.
        """
        lost = self._lease.incarnation
        held = self._held()
        told = about(*held, requests=len(held), incarnation=lost)
        logger.error("the lease of %s is lost; its results are discarded", lost, extra=told)
        self._settling.drop(forgotten=forgotten)
        self._went_back = False
        self._claims.clear()
        self._budget.clear()
        self._unfetched.clear()
        self._decoded.clear()
        for model, job in self._leaving:
            model.ended(job)
        self._leaving.clear()
        for model in self._models.values():
            model.recall()
            model.waiting.clear()
        try:
            self._client.delete(self._names.running(lost))
            self._lease.be_born()
            self._fenced_out = False
        except RedisError as problem:
            logger.warning("no new lease yet: %s", problem)
            time.sleep(RECONNECT_S)

    def _held(self) -> list[str]:
        """The ids of the requests that wait or compute."""
        models = self._models.values()
        jobs = [item for model in models for job in model.jobs for item in job.items]
        waiting = [item for model in models for item in model.waiting.items]
        unfetched = [each.opened.ticket.id for each in self._unfetched]
        return [*(item.ticket.id for item in (*jobs, *waiting)), *unfetched]

    def _hand_back(self) -> None:
        """Put everything that is still held back into its queues, and give up the lease."""
        for model in self._models.values():
            model.recall()  # or lanes would still begin what others are about to compute
        incarnation = self._settling.incarnation
        held = self._held()
        deadline = max(self._drain_by or 0.0, time.monotonic()) + self._reply_timeout_s
        while True:
            try:
                self._lease.stop()
                if not self._fatal:
                    self._client.delete(self._names.running(incarnation))
                # kill point: handback-begun
                moved = self._recoverer.recover(incarnation, dead=True)
                # kill point: handback-unretired
                self._lease.retire()
                told = about(*held[: moved or 0], requests=moved or 0, incarnation=incarnation)
                logger.info("handed back what was held: %d requests", moved or 0, extra=told)
                return
            except RedisError as problem:
                if time.monotonic() > deadline:
                    logger.error("claims not handed back, others will recover them: %s", problem)
                    return
                time.sleep(RECONNECT_S)
