"""Sends Celery's task events for the data plane's requests; Flower shows them.

    task-received    it was claimed and waits for a lane; after `task-retried` if it ended a worker
    task-started     a lane began to compute it
    task-succeeded   its result is stored; `runtime` is what its batch took
    task-failed, task-revoked

Above INFERQ_EVENTS_PER_S, whole requests are left out, but never one that fails or is revoked: its
earlier events are then sent together with its end. Nothing here waits for Redis, or raises.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from celery.worker import WorkController

from inferq.shared import codec
from inferq.shared.connect import redis_client
from inferq.shared.names import TASK, queue_of
from inferq.shared.schema import Ticket, describe
from inferq.shared.settings import Settings
from inferq.workers.batching.waiting import Waiting
from inferq.workers.claims.runs import Finished, Outcome
from inferq.workers.claims.settlement import FAILURE
from inferq.workers.claims.verdicts import Failed, Revoked
from inferq.workers.control_plane import celery_private
from inferq.workers.control_plane.event_publisher import TIMEOUT_S, Event, EventPublisher
from inferq.workers.control_plane.event_sampling import Sampler
from inferq.workers.data_plane.observers import Observer, Settled
from inferq.workers.data_plane.served_model import ServedModel
from inferq.workers.process.periodic import Periodic

#: Longest text in an event, in characters.
MAX_TEXT: Final = 500
#: Most requests that are remembered until they end. Some never end here, since a lease was lost.
MAX_OPEN: Final = 20_000


class _Open(msgspec.Struct):
    """A request with events, until it is settled. Times: Unix s."""

    received: float
    #: False: nothing was sent before, since it was not chosen; now it fails.
    sent: bool = True
    started: float | None = None
    #: Seconds.
    runtime: float | None = None
    result: str = ""


class TaskEvents(Observer):
    """Sends the task events of one worker, while they are enabled as stock Celery has it (-E).

    `Observers` logs what its methods raise: no request fails because of an event.
    """

    def __init__(
        self, worker: WorkController, settings: Settings, models: Mapping[str, ServedModel]
    ) -> None:
        """`models`: the loaded ones, by name; more may be added later."""
        self._worker = worker
        self._models = models
        self._enabled = bool(worker.task_events)
        self._open: dict[str, _Open] = {}
        self._sampler = Sampler(settings.events_per_s)
        self._publisher = EventPublisher(
            redis_client(
                settings.redis_url,
                sentinel_master=settings.sentinel_master,
                socket_timeout=TIMEOUT_S,
            ),
            settings.global_keyprefix,
            worker.hostname,
            forward=worker.app.clock.forward,
            left_out=lambda: self._sampler.left_out,
            per_s=settings.events_per_s,
        )

    @property
    def loop(self) -> Periodic:
        return self._publisher.loop

    def start(self) -> None:
        self._publisher.start()

    def stop(self) -> None:
        """Send what is left; that takes some seconds at most."""
        self._publisher.stop()

    def info(self) -> dict[str, Any]:
        """Flat keys, for ``celery inspect stats``."""
        return {
            "inferq_events_left_out": self._sampler.left_out,
            "inferq_events_dropped": self._publisher.dropped,
        }

    def claimed(self, items: Sequence[Waiting]) -> None:
        """These requests were claimed and wait for a lane."""
        if not self._is_on():
            return
        now = time.time()
        events: list[Event] = []
        chosen = self._sampler.choose(items, time.monotonic())
        for item in chosen:
            events += _beginning(item.ticket, _arguments(item), now)
        if events and self._publisher.put(events, begin=True):
            self._open.update((item.ticket.id, _Open(now)) for item in chosen)
            if len(self._open) > MAX_OPEN:
                for request_id in list(self._open)[: MAX_OPEN // 2]:
                    self._open.pop(request_id, None)

    def started(self, items: Sequence[Waiting]) -> None:
        """A lane starts to compute these requests."""
        told = self._open
        if not told:
            return
        now = time.time()
        events = [_started(item.ticket.id, now) for item in items if item.ticket.id in told]
        if events:
            self._publisher.put(events)

    def finished(self, finished: Finished) -> None:
        """A lane has ended a batch; its requests are settled later."""
        told = self._open
        for outcome in finished.outcomes:
            known = told.get(outcome.item.ticket.id)
            if known is not None:
                self._note(known, outcome)
            elif outcome.error is not None and self._enabled:
                behind = time.time() - time.monotonic()
                received = behind + outcome.item.arrived_mono_ms / 1000
                told[outcome.item.ticket.id] = _Open(
                    received, sent=False, started=behind + finished.began
                )

    def _note(self, known: _Open, outcome: Outcome) -> None:
        run, outputs = outcome.run, outcome.outputs
        if run is None or outputs is None:
            return
        known.runtime = (run.ended_mono_ms - run.started_mono_ms) / 1000
        if outcome.item.padded:
            model = self._models[outcome.item.ticket.model]
            outputs = model.results.padding.cut(outputs, outcome.item.padded)
        shown = ", ".join(f"{name!r}: {describe(array)}" for name, array in outputs.items())
        known.result = _short(f"{{{shown}}}")

    def settled(self, settled: Settled) -> None:
        """These requests have a stored result, or were handed on."""
        told, events = self._open, []
        now = time.time()
        for done in settled.settlements:
            known = told.pop(done.request_id, None)  # type: ignore[arg-type]
            if done.ended is not None:
                events += self._ended_badly(done.ended, known, now)
            elif known is not None and known.sent and done.ending == FAILURE:
                reason = f"{done.error_code}: its links could not be published"
                events.append(_failed(done.request_id, reason, reason, now))
            elif known is not None and known.sent and done.outcome:
                events.append(
                    {
                        "type": "task-succeeded",
                        "uuid": done.request_id,
                        "timestamp": now,
                        "result": known.result,
                        "runtime": known.runtime,
                    }
                )
        if events:
            self._publisher.put(events)

    def _ended_badly(self, ended: Failed | Revoked, known: _Open | None, now: float) -> list[Event]:
        """The events of a request that ends without outputs, with those not sent so far first."""
        ticket = ended.ticket
        events: list[Event] = []
        if known is None or not known.sent:
            if not self._is_on():
                return []
            known = known or _Open(now)
            events += _beginning(ticket, _short(ticket.kwargsrepr), known.received)
            if known.started is not None:
                events.append(_started(ticket.id, known.started))
        if isinstance(ended, Revoked):
            events.append(
                {
                    "type": "task-revoked", "uuid": ticket.id, "timestamp": now,
                    "terminated": False, "signum": None, "expired": ended.reason == "expired",
                }
            )  # fmt: skip
        else:
            name, message = type(ended.error).__name__, ended.error.message
            module = ended.error.module
            exception, traceback = f"{name}({message!r})", f"{module}.{name}: {message}"
            events.append(_failed(ticket.id, exception, traceback, now))
        return events

    def _is_on(self) -> bool:
        """The last state of Celery's event dispatcher, which is gone while a worker stops."""
        enabled = celery_private.task_events_enabled(self._worker.consumer)
        if enabled is not None:
            self._enabled = enabled
        return self._enabled


