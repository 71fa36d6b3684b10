"""Listening to Celery's events, as Flower and ``celery events`` do."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import redis as redis_py
from celery import Celery
from celery.events.state import Task, Worker

from helpers.scoped import Scoped
from helpers.wait import until

Event = dict[str, Any]

OUTCOMES = frozenset({"task-succeeded", "task-failed", "task-revoked"})


class Listener(Scoped):
    """Everything that is sent from the start of the context on; `state` is what Flower shows of it.

    It connects again if Redis goes away.
    """

    def __init__(self, app: Celery, redis: redis_py.Redis, prefix: str = "") -> None:
        self._app = app
        self._redis = redis
        self._prefix = prefix
        self.state = app.events.State()
        #: In the order in which they came.
        self.events: list[Event] = []
        self._tasks: dict[str, list[Event]] = defaultdict(list)
        self._receiver: Any = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _begin(self) -> None:
        self._thread.start()
        self.wait_until_listening()

    def _end(self) -> None:
        self._ended.set()
        if self._receiver is not None:
            self._receiver.should_stop = True
        self._thread.join(10)

    def of(self, request_id: str) -> list[Event]:
        """What was told of one request."""
        return list(self._tasks[request_id])

    def types(self, request_id: str) -> list[str]:
        return [event["type"] for event in self.of(request_id)]

    def whole(self, request_id: str) -> list[Event]:
        """What was told of one request, once its end was."""
        until(lambda: OUTCOMES & set(self.types(request_id)), what=f"{request_id} ends in events")
        return self.of(request_id)

    def task(self, request_id: str) -> Task:
        """The request as Flower has it, once its end was told."""
        self.whole(request_id)
        return self.state.tasks[request_id]

    @property
    def tasks(self) -> dict[str, list[Event]]:
        return {request_id: list(events) for request_id, events in self._tasks.copy().items()}

    def workers(self) -> list[Worker]:
        return list(self.state.workers.values())

    def wait_until_listening(self) -> None:
        """Wait until it hears what is sent; no other listener may do so."""
        topic = f"{self._prefix}/0.celeryev/task.nothing"  # kombu passes over what is empty
        until(lambda: self._redis.publish(topic, b""), what="somebody listens to events")

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                with self._app.connection_for_read() as connection:
                    self._receiver = self._app.events.Receiver(
                        connection, handlers={"*": self._take}, app=self._app
                    )
                    self._receiver.capture(limit=None, timeout=None, wakeup=False)
            except Exception:  # noqa: BLE001 - whatever it is, Flower tries again as well
                self._ended.wait(0.2)

    def _take(self, event: Event) -> None:
        self.state.event(dict(event))
        if event["type"].startswith("task-"):
            self._tasks[event["uuid"]].append(event)
        self.events.append(event)
