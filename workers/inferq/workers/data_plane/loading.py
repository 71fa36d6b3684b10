"""Loads one model: its engine, its warm-up, its lanes. The result is a `ServedModel`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from inferq.shared.errors import ConfigError, EngineError, FatalEngineError
from inferq.shared.names import Names
from inferq.shared.schema import TensorSpec
from inferq.workers.audit.audit import Audit
from inferq.workers.batching.policy import Knobs
from inferq.workers.batching.waiting import Waiting
from inferq.workers.canvas.link_queues import LinkQueues
from inferq.workers.claims.clock import RedisClock
from inferq.workers.claims.runs import Finished, Job
from inferq.workers.data_plane.counts import ModelCounts
from inferq.workers.data_plane.foreign_tasks import ForeignTasks
from inferq.workers.data_plane.intake import Intake
from inferq.workers.data_plane.lanes import Lanes
from inferq.workers.data_plane.results import Results
from inferq.workers.data_plane.served_model import ServedModel
from inferq.workers.data_plane.target import Target
from inferq.workers.logs.fields import about
from inferq.workers.models.batch_layout import laid_out
from inferq.workers.models.chosen_outputs import chosen_lanes
from inferq.workers.models.engine import LoadedModel
from inferq.workers.models.lane_threads import LaneThreads
from inferq.workers.models.off_gpu import PINNED, off_gpu
from inferq.workers.models.registry import engine_class
from inferq.workers.models.spec import MAX_LABEL_CHARS, ModelSpec
from inferq.workers.pad_probe.probe import probe_padding
from inferq.workers.warmup.prepare import Preparation, Prepared

logger = logging.getLogger(__name__)


def _axes(specs: Sequence[TensorSpec]) -> dict[str, int]:
    return {spec.name: spec.batch_axis for spec in specs if spec.batch_axis}


class LoadingModel:
    """A model that a worker is to serve and that is not loaded yet: it has no requests."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.name = spec.name
        #: Whether requests will be claimed once it is loaded.
        self.consuming = True
        #: Counts of its requests, all 0 so far.
        self.counts = ModelCounts()
        self.audit: Audit | None = None
        self.lanes = 0
        self.max_rows = self.target_rows = spec.max_batch_size
        self.is_driven = False
        self.off_gpu = ""
        self._preparation = Preparation(spec)

    def computing(self) -> list[tuple[Job, float]]:
        return []

    def reserved(self) -> list[Waiting]:
        return []

    def stop_blaming(self) -> None:
        """Note that if this process ends from now on, no batch caused it. For any thread."""
        self._preparation.stop_blaming()

    def close(self, timeout: float, *, free: bool = True) -> None:
        """As a served model's: there is nothing to free, or `load` has freed it."""
        self.stop_blaming()

    def load(
        self,
        worker: str,
        names: Names,
        clock: RedisClock,
        *,
        is_revoked: Callable[[str], bool],
        on_finished: Callable[[Finished], None],
        result_expires_s: int,
        on_begun: Callable[[Sequence[Waiting]], None] = lambda _: None,
        wake: Callable[[], None] = lambda: None,
        foreign: ForeignTasks | None = None,
        links: LinkQueues | None = None,
        json_nan: str = "bare",
    ) -> ServedModel:
        """Load the engine, warm it up, start the lanes' threads. ConfigError if it cannot be; then
        all is freed again.
        """
        spec, config = self.spec, self.spec.config
        self._tell_of_rows()
        engine = engine_class(config.engine)(spec)
        began = time.monotonic()
        self._preparation.start()
        with ExitStack() as undo:
            with self._named():
                loaded = laid_out(chosen_lanes(engine.load()))
            undo.callback(loaded.close)
            undo.callback(self.stop_blaming)
            with self._named():
                padding = probe_padding(loaded)
            threads = LaneThreads(f"inferq-{spec.name}")
            undo.callback(threads.end)
            prepared = self._preparation.prepare(loaded, threads)
            loaded.warmed_up()
            target = self._target(loaded, prepared)
            advert = spec.advert(
                seconds_per_row=prepared.tuning.seconds_per_row if prepared.tuning else 0.0,
                result_expires_s=result_expires_s,
            )
            links = links or LinkQueues(names)
            intake = Intake(advert, names, padding, is_revoked, clock.now, links, foreign)
            counts = self.counts
            audit = Audit(
                spec.name,
                config.audit_every,
                target.knobs,
                unbatch=config.on_mismatch == "unbatch",
                computed_s=lambda: counts.busy_s,
                answered=lambda: sum(counts.outcomes.values()),
                wake=wake,
            )
            lanes = Lanes(
                f"inferq-{spec.name}",
                prepared.lanes,
                threads,
                target.knobs,
                intake.too_late,
                on_finished,
                on_begun,
                audit,
                prepared.fit,
            )
            served = ServedModel(
                loaded,
                prepared,
                lanes,
                target,
                advert=advert,
                intake=intake,
                results=Results(
                    worker,
                    config.engine,
                    spec.version,
                    padding,
                    _axes(advert.signature.outputs),
                    json_nan,
                ),
                counts=counts,
                audit=audit,
                steps=names.priority_steps,
            )
            prepared.serve()
            lanes.start()
            undo.pop_all()
        logger.info(
            "model %s version %d: %s on %s, %d lanes, batches of %d, ready in %.1f s",
            spec.name,
            spec.version,
            config.engine,
            loaded.device,
            len(lanes),
            target.size,
            time.monotonic() - began,
            extra=about(model=spec.name),
        )
        served.off_gpu = off_gpu(config.engine, loaded.device)
        if served.off_gpu:
            logger.warning(
                "model %s runs on the CPU, though this worker is pinned to GPU %s; expected %s",
                spec.name,
                os.environ[PINNED],
                served.off_gpu,
                extra=about(model=spec.name),
            )
        return served

    def _tell_of_rows(self) -> None:
        """Log why requests do not share batches, or what was found about batches."""
        if not self.spec.tells_labels:
            logger.warning(
                "model %s: clients are not told of its %d labels; expected at most %d characters",
                self.name,
                len(self.spec.labels),
                MAX_LABEL_CHARS,
                extra=about(model=self.name),
            )
        why, remark = self.spec.why_not_batchable, self.spec.remark
        told = about(model=self.name)
        if why is not None:
            logger.warning("model %s runs request by request: %s", self.name, why, extra=told)
        elif remark is not None:
            logger.warning("model %s is batched: %s", self.name, remark, extra=told)

    def _target(self, loaded: LoadedModel, prepared: Prepared) -> Target:
        spec, config = self.spec, self.spec.config
        preferred = config.preferred_batch_sizes
        knobs = Knobs(
            max_batch_size=prepared.rows,
            preferred_batch_sizes=tuple(n for n in preferred if n <= prepared.rows),
            max_queue_delay_ms=config.max_queue_delay_ms,
            buckets=loaded.buckets,
            batchable=spec.batchable,
            spread=loaded.parallel_lanes,
        )
        return Target(spec.name, knobs, prepared, fixed=bool(preferred))

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn errors into a ConfigError that names the model, which may be one of many."""
        try:
            yield
        except FatalEngineError:
            raise
        except (ConfigError, EngineError) as problem:
            known = repr(self.name) in problem.message or str(self.spec.path) in problem.message
            named = problem.message if known else f"model {self.name!r}: {problem.message}"
            raise ConfigError(named) from problem