def _beginning(ticket: Ticket, arguments: str, received: float) -> list[Event]:
    """The first events of a request that was claimed. `received`: Unix s."""
    expires = ticket.expires_ms
    event: Event = {
        "type": "task-received", "uuid": ticket.id, "timestamp": received,
        "name": TASK if ticket.task is None else _short(ticket.task),
        "args": "()", "kwargs": arguments, "retries": ticket.attempts,
        "root_id": ticket.root_id,
        "parent_id": ticket.extra.get("parent_id") if ticket.extra else None,
        "eta": ticket.eta and _short(ticket.eta),
        "expires": None if expires is None
        else datetime.fromtimestamp(expires / 1000, UTC).isoformat(),
        "exchange": "", "routing_key": queue_of(ticket.model), "priority": ticket.priority,
    }  # fmt: skip
    if not ticket.attempts:
        return [event]
    lost = f"WorkerLostError('its worker died computing it, {ticket.attempts} so far')"
    retried: Event = {
        "type": "task-retried",
        "uuid": ticket.id,
        "timestamp": received,
        "exception": lost,
        "traceback": lost,
    }
    return [retried, event]


def _started(request_id: str, at: float) -> Event:
    return {"type": "task-started", "uuid": request_id, "timestamp": at}


def _failed(uuid: str | None, exception: str, traceback: str, at: float) -> Event:
    return {
        "type": "task-failed",
        "uuid": uuid,
        "timestamp": at,
        "exception": _short(exception),
        "traceback": _short(traceback),
    }


def _arguments(item: Waiting) -> str:
    """As our client writes them, whoever sent it: what stock Celery writes holds values.

    Ours knows the sizes before padding. It is told by its reply channel.
    """
    if item.padded and item.ticket.reply:
        return _short(item.ticket.kwargsrepr)
    return _short(codec.shown(item.ticket.model, item.inputs))


def _short(text: str) -> str:
    """`text` made safe for an event and short enough for a page."""
    cut = text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
    return cut.encode(errors="replace").decode()
