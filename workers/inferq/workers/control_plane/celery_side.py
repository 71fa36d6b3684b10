"""Celery's part in the data plane: canvas, hand-over of foreign messages, the process' end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from celery.worker import WorkController

from inferq.shared.names import TASK, Names
from inferq.workers.batching.waiting import Waiting
from inferq.workers.canvas.publisher import Canvas
from inferq.workers.claims.claim import Slot
from inferq.workers.claims.scheduled import Later
from inferq.workers.claims.settlement import Settlement
from inferq.workers.control_plane import celery_private
from inferq.workers.control_plane.celery_inbox import CeleryInbox, Handed
from inferq.workers.control_plane.task_events import TaskEvents
from inferq.workers.supervision.health import EX_FATAL_ENGINE


class CelerySide:
    """The data plane's Hooks in a Celery worker. `canvas` is set before the plane starts."""

    canvas: Canvas

    def __init__(
        self, worker: WorkController, later: Later, names: Names, events: TaskEvents
    ) -> None:
        self._worker = worker
        self._later = later
        self._names = names
        self._events = events
        #: Other tasks, on their way to Celery's own handler.
        self.inbox = CeleryInbox(names.prefix)
        # Its entry is there before the data plane's thread counts in it and others read it.
        celery_private.count_tasks(TASK, 0)

    def publish_canvas(self, incarnation: str, settlement: Settlement, message: bytes) -> None:
        self.canvas.put(incarnation, settlement, message)

    def hand_over(self, slot: Slot, model: str, message: bytes, handed: bytes) -> Settlement:
        given = Handed(handed, self._names.queue(model, slot.claim.step))
        if not self.inbox.expect(given):
            return self._later.postpone(slot, message)
        return Settlement(
            slot, model, None, b"",
            before=tuple(celery_private.unacked_commands(handed, self._names.prefix)),
            after=partial(self.inbox.put, given),
        )  # fmt: skip

    def keep(self, slot: Slot, message: bytes, due_ms: float) -> Settlement:
        return self._later.keep(slot, message, due_ms)

    def on_admitted(self, items: Sequence[Waiting]) -> None:
        self._events.on_admitted(items)

    def on_settled(self, settlements: Sequence[Settlement]) -> None:
        count = sum(
            done.request_id is not None and (done.ended is None or done.ended.ticket.task is None)
            for done in settlements
        )
        celery_private.count_tasks(TASK, count)
        self._events.on_settled(settlements)

    def on_fatal(self, reason: str) -> None:
        celery_private.stop_worker(EX_FATAL_ENGINE)
        self.wake()

    def wake(self) -> None:
        """Make the main thread's event loop look at the shutdown flags now."""
        hub = self._worker.hub
        if hub is not None:
            hub.call_soon(lambda: None)
