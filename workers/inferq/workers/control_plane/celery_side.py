"""What Celery's half does for the data plane: canvas, foreign messages, totals, the end."""

from __future__ import annotations

from functools import partial

from celery.worker import WorkController

from inferq.shared.names import TASK, Names
from inferq.workers.canvas.publisher import Canvas
from inferq.workers.claims.claim import Slot
from inferq.workers.claims.scheduled import ScheduledKeeper
from inferq.workers.claims.settlement import Settlement
from inferq.workers.control_plane import celery_private
from inferq.workers.control_plane.celery_inbox import CeleryInbox, Handed
from inferq.workers.data_plane.control import Control
from inferq.workers.data_plane.observers import Observer, Settled
from inferq.workers.supervision.health import EX_FATAL_ENGINE


class CelerySide(Control):
    """Does what the data plane asks of Celery's half of a worker."""

    def __init__(
        self, worker: WorkController, canvas: Canvas, scheduled: ScheduledKeeper, names: Names
    ) -> None:
        self._worker = worker
        self._canvas = canvas
        self._scheduled = scheduled
        self._names = names
        #: Foreign tasks, on their way to Celery's own handler.
        self.inbox = CeleryInbox(names.prefix)

    def publish_canvas(self, incarnation: str, settlement: Settlement, message: bytes) -> None:
        self._canvas.put(incarnation, settlement, message)

    def hand_over(self, slot: Slot, model: str, message: bytes, handed: bytes) -> Settlement:
        given = Handed(handed, self._names.queue(model, slot.claim.step))
        if not self.inbox.expect(given):
            return self._scheduled.postpone(slot, message)
        return Settlement(
            slot,
            model,
            None,
            b"",
            before=tuple(celery_private.unacked_commands(handed, self._names.prefix)),
            after=partial(self.inbox.put, given),
        )

    def end_process(self) -> None:
        celery_private.stop_worker(EX_FATAL_ENGINE)
        self.wake()

    def wake(self) -> None:
        """Make the main thread's event loop look at the shutdown flags now."""
        hub = self._worker.hub
        if hub is not None:
            hub.call_soon(lambda: None)


class TaskTotals(Observer):
    """Counts requests in Celery's own total of tasks, which ``inspect stats`` and Flower show."""

    def __init__(self) -> None:
        # Make the entry before the data plane's thread adds to it and others read it.
        celery_private.count_tasks(TASK, 0)

    def settled(self, settled: Settled) -> None:
        count = sum(
            done.request_id is not None and (done.ended is None or done.ended.ticket.task is None)
            for done in settled.settlements
        )
        celery_private.count_tasks(TASK, count)
