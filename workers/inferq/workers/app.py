"""The Celery app of a worker: ``celery -A inferq.workers.app worker -P solo -Q inferq.<model>``."""

from __future__ import annotations

from typing import Any, NoReturn

from celery import Task

from inferq.shared.celery_app import make_app
from inferq.shared.errors import ModelNotFound
from inferq.shared.names import TASK
from inferq.shared.settings import Settings
from inferq.workers.control_plane import (
    kombu_guard,
    mailbox,
    remote_control,  # noqa: F401 - registers the remote control commands
    worker_logs,
)
from inferq.workers.control_plane.bootsteps import DataPlaneStep, QueuesStep

settings = Settings.load()
worker_logs.stand_by(settings.log_format)
kombu_guard.install()
mailbox.install()
app = make_app(settings)
app.conf.worker_enable_remote_control = settings.remote_control
app.conf.inferq_settings = settings
app.steps["worker"].add(DataPlaneStep)
app.steps["consumer"].add(QueuesStep)


@app.task(name=TASK, bind=True)  # type: ignore[untyped-decorator]
def infer(self: Task, inputs: Any = None, model: str | None = None) -> NoReturn:
    """Run a model on a batch. The data plane does that; only tasks from other queues come here."""
    queue = self.request.delivery_info["routing_key"]
    raise ModelNotFound(f"queue {queue!r} serves no model; expected inferq.<model>")
