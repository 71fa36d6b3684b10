"""Puts together all that serves requests in one worker process: models, lease, data plane."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from celery.worker import WorkController
from redis.exceptions import RedisError

from inferq.shared.codec import encode_advert
from inferq.shared.connect import check_server, redis_client
from inferq.shared.errors import (
    ConfigError,
    FatalEngineError,
    InferqError,
    InvalidInput,
    RedisUnavailable,
)
from inferq.shared.names import queue_of
from inferq.shared.settings import Settings
from inferq.workers.canvas.link_queues import LinkQueues
from inferq.workers.canvas.publisher import Canvas
from inferq.workers.claims.clock import RedisClock
from inferq.workers.claims.lease import Lease
from inferq.workers.claims.recovery import Recoverer
from inferq.workers.claims.runs import Finished
from inferq.workers.claims.scheduled import ScheduledKeeper
from inferq.workers.claims.settlement import Settlement
from inferq.workers.claims.wrong_type import LIST, type_of
from inferq.workers.control_plane import celery_private
from inferq.workers.control_plane.celery_inbox import CeleryInbox
from inferq.workers.control_plane.celery_side import CelerySide, TaskTotals
from inferq.workers.control_plane.main_loop import MainLoop
from inferq.workers.control_plane.repository_scan import RepositoryScan, log_not_served
from inferq.workers.control_plane.task_events import TaskEvents
from inferq.workers.cuda.telemetry import GpuTelemetry
from inferq.workers.data_plane import reporting
from inferq.workers.data_plane.batch_log import BatchLog
from inferq.workers.data_plane.counts import Counts, WorkerStats
from inferq.workers.data_plane.foreign_tasks import ForeignTasks
from inferq.workers.data_plane.loading import LoadingModel
from inferq.workers.data_plane.observers import Observers
from inferq.workers.data_plane.plane import DataPlane
from inferq.workers.data_plane.served_model import ServedModel
from inferq.workers.logs.slow import warn_if_slow
from inferq.workers.metrics.published import StatsPublisher
from inferq.workers.models.not_served import NotServed, listed, not_served
from inferq.workers.process.memory import keep_freed_memory, keep_objects
from inferq.workers.process.periodic import Loop, troubles
from inferq.workers.process.versions import installed_versions
from inferq.workers.supervision.exit import end_at_once
from inferq.workers.supervision.health import (
    EX_FATAL_ENGINE,
    EX_SHUT_DOWN,
    LINKS,
    LOADING,
    LOADS,
    OVERDUE,
    SERVING,
    STOPPING,
    STUCK_S,
    loops_problem,
)
from inferq.workers.supervision.heartbeat import UNANSWERED_S, Heartbeat, links_s
from inferq.workers.supervision.redis_identity import place_of

if TYPE_CHECKING:
    from inferq.workers.metrics.endpoint import Endpoint

logger = logging.getLogger(__name__)

#: Seconds between tries while Redis cannot be reached at the start.
RETRY_S = 2.0
#: Seconds in which a process has ended whose engine is beyond use.
ENDED_WITHIN_S = 3600.0
#: Exit status of a worker that cannot serve its models (sysexits.h).
EX_CONFIG = 78


class Service:
    """Everything that serves requests in this process. `start` returns at once."""

    def __init__(self, worker: WorkController, settings: Settings, found: RepositoryScan) -> None:
        self._worker = worker
        self._settings = settings
        self._names = settings.names()
        self._clock = RedisClock()
        self._client = redis_client(settings.redis_url, sentinel_master=settings.sentinel_master)
        self._scheduled = ScheduledKeeper(self._client, self._names, self._clock)
        self._recoverer = Recoverer(self._client, self._names, settings.lease_s)
        self._lease: Lease | None = None
        self._canvas = Canvas(settings, self._client, self._on_ready)
        #: Replaced, never changed in place: other threads read it. A loaded model takes the place
        #: of its LoadingModel.
        self._models: Sequence[LoadingModel | ServedModel] = [
            LoadingModel(spec) for spec in found.specs
        ]
        #: Held while the list is replaced.
        self._replacing = threading.Lock()
        #: The loaded models, by name.
        self._served: dict[str, ServedModel] = {}
        #: Replaced, never changed: other threads read it.
        self._not_served = found.not_served
        self._others = found.others
        self._events = TaskEvents(worker, settings, self._served)
        self._side = CelerySide(worker, self._canvas, self._scheduled, self._names)
        counts = Counts({model.name: model.counts for model in self._models})
        self._observers = Observers([counts, self._events, TaskTotals(), BatchLog()])
        self._foreign = (
            ForeignTasks(worker.app.tasks, celery_private.read_body)
            if settings.foreign_tasks
            else None
        )
        self._loader = threading.Thread(target=self._load, name="inferq-load", daemon=True)
        path = settings.heartbeat_file
        self._heartbeat = (
            Heartbeat(path, worker.hostname, self._loops, self.not_served) if path else None
        )
        if self._heartbeat is not None:
            self._heartbeat.redis = place_of(settings)
        self.main_loop = MainLoop(self._may_pause, self._answering_since)
        self._gpu: GpuTelemetry | None = None
        self._endpoint: Endpoint | None = None
        self._publisher = StatsPublisher(self._client, self._names, self.stats)
        self._versions = installed_versions()
        self._host = socket.gethostname()
        self._started_at = time.time()
        self._stopping = False
        #: While it was loaded.
        self._engine_failed = False
        self.plane: DataPlane | None = None
        #: The models' queues as kombu declares them, by name, for ``inspect active_queues``.
        self.queues: dict[str, Any] = {}

    def start(self) -> None:
        """Load the models and begin to serve, both in the background. ConfigError."""
        keep_freed_memory()
        if self._settings.gpu is not None:
            self._gpu = GpuTelemetry(self._settings.gpu)
        if self._settings.metrics is not None:
            self._endpoint = _endpoint(self._settings.metrics, self)
            self._endpoint.start()
        if self._heartbeat is not None:
            self._heartbeat.start()
        self._publisher.start()
        self._loader.start()

    def _load(self) -> None:
        try:
            self._when_redis_answers(self._check_server)
            self._load_models()
            self._when_redis_answers(self._serve)
        except FatalEngineError as problem:
            logger.critical("%s", problem)
            self._engine_failed = True
            self._give_up(EX_FATAL_ENGINE)
            # Not the end of this thread, but that of the process, which takes it along: a context
            # that could not be popped is on PyCUDA's stack, which aborts at the end of its thread.
            threading.Event().wait(ENDED_WITHIN_S)
        except InferqError as problem:
            logger.critical("%s", problem)
            self._give_up(EX_CONFIG)
        except Exception:
            logger.critical("the models could not be loaded", exc_info=True)
            self._give_up(EX_CONFIG)

    def _load_models(self) -> None:
        """Load one model after the other; one that cannot be loaded is set aside.

        Raises FatalEngineError, after which none can be served; ConfigError: none is left, or
        `strict`.
        """
        for model in [each for each in self._models if isinstance(each, LoadingModel)]:
            try:
                with warn_if_slow(logger, model.name, "loading it and warming it up"):
                    served = model.load(
                        self._worker.hostname,
                        self._names,
                        self._clock,
                        is_revoked=celery_private.is_revoked,
                        on_finished=self._on_finished,
                        on_begun=self._observers.started,
                        wake=self._look,
                        result_expires_s=self._settings.result_expires_s,
                        json_nan=self._settings.json_nan,
                        foreign=self._foreign,
                        links=LinkQueues(self._names, self._settings.link_queues),
                    )
            except FatalEngineError:
                raise
            except InferqError as problem:
                self._set_aside(model, problem.message)
            except Exception as problem:
                logger.exception("model %r could not be loaded", model.name)
                self._set_aside(model, f"it could not be loaded: {problem!r}")
            else:
                self._put_in_place(model, served)
        if not self._models:
            raise ConfigError("no model can be served")

    def _put_in_place(self, loading: LoadingModel, served: ServedModel) -> None:
        with self._replacing:
            served.consuming = loading.consuming
            self._served[served.name] = served
            self._models = [served if each is loading else each for each in self._models]

    def _set_aside(self, model: LoadingModel, reason: str) -> None:
        """Serve the other models; requests for this one wait in its queue.

        ConfigError if strict.
        """
        if self._settings.strict:
            raise ConfigError(reason)
        found = not_served(model.name, reason)
        log_not_served(found)
        self._models = [each for each in self._models if each is not model]
        self._not_served = [*self._not_served, found]
        model.close(timeout=1.0)

    def _check_server(self) -> None:
        evicts = check_server(self._client).evicts
        if evicts is not None:
            logger.critical(
                "maxmemory-policy is %r; expected 'noeviction': a Redis that evicts drops "
                "requests, payloads and results, and this one will once it is full",
                evicts,
            )

    def _when_redis_answers(self, step: Callable[[], object]) -> None:
        """Retry `step` until Redis can be reached, as Celery's own side does."""
        while not self._stopping:
            try:
                step()
                return
            except (RedisUnavailable, RedisError) as problem:
                logger.warning("%s; trying again in %g s", problem, RETRY_S)
                time.sleep(RETRY_S)

    def _give_up(self, status: int) -> None:
        self._close_models()
        celery_private.stop_worker(status)
        self._side.wake()

    def _serve(self) -> None:
        settings, names = self._settings, self._names
        models = list(self._served.values())
        adverts = {model.name: encode_advert(model.advert) for model in models}
        lease = self._lease = Lease(
            self._client,
            names,
            self._clock,
            prefix=settings.incarnation,
            lease_s=settings.lease_s,
            adverts=adverts,
            may_renew=lambda: not plane.overdue(),
            on_lost=lambda: plane.on_lease_lost(),  # noqa: PLW0108 - plane is made below
            on_missing=self._recoverer.leases_lost,
        )
        plane = DataPlane(
            self._client,
            names,
            self._clock,
            models,
            lease=lease,
            recoverer=self._recoverer,
            scheduled=self._scheduled,
            control=self._side,
            observers=self._observers,
            result_expires_s=settings.result_expires_s,
            reply_timeout_s=min(5.0, settings.lease_s),
        )
        lease.start()
        self._canvas.start()
        self._recoverer.start()
        self._scheduled.start()
        self._events.start()
        self.plane = plane
        if self._heartbeat is not None:
            self._heartbeat.plane, self._heartbeat.links = plane, self._canvas
        keep_objects()
        plane.start()
        missing = ", ".join(each.model for each in self._not_served if each.version is None)
        without = f"; not served: {missing}" if missing else ""
        logger.info("serving %s%s", ", ".join(model.name for model in models), without)

    def _on_finished(self, finished: Finished) -> None:
        if self.plane is not None:
            self.plane.on_finished(finished)

    def _on_ready(self, incarnation: str, settlement: Settlement) -> None:
        if self.plane is not None:
            self.plane.on_ready(incarnation, settlement)

    def _look(self) -> None:
        if self.plane is not None:
            self.plane.look()

    @property
    def status_of_shutdown(self) -> int:
        """The exit status after `control shutdown`: by it the supervisor decides what follows."""
        return EX_SHUT_DOWN if self._settings.incarnation else 0

    @property
    def inbox(self) -> CeleryInbox:
        """Other tasks, on their way to Celery's own handler."""
        return self._side.inbox

    @property
    def models(self) -> Sequence[LoadingModel | ServedModel]:
        return self._models

    def not_served(self) -> list[NotServed]:
        """Models that it was told to serve and does not. For any thread."""
        return self._not_served

    def active_queues(self) -> list[Any]:
        """The models' queues from which requests are claimed."""
        return [
            self.queues[q]
            for m in self._models
            if m.consuming and (q := queue_of(m.name)) in self.queues
        ]

    def consume(self, queue: str, consuming: bool) -> bool:
        """Begin or stop to claim from `queue`. False if no model loaded here has that queue."""
        with self._replacing:
            found = [model for model in self._models if queue_of(model.name) == queue]
            for model in found:
                model.consuming = consuming
        if found and self.plane is not None:
            self.plane.look()
        return bool(found)

    def why_not_consume(self, queue: str) -> str | None:
        """Why Celery's own handler may not consume `queue`, which is no model's; None: it may."""
        if self._foreign is None:
            return "other tasks than inferq's are not run; expected INFERQ_FOREIGN_TASKS=1"
        if queue.startswith("inferq"):
            return "its name begins like those of models; expected a queue of an application"
        try:
            LinkQueues(self._names).check(queue)
        except InvalidInput as problem:
            return problem.message
        for key in self._names.lists_of(queue):
            if (kind := type_of(self._client, key)) not in (LIST, "none"):
                return f"key {key!r} is a {kind}; expected a {LIST}"
        return None

    def stop_claiming(self) -> None:
        self._stopping = True
        self._stop_blaming()
        if self._heartbeat is not None:
            self._heartbeat.stopping = True
        if self.plane is not None:
            self.plane.stop_claiming()

    def stop(self, grace_s: float) -> None:
        """Finish what computes within `grace_s` seconds, hand back the rest, free the engines.

        Waits in short steps, so that a request for a cold shutdown takes effect meanwhile.
        """
        self._stopping = True
        self._stop_blaming()
        if self.plane is not None:
            self._drain(self.plane, grace_s)
        self._publisher.stop()
        if self._endpoint is not None:
            self._endpoint.stop()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._gpu is not None:
            self._gpu.close()
        if self._must_end_at_once():
            end_at_once(self._must_end_at_once, lambda: int(self._worker.exitcode or 0))

    def _stop_blaming(self) -> None:
        for model in self._models:
            model.stop_blaming()

    def _must_end_at_once(self) -> bool:
        return self._is_busy() or self._is_beyond_use()

    def _is_beyond_use(self) -> bool:
        """Whether an engine has said that nothing can run in this process any more."""
        return self._engine_failed or (self.plane is not None and self.plane.engine_failed)

    def _is_busy(self) -> bool:
        """Whether a thread loads a model or drives a lane."""
        return self._loader.is_alive() or any(model.is_driven for model in self._models)

    def _drain(self, plane: DataPlane, grace_s: float) -> None:
        plane.drain(grace_s)
        deadline = time.monotonic() + grace_s + 10.0
        terminated = False
        while not plane.join(0.1) and time.monotonic() < deadline:
            if celery_private.is_terminating() and not terminated:
                terminated = True
                plane.drain(self._worker.app.conf.worker_soft_shutdown_timeout)
        self.inbox.put_back(self._client)
        self._recoverer.stop()
        self._scheduled.stop()
        self._canvas.stop()
        self._events.stop()
        self._close_models()

    def _close_models(self) -> None:
        free = not self._is_beyond_use()
        for model in self._models:
            model.close(timeout=1.0, free=free)

    def stats(self) -> WorkerStats:
        """What this worker has done so far, and its state. For any thread; may query the GPU."""
        plane, gpu = self.plane, self._gpu
        state = LOADING if plane is None else SERVING
        return WorkerStats(
            incarnation=plane.incarnation if plane is not None else "",
            node=self._worker.hostname,
            host=self._host,
            pid=os.getpid(),
            started_at=self._started_at,
            at=time.time(),
            state=STOPPING if self._stopping else state,
            redis_up=self._answered(),
            device=self._device(),
            versions=self._versions,
            gpu=None if gpu is None else gpu.numbers(),
            models=[reporting.stats(model) for model in self._models],
            not_served=self._not_served,
            passed_over=self._others,
        )

    def _device(self) -> str:
        return "cpu" if self._gpu is None else f"gpu{self._gpu.gpu.index} {self._gpu.gpu.name}"

    def problem(self) -> str | None:
        """Why it does not serve; None if it does, or if it waits for a Redis that is away."""
        plane = self.plane
        if self._stopping:
            return f"it is {STOPPING}"
        if plane is None:
            return LOADS
        if plane.overdue():
            return OVERDUE
        waits_s = links_s(plane, self._canvas)
        if waits_s > STUCK_S and self._answered():
            return LINKS.format(waits_s)
        bad = troubles(self._loops())
        return loops_problem(bad) if bad else None

    def _may_pause(self) -> bool:
        """Whether Celery's event loop need not run now."""
        return self._stopping or not self._answered() or celery_private.is_executing()

    def _answering_since(self) -> float:
        return 0.0 if self.plane is None else self.plane.answering_since

    def _answered(self) -> bool:
        """Whether Redis answers the data plane; False if there is no data plane yet."""
        plane = self.plane
        return plane is not None and time.monotonic() - plane.answered_at < UNANSWERED_S

    def _loops(self) -> list[Loop]:
        """The background loops that should run in this worker."""
        found: list[Loop] = [
            self.main_loop, self._scheduled.loop, self._recoverer.loop, self._publisher.loop,
            self._events.loop, self._canvas.loop,
        ]  # fmt: skip
        some = (self._lease, self._gpu, self._endpoint)
        return found + [each.loop for each in some if each is not None]

    def info(self) -> dict[str, Any]:
        """Flat keys, for ``celery inspect stats`` and Flower's worker page."""
        plane = self.plane
        return {
            "inferq_models": ", ".join(f"{m.name}:{m.spec.version}" for m in self._models),
            "inferq_not_served": listed(self._not_served),
            "inferq_engines": ", ".join(f"{m.name}: {m.spec.config.engine}" for m in self._models),
            "inferq_lanes": ", ".join(f"{m.name}: {m.lanes}" for m in self._models),
            "inferq_batch_fill": ", ".join(f"{m.name}: {reporting.fill(m)}" for m in self._models),
            "inferq_audits": ", ".join(f"{m.name}: {reporting.audits(m)}" for m in self._models),
            "inferq_device": self._device(),
            "inferq_off_gpu": ", ".join(m.name for m in self._models if m.off_gpu),
            "inferq_versions": ", ".join(f"{name} {v}" for name, v in self._versions.items()),
            "inferq_state": "loading" if plane is None else "serving",
            "inferq_claimed": plane.claimed if plane else 0,
            "inferq_settled": plane.settled if plane else 0,
            "inferq_computing": sum(
                len(job.items) for m in self._models for job, _ in m.computing()
            ),
            "inferq_waiting": sum(len(m.reserved()) for m in self._models),
            **self._events.info(),
            **(self._gpu.info() if self._gpu is not None else {}),
        }


def _endpoint(address: str, service: Service) -> Endpoint:
    from inferq.workers.metrics.endpoint import Endpoint  # noqa: PLC0415 - takes 40 ms
    from inferq.workers.metrics.prometheus import worker_registry  # noqa: PLC0415

    return Endpoint(address, worker_registry(service.stats), service.problem)
