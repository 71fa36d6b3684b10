"""The Celery app of a worker: ``celery -A inferq.workers.app worker -P solo -Q inferq.<model>``."""

from __future__ import annotations

from typing import Any, NoReturn

from celery import Task
from celery.exceptions import Ignore

from inferq.shared.celery_app import make_app
from inferq.shared.names import TASK
from inferq.shared.settings import Settings
from inferq.workers import control  # noqa: F401 - registers the remote control commands
from inferq.workers.bootsteps import DataPlaneStep, QueuesStep

settings = Settings.load()
app = make_app(settings)
app.conf.inferq_settings = settings
app.steps["worker"].add(DataPlaneStep)
app.steps["consumer"].add(QueuesStep)


@app.task(name=TASK, bind=True, acks_late=True)  # type: ignore[untyped-decorator]
def infer(self: Task, inputs: Any = None, model: str | None = None) -> NoReturn:
    """Run a model on a batch. The data plane serves it; only an ETA's message comes through here.

    Celery has held it until its time: now it goes back into its queue, to be batched with others.
    """
    request = self.request
    serializer = "msgpack" if request.content_type == "application/x-msgpack" else "json"
    again = self.signature_from_request(request, eta=None, countdown=None, serializer=serializer)
    again.apply_async()
    raise Ignore()
