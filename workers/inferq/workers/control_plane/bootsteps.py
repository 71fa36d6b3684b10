"""Celery boot steps that start the data plane after the pool and drain it at the end."""

from __future__ import annotations

import logging
import sys
from typing import Any

from celery import bootsteps
from celery.worker import WorkController
from celery.worker.consumer import Consumer

from inferq.shared.errors import ConfigError
from inferq.shared.names import model_of
from inferq.shared.settings import Settings
from inferq.workers.control_plane import celery_private
from inferq.workers.control_plane.main_loop import TICK_S
from inferq.workers.control_plane.repository_scan import RepositoryScan, scan_repository
from inferq.workers.control_plane.service import Service
from inferq.workers.cuda.pinning import pin
from inferq.workers.logs.printing import plain_lines
from inferq.workers.process.shares import share_with
from inferq.workers.process.visible_passwords import visible_password

logger = logging.getLogger(__name__)

#: Seconds between two checks for messages that dead workers held until their ETA.
RESTORE_EVERY_S = 10.0


def refuse(reason: str) -> SystemExit:
    """End a worker that cannot start, with one line that says why."""
    return SystemExit(f"inferq: {plain_lines(reason)}")


class DataPlaneStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Worker step: loads the models, runs the data plane, drains it on shutdown."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: WorkController, **options: Any) -> None:
        super().__init__(worker, **options)
        worker.inferq = None
        self._settings: Settings = worker.app.conf.inferq_settings
        celery_private.hear_no_others(worker, self._settings.remote_control)
        solo = celery_private.is_solo(worker.pool_cls)
        if not solo or celery_private.asks_for_prefork(sys.argv):
            raise refuse(
                "pool refused: a worker that holds an engine runs with -P solo only, since threads "
                "and CUDA contexts do not survive prefork's fork"
            )
        if options.get("autoscale"):
            raise refuse("--autoscale refused: scale by starting more workers")
        try:
            pin(self._settings)  # before the engines are imported
        except ConfigError as problem:
            raise refuse(problem.message) from None
        share_with(self._settings.processes, on_host=self._settings.processes_on_host)
        self._found = self._read_models(worker)

    def _read_models(self, worker: WorkController) -> RepositoryScan:
        queues = celery_private.selected_queues(worker.app)
        if queues is None:
            raise refuse("no queues: expected -Q inferq.<model>[,inferq.<model>…]")
        models = [model for queue in queues if (model := model_of(queue)) is not None]
        if not models:
            raise refuse(f"-Q {','.join(queues)} names no queue of ours; expected inferq.<model>")
        if self._settings.models is None:
            raise refuse("no model repository: set INFERQ_MODELS or use inferq worker --models DIR")
        try:
            found = scan_repository(
                self._settings.models, models, on_cpu=self._settings.device == "cpu"
            )
            found.check(strict=self._settings.strict)
        except ConfigError as problem:
            raise refuse(str(problem)) from None
        found.log()
        return found

    def start(self, worker: WorkController) -> None:
        told = visible_password(sys.argv[1:])
        if told and not self._settings.incarnation:  # else the supervisor has logged it
            logger.warning("%s", told)
        worker.inferq = Service(worker, self._settings, self._found)
        try:
            worker.inferq.start()
        except ConfigError as problem:
            raise refuse(str(problem)) from None

    def close(self, worker: WorkController) -> None:
        if worker.inferq is not None:
            worker.inferq.stop_claiming()

    def stop(self, worker: WorkController) -> None:
        if worker.inferq is not None:
            worker.inferq.stop(self._settings.grace_s)

    def terminate(self, worker: WorkController) -> None:
        if worker.inferq is not None:
            worker.inferq.stop(worker.app.conf.worker_soft_shutdown_timeout)

    def info(self, worker: WorkController) -> dict[str, Any]:
        return worker.inferq.info() if worker.inferq is not None else {}


class QueuesStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Consumer step: takes models' queues from Celery's own consumer each time that connects."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Consumer, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._restoring: Any = None
        self._ticking: Any = None

    def start(self, consumer: Consumer) -> None:
        self._restoring = consumer.timer.call_repeatedly(
            RESTORE_EVERY_S, celery_private.restore_messages, (consumer,)
        )
        celery_private.let_tasks_end(consumer)
        service: Service = consumer.controller.inferq
        service.inbox.open(consumer)
        self._ticking = consumer.timer.call_repeatedly(TICK_S, service.main_loop.tick)
        for queue in list(consumer.task_consumer.queues):
            if model_of(queue.name) is not None:
                service.queues[queue.name] = queue
                consumer.app.amqp.queues.deselect(queue.name)
                consumer.task_consumer.cancel_by_queue(queue.name)

    def stop(self, consumer: Consumer) -> None:
        consumer.controller.inferq.inbox.close()
        for timer in (self._restoring, self._ticking):
            if timer is not None:
                timer.cancel()
