"""The Celery app of a worker: ``celery -A inferq.workers.app worker -P solo -Q inferq.<model>``."""

from __future__ import annotations

from typing import Any, NoReturn

from celery import Task
from celery.exceptions import Ignore

from inferq.shared.celery_app import make_app
from inferq.shared.errors import ModelNotFound
from inferq.shared.names import TASK, model_of
from inferq.shared.settings import Settings
from inferq.workers import celery_private, control  # noqa: F401 - control registers its commands
from inferq.workers.bootsteps import DataPlaneStep, QueuesStep

settings = Settings.load()
app = make_app(settings)
app.conf.inferq_settings = settings
app.steps["worker"].add(DataPlaneStep)
app.steps["consumer"].add(QueuesStep)


# Celery's own handler sees a request only if it has an ETA, which Celery has held it for, or if it
# came through a queue that is none of ours.
@app.task(name=TASK, bind=True, acks_late=True, Request=celery_private.Held)  # type: ignore[untyped-decorator]
def infer(self: Task, inputs: Any = None, model: str | None = None) -> NoReturn:
    """Run a model on a batch. The data plane serves it: back into its queue, it is due now."""
    queue = self.request.delivery_info["routing_key"]
    if model_of(queue) is None:
        raise ModelNotFound(f"queue {queue!r} serves no model; expected inferq.<model>")
    celery_private.put_back(self.request.id)
    raise Ignore
