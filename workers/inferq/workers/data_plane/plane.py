"""The data plane: claim → form → run → settle, in one thread on one connection.

    collect   what the lanes have finished becomes settlements
    form      waiting requests leave in batches: for free lanes, and one more for each lane
    exchange  one fenced MULTI settles and claims
    admit     what was claimed is decoded and waits

While lanes compute (GIL released), this thread settles the batch before and claims, decodes and
forms the batch after, which a lane takes by itself. It never waits for a lane. It sleeps until
Redis reports a changed queue on this connection, or a lane sets the waker. A lane with short
batches and enough of them queued does not wake it; its results are settled within SETTLE_WITHIN_S.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import redis

from inferq.shared.names import Names
from inferq.shared.resp import BROKEN
from inferq.workers.claims.claim import Want
from inferq.workers.claims.clock import RedisClock
from inferq.workers.claims.fenced import LeaseLost, QueueId, RedisFull
from inferq.workers.claims.lease import Lease
from inferq.workers.claims.ledger import Ledger
from inferq.workers.claims.link import Link, Waker
from inferq.workers.claims.payloads import PayloadReader
from inferq.workers.claims.recovery import Recoverer
from inferq.workers.claims.runs import Finished, Job
from inferq.workers.claims.scheduled import ScheduledKeeper
from inferq.workers.claims.settlement import Settlement
from inferq.workers.data_plane import scheduling
from inferq.workers.data_plane.admission import Admission
from inferq.workers.data_plane.budget import Budget, budget_bytes
from inferq.workers.data_plane.calls import Calls
from inferq.workers.data_plane.control import Control
from inferq.workers.data_plane.held import Held, running
from inferq.workers.data_plane.incarnation import Incarnation
from inferq.workers.data_plane.observers import Observers
from inferq.workers.data_plane.receiver import Receiver
from inferq.workers.data_plane.served_model import ServedModel
from inferq.workers.data_plane.settling import SETTLE_WITHIN_S, Settling, portion

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: Longest sleep of an idle data plane, in s. Then it reads the queues, which checks its connection.
IDLE_S = 1.0
#: Seconds before a broken connection is replaced, and between further attempts.
RECONNECT_S = 0.2
#: If so many requests wait for their links to be published, no more of their model are claimed.
MAX_AWAY_IN_CANVAS = 256
#: Seconds after which a broken connection is logged again.
REMIND_S = 5.0
#: Seconds before a MULTI that a full Redis refused is sent again.
FULL_RETRY_S = 0.25


class DataPlane:
    """Runs the request path of one worker process. `start` spawns its thread.

    `control` does what only Celery's half can do. `observers` are told what becomes of requests.
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
        scheduled: ScheduledKeeper,
        control: Control,
        observers: Observers,
        result_expires_s: int,
        reply_timeout_s: float,
    ) -> None:
        self._client = client
        self._clock = clock
        self._models = {model.name: model for model in models}
        self._scheduled = scheduled
        self._control = control
        self._observers = observers
        self._reply_timeout_s = reply_timeout_s
        self._waker = Waker()
        self._calls = Calls(self._waker.set)
        self._held = Held(self._models, Budget(models, budget_bytes()))
        self._settling = Settling(self._models, self._held, control, observers)
        self._incarnation = Incarnation(
            client,
            names,
            self._models,
            lease=lease,
            recoverer=recoverer,
            held=self._held,
            settling=self._settling,
            result_expires_s=result_expires_s,
            reply_timeout_s=reply_timeout_s,
        )
        #: The ledger on the present link, or on the one before.
        self._ledger: Ledger | None = None
        self._claiming = True
        self._drain_by: float | None = None
        self._fatal = False
        #: Whether an engine is beyond use, and with it the process.
        self.engine_failed = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inferq-data-plane", daemon=True)
        #: When Redis last answered (monotonic s); 0: never yet.
        self.answered_at = 0.0
        #: When the present connection was made (monotonic s). Redis has answered since then.
        self.answering_since = 0.0

    # --- called from other threads ----------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def on_finished(self, finished: Finished) -> None:
        """A lane has ended a batch. Its thread calls this."""
        self._settling.on_finished(finished)
        if finished.lanes_run_short:
            self._waker.set()

    def on_ready(self, incarnation: str, settlement: Settlement) -> None:
        """A request's links, chain or chord are published: it may be settled now."""
        self._settling.on_ready(incarnation, settlement)
        self._waker.set()

    def on_lease_lost(self) -> None:
        """The lease's thread found the fence gone."""
        self._incarnation.on_lost()
        self._waker.set()

    def look(self) -> None:
        """Look at the queues again: the set of queues to claim from has changed."""
        self._waker.set()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` in the data plane's thread, between two batches.

        Meanwhile no claim is read and no batch is formed; lanes compute on. All requests wait for
        `function`, so it must be short. It runs within milliseconds or, while Redis does not
        answer, within `reply_timeout_s`. Wait for the future with a timeout; what has not begun by
        then can be cancelled. Its exception is DataPlaneEnded if the data plane ends before.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("called from the data plane's own thread; call the function itself")
        return self._calls.put(function)

    @property
    def incarnation(self) -> str:
        """The name under which it holds claims; empty: it is not registered yet."""
        return self._incarnation.id

    @property
    def run_id(self) -> str:
        """Run id of the Redis that last knew it; empty: none yet."""
        return self._incarnation.run_id

    @property
    def claimed(self) -> int:
        """Requests since the start."""
        return self._held.requests_claimed

    @property
    def settled(self) -> int:
        """Requests since the start."""
        return self._settling.requests_settled

    @property
    def steps(self) -> int:
        """Grows with everything that is done; see heartbeat."""
        return self.claimed + self.settled + self._settling.batches_ended

    def backlog(self) -> bool:
        """Whether requests wait in a queue that this worker consumes, as far as it knows.

        False while links wait for a Redis that is full or away: a restart of the worker would not
        help.
        """
        ledger = self._ledger
        if ledger is None or not self._claiming:
            return False
        claimable = {model.name for model in self._claimable() if model.consuming}
        return any(
            depth and model in claimable for (model, _), depth in list(ledger.link.depths.items())
        )

    def overdue(self) -> bool:
        """Whether some batch has exceeded its model's max_run_seconds."""
        return any(model.overdue() for model in self._models.values())

    def stop_claiming(self) -> None:
        """Claim and form no more batches. Batches that compute are finished and settled."""
        self._claiming = False
        self._end_audits()
        self._waker.set()

    def drain(self, grace_s: float) -> None:
        """End within `grace_s` seconds: settle what computes, hand back the rest.

        With 0 everything is handed back at once, even what computes.
        """
        self._claiming = False
        self._drain_by = time.monotonic() + grace_s
        self._end_audits()
        self._waker.set()

    def _end_audits(self) -> None:
        for model in self._models.values():
            model.audit.stop()

    def join(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the end. True once everything is handed back."""
        return self._ended.wait(timeout)

    @property
    def models(self) -> Iterable[ServedModel]:
        return self._models.values()

    # --- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            try:
                self._serve_on_links()
            finally:
                self._calls.end()
            self._hand_back()
        except Exception:
            logger.critical("the data plane failed", exc_info=True)
            self._fatal = True
            try:
                self._hand_back()
            finally:  # whatever fails: a process that serves nothing must end
                self._control.end_process()
        finally:
            self._ended.set()

    def _hand_back(self) -> None:
        self._incarnation.hand_back(self._drain_by or 0.0, blame=self._fatal)

    def _serve_on_links(self) -> None:
        """Serve until the end, on one connection after the other."""
        broke_at = -math.inf
        while not self._over():
            self._calls.run()
            try:
                self._serve_on_link()
            except BROKEN as problem:
                if time.monotonic() > broke_at + REMIND_S:
                    broke_at = time.monotonic()
                    logger.warning("the data plane's connection broke: %s", problem)
                time.sleep(RECONNECT_S)

    def _serve_on_link(self) -> None:
        """Serve until the end, or until the lease is lost.

        Raises one of BROKEN if the link breaks.
        """
        incarnation = self._incarnation
        self._settling.incarnation = incarnation.id
        link = Link(self._client, self._waker, self._reply_timeout_s)
        payloads = PayloadReader(self._client, self._reply_timeout_s)
        receiver = Receiver(self._models, self._clock, self._control, self._scheduled, payloads)
        try:
            link.open()
            self._ledger = ledger = incarnation.ledger(link)
            admission = Admission(
                ledger,
                receiver,
                self._clock,
                self._models,
                self._held,
                self._settling,
                self._observers,
            )
            incarnation.catch_up(link, ledger, admission)
            self._serve(link, ledger, admission)
        except LeaseLost:
            incarnation.begin_anew(forgotten=link.run_id != incarnation.run_id)
        finally:
            payloads.close()
            link.close()

    def _over(self) -> bool:
        if self._drain_by is None:
            return self._fatal
        if time.monotonic() >= self._drain_by or self._fatal:
            return True
        computing = any(model.jobs for model in self._models.values())
        return not computing and self._settling.is_over()

    def _serve(  # noqa: C901 - the steps of the loop, in their order
        self, link: Link, ledger: Ledger, admission: Admission
    ) -> None:
        settling = self._settling
        self.answered_at = self.answering_since = time.monotonic()
        while not self._over():
            if self._incarnation.is_lost:
                raise LeaseLost
            self._calls.run()
            if ledger.link.forgot():
                self._incarnation.mark_all(ledger)
            fatal = settling.collect()
            if fatal is not None:
                self._fatal = self.engine_failed = True
                self._control.end_process()
            if self._held.unfetched and self._claiming:
                admission.fetch()
            self._form(ledger)
            wants, listen = self._wants(ledger)
            if wants or settling.is_due():
                settling.take(ledger)
            if settling.due or wants:
                try:
                    self._exchange(ledger, admission, wants, listen)
                except RedisFull as problem:
                    logger.error("Redis is full, will try again: %s", problem)
                    link.wait(FULL_RETRY_S)
                self.answered_at = time.monotonic()
                continue
            if self._held.leaving:
                ledger.link.flush()
                # kill point: batch-flushed
                self._dispatch()
            link.wait(self._sleep_s())
            ledger.link.note_changes()
            if time.monotonic() - self.answered_at > IDLE_S:
                ledger.link.arm()
                settling.settled_multis.trim()
                self.answered_at = time.monotonic()

    def _sleep_s(self) -> float:
        until = [IDLE_S]
        now = time.monotonic()
        dues = [model.due_mono_ms for model in self._models.values()]
        until += [due / 1000 - now for due in dues if due is not None]
        if self._drain_by is not None:
            until.append(self._drain_by - now)
        if (due_at := self._settling.due_at()) is not None:
            until.append(due_at - now)
        elif any(model.runs_ahead() for model in self._models.values()):
            until.append(SETTLE_WITHIN_S)
        return max(0.0, min(until))

    def _form(self, ledger: Ledger) -> None:
        """Decide which batches leave.

        They are dispatched once Redis was told which requests start.
        """
        leaving: list[tuple[ServedModel, Job]] = []
        for model in self._models.values():
            model.due_mono_ms = None
        if self._claiming and not self._fatal:
            for model in self._models.values():
                if model.overtaken():
                    self._recall(ledger, model)
            leaving = scheduling.next_batches(self._models.values(), time.monotonic() * 1000)
        else:
            for model in self._models.values():
                self._recall(ledger, model)
        held = self._held
        if leaving or held.decoded:
            ledger.mark(running(item for _, job in leaving for item in job.items), held.decoded)
            # kill point: batch-noted
            held.decoded = []
            held.leaving += leaving

    def _recall(self, ledger: Ledger, model: ServedModel) -> None:
        """Take back batches that no lane of `model` has begun, to form or hand them back anew."""
        recalled = model.recall()
        if recalled:
            ledger.unmark(running(recalled))

    def _dispatch(self) -> None:
        for model, job in self._held.leaving:
            model.put(job)
        self._held.leaving.clear()

    def _wants(self, ledger: Ledger) -> tuple[list[Want], list[QueueId]]:
        if not self._claiming:
            return [], []
        models, ending = self._claimable(), self._settling.ending()
        return scheduling.wants(models, ledger.link.depths, ending, self._held.budget)

    def _claimable(self) -> Collection[ServedModel]:
        """The models of which more requests may be claimed, since few wait for links."""
        away, models = self._settling.away_in_canvas, self._models.values()
        return [m for m in models if away[m.name] < MAX_AWAY_IN_CANVAS] if away else models

    def _exchange(
        self, ledger: Ledger, admission: Admission, wants: list[Want], listen: list[QueueId]
    ) -> None:
        sending = portion(self._settling.due)
        try:
            exchange = ledger.exchange(sending, wants, listen, self._dispatch)
        except BROKEN:
            self._settling.unanswered(sending)
            raise
        if sending:
            # kill point: settle-answered
            self._settling.settled(
                sending,
                exchange.storing,
                ledger.link.settles_sent,
                exchange.overtaken,
                self._clock.now(),
            )
        admission.take_on(exchange.claimed, exchange.suspicious)
        if exchange.missed:
            ledger.link.arm()
